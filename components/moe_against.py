"""The card that compares this trace's routing with another's: another prompt, another quantization, another engine."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Input, Output, State, callback, dcc, html

from backend.analysis import moe
from backend.errors import LayerscopeError
from backend.reports.routing import compare, comparison_words
from backend.trace import Trace
from components import moe_values as values
from components.card import card
from components.figures import moe as figures
from components.figures.moe_alike import load_bars
from components.graph import graph, graph_tools
from components.moe_tables import alike_table
from components.services import services
from components.trace_view import one_line

ABOUT_COMPARE = (
    "For the same tokens, and as lines: the share of tokens whose set of k experts differs (experts), whose first choice does, and the share of all "
    "tokens × k choices that the other trace did not make. Other tokens have the loads of the chosen layer as bars. For any two traces: cosine, Pearson correlation "
    "and Jensen-Shannon divergence (nats, at most ln 2) of how often each expert was chosen.",
    "From the second layer with experts on, other experts are also chosen because the layers before gave other values.",
)  # fmt: skip


def against_card(trace: Trace, asked: str | None) -> html.Section:
    """The card; asked: the id of the other trace in the page's address."""
    others = values.others(trace)
    against = asked if any(each["value"] == asked for each in others) else values.NONE
    options: Any = [{"value": values.NONE, "label": "nothing"}, *others]
    pick = dcc.Dropdown(options, against, id="moe-against", clearable=False, className="picker-prompt moe-against")
    form = html.Div(html.Label([html.Span("With the trace"), pick]), className="controls moe-form")
    body = html.Div(id="moe-compared", className="moe-compared", hidden=True)  # no graph in it yet: one that nobody sees is drawn all the same
    return card("Against another trace", [form, html.P(id="moe-sentence", className="moe-sentence"), body], "", graph_tools("moe-change", "routing-change"), list(ABOUT_COMPARE),
                className="wide")  # fmt: skip


@callback(
    Output("moe-compared", "children"), Output("moe-sentence", "children"), Output("moe-compared", "hidden"),
    Input("moe-begun", "data"), Input("moe-against", "value"), Input("moe-layer", "value"), Input("theme", "data"), State("page-state", "data"),
    prevent_initial_call=True,
)  # fmt: skip
def show_comparison(_: Any, against: str, layer: int, theme: str, page: dict[str, Any]):
    if not against or against == values.NONE:
        return None, "Choose another trace of a model with as many experts: another prompt, another quantization, or another engine.", True
    try:
        trace, other = services().library.open(page["trace"]), services().library.open(against)
        found = compare(trace, other)
    except LayerscopeError as problem:
        return None, str(problem), True
    changes = [(each.layer, each.change.share, each.change.first.mean()) for each in found if each.change is not None]
    if changes:
        figure = figures.change_lines([at for at, _, _ in changes], np.array([share for _, share, _ in changes]), np.array([first for _, _, first in changes]), layer, theme)
    else:  # other tokens: only the loads can be compared
        at = layer if any(each.layer == layer for each in found) else found[0].layer
        loads = [moe.shares(moe.expert_counts(each["expert_indices", at], each.info.n_experts)) for each in (trace, other)]
        figure = load_bars(loads[0], loads[1], (f"this trace, layer {at}", f"the other: {one_line(other.prompt, 24)}"), theme)
    table = html.Div(alike_table(found, layer), id="moe-alike", className="table-scroll table-tall")
    return [graph("moe-change", 260, figure), table], comparison_words(trace, other, found), False

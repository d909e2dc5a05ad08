"""The card that takes every expert out in turn: a job runs the model once for each, and a heatmap ranks them by what they did."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.trace import Trace
from components.card import card
from components.figures.moe import effect_heatmap
from components.graph import graph, graph_tools
from components.job_follow import follow_job
from components.services import services

# measure -> words of the menu, unit beside the scale; the order is that of the array
MEASURES = {
    "nll": ("Loss", "change of the loss, nats per token"),
    "kl": ("KL", "KL(clean ‖ without), nats"),
    "changed": ("Other top token", "share of positions with another top token"),
}
RANKED = 12
ABOUT = (
    "The prompt is run again once for each expert of each layer, with that expert taken out of the router's choice: the tokens that had chosen it get their next best. Nothing "
    "else is changed, and tokens that had not chosen it keep their MLP output in that layer (except where whole groups of experts are chosen, as in DeepSeek V3).",
    "Loss: mean of −ln p of the token that follows, without the expert less with it; exp of it is the factor on perplexity. KL: mean over positions of KL(clean ‖ without), nats. "
    "One prompt is a small sample: an expert that does nothing here may serve other text.",
)  # fmt: skip


def ablation_card(trace: Trace, measure: str) -> html.Section:
    """The card; its callbacks need `theme`, `page-state` and `jobs-now`."""
    n = len(trace.stored["expert_indices"]) * trace.info.n_experts
    done = services().derived.get_array(("expert_sweep", trace.id)) is not None
    options: Any = [{"value": name, "label": words} for name, (words, _) in MEASURES.items()]
    pick = dcc.Dropdown(options, measure, id="moe-effect-measure", clearable=False, searchable=False, className="picker-metric")
    button = html.Button(f"Run {n:,} ablations", id="moe-sweep", className="btn btn-primary", n_clicks=0)
    offer = html.Div([button, html.Span(f"One run of {trace.n_tokens:,} tokens for each expert of each layer. The result is kept.")], id="moe-sweep-offer",
                     className="neuron-foot", hidden=done)  # fmt: skip
    picture = graph("moe-effect", height=100 + min(24 * len(trace.stored["expert_indices"]), 480))
    shown = html.Div([picture, html.Div(id="moe-ranked", className="table-scroll")], id="moe-effect-box", hidden=not done)
    stores = [dcc.Store(id="moe-sweep-job"), dcc.Store(id="moe-sweep-ready")]
    return card("Without one expert", [*stores, offer, html.Div(id="moe-sweep-progress", role="status"), shown], html.Span("", id="moe-effect-said"),
                [pick, *graph_tools("moe-effect", "expert-ablation")], list(ABOUT), className="wide")  # fmt: skip


@callback(Output("moe-sweep-job", "data"), Input("moe-sweep", "n_clicks"), State("page-state", "data"), prevent_initial_call=True)
def submit(clicks: int | None, page: dict[str, Any]):
    if not clicks:
        return no_update
    trace = services().library.open(page["trace"])
    return services().jobs.submit("expert_sweep", {"trace_id": trace.id}, f"Ablate every expert of {trace.info.name}").id


@callback(Output("moe-sweep-progress", "children"), Output("moe-sweep-ready", "data"), Input("moe-sweep-job", "data"), Input("jobs-now", "data"),
          State("moe-sweep-ready", "data"), prevent_initial_call=True)  # fmt: skip
def follow(job_id: str | None, _: Any, ready: str | None):
    return follow_job(job_id, ready)


@callback(
    Output("moe-effect", "figure"), Output("moe-ranked", "children"), Output("moe-effect-said", "children"), Output("moe-sweep-offer", "hidden"),
    Output("moe-effect-box", "hidden"),
    Input("moe-effect-measure", "value"), Input("moe-sweep-ready", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show(measure: str, _: Any, theme: str, page: dict[str, Any]):
    trace, derived = services().library.open(page["trace"]), services().derived
    found, layers = derived.get_array(("expert_sweep", trace.id)), derived.get_json(("expert_sweep_layers", trace.id))
    if found is None or layers is None:
        return no_update, "", "Not measured yet.", False, True
    values = found[list(MEASURES).index(measure)]
    figure = effect_heatmap(values, layers, MEASURES[measure][1], theme)
    row, expert = np.unravel_index(int(np.nanargmax(np.abs(values))), values.shape)
    said = f"Taking out expert {expert} of layer {layers[row]} does most: {values[row, expert]:.4g} ({MEASURES[measure][1]})."
    return figure, _ranked(trace, found, layers, values), said, True, False


def _ranked(trace: Trace, found: Any, layers: list[int], values: Any) -> html.Table:
    titles = ("Expert", "Tokens routed to it", "Loss, nats", "Perplexity ×", "KL, nats", "Other top token")
    order = np.argsort(-np.abs(values), axis=None, kind="stable")[:RANKED]
    rows = []
    for row, expert in zip(*np.unravel_index(order, values.shape), strict=True):
        nll, kl, changed = (float(part[row, expert]) for part in found)
        routed = int((trace["expert_indices", layers[row]] == expert).any(axis=1).sum())
        cells = (f"{routed:,} of {trace.n_tokens:,}", f"{nll:+.4f}", f"{np.exp(nll):.3f}", f"{kl:.4f}", f"{changed:.1%}")
        rows.append(html.Tr([html.Td(f"{layers[row]}.{expert}"), *(html.Td(cell, className="num") for cell in cells)]))
    head = html.Tr([html.Th(title, className="num" if i else "") for i, title in enumerate(titles)])
    return html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact")

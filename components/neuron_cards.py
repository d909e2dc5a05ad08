"""Cards and tables of the Neurons page: the largest neurons of a position, the tokens that one writes, the places where it is largest."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import numpy as np
from dash import dcc, html

from backend.analysis.neurons import Neuron
from backend.errors import LayerscopeError
from backend.reports.neurons import Examples
from backend.trace import Trace
from components.card import card, cards
from components.graph import graph, graph_tools
from components.neuron_values import Place
from components.services import services
from components.states import empty
from components.token_choice import text_of
from components.token_label import token_label

SIDES = {"largest": "Largest", "smallest": "Most negative"}
ABOUT = (
    "mlp_post: the hidden values of each layer's MLP, as they enter W_out. A neuron layer.number is one of them; here are those with the largest |value| at the chosen position.",
    "Writes for: the neuron's column of W_out through the final norm's gain and W_U: the tokens whose logits it raises most (Geva et al. 2022, arXiv 2203.14680). A negative "
    "value turns the column round, so that the row shows what the neuron does here. It is the direct path alone, as if no layer came after.",
)  # fmt: skip
ABOUT_EXAMPLES = (
    "The tokens of all traces of this model in the library at which the neuron is largest, or most negative, with the text around them. NaN takes no place and is counted.",
)
AROUND = 8  # tokens before an example; after it half as many


def neuron_cards(side: str, list_at_once: bool) -> list[Any]:
    """The cards of the page, empty, and the stores of its callbacks. list_at_once: the button that lists the vocabulary is pressed already."""
    sides: Any = [{"label": words, "value": name} for name, words in SIDES.items()]
    choose = dcc.Dropdown(sides, side, id="neuron-side", clearable=False, searchable=False, className="picker-metric")
    stores = [dcc.Store(id=name) for name in ("neuron-choice", "neuron-jobs", "neuron-ready")]
    foot = html.Div(
        [html.Div(html.Button("Name the tokens", id="neuron-list", className="chip", n_clicks=int(list_at_once)), id="neuron-list-box"),
         html.Div(html.Button("Read what they write", id="neuron-read", className="chip", n_clicks=0), id="neuron-read-box"), html.Div(id="neuron-said")],
        className="neuron-foot",
    )  # fmt: skip
    search = html.Div([html.Div(id="neuron-examples", className="table-scroll"), html.Div(_offer(), id="neuron-offer", hidden=True)])
    return [
        *stores,
        html.Div(id="neuron-progress"),
        cards(
            card(html.Span("", id="neurons-title"), [html.Div(id="neuron-table", className="table-scroll table-tall"), foot], "Click a row to look at the neuron.", [], list(ABOUT),
                 className="wide"),
            card(html.Span("", id="neuron-title"), graph("neuron-bars", height=300, className="fill"), "Its value at every token of this prompt.",
                 graph_tools("neuron-bars", "neuron"), list(ABOUT), className="fill"),
            card("What it writes", html.Div(id="neuron-written"), "Tokens whose logits its column of W_out raises and lowers most, before the norm's scale.", [], list(ABOUT)),
            card(html.Span("", id="examples-title"), search, html.Span("", id="examples-said"), [choose], list(ABOUT_EXAMPLES), className="wide"),
        ),
    ]  # fmt: skip


def _offer() -> html.Div:
    button = html.Button("Search all traces", id="neuron-search", className="btn btn-primary", n_clicks=0)
    words = "Every trace of this model that holds mlp_post is read once for this layer; the result is kept."
    return empty("The traces have not been searched as they are now", words, button, "search")


def neuron_table(trace: Trace, identity: str, neurons: list[Neuron], tokens: dict[Place, dict[str, list[Any]]], chosen: Place) -> html.Table:
    """One row a neuron: its name, value, and the tokens it writes for as it stands (a negative value writes for those against)."""
    top = max((abs(each.value) for each in neurons if np.isfinite(each.value)), default=0.0) or 1.0
    head = html.Tr([html.Th("Neuron"), html.Th("Value", className="num"), html.Th(""), html.Th("Writes for"), html.Th("and against")])
    rows = [_row(trace, identity, each, tokens.get((each.layer, each.neuron)), top, chosen) for each in neurons]
    return html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact")


def _row(trace: Trace, identity: str, each: Neuron, tokens: dict[str, list[Any]] | None, top: float, chosen: Place) -> html.Tr:
    sides = ("for_ids", "against_ids") if each.value >= 0 else ("against_ids", "for_ids")
    words = [html.Td(_chips(trace, identity, tokens[side][:4]) if tokens else html.Span("–", className="muted"), className="guesses") for side in sides]
    share = min(abs(each.value) / top, 1.0) if not np.isnan(each.value) else 0.0
    bar = html.Span(className="bar " + ("bar-for" if each.value >= 0 else "bar-against"), style={"width": f"{100 * share:.1f}%"})
    here: Any = {"data-set": "neuron-choice", "data-value": f"{each.layer}.{each.neuron}"}
    look = "chosen" if (each.layer, each.neuron) == chosen else ""
    return html.Tr([html.Td(f"{each.layer}.{each.neuron}", className="mono"), html.Td(f"{each.value:.4g}", className="num"), html.Td(bar, className="neuron-bar"), *words],
                   tabIndex=0, className=look, **here)  # fmt: skip


def _chips(trace: Trace, identity: str, ids: list[int]) -> list[Any]:
    return [html.Span(token_label(text_of(trace, identity, i), max_length=14), className="chip-token guess") for i in ids]


def written_lists(trace: Trace, identity: str, tokens: dict[str, list[Any]] | None) -> Any:
    """Both lists of one neuron with their logits, before the norm's scale and the neuron's own value."""
    if tokens is None:
        return html.P("Not known.", className="muted small")
    columns = []
    for title, side in (("For, when positive", "for"), ("Against, when positive", "against")):
        rows = [html.Tr([html.Td(token_label(text_of(trace, identity, i), max_length=18), className="chip-token"), html.Td(f"{logit:+.3f}", className="num")])
                for i, logit in zip(tokens[f"{side}_ids"], tokens[f"{side}_logits"], strict=True)]  # fmt: skip
        columns.append(html.Table([html.Thead(html.Tr([html.Th(title), html.Th("Logit", className="num")])), html.Tbody(rows)], className="ls-table compact"))
    return html.Div(columns, className="neuron-lists")


def example_table(found: Examples, layer: int, neuron: int, side: int) -> html.Table:
    """Places of one neuron, strongest first, each with the tokens around it; a row's link opens its trace there."""
    every = list(found.of(neuron, side))
    top = max((abs(value) for *_, value in every if np.isfinite(value)), default=0.0) or 1.0
    head = html.Tr([html.Th("Value", className="num"), html.Th("Text around it"), html.Th("Trace")])
    rows = [_example(trace_id, position, value, top, (layer, neuron)) for trace_id, position, value in every]
    return html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact")


def _example(trace_id: str, position: int, value: float, top: float, place: Place) -> html.Tr:
    try:
        trace = services().library.open(trace_id)
    except LayerscopeError:
        return html.Tr([html.Td(f"{value:.4g}", className="num"), html.Td("This trace was deleted.", className="muted", colSpan=2)])
    first, last = max(position - AROUND, 0), min(position + AROUND // 2, trace.n_tokens - 1)
    depth = round(100 * min(abs(value) / top, 1.0)) if not np.isnan(value) else 0
    words: list[Any] = ["… "] if first else []
    for at in range(first, last + 1):
        label = token_label(trace.token_texts[at], at in trace.special, 18)
        words.append(html.Span(label, className="tok-here" if at == position else "tok-near", style={"--depth": f"{depth}%"} if at == position else {}))
    words += [" …"] if last + 1 < trace.n_tokens else []
    there = {"trace": trace_id, "pos": position, "layer": place[0], "neuron": place[1]}
    link = dcc.Link(f"position {position}", href=f"/neurons?{urlencode(there)}", title="Open this trace there")
    return html.Tr([html.Td(f"{value:.4g}", className="num"), html.Td(words, className="neuron-context"), html.Td(link, className="nowrap small")])

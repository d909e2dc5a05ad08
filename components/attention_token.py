"""The token card of the Attention page: where the chosen token looks and who looks at it, over one head, a layer's heads or all of them.

A figure, a strip of the tokens in the colour of their attention, and the strongest of both as tables. Its callbacks need the stores
`pattern-shown`, `position`, `theme`, `maps-ready` and `page-state`, and the control `pattern-first`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Input, Output, State, callback, dcc, html
from dash.exceptions import PreventUpdate
from numpy.typing import NDArray

from backend.analysis.attention_views import strongest
from backend.errors import LayerscopeError
from backend.reports.attention_maps import looks_at, n_cells
from backend.trace import Trace
from components.attention_pattern import want_summary
from components.attention_source import AT_ONCE, short_labels, shown_map, summary
from components.card import card
from components.drawn import drawing, draws, elements
from components.figures.attention_token import token_attention
from components.figures.theme import no_figure
from components.follow_token import position_in
from components.graph import graph, graph_tools
from components.services import services
from components.token_label import token_label

SCOPES = {"head": "This head", "mean": "This layer's heads (mean)", "all": "All layers (mean)"}
IN_STRIP = 320  # tokens of the strip: those around the chosen one
IN_TABLE = 8
_LEAST = 0.00005  # attention that the table writes as more than 0

ABOUT = (
    "Looks at: the chosen token's row of the attention map, how much of its attention goes to each token. Is looked at by: its column, how much each later "
    "token gives to it; a column sums to anything. Choose a token in the strip above, in this one, in the tables or by a click in the pattern.",
    "This layer's heads, all layers: the plain mean of the maps. Colour of the strip: square root of attention, so that weak links are seen. The first token "
    "is hidden here too where the pattern hides it.",
)  # fmt: skip


def token_card(scope: str) -> html.Section:
    """The card; `scope` is one of SCOPES."""
    options: Any = [{"label": title, "value": name} for name, title in SCOPES.items()]
    choose = dcc.Dropdown(options, scope, id="token-scope", clearable=False, searchable=False, className="picker-view")
    body = html.Div(
        [
            html.Div(graph("token-attention", height=320), className="token-pictures"),
            html.Div([html.Div(id="token-tables", className="token-tables"), drawing("token-tables")]),
        ],
        className="token-body",
    )
    tools = [choose, *graph_tools("token-attention")]
    pictures = [body, html.Div(id="token-strips"), drawing("token-strips")]
    return card(html.Span("", id="token-title"), pictures, html.Span("", id="token-subtitle"), tools, list(ABOUT), className="wide")


@callback(
    Output("token-attention", "figure"), Output("token-title", "children"), Output("token-subtitle", "children"), Output("token-strips-drawing", "data"),
    Output("token-tables-drawing", "data"),
    Input("position", "data"), Input("pattern-shown", "data"), Input("token-scope", "value"), Input("pattern-first", "value"), Input("theme", "data"), Input("maps-ready", "data"),
    State("page-state", "data"),
)  # fmt: skip
def show_token(position: int | None, chosen: dict[str, int] | None, scope: str, first: list[str], theme: str, _: Any, page: dict[str, Any]):
    if chosen is None:
        raise PreventUpdate  # the pattern comes first
    trace = services().library.open(page["trace"])
    at = position_in(trace, position)
    label = token_label(trace.token_texts[at], at in trace.special, 16)
    title, where = f"Where {label} looks, and what looks at it", _where(scope, chosen)
    try:
        found = _values(trace, scope, chosen, at, bool(first))
    except LayerscopeError as problem:
        return no_figure(theme, str(problem)), title, where, [], []
    if found is None:
        want_summary()
        return no_figure(theme, "Made from every head of the trace, which are being read."), title, where, [], []
    row, column = found
    labels = short_labels(trace)
    strips = elements(_strips(trace, row, column, at))
    return token_attention(row, column, at, labels, theme), title, f"Position {at:,}, {where}.", strips, elements(_tables(trace, row, column, at))


draws("token-strips")
draws("token-tables")


def _where(scope: str, chosen: dict[str, int]) -> str:
    return {"head": f"head {chosen['layer']}.{chosen['head']}", "mean": f"mean of the heads of layer {chosen['layer']}", "all": "mean of all heads of all layers"}[scope]


def _values(trace: Trace, scope: str, chosen: dict[str, int], at: int, hide_first: bool) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """`looks_at`, or None while every head has to be read first."""
    shown = shown_map(scope, chosen["layer"], chosen["head"], "pattern", hide_first)
    known = summary(trace, 0) if scope != "head" else None
    if scope == "all" and known is None and n_cells(trace) > AT_ONCE:
        return None
    return looks_at(trace, shown, at, known)


def _strips(trace: Trace, row: NDArray[np.float32], column: NDArray[np.float32], at: int) -> list[Any]:
    """Two strips: the tokens up to the chosen one by how it looks at them, and those from it on by how they look at it."""
    before, after = range(max(0, at + 1 - IN_STRIP), at + 1), range(at, min(trace.n_tokens, at + IN_STRIP))
    parts = []
    for words, places, values in (("Looks at", before, row), ("Is looked at by", after, column)):
        first = 0 if words == "Looks at" else at
        tokens = [_token(trace, i, float(values[i - first]), i == at) for i in places]
        cut = f", positions {places.start:,} to {places.stop - 1:,}" if len(places) < len(values) else ""
        parts += [html.Div(f"{words}{cut}", className="strip-name"), html.Div(tokens, className="strip-tokens attention-strip")]
    return parts


def _token(trace: Trace, at: int, value: float, chosen: bool) -> html.Span:
    share = 0.0 if np.isnan(value) else min(max(value, 0.0), 1.0) ** 0.5
    place: Any = {"data-at": at}
    return html.Span(token_label(trace.token_texts[at], at in trace.special), className="tok chosen" if chosen else "tok", style={"--share": f"{100 * share:.0f}%"},
                     title=f"position {at}: {value:.4f}", **place)  # fmt: skip


def _tables(trace: Trace, row: NDArray[np.float32], column: NDArray[np.float32], at: int) -> list[Any]:
    return [_table(trace, "Looks at", row, 0), _table(trace, "Is looked at by", column, at)]


def _table(trace: Trace, title: str, values: NDArray[np.float32], first: int) -> html.Table:
    """The strongest links of one direction; a row chooses its token."""
    head = html.Thead(html.Tr([html.Th(title), html.Th("Position", className="num"), html.Th("Attention", className="num")]))
    rows = []
    for i in strongest(values, IN_TABLE):
        place: Any = {"data-pos": int(i) + first}
        if values[i] < _LEAST:
            break
        text = token_label(trace.token_texts[int(i) + first], int(i) + first in trace.special, 18)
        rows.append(html.Tr([html.Td(text, className="chip-token"), html.Td(f"{int(i) + first:,}", className="num"), html.Td(f"{values[i]:.4f}", className="num")], **place))
    return html.Table([head, html.Tbody(rows or [html.Tr(html.Td("nothing", colSpan=3, className="muted"))])], className="ls-table compact")

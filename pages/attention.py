"""Attention: where each head looks.

All heads as thumbnails, the pattern of the chosen one, every head's scores. Scores were computed at capture from the full values,
so choosing a head reads one head and nothing else.
"""

from __future__ import annotations

from typing import Any

import dash
import numpy as np
from dash import ALL, Input, Output, State, callback, ctx, dcc, html, no_update

from backend.analysis.attention import reduce_max
from backend.trace import Trace
from components.card import card, cards
from components.figures.attention import LARGEST, attention_pattern, head_heatmap
from components.figures.theme import no_figure
from components.graph import graph, graph_tools
from components.head_table import METRIC_TEXTS, head_table
from components.heads import head_grid, head_picker
from components.services import services
from components.token_label import token_labels
from components.trace_view import trace_page
from components.url_state import as_choice, as_int, keep_url

dash.register_page(__name__, path="/attention", name="Attention", order=3, icon="grid-3x3", description="Where each head looks")

REQUIRES = ("attn_pattern", "attn_thumbs")

ABOUT_PATTERN = (
    "Row: the token that looks (query). Column: the token it looks at (key). Each row sums to 1. The triangle above the diagonal is empty because a model that "
    "writes from left to right cannot look ahead.",
    f"The values are the softmax of the scaled, masked attention scores as the engine computed them. Beyond {LARGEST} tokens each cell shows the largest value "
    "of the cells it stands for, so no strong link is lost; the hover names the range.",
)  # fmt: skip
ABOUT_METRICS = [html.P([html.B(title), f": {text}."]) for title, _, text in METRIC_TEXTS.values()] + [
    html.P("Row 0 is left out of every mean: the first token can only look at itself. A dash means that no token of this prompt repeats.")
]


def layout(trace: str | None = None, layer: str | None = None, head: str | None = None, metric: str | None = None, scale: str | None = None, **state: str):
    def start(opened: Trace) -> tuple[int, int, str]:
        shown = as_choice(metric, list(METRIC_TEXTS), _telling_metric(opened))
        best_layer, best_head = _best_head(opened, shown)
        layers = opened.layers("attn_pattern")
        asked = as_int(layer, best_layer, 0, opened.info.n_layers - 1)
        return asked if asked in layers else layers[0], as_int(head, best_head, 0, opened.info.n_heads - 1), shown

    def build(opened: Trace) -> list[Any]:
        return _cards(opened, *start(opened), as_choice(scale, ("linear", "sqrt"), "linear"))

    return trace_page(__name__, trace, REQUIRES, state, build, "Where each head looks.", lambda opened: head_picker(opened, *start(opened)[:2]))


def _cards(trace: Trace, layer: int, head: int, metric: str, scale: str) -> list[Any]:
    options: Any = [{"label": title, "value": name} for name, (title, _, _) in METRIC_TEXTS.items()]
    scales: Any = [{"label": "Linear", "value": "linear"}, {"label": "Square root", "value": "sqrt"}]
    choose_metric = dcc.Dropdown(options, metric, id="head-metric", clearable=False, searchable=False, className="picker-metric")
    choose_scale = dcc.Dropdown(scales, scale, id="pattern-scale", clearable=False, searchable=False, className="picker-metric")
    n_rows = len(trace.result_attrs("attn_thumbs")["layers"])
    left = html.Div(
        [
            card("All heads", head_grid(trace, layer, head), _groups(trace)),
            card(html.Span("", id="metric-title"), graph("metric-heads", height=max(190, 88 + 26 * min(n_rows, 32)), className="fill"),
                 "Click a cell to open the head.", [choose_metric, *graph_tools("metric-heads", "head-metric")], list(ABOUT_METRICS), className="fill"),
        ],
        className="card-stack",
    )  # fmt: skip
    pattern = card(html.Span("", id="pattern-title"), graph("pattern", height=580), html.Span("", id="pattern-subtitle"),
                   [choose_scale, *graph_tools("pattern", "attention-pattern")], list(ABOUT_PATTERN), className="fill")  # fmt: skip
    table = card("Head metrics", html.Div(id="head-table", className="table-scroll table-tall"), "Click a column to sort by it, a row to open the head.",
                 [], list(ABOUT_METRICS), className="wide")  # fmt: skip
    return [cards(left, pattern, table)]


def _groups(trace: Trace) -> str:
    """How many heads there are and which share their keys and values (grouped-query attention)."""
    info = trace.info
    per_group = info.n_heads // info.n_kv_heads
    shared = f"{per_group} neighbouring heads share each of {info.n_kv_heads} key/value heads" if per_group > 1 else "each with its own keys and values"
    return f"{info.n_layers} layers × {info.n_heads} heads, {shared}. Colour: square root of attention. Click to open, arrow keys to step."


def _telling_metric(trace: Trace) -> str:
    """Induction where any token repeats, else the previous-token score, which every prompt has."""
    return "induction" if np.isfinite(trace.result("attn_induction")).any() else "previous"


def _best_head(trace: Trace, metric: str) -> tuple[int, int]:
    values = np.nan_to_num(trace.result(f"attn_{metric}"), nan=-np.inf)
    row, head = np.unravel_index(int(np.argmax(values)), values.shape)
    return trace.result_attrs(f"attn_{metric}")["layers"][int(row)], int(head)


@callback(
    Output("pattern", "figure"), Output("pattern-title", "children"), Output("pattern-subtitle", "children"),
    Input("chosen-head", "data"), Input("pattern-scale", "value"), Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_pattern(chosen: dict[str, int], scale: str, position: int | None, theme: str, page: dict[str, Any]):
    layer, head = chosen["layer"], chosen["head"]
    trace = services().library.open(page["trace"])
    heads, kept_rows = trace.kept("attn_pattern", layer)
    if head not in heads:
        return no_figure(theme, f"Head {layer}.{head} was not captured; layer {layer} holds {', '.join(f'{layer}.{h}' for h in heads)}."), f"Pattern of {layer}.{head}", ""
    pattern = trace.head("attn_pattern", layer, head)
    reduced, rows, columns = reduce_max(pattern, LARGEST, LARGEST)
    labels = token_labels(trace.token_texts, trace.special, 12)
    figure = attention_pattern(reduced, labels, theme, scale == "sqrt", position, (rows, columns))
    figure.update_layout(uirevision=trace.id)
    group = head // (trace.info.n_heads // trace.info.n_kv_heads)
    keys = f" KV head {group} of {trace.info.n_kv_heads}." if trace.info.n_kv_heads < trace.info.n_heads else ""
    part = f" Captured: rows {kept_rows[0]} to {kept_rows[1] - 1}." if kept_rows != (0, trace.n_tokens) else ""
    return figure, f"Pattern of {layer}.{head}", f"Rows look at columns.{keys}{part}"


@callback(
    Output("metric-heads", "figure"), Output("metric-title", "children"), Output("head-table", "children"),
    Input("head-metric", "value"), Input("chosen-head", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_metrics(metric: str, chosen: dict[str, int], theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    title, limit, _ = METRIC_TEXTS[metric]
    layers = trace.result_attrs(f"attn_{metric}")["layers"]
    at = (chosen["layer"], chosen["head"])
    figure = head_heatmap(trace.result(f"attn_{metric}"), layers, title, at, theme, limit)
    table = no_update if ctx.triggered_id in ("chosen-head", "theme") else head_table(trace, metric, at)
    return figure, f"{title} of every head", table


@callback(Output("head-metric", "value"), Input({"type": "sort-heads", "metric": ALL}, "n_clicks"), prevent_initial_call=True)
def sort_by(clicks: list[int | None]):
    return ctx.triggered_id["metric"] if any(clicks) else no_update


@callback(Output("chosen-head", "data", allow_duplicate=True), Input("metric-heads", "clickData"), State("page-state", "data"), prevent_initial_call=True)
def open_clicked(click: dict[str, Any] | None, page: dict[str, Any]):
    if not click:
        return no_update
    layers = services().library.open(page["trace"]).result_attrs("attn_thumbs")["layers"]
    point = click["points"][0]
    return {"layer": layers[int(point["y"])], "head": int(point["x"])}


keep_url({"layer": ("chosen-head", "data", "layer"), "head": ("chosen-head", "data", "head"), "metric": ("head-metric", "value"), "scale": ("pattern-scale", "value")})

"""Every head's scores on the Attention page: one metric as a heatmap, all of them as a sortable table.

Those of the capture are there at once. Mean attention and the share of cells below a threshold are counted from the stored patterns:
at once for a small trace, after a press of a button for a large one. Callbacks need the stores `chosen-head`, `theme`, `maps-ready`, `page-state`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import ClientsideFunction, Input, Output, State, callback, clientside_callback, dcc, html, no_update
from numpy.typing import NDArray

from backend.analysis.attention import METRICS
from backend.analysis.attention_views import THRESHOLDS
from backend.trace import Trace
from components.attention_pattern import want_summary
from components.attention_source import summary
from components.card import card
from components.drawn import drawing, draws, elements
from components.figures.attention import head_heatmap
from components.figures.theme import no_figure
from components.graph import graph, graph_tools
from components.head_table import COUNTED, METRIC_TEXTS, head_table
from components.services import services

_WITHOUT_ASKING = 5_000_000  # cells that are counted when the page is opened: some hundredths of a second

ABOUT = [html.P([html.B(title), f": {text}."]) for title, _, text in METRIC_TEXTS.values()] + [
    html.P("Row 0 is left out of every mean of the scores: the first token can only look at itself. A dash means that no token of this prompt repeats.")
]


def metric_card(metric: str, n_rows: int) -> html.Section:
    options: Any = [{"label": title, "value": name} for name, (title, _, _) in METRIC_TEXTS.items()]
    choose = dcc.Dropdown(options, metric, id="head-metric", clearable=False, searchable=False, className="picker-view")
    return card(html.Span("", id="metric-title"), graph("metric-heads", height=max(190, 88 + max(26 * min(n_rows, 12), min(10 * n_rows, 400))), className="fill"),
                "Click a cell to open the head.", [choose, *graph_tools("metric-heads", "head-metric")], list(ABOUT), className="fill metric-card")  # fmt: skip


def table_card(threshold: int) -> html.Section:
    """`threshold`: number of one of THRESHOLDS."""
    options: Any = [{"label": f"below {value:g}", "value": number} for number, value in enumerate(THRESHOLDS)]
    choose = dcc.Dropdown(options, threshold, id="below-threshold", clearable=False, searchable=False, className="picker-metric")
    count = html.Button("Count sparsity and mean", id="count-heads", className="btn btn-outline-secondary", hidden=True)
    tools = [count, html.Label([html.Span("Sparsity"), choose], className="tool-label")]
    body = [html.Div(id="head-table", className="table-scroll table-tall"), drawing("head-table")]
    return card("Head metrics", body, "Click a column to sort by it, a row to open the head.", tools, list(ABOUT), className="wide")


def scores(trace: Trace, threshold: int, at_once: int = _WITHOUT_ASKING) -> tuple[dict[str, NDArray[np.float32]], list[int]]:
    """Every score there is, (layer, head) each, and the layers' numbers."""
    layers = trace.result_attrs("attn_thumbs")["layers"]
    columns = {name: trace.result(f"attn_{name}") for name in METRICS}
    known = summary(trace, at_once)
    if known is not None and known.layers == layers:
        columns |= {"below": known.below(threshold).astype(np.float32), "mean": known.mean.astype(np.float32)}
    return columns, layers


@callback(
    Output("metric-heads", "figure"), Output("metric-title", "children"),
    Input("head-metric", "value"), Input("theme", "data"), Input("below-threshold", "value"), Input("maps-ready", "data"),
    State("chosen-head", "data"), State("page-state", "data"),
)  # fmt: skip
def show_metric(metric: str, theme: str, threshold: int, _: Any, chosen: dict[str, int], page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    title, limit, _words = METRIC_TEXTS[metric]
    columns, layers = scores(trace, threshold)
    if metric not in columns:
        want_summary()
        return no_figure(theme, "Counted from every head of the trace, which are being read."), f"{title} of every head"
    said = f"{title} {THRESHOLDS[threshold]:g}" if metric == "below" else title
    return head_heatmap(columns[metric], layers, said, (chosen["layer"], chosen["head"]), theme, limit), f"{said} of every head"


# The frame follows the chosen head in the browser: the picture stays.
clientside_callback(ClientsideFunction("layerscope", "frameHead"), Output("metric-heads", "id"), Input("chosen-head", "data"))


@callback(
    Output("head-table-drawing", "data"), Output("count-heads", "hidden"),
    Input("head-metric", "value"), Input("below-threshold", "value"), Input("maps-ready", "data"), State("chosen-head", "data"), State("page-state", "data"),
)  # fmt: skip
def show_table(metric: str, threshold: int, _: Any, chosen: dict[str, int], page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    columns, layers = scores(trace, threshold)
    shown = metric if metric in columns else "entropy"
    share = trace.info.n_heads // trace.info.n_kv_heads
    table = head_table(columns, layers, shown, (chosen["layer"], chosen["head"]), share, THRESHOLDS[threshold])
    return elements(table), all(name in columns for name in COUNTED)


draws("head-table")


@callback(Output("count-heads", "disabled"), Input("count-heads", "n_clicks"), prevent_initial_call=True)
def count(clicks: int | None):
    if clicks:
        want_summary()
    return bool(clicks)


@callback(Output("chosen-head", "data", allow_duplicate=True), Input("metric-heads", "clickData"), State("page-state", "data"), prevent_initial_call=True)
def open_clicked(click: dict[str, Any] | None, page: dict[str, Any]):
    if not click:
        return no_update
    layers = services().library.open(page["trace"]).result_attrs("attn_thumbs")["layers"]
    point = click["points"][0]
    return {"layer": layers[int(point["y"])], "head": int(point["x"])}

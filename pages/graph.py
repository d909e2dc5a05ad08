"""Computation graph: every node that the engine executed, folded by block.

The graph is recorded once by a job and kept. Only unfolded blocks send their nodes, so the picture stays quick however deep the model is.
"""

from __future__ import annotations

import re
from typing import Any

import dash
from dash import Input, Output, State, callback, clientside_callback, dcc, html, no_update
from dash.exceptions import PreventUpdate

from backend.analysis.graph import fold
from backend.errors import LayerscopeError
from backend.trace import Trace
from components.graph_card import SHOW, graph_cards
from components.graph_values import graph_missing, graph_of, graph_stores, opened_graph
from components.graph_view import elements, stylesheet
from components.node_panel import node_panel
from components.services import services
from components.states import empty, error
from components.url_state import keep_url

dash.register_page(__name__, path="/graph", name="Computation graph", order=31, group="This model", icon="workflow", description="Every operation that is really executed")

MOST_UNFOLDED = 4


def layout(model: str | None = None, trace: str | None = None, blocks: str | None = None, node: str | None = None, show: str | None = None, **_: str) -> html.Div:
    title = html.H1("Computation graph")
    models = [entry for entry in services().library.models() if entry.error is None]
    names = [entry.name for entry in models]
    try:
        traced = services().library.open(trace) if trace else None
    except LayerscopeError as gone:
        return html.Div([html.Div(title, className="page-title"), error(str(gone))], className="page")
    wanted = model or (traced.info.name if traced else None)
    if not names:
        return html.Div([html.Div(title, className="page-title"), empty("No models found", "Put a .gguf file or a Hugging Face folder into the models folder.")], className="page")
    problem = error(f"There is no model {wanted[:200]!r} on the shelf that can be opened.") if wanted and wanted not in names else None
    chosen = wanted if wanted in names else None if problem else names[0]
    picker = dcc.Dropdown(names, chosen, id="graph-model", clearable=False, placeholder="choose a model", className="picker-model")
    head = html.Div([title, html.Span("What is really executed.", className="page-subtitle"), html.Div(html.Div(picker), className="page-controls")], className="page-title")
    asked = {"model": chosen, "blocks": _numbers(blocks), "node": node if node and node.isdecimal() else None, "show": [name for name in (show or "").split(",") if name in SHOW]}
    stores = [dcc.Store(id="graph-asked", data=asked), dcc.Store(id="graph-node"), dcc.Store(id="graph-trace", data=trace if traced else None)]
    return html.Div([head, *stores, problem, html.Div(id="graph-body"), *graph_stores()], className="page")


def _numbers(text: str | None) -> list[int]:
    return [int(part) for part in (text or "").split(",") if part.isdecimal() and len(part) < 6][:MOST_UNFOLDED]


@callback(Output("graph-body", "children"), Output("graph-node", "data"), Input("graph-model", "value"), Input("graph-ready", "data"), State("graph-asked", "data"))
def show_body(model: str | None, _: str | None, asked: dict[str, Any]) -> tuple[Any, Any]:
    """The cards of the model, or the job that makes its graph. What the address asks for holds for the model it names."""
    if model is None:
        return empty("No model chosen", "Choose one above.", symbol="workflow"), None
    entry = services().library.resolve_model(model)
    graph = graph_of(entry)
    if graph is None:
        return graph_missing(entry), no_update
    mine = asked["model"] == model
    unfolded = [layer for layer in asked["blocks"] if layer < graph.n_layers] if mine else []
    return graph_cards(graph, unfolded, asked["show"] if mine else []), {"value": asked["node"]} if mine and asked["node"] else None


@callback(Output("graph-canvas", "elements"), Input("graph-open", "value"), Input("graph-show", "value"), State("graph-model", "value"))
def draw(unfolded: list[int] | None, show: list[str] | None, model: str):
    """The folded graph; Cytoscape lays it out again whenever elements come or go."""
    graph = opened_graph(model)
    folded = fold(graph, [layer for layer in (unfolded or []) if isinstance(layer, int)][-MOST_UNFOLDED:], memory="memory" in (show or ()), views="views" in (show or ()))
    return elements(graph, folded)


@callback(Output("graph-open", "value"), Input("graph-open", "value"), prevent_initial_call=True)
def keep_few(unfolded: list[int] | None):
    """The block that was unfolded first is folded when there are too many."""
    return unfolded[-MOST_UNFOLDED:] if unfolded and len(unfolded) > MOST_UNFOLDED else no_update


@callback(
    Output("graph-open", "value", allow_duplicate=True), Output("graph-node", "data", allow_duplicate=True),
    Input("graph-canvas", "tapNodeData"), State("graph-open", "value"), prevent_initial_call=True,
)  # fmt: skip
def tapped(data: dict[str, Any] | None, unfolded: list[int] | None):
    """L3: unfold the block; B3: fold it; n12: choose the node."""
    found = re.fullmatch(r"([LBn])(\d{1,9})", str((data or {}).get("id", "")))
    if found is None:
        return no_update, no_update
    number, others = int(found[2]), [layer for layer in unfolded or [] if layer != int(found[2])]
    if found[1] == "n":
        return no_update, {"value": str(number)}
    return ([*others, number][-MOST_UNFOLDED:] if found[1] == "L" else others), no_update


@callback(
    Output("graph-panel", "children"), Output("graph-open", "value", allow_duplicate=True),
    Input("graph-node", "data"), Input("graph-body", "children"), State("graph-model", "value"), State("graph-open", "value"),
    State("graph-trace", "data"), State("trace-id", "data"),
    prevent_initial_call="initial_duplicate",
)  # fmt: skip
def show_node(chosen: dict[str, Any] | None, _: Any, model: str | None, unfolded: list[int] | None, asked: str | None, open_trace: str | None):
    """The chosen node's card; its block is unfolded if it is not."""
    if model is None:
        raise PreventUpdate
    graph = opened_graph(model)
    text = str((chosen or {}).get("value") or "")
    node = graph.nodes[int(text)] if text.isdecimal() and len(text) < 10 and int(text) < len(graph.nodes) else None
    opens = node is not None and node.layer is not None and node.layer not in (unfolded or [])
    return node_panel(graph, node, _trace_of(model, asked, open_trace)), [*(unfolded or []), node.layer][-MOST_UNFOLDED:] if opens and node else no_update


def _trace_of(model: str, *ids: str | None) -> Trace | None:
    """The first of these traces that is one of this model."""
    for trace_id in ids:
        try:
            trace = services().library.open(trace_id) if trace_id else None
        except LayerscopeError:
            continue  # deleted since it was opened
        if trace is not None and trace.info.name == model:
            return trace
    return None


@callback(Output("graph-canvas", "stylesheet"), Input("graph-node", "data"), Input("theme", "data"), Input("graph-body", "children"))
def paint(chosen: dict[str, Any] | None, theme: str, _: Any):
    text = str((chosen or {}).get("value") or "")
    return stylesheet(theme, f"n{text}" if text.isdecimal() else None)


# Bring the chosen node, or the block that was unfolded last, into sight once it is drawn (assets/graph_view.js).
clientside_callback(
    "function(node, elements, unfolded) { return window.layerscope.showNode(node, elements, unfolded); }",
    Output("graph-frame", "title"), Input("graph-node", "data"), Input("graph-canvas", "elements"), State("graph-open", "value"),
)  # fmt: skip

keep_url({"model": ("graph-model", "value"), "node": ("graph-node", "data", "value")})
keep_url({"blocks": ("graph-open", "value"), "show": ("graph-show", "value")})

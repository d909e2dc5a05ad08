"""The cards of the Computation graph page: the picture with its controls and tools, finding a node, how often each op runs."""

from __future__ import annotations

import json
import re
from typing import Any

import dash_cytoscape as cyto
from dash import Input, Output, State, callback, ctx, dcc, html, no_update

from backend.analysis.graph import count_ops, find
from backend.reports.graph_formats import as_dot
from backend.reports.model_graph import ModelGraph
from components.card import card, full_screen_button
from components.figures.theme import colours
from components.graph_values import opened_graph
from components.graph_view import LAYOUT, legend
from components.node_panel import node_button

SHOW = {"memory": "Weights, inputs, cache", "views": "Views"}

ABOUT = (
    "One forward pass over 8 tokens, every node as it was executed, in a program made for looking inside: flash attention is off, so that scores and pattern are nodes. "
    "GGUF: llama.cpp's scheduler tells each node before it runs, and a node's sources are found by their address (its names are not unique). "
    "PyTorch: every operator that is dispatched, modules without children as one node each, edges by the identity of tensors.",
    "A dashed edge leads through memory: keys and values are written into the cache by one node and read from it by another. Views compute nothing and are left out "
    "unless asked for, and so are nodes that the output does not depend on; edges lead through them. An edge that runs past blocks (rotary tables, masks) is drawn when the node "
    "at one of its ends is chosen.",
    "Shapes are in NumPy's order. A blue frame marks a node whose values a capture stores under the name of a site.",
)  # fmt: skip

ABOUT_FINDER = "Looks for the words in the names of nodes, of the tensors they read, of ops and of sites; a node that is found is centred and chosen."
ABOUT_NODE = "The chosen node as it ran: its op and name, shape and type, what it reads and what reads it, and the site that a capture stores it under, if any."
ABOUT_OPERATIONS = "How many nodes of the graph run each operation, under the engine's own names: ggml's op names, PyTorch's ATen operators. Views move no numbers."


def graph_cards(graph: ModelGraph, unfolded: list[int], show: list[str]) -> html.Div:
    """The page's cards, with these blocks unfolded and these kinds of nodes (keys of SHOW) drawn."""
    executed = sum(node.executed for node in graph.nodes)
    blocks: Any = [{"label": f"Block {layer}", "value": layer} for layer in range(graph.n_layers)]
    shown: Any = [{"label": label, "value": name} for name, label in SHOW.items()]
    controls = html.Div(
        [
            html.Div(dcc.Dropdown(blocks, unfolded, id="graph-open", multi=True, placeholder="Unfold blocks"), className="picker-blocks"),
            dcc.Checklist(shown, show, id="graph-show", className="checks", inline=True),
        ],
        className="graph-controls",
    )
    canvas = cyto.Cytoscape(id="graph-canvas", layout=LAYOUT, elements=[], stylesheet=[], style={"width": "100%", "height": "100%"}, minZoom=0.05, maxZoom=3,
                            autoungrabify=True)  # fmt: skip
    kinds = ("png", "svg", "dot", "json")
    whole = html.Button("Whole", className="tool", title="Bring the whole graph into sight", **{"data-tool": "fit-graph"})
    tools = [whole, *[html.Button(kind.upper(), id=f"graph-save-{kind}", className="tool", title=f"Save as {kind.upper()}") for kind in kinds], full_screen_button()]
    said = f"{executed:,} nodes executed. Click a block to unfold it, its frame to fold it, a node to read it."
    body = [controls, html.Div(canvas, className="graph-canvas", id="graph-frame"), legend(), dcc.Download(id="graph-download")]
    picture = card("Graph", body, said, tools, list(ABOUT), className="fill")
    search = dcc.Input(id="graph-find", placeholder="name, op or site", debounce=0.25, maxLength=200, className="text-input")
    finder = card("Find a node", [search, html.Div(id="graph-found", className="node-results")], about=ABOUT_FINDER)
    panel = card("Node", html.Div(id="graph-panel"), about=ABOUT_NODE, className="fill")
    return html.Div([picture, html.Div([finder, panel, _operations(graph)], className="card-stack")], className="cards cards-wide-left")


def _operations(graph: ModelGraph) -> html.Section:
    counts = count_ops(graph)
    rows = [html.Tr([html.Td(op, className="mono wrap"), html.Td(f"{n:,}", className="num")]) for op, n in counts]
    table = html.Table([html.Thead(html.Tr([html.Th("Op"), html.Th("Nodes", className="num")])), html.Tbody(rows)], className="ls-table compact")
    return card("Operations", html.Div(table, className="table-scroll table-ops"), f"{len(counts)} different ones, views included; {graph.version}.", about=ABOUT_OPERATIONS)


@callback(Output("graph-found", "children"), Input("graph-find", "value"), State("graph-model", "value"))
def search(text: str | None, model: str):
    found, n = find(opened_graph(model), text or "", limit=30)
    if not (text or "").strip():
        return None
    more = html.Div(f"{n:,} nodes" if n != 1 else "1 node", className="muted small")
    return [more, *[node_button(node) for node in found]]


@callback(Output("graph-canvas", "generateImage"), Input("graph-save-png", "n_clicks"), Input("graph-save-svg", "n_clicks"), State("graph-model", "value"),
          State("theme", "data"), prevent_initial_call=True)  # fmt: skip
def save_picture(_: int | None, __: int | None, model: str, theme: str):
    if not ctx.triggered[0]["value"]:
        return no_update
    kind = str(ctx.triggered_id).rpartition("-")[2]
    return {"type": kind, "action": "download", "filename": _file_name(model), "options": {"full": True, "scale": 2, "bg": colours(theme)["surface"]}}


@callback(Output("graph-download", "data"), Input("graph-save-dot", "n_clicks"), Input("graph-save-json", "n_clicks"), State("graph-model", "value"),
          prevent_initial_call=True)  # fmt: skip
def save_text(_: int | None, __: int | None, model: str):
    if not ctx.triggered[0]["value"]:
        return no_update
    graph, kind = opened_graph(model), str(ctx.triggered_id).rpartition("-")[2]
    return {"content": as_dot(graph) if kind == "dot" else json.dumps(graph.to_json(), ensure_ascii=False), "filename": f"{_file_name(model)}.{kind}"}


def _file_name(model: str) -> str:
    return "graph-" + re.sub(r"[^A-Za-z0-9._-]+", "-", model)[:80]

"""What is known of one node of the computation graph: facts, what it takes and gives, and its numbers in a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import dash
import numpy as np
from dash import dcc, html

from backend.analysis.activations import l2_norms, site_statistics
from backend.reports.graph_formats import operation, plain, shape_text
from backend.reports.model_graph import GraphNode, ModelGraph
from backend.trace import Trace
from components.controls import facts, set_button
from components.states import empty

_MOST = 8  # neighbours listed
_KINDS = {"weight": "weight of the file", "input": "input of the graph", "cache": "key/value cache", "copy": "copy from another backend", "op": "operation", "module": "module"}


def node_panel(graph: ModelGraph, node: GraphNode | None, trace: Trace | None) -> list[Any]:
    """The body of the card; `trace` is one of the same model, or None."""
    if node is None:
        return [empty("No node chosen", "Click one in the picture, or find it by name above.", symbol="workflow")]
    consumers = [graph.nodes[i] for i in graph.consumers()[node.id]]
    rows = {
        "Kind": _KINDS[node.kind] + (", computes nothing" if node.view and node.executed else ""),
        "Op": operation(node) if node.executed else None,
        "Shape": f"{shape_text(node)}",
        "Type": node.type,
        "Layer": "outside the blocks" if node.layer is None else str(node.layer),
        "Lies in": plain(node.backend),
        "Runs inside": plain(node.detail) if node.kind == "module" else None,
        "Module": plain(node.module) if node.kind == "op" else None,
        "Sites": ", ".join(site if layer is None else f"{site} of layer {layer}" for site, layer in node.sites),
        "Step": f"{node.id} of {len(graph.nodes):,}",
    }
    head = html.Div([html.Span(plain(node.name), className="mono node-name"), weight_link(graph, node)], className="node-head")
    lists = [_neighbours("Takes", [graph.nodes[i] for i in dict.fromkeys(node.sources)]), _neighbours("Takes through memory", [graph.nodes[i] for i in node.after]),
             _neighbours("Taken by", consumers)]  # fmt: skip
    return [head, facts(rows), *[part for part in lists if part], _numbers(node, trace)]


def weight_link(graph: ModelGraph, node: GraphNode) -> Any:
    """The way to a weight's own page, where there is one."""
    if node.kind != "weight" or not any(page["path"] == "/weights" for page in dash.page_registry.values()):
        return None
    return dcc.Link("Open the weight", href=f"/weights?{urlencode({'model': graph.model, 'tensor': node.name})}", className="btn btn-outline-secondary")


def node_button(node: GraphNode) -> html.Button:
    """A node as a row that chooses it."""
    words = [html.Span(plain(node.name), className="mono"), html.Span(f"{operation(node)}, {shape_text(node)}", className="muted small")]
    return set_button(words, "graph-node", str(node.id), "node-row")


def _neighbours(title: str, nodes: Sequence[GraphNode]) -> Any:
    if not nodes:
        return None
    more = html.Div(f"and {len(nodes) - _MOST:,} more", className="muted small") if len(nodes) > _MOST else None
    return html.Div([html.H3(title), *[node_button(node) for node in nodes[:_MOST]], more], className="node-list")


def _numbers(node: GraphNode, trace: Trace | None) -> Any:
    """Mean, standard deviation, range and norm of each site read at the node, in the open trace."""
    if not node.sites:
        return None
    if trace is None:
        return html.P("Open a trace of this model to see the numbers of this node.", className="muted small")
    held = [(site, layer) for site, layer in node.sites if trace.has(site, layer)]
    if not held:
        return html.P(f"The open trace does not hold {', '.join(dict.fromkeys(site for site, _ in node.sites))}.", className="muted small")
    head = html.Tr([html.Th("Site"), *(html.Th(name, className="num") for name in ("Mean", "Std", "Min", "Max", "Norm"))])
    rows = [_row(trace, site, layer) for site, layer in held]
    title = html.H3(dcc.Link("In the open trace", href=f"/trace?{urlencode({'trace': trace.id})}"))
    words = html.P(f"Over all values of its {trace.n_tokens} tokens; norm: mean length of a token's vector.", className="muted small")
    table = html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact", id="node-numbers")
    return html.Div([title, html.Div(table, className="table-scroll"), words], className="node-list")


def _row(trace: Trace, site: str, layer: int | None) -> html.Tr:
    values = trace[site] if layer is None else trace[site, layer]
    numbers = site_statistics(values)
    by_position = values if values.ndim < 3 or site not in ("attn_pattern", "attn_scores") else np.moveaxis(values, 1, 0)
    finite = np.where(np.isfinite(by_position), by_position, 0)
    cells = [*(numbers[name] for name in ("mean", "std", "min", "max")), float(l2_norms(finite).mean())]
    return html.Tr([html.Td(site, className="mono"), *(html.Td(f"{value:z.4g}", className="num") for value in cells)])

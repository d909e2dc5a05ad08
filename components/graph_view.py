"""The computation graph as Cytoscape draws it: elements of a folded graph, its stylesheet in each theme, the legend.

Text on the canvas is drawn, never parsed, so the names of a file cannot become markup there.
"""

from __future__ import annotations

import re
from typing import Any

import dash_cytoscape as cyto
from dash import html

from backend.analysis.graph import FoldedGraph
from backend.reports.graph_formats import operation, plain, shape_text
from backend.reports.model_graph import GraphNode, ModelGraph
from components.figures.theme import LINES, MONO, SANS, colours

cyto.load_extra_layouts()  # dagre, from the package's own files

LAYOUT = {"name": "preset", "fit": False}  # assets/graph_view.js lays the graph out, by dagre
_LABEL = 34  # characters of a name on the canvas

# What an op is, by the beginning or a part of its name, first match first: (class, words in the legend, parts of names).
KINDS = (
    ("attention", "softmax, attention", ("SOFT_MAX", "FLASH_ATTN", "scaled_dot_product", "softmax")),
    ("norm", "norm", ("NORM", "Norm", "norm")),
    ("product", "matrix product", ("MUL_MAT", "Linear", "Conv1D", "aten.mm", "aten.addmm", "aten.bmm", "grouped_mm", "TopKRouter", "Router")),
    ("function", "activation", ("GLU", "UNARY", "SiLU", "GELU", "Activation", "aten.silu", "aten.gelu", "aten.sigmoid", "aten.tanh")),
    ("look-up", "look-up, top-k", ("GET_ROWS", "Embedding", "SET_ROWS", "ARGSORT", "TOP_K", "topk", "aten.index", "aten.sort")),
    ("plain", "element by element", ("",)),
)


def kind_of(node: GraphNode) -> str:
    """The class that colours a node."""
    if not node.executed:
        return node.kind
    return "view" if node.view else next(name for name, _, parts in KINDS if any(part in node.op for part in parts))


def elements(graph: ModelGraph, folded: FoldedGraph) -> list[dict[str, Any]]:
    """Cytoscape's elements: "n12" a node, "L3" a folded block, "B3" the frame of an unfolded one."""
    out: list[dict[str, Any]] = [{"data": {"id": f"B{layer}", "label": f"Block {layer}"}, "classes": "frame"} for layer in folded.unfolded]
    for layer, n in folded.folded.items():
        out.append({"data": {"id": f"L{layer}", "label": f"Block {layer}\n{n} nodes", "width": 132, "height": 40}, "classes": "block"})
    for node in folded.nodes:
        lines = _lines(node, graph)
        data: dict[str, Any] = {"id": f"n{node.id}", "label": "\n".join(lines), "width": max(64, round(6.4 * max(map(len, lines))) + 18), "height": 13 * len(lines) + 12}
        if node.layer in folded.unfolded:
            data["parent"] = f"B{node.layer}"
        out.append({"data": data, "classes": f"node {kind_of(node)}" + (" site" if node.sites else "")})
    for edge in folded.edges:
        classes = " ".join(name for name, on in (("memory", edge.through_memory), ("far", edge.far)) if on)
        out.append({"data": {"id": f"{edge.source}-{edge.target}", "source": edge.source, "target": edge.target}, "classes": classes})
    return out


def _lines(node: GraphNode, graph: ModelGraph) -> list[str]:
    name = short_name(node)
    shown = name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}…"
    facts = f"{shape_text(node)} {node.type}"
    return [shown, facts] if not node.executed else [shown, operation(node).removeprefix("aten.")[:_LABEL], facts]


def short_name(node: GraphNode) -> str:
    """The name without what the frame around it says: the number of the layer and the path of the block."""
    name = plain(node.name)
    if node.layer is None:
        return name
    return re.sub(rf"-{node.layer}(?= |$)", "", re.sub(rf"^(?:.*?\.)?{node.layer}\.(?=.)", "", name))


def stylesheet(theme: str, chosen: str | None = None) -> list[dict[str, Any]]:
    """The look of every class; the chosen node framed, its edges in colour: what it takes in blue, what takes it in orange."""
    c, lines = colours(theme), LINES["dark" if theme == "dark" else "light"]
    fills = _fills(theme)
    text = {"content": "data(label)", "text-wrap": "wrap", "text-valign": "center", "text-halign": "center", "font-size": 10.5, "line-height": 1.15}
    rules: list[dict[str, Any]] = [
        _rule("node", **text, shape="round-rectangle", **{"font-family": MONO, "color": c["ink"], "border-width": 1}),
        _rule("node[width]", width="data(width)", height="data(height)"),  # a frame is as large as what it holds
        _rule(".node", **{"background-color": c["surface"], "border-color": c["line-strong"]}),
        *(_rule(f".{name}", **{"background-color": fill, "border-color": fill, "color": ink}) for name, (fill, ink) in fills.items()),
        _rule(".view", **{"background-color": c["surface"], "border-color": c["line-strong"], "border-style": "dashed", "color": c["ink-3"]}),
        *(_rule(f".{kind}", **{"background-color": c["surface-2"], "border-color": c["line"], "color": c["ink-2"], "shape": shape})
          for kind, shape in (("weight", "rectangle"), ("input", "ellipse"), ("cache", "barrel"), ("copy", "tag"))),
        _rule(".site", **{"border-width": 2, "border-color": c["accent"]}),
        _rule(".block", **{"background-color": c["surface-2"], "border-color": c["line-strong"], "font-family": SANS, "font-size": 12, "color": c["ink"]}),
        _rule(".frame", content="data(label)", shape="round-rectangle", **{"background-color": c["surface-2"], "background-opacity": 0.45, "border-color": c["line-strong"],
              "text-valign": "top", "text-halign": "center", "font-family": SANS, "font-size": 12, "color": c["ink-2"], "padding": 12, "text-margin-y": -4}),
        _rule("edge", width=1.2, opacity=0.8, **{"curve-style": "bezier", "line-color": c["ink-3"], "target-arrow-color": c["ink-3"], "target-arrow-shape": "triangle",
              "arrow-scale": 0.7}),
        _rule("edge.memory", **{"line-style": "dashed"}),
        _rule("edge.far", opacity=0, events="no"),  # dozens of them on top of each other hide the picture: shown from a chosen end
        _rule("node:active", **{"overlay-color": c["accent"], "overlay-opacity": 0.12}),
    ]  # fmt: skip
    if chosen:
        mark = {"border-width": 3, "border-color": c["accent"], "underlay-color": c["accent"], "underlay-opacity": 0.18, "underlay-padding": 5}
        rules += [
            _rule(f'edge[target = "{chosen}"]', width=2.2, opacity=1, **{"line-color": lines[0], "target-arrow-color": lines[0]}),
            _rule(f'edge[source = "{chosen}"]', width=2.2, opacity=1, **{"line-color": lines[1], "target-arrow-color": lines[1]}),
            _rule(f'node[id = "{chosen}"]', **mark),
        ]
    return rules


def _rule(selector: str, **style: Any) -> dict[str, Any]:
    return {"selector": selector, "style": style}


def _fills(theme: str) -> dict[str, tuple[str, str]]:
    """class -> (ground, ink), after the sequential scale and the lines of the theme."""
    if theme == "dark":
        return {"product": ("#2c3f86", "#e8edf4"), "attention": ("#5f4a1f", "#fbe6c6"), "norm": ("#24442f", "#cfeedd"), "function": ("#532f51", "#f3d8f1"),
                "look-up": ("#25424d", "#cfeaf2")}  # fmt: skip
    return {"product": ("#dfe6ff", "#16202e"), "attention": ("#ffe3cb", "#16202e"), "norm": ("#d8f0e2", "#16202e"), "function": ("#f3dcf1", "#16202e"),
            "look-up": ("#d6ecf3", "#16202e")}  # fmt: skip


def legend() -> html.Div:
    """What the colours mean."""
    marks = [html.Span([html.I(className=f"swatch swatch-{name}"), words]) for name, words, _ in KINDS]
    words = ["blue: what the chosen node takes", "orange: what takes it"]
    return html.Div([*marks, html.Span([html.I(className="swatch swatch-site"), "a capture reads here"]), *map(html.Span, words)], className="graph-legend")

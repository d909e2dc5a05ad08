"""A computation graph as text for a terminal and as DOT for Graphviz, and one layer cut out of it.

Names come from the model's file and are nobody's to trust: in DOT every one is a quoted string with its specials escaped, in a
terminal control characters are spelled out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import replace

from backend.errors import LayerscopeError
from backend.reports.model_graph import GraphNode, ModelGraph

_SHAPES = {"weight": "box", "input": "ellipse", "cache": "cylinder", "copy": "cds"}


def of_layer(graph: ModelGraph, layer: int) -> ModelGraph:
    """The nodes of one layer and those that they take directly, numbered anew; what lies outside the layer stands without sources.

    Raises LayerscopeError for a layer that the model does not have.
    """
    if not 0 <= layer < graph.n_layers:
        raise LayerscopeError(f"Layer {layer} is outside 0-{graph.n_layers - 1} of {graph.model}.")
    inside = {node.id for node in graph.nodes if node.layer == layer}
    kept = sorted(inside | {i for at in inside for i in (*graph.nodes[at].sources, *graph.nodes[at].after)})
    number = {old: new for new, old in enumerate(kept)}

    def cut(ids: tuple[int, ...], node: GraphNode) -> tuple[int, ...]:
        return tuple(number[i] for i in ids) if node.id in inside else ()

    nodes = tuple(replace(node, id=number[node.id], sources=cut(node.sources, node), after=cut(node.after, node)) for node in (graph.nodes[i] for i in kept))
    return replace(graph, nodes=nodes)


def as_text(graph: ModelGraph) -> str:
    """One line a node, in the order of execution: id, layer, op, shape, type, where it lies, name, and the ids it takes (~: through memory)."""
    executed = sum(node.executed for node in graph.nodes)
    head = f"{plain(graph.model)} ({graph.architecture}, {graph.version})\n{len(graph.nodes):,} nodes, {executed:,} of them executed, over {graph.n_tokens} tokens\n{graph.edges}\n"
    rows = [("id", "layer", "op", "shape", "type", "in", "name", "from")]
    for node in graph.nodes:
        taken = " ".join([*(str(i) for i in node.sources), *(f"~{i}" for i in node.after)])
        rows.append((str(node.id), "" if node.layer is None else str(node.layer), operation(node), shape_text(node), node.type, plain(node.backend), plain(node.name), taken))
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    lines = ["  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[7]]).rstrip() for row in rows]
    return "\n".join([head, *lines])


def as_dot(graph: ModelGraph) -> str:
    """The graph in Graphviz' language: a cluster for each layer, dashed edges for what goes through memory."""
    outside = [node for node in graph.nodes if node.layer is None]
    lines = [f"digraph {_quoted(plain(graph.model))} {{", "  rankdir=TB;", '  node [shape=box, style=rounded, fontname="monospace", fontsize=10];']
    lines += [f"  {_node(node)}" for node in outside]
    for layer in range(graph.n_layers):
        inside = [node for node in graph.nodes if node.layer == layer]
        if inside:
            lines += [f"  subgraph cluster_{layer} {{", f'    label="layer {layer}";', *(f"    {_node(node)}" for node in inside), "  }"]
    return "\n".join([*lines, *(f"  {edge}" for edge in _edges(graph)), "}"])


def operation(node: GraphNode) -> str:
    """GLU SWIGLU, MUL_MAT, Linear; of memory what it is."""
    if not node.executed:
        return node.kind
    return f"{node.op} {node.detail}" if node.detail and node.kind == "op" else node.op


def shape_text(node: GraphNode) -> str:
    """8 × 64; a scalar is 1."""
    return " × ".join(f"{size:,}" for size in node.shape) or "1"


def plain(text: str) -> str:
    """Text on one line: control and formatting characters as their escapes, so that a name can neither move a cursor nor turn a line around.

    >>> plain("a\\x1b[2Jb\\u202ec")
    'a\\\\x1b[2Jb\\\\u202ec'
    """
    return "".join(char if unicodedata.category(char)[0] != "C" else ascii(char)[1:-1] for char in text)


def _node(node: GraphNode) -> str:
    label = f"{plain(node.name)}\n{operation(node)}\n{shape_text(node)} {node.type}"
    shape = f", shape={_SHAPES[node.kind]}" if node.kind in _SHAPES else ", style=dashed" if node.view else ""
    return f"n{node.id} [label={_quoted(label)}{shape}];"


def _edges(graph: ModelGraph) -> Iterator[str]:
    for node in graph.nodes:
        yield from (f"n{source} -> n{node.id};" for source in dict.fromkeys(node.sources))
        yield from (f"n{source} -> n{node.id} [style=dashed];" for source in node.after)


def _quoted(text: str) -> str:
    """A DOT string. A backslash is doubled, since Graphviz reads \\N and the like in labels; a line break is its \\n."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'

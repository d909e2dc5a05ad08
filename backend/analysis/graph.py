"""A computation graph as it is looked at: blocks folded to one node each, views and memory left out, the edges led through them.

    fold(graph, ...)      what is to be drawn
    find(graph, text)     nodes by name or op
    count_ops(graph)      how often each op runs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from backend.reports.model_graph import GraphNode, ModelGraph


@dataclass(frozen=True)
class FoldedEdge:
    """From one drawn thing to another; keys are "n12" for a node and "L3" for a folded block.

    through_memory: the data goes by way of memory that one wrote and the other reads. far: it leads from outside the blocks, or from
    a block that is not the one before, into a block: such an edge runs past everything.
    """

    source: str
    target: str
    through_memory: bool = False
    far: bool = False


@dataclass(frozen=True)
class FoldedGraph:
    """`nodes`: those drawn on their own; `folded`: block -> executed nodes in it; `unfolded`: blocks drawn as frames."""

    nodes: tuple[GraphNode, ...]
    folded: dict[int, int]
    unfolded: tuple[int, ...]
    edges: tuple[FoldedEdge, ...]


def fold(graph: ModelGraph, unfolded: Collection[int] = (), *, memory: bool = False, views: bool = False) -> FoldedGraph:
    """Blocks as single nodes, but for those in `unfolded`. memory: weights, inputs and caches are drawn too; views: so are nodes that compute nothing.

    What is left out is led through: a reader of a view has an edge from what the view looks at. Nothing that is left out loses data
    but memory, which has no sources. Nodes that the output does not depend on (PyTorch programs look at values to take a branch) are left out too.
    """
    drawn = {node.id for node in graph.nodes if _drawn(node, memory, views)} - _leads_nowhere(graph)
    keys = {i: _key(graph.nodes[i], unfolded) for i in drawn}
    through: list[frozenset[tuple[int, bool]]] = []  # of each node: the drawn nodes that its values come from, and whether through memory
    edges: dict[tuple[str, str], FoldedEdge] = {}
    for node in graph.nodes:
        taken = frozenset[tuple[int, bool]]().union(*(through[i] for i in node.sources), *({(i, True) for i, _ in through[i]} for i in node.after))
        through.append(frozenset({(node.id, False)}) if node.id in drawn else taken)
        for source, by_memory in sorted(taken) if node.id in drawn else ():
            pair = keys[source], keys[node.id]
            if pair[0] != pair[1]:
                far = _far(graph.nodes[source].layer, node.layer)
                earlier = edges.get(pair)
                edges[pair] = FoldedEdge(*pair, by_memory and (earlier is None or earlier.through_memory), far)
    blocks = Counter(node.layer for node in graph.nodes if node.layer is not None and node.executed)
    alone = tuple(graph.nodes[i] for i in sorted(drawn) if keys[i] == f"n{i}")
    open_blocks = tuple(sorted(layer for layer in blocks if layer in unfolded))
    return FoldedGraph(alone, {layer: n for layer, n in sorted(blocks.items()) if layer not in unfolded}, open_blocks, tuple(edges.values()))


def _drawn(node: GraphNode, memory: bool, views: bool) -> bool:
    return (views or not node.view) if node.executed else memory


def _leads_nowhere(graph: ModelGraph) -> set[int]:
    """Nodes on which the last one, the output, does not depend: the program looked at them to decide something."""
    needed: set[int] = set()
    for node in reversed(graph.nodes):
        if not needed and node.executed and not node.view:
            needed.add(node.id)
        if node.id in needed:
            needed.update((*node.sources, *node.after))
    return {node.id for node in graph.nodes} - needed


def _key(node: GraphNode, unfolded: Collection[int]) -> str:
    return f"n{node.id}" if node.layer is None or node.layer in unfolded else f"L{node.layer}"


def _far(source: int | None, target: int | None) -> bool:
    return target is not None and target > 0 and source not in (target, target - 1)


def find(graph: ModelGraph, text: str, limit: int = 30) -> tuple[list[GraphNode], int]:
    """The first `limit` nodes whose name, op or site contains `text` (upper and lower case alike), and how many there are in all."""
    wanted = text.strip().casefold()
    if not wanted:
        return [], 0
    exact = [node for node in graph.nodes if wanted == node.name.casefold()]
    rest = [node for node in graph.nodes if wanted != node.name.casefold() and any(wanted in word.casefold() for word in (node.name, node.op, *(site for site, _ in node.sites)))]
    return [*exact, *rest][:limit], len(exact) + len(rest)


def count_ops(graph: ModelGraph) -> list[tuple[str, int]]:
    """(op, how many nodes run it), most frequent first. Views are counted under their own ops."""
    counts = Counter(node.op for node in graph.nodes if node.executed)
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))

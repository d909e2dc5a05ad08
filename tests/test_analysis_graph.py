"""Claims about the folded graph, against graphs small enough to fold by hand."""

from __future__ import annotations

from backend.analysis.graph import count_ops, find, fold
from backend.reports.model_graph import GraphNode, ModelGraph


def small() -> ModelGraph:
    """embed -> block 0 (norm, product with a weight, a view of it, sum) -> block 1 (likewise, by way of a cache) -> output; positions go into both."""
    rows = [
        ("input", "tokens", "", (), (), None, False),  # 0
        ("op", "embed", "GET_ROWS", (0,), (), None, False),  # 1
        ("input", "pos", "", (), (), None, False),  # 2
        ("op", "table", "COS", (2,), (), None, False),  # 3
        ("op", "norm-0", "RMS_NORM", (1,), (), 0, False),  # 4
        ("weight", "blk.0.w", "", (), (), 0, False),  # 5
        ("op", "mul-0", "MUL_MAT", (5, 4), (), 0, False),  # 6
        ("op", "mul-0 (view)", "VIEW", (6,), (), 0, True),  # 7
        ("op", "l_out-0", "ADD", (7, 1, 3), (), 0, False),  # 8
        ("op", "check", "MAX", (8,), (), None, False),  # 9: leads nowhere
        ("cache", "cache_k_l1", "", (), (), 1, False),  # 10
        ("op", "store-1", "SET_ROWS", (8, 10), (), 1, False),  # 11
        ("op", "cache (view)", "VIEW", (10,), (11,), 1, True),  # 12
        ("op", "l_out-1", "ADD", (12, 8, 3), (), 1, False),  # 13
        ("op", "out", "MUL_MAT", (13,), (), None, False),  # 14
    ]
    nodes = tuple(
        GraphNode(i, kind, name, op, (2,), "F32", sources, after, layer, view=view, sites=(("resid_post", layer),) if "l_out" in name else ())
        for i, (kind, name, op, sources, after, layer, view) in enumerate(rows)
    )
    return ModelGraph("m", "llama", "gguf", "v", 2, 2, "", nodes)


def pairs(folded) -> set[tuple[str, str]]:
    return {(edge.source, edge.target) for edge in folded.edges}


def test_folded_blocks_are_a_chain_without_views_memory_and_dead_ends():
    folded = fold(small())
    assert folded.folded == {0: 4, 1: 3} and folded.unfolded == ()
    assert {node.name for node in folded.nodes} == {"embed", "table", "out"}
    assert pairs(folded) == {("n1", "L0"), ("n3", "L0"), ("n3", "L1"), ("L0", "L1"), ("L1", "n14")}
    assert {(edge.source, edge.target) for edge in folded.edges if edge.far} == {("n3", "L1")}


def test_an_unfolded_block_leads_its_edges_through_what_is_left_out():
    folded = fold(small(), [1])
    assert folded.folded == {0: 4} and folded.unfolded == (1,)
    assert pairs(folded) == {("n1", "L0"), ("n3", "L0"), ("L0", "n11"), ("n11", "n13"), ("L0", "n13"), ("n3", "n13"), ("n13", "n14")}
    assert [(edge.source, edge.target) for edge in folded.edges if edge.through_memory] == [("n11", "n13")]


def test_memory_and_views_are_drawn_when_asked_for():
    folded = fold(small(), [0, 1], memory=True, views=True)
    assert {node.id for node in folded.nodes} == set(range(15)) - {9}
    assert {("n5", "n6"), ("n6", "n7"), ("n7", "n8"), ("n10", "n12"), ("n11", "n12"), ("n12", "n13"), ("n2", "n3"), ("n0", "n1")} <= pairs(folded)
    assert ("n6", "n8") not in pairs(folded)
    assert {(edge.source, edge.target) for edge in folded.edges if edge.through_memory} == {("n11", "n12")}


def test_every_drawn_edge_is_a_path_of_the_graph_and_none_is_lost():
    graph = small()
    for unfolded in ((), (0,), (1,), (0, 1)):
        folded = fold(graph, unfolded)
        key = {node.id: f"n{node.id}" if node.layer is None or node.layer in unfolded else f"L{node.layer}" for node in graph.nodes}
        reach = {(key[source], key[node.id]) for node in graph.nodes for source in node.sources if graph.nodes[source].executed and not graph.nodes[source].view and not node.view}
        assert {(a, b) for a, b in reach if a != b and b != "n9"} <= pairs(folded)


def test_a_layer_that_is_not_there_is_no_error():
    assert fold(small(), [7, -1]).unfolded == ()


def test_nodes_are_found_by_name_op_and_site_with_the_whole_name_first():
    graph = small()
    assert [node.name for node in find(graph, "mul-0")[0]] == ["mul-0", "mul-0 (view)"]
    assert find(graph, "ADD ")[1] == 2 and find(graph, "resid_post")[1] == 2
    found, n = find(graph, "-", limit=2)
    assert len(found) == 2 and n == 6
    assert find(graph, "  ") == ([], 0) and find(graph, "nothing like it") == ([], 0)


def test_ops_are_counted():
    assert count_ops(small())[:2] == [("ADD", 2), ("MUL_MAT", 2)] and dict(count_ops(small()))["VIEW"] == 2

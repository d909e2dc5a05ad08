"""Claims about the graph as text, JSON and DOT, and about the command that prints it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from backend.errors import LayerscopeError
from backend.reports.graph_formats import as_dot, as_text, of_layer, plain
from backend.reports.model_graph import GraphNode, ModelGraph
from tests.test_cli import run  # noqa: F401 - a fixture

HOSTILE = ['"];evil [label="', "a\\", "\\N \\G", "<b>x</b>", "line\nbreak", "\x1b[2Jclear", "\u202egnp.exe", "ends in quote\"", "", "{|}", "日本"]


def hostile_graph() -> ModelGraph:
    nodes = [GraphNode(0, "input", "tokens", "", (3,), "I32")]
    nodes += [GraphNode(i + 1, "op", name, "ADD", (3, 4), "F32", (i,), layer=i % 2 if i else None, backend="CPU") for i, name in enumerate(HOSTILE)]
    nodes[3] = replace(nodes[3], after=(1,))
    return ModelGraph('m"x\n', "llama", "gguf", "v", 2, 3, "edges", tuple(nodes))


def parse_dot(text: str) -> tuple[dict[str, str], set[tuple[str, str]], list[str]]:
    """A reader of the part of DOT that is written: nodes with their unescaped labels, edges, names of clusters. Anything else is an error."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|->|[\w.]+|[{}\[\]=,;]', text)
    assert re.sub(r"\s+", "", "".join(tokens)) == re.sub(r"\s+", "", text), "something in the text is no token of DOT"
    nodes: dict[str, str] = {}
    edges: set[tuple[str, str]] = set()
    clusters, depth, at = [], 0, 0
    while at < len(tokens):
        token = tokens[at]
        depth += (token == "{") - (token == "}")
        if token == "subgraph":
            clusters.append(tokens[at + 1])
        elif tokens[at + 1 : at + 2] == ["->"]:
            edges.add((token, tokens[at + 2]))
            at += 2
        elif re.fullmatch(r"n\d+", token) and tokens[at + 1 : at + 4] == ["[", "label", "="]:
            raw = tokens[at + 4]
            nodes[token] = re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], raw[1:-1])
            at += 4
        at += 1
    assert depth == 0
    return nodes, edges, clusters


def test_dot_holds_every_node_and_edge_whatever_the_names_are():
    graph = hostile_graph()
    nodes, edges, clusters = parse_dot(as_dot(graph))
    assert set(nodes) == {f"n{node.id}" for node in graph.nodes}
    assert edges == {(f"n{source}", f"n{node.id}") for node in graph.nodes for source in (*node.sources, *node.after)}
    assert clusters == ["cluster_0", "cluster_1"]
    for node in graph.nodes:
        assert nodes[f"n{node.id}"].startswith(plain(node.name) + "\n")


def test_text_is_one_line_a_node_and_moves_no_cursor():
    graph = hostile_graph()
    text = as_text(graph)
    assert "\x1b" not in text and "\u202e" not in text
    assert len(text.split("\n\n")[1].splitlines()) == len(graph.nodes) + 1


def test_json_comes_back_as_it_was_and_another_format_is_refused():
    graph = hostile_graph()
    data = json.loads(json.dumps(graph.to_json()))
    assert ModelGraph.from_json(data) == graph
    with pytest.raises(LayerscopeError, match="format 99"):
        ModelGraph.from_json({**data, "format": 99})


def test_one_layer_keeps_its_nodes_and_what_they_take():
    graph = hostile_graph()
    cut = of_layer(graph, 1)
    inside = [node.name for node in graph.nodes if node.layer == 1]
    assert [node.name for node in cut.nodes if node.layer == 1] == inside
    for node in cut.nodes:
        assert node.id == cut.nodes.index(node) and all(source < node.id for source in (*node.sources, *node.after))
        original = next(each for each in graph.nodes if each.name == node.name)
        expected = [graph.nodes[i].name for i in original.sources] if node.layer == 1 else []
        assert [cut.nodes[i].name for i in node.sources] == expected
    with pytest.raises(LayerscopeError, match="Layer 2 is outside 0-1"):
        of_layer(graph, 2)


@pytest.mark.parametrize("part", ["gguf", "hf"])
def test_the_command_prints_three_forms_of_one_graph(run, tiny_llama, tmp_path: Path, part: str):  # noqa: F811
    model = str(getattr(tiny_llama, part))
    code, out, _ = run("graph", "-m", model, "--format", "json")
    data = json.loads(out)
    assert code == 0 and data["n_layers"] == 3 and data["engine"] == part and data["n_tokens"] == 8
    assert {"id", "kind", "name", "op", "detail", "shape", "type", "sources", "after", "layer", "backend", "view", "sites", "module"} == set(data["nodes"][0])
    assert bool(data["modules"]) == (part == "hf")
    file = tmp_path / "graph.dot"
    assert run("graph", "-m", model, "--format", "dot", "--output", str(file))[:2] == (0, "")
    nodes, edges, _ = parse_dot(file.read_text(encoding="utf-8").rstrip("\n"))
    assert len(nodes) == len(data["nodes"]) and edges == {(f"n{source}", f"n{node['id']}") for node in data["nodes"] for source in (*node["sources"], *node["after"])}
    text = run("graph", "-m", model)[1]
    assert f"{len(data['nodes'])} nodes" in text and all(node["name"] in text for node in data["nodes"])
    layer = json.loads(run("graph", "-m", model, "--format", "json", "--layer", "1", "--tokens", "3")[1])
    assert layer["n_tokens"] == 3 and sum(node["layer"] == 1 for node in layer["nodes"]) == sum(node["layer"] == 1 for node in data["nodes"])


def test_the_command_s_mistakes_are_one_sentence(run, tiny_llama, tmp_path: Path):  # noqa: F811
    for words, message in ((("--format", "svg"), "format 'svg'"), (("--layer", "9"), "Layer 9 is outside"), (("--output", str(tmp_path / "no" / "x")), "cannot be written")):
        code, out, err = run("graph", "-m", str(tiny_llama.gguf), *words)
        assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1

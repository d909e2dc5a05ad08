"""Architecture and Computation graph in a real browser, against the real server and worker, on tiny models and a hostile file.

What the pages show is held against the file's header and against a graph that this process records itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest

from backend.engines import open_engine
from backend.reports.graph_formats import shape_text
from backend.reports.model_graph import ModelGraph
from backend.trace import Trace, open_trace
from tests.browser.served import served
from tests.gguf_cases import ARR, STR, Tensor, model_file, model_tensors
from tests.tiny_models import TinyModel

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
WAIT_MS = 100_000  # generous: other tests share the machine
HOSTILE = '<img src=x onerror="window.__x=1"><a href="javascript:window.__x=1">%{x}</a>'


@pytest.fixture(scope="module")
def server(tiny_llama: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Trace, ModelGraph]]:
    """A running server: (address, a trace of the tiny GGUF file, the graph of that file as this process records it)."""
    from backend.experiments.capture import CaptureSpec, capture
    from backend.library import Library
    from config import load_settings

    data, models = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("shelf")
    (models / "tiny.gguf").write_bytes(tiny_llama.gguf.read_bytes())
    metadata: dict[str, Any] = {"general__name": (STR, HOSTILE), "tokenizer__chat_template": (STR, HOSTILE * 40), "general__tags": (ARR, (STR, [HOSTILE] * 9000))}
    (models / "hostile.gguf").write_bytes(model_file([*model_tensors(), Tensor(HOSTILE[:60], (4,))], **metadata))
    settings = load_settings(data_dir=data, models_dirs=[models])
    engine = open_engine(models / "tiny.gguf")
    graph = engine.graph()
    engine.info = type(engine.info).from_json({**engine.info.to_json(), "name": "tiny.gguf"})
    path = capture(engine, CaptureSpec(prompt="Mary gave the book to John."), settings.traces_dir)
    engine.close()
    Library.from_settings(settings).add(path)
    with served(data, [models]) as address:
        with open_trace(path) as trace:
            yield address, trace, graph


@pytest.fixture
def browse(server, page) -> Iterator[Any]:
    """Open a path; fail on any error in the browser's console, the guard's policy included."""
    problems: list[str] = []
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)

    def go(path: str):
        page.goto(f"{server[0]}{path}", wait_until="domcontentloaded")
        return page

    yield go
    assert problems == [] and page.evaluate("() => window.__x") is None


CY = "document.getElementById('graph-canvas')?._cyreg?.cy"


def drawn(page) -> set[str]:
    return set(page.evaluate(f"() => {CY}.nodes().map(node => node.id())"))


def wait_for_node(page, node: str) -> None:
    """Until the node is on the canvas, laid out and brought into sight."""
    page.wait_for_function(f"() => {CY} && {CY}.getElementById('{node}').length === 1 && {CY}.scratch('settled') === {CY}.elements().length")


def tap(page, node: str) -> None:
    """Click in the middle of a node, or on the upper edge of a frame, where none of its nodes lie."""
    place = page.evaluate(f"""() => {{ const cy = {CY}; const one = cy.getElementById('{node}'); cy.zoom(1); cy.center(one);
        const box = one.renderedBoundingBox({{ includeLabels: false }}), frame = cy.container().getBoundingClientRect();
        if (one.isParent()) {{ cy.panBy({{ x: 0, y: 60 - box.y1 }}); return [frame.x + (box.x1 + box.x2) / 2, frame.y + 60 + 5]; }}
        return [frame.x + (box.x1 + box.x2) / 2, frame.y + (box.y1 + box.y2) / 2]; }}""")
    page.mouse.click(*place)


def test_the_graph_is_recorded_when_the_page_is_opened_and_shown_folded(server, browse):
    _, _, graph = server
    page = browse("/graph?model=tiny.gguf")
    wait_for_node(page, "L0")  # the job runs in between
    outside = {f"n{node.id}" for node in graph.nodes if node.layer is None and node.executed}
    assert drawn(page) == {"L0", "L1", "L2"} | outside
    assert page.evaluate(f"() => {CY}.getElementById('L1').data('label')").startswith("Block 1\n")


def test_a_click_unfolds_a_block_another_folds_it_and_the_address_remembers(server, browse):
    _, _, graph = server
    page = browse("/graph?model=tiny.gguf")
    wait_for_node(page, "L1")
    tap(page, "L1")
    inside = {f"n{node.id}" for node in graph.nodes if node.layer == 1 and node.executed and not node.view}
    wait_for_node(page, "B1")
    assert inside <= drawn(page) and "L1" not in drawn(page)
    page.wait_for_function("() => new URL(location).searchParams.get('blocks') === '1'")
    parents = page.evaluate(f"() => {CY}.nodes().filter(node => node.parent().length).map(node => [node.id(), node.parent().id()])")
    assert {(node, "B1") for node in inside} == {tuple(pair) for pair in parents}
    tap(page, "B1")
    wait_for_node(page, "L1")
    assert not inside & drawn(page)


def test_edges_on_the_canvas_are_those_of_the_graph(server, browse):
    from backend.analysis.graph import fold

    _, _, graph = server
    page = browse("/graph?model=tiny.gguf&blocks=0,2&show=memory,views")
    wait_for_node(page, "B2")
    seen = {tuple(edge) for edge in page.evaluate(f"() => {CY}.edges().map(edge => [edge.source().id(), edge.target().id()])")}
    assert seen == {(edge.source, edge.target) for edge in fold(graph, [0, 2], memory=True, views=True).edges}


def test_a_node_is_found_by_name_and_shows_its_facts_and_its_numbers_in_the_trace(server, browse):
    _, trace, graph = server
    page = browse(f"/graph?trace={trace.id}")
    wait_for_node(page, "L2")
    node = next(node for node in graph.nodes if ("resid_post", 2) in node.sites)
    page.locator("#graph-find").fill("l_out-2")
    page.locator("#graph-found .node-row").first.click()
    wait_for_node(page, f"n{node.id}")  # its block was unfolded
    panel = page.locator("#graph-panel")
    page.wait_for_function("() => document.querySelector('#graph-panel .node-name')?.textContent === 'l_out-2'")
    text = panel.inner_text()
    assert node.op in text and shape_text(node) in text and "resid_post of layer 2" in text
    for source in node.sources:
        assert panel.locator(f"[data-set='graph-node'][data-value='{source}']").count() == 1
    shown = [float(cell.replace(",", "")) for cell in panel.locator("#node-numbers td").all_inner_texts()[1:]]
    values = trace["resid_post", 2].astype(np.float64)
    np.testing.assert_allclose(shown, [values.mean(), values.std(), values.min(), values.max(), np.linalg.norm(values, axis=-1).mean()], rtol=2e-3, atol=1e-4)
    assert parse_qs(urlparse(page.url).query)["node"] == [str(node.id)]
    page.reload()
    page.wait_for_function("() => document.querySelector('#graph-panel .node-name')?.textContent === 'l_out-2'")
    box = page.wait_for_function(f"() => {{ const cy = {CY}; const b = cy && cy.getElementById('n{node.id}').length && cy.getElementById('n{node.id}').renderedBoundingBox();"
                                 " return b && b.x1 >= 0 && b.y1 >= 0 && b.x2 <= cy.width() && b.y2 <= cy.height(); }")  # fmt: skip
    assert box  # brought into sight


def test_the_graph_is_saved_as_dot_and_json(server, browse):
    _, _, graph = server
    page = browse("/graph?model=tiny.gguf")
    wait_for_node(page, "L0")
    for kind in ("dot", "json"):
        with page.expect_download() as download:
            page.locator(f"#graph-save-{kind}").click()
        text = Path(download.value.path()).read_text(encoding="utf-8")
        assert text.count("->") == sum(len({*node.sources}) + len(node.after) for node in graph.nodes) if kind == "dot" else len(json.loads(text)["nodes"]) == len(graph.nodes)


def test_a_model_that_is_not_there_is_said_in_one_sentence(browse):
    for path in ("/graph?model=nope", "/architecture?model=nope"):
        page = browse(path)
        page.wait_for_selector(".state-error")
        assert "no model 'nope'" in page.locator(".state-error").inner_text()


def test_the_parts_are_those_of_the_header_and_a_click_shows_their_tensors(server, browse, tiny_llama: TinyModel):
    from backend.files.gguf_header import read_header

    tensors = read_header(tiny_llama.gguf).tensors
    page = browse("/architecture?model=tiny.gguf")
    page.wait_for_selector("#arch-tensors td")
    assert page.locator(".arch-times").inner_text() == "Block × 3"
    page.locator(".arch-mlp").click()
    page.wait_for_function("() => document.querySelector('#arch-title').textContent.startsWith('Weights of MLP')")
    page.wait_for_function("() => document.querySelector('#arch-tensors td').textContent.includes('ffn_')")
    shown = {row.split("\t")[0]: row.split("\t")[1] for row in page.locator("#arch-tensors tbody tr").all_inner_texts()}
    assert shown == {name: " × ".join(f"{n:,}" for n in tensors[name].shape) for name in tensors if name.startswith("blk.0.ffn_") and "norm" not in name}
    assert parse_qs(urlparse(page.url).query)["part"] == ["block0.mlp"]
    links = page.eval_on_selector_all("#arch-tensors a", "links => links.map(link => link.href)")
    assert {(urlparse(link).path, parse_qs(urlparse(link).query)["model"][0], parse_qs(urlparse(link).query)["tensor"][0]) for link in links} == {
        ("/weights", "tiny.gguf", name) for name in shown
    }
    page.locator("#arch-search").fill("block_count")
    page.wait_for_function("() => document.querySelectorAll('#arch-metadata tbody tr').length === 1")
    assert page.locator("#arch-metadata tbody tr").inner_text().split("\t") == ["llama.block_count", "uint32", "3"]


def test_hostile_names_and_metadata_are_text_and_long_lists_are_not_sent(browse):
    page = browse("/architecture?model=hostile.gguf&part=rest")
    page.wait_for_selector("#arch-metadata td")
    page.wait_for_selector("#arch-tensors td")
    assert HOSTILE[:60] in page.locator("#arch-tensors").inner_text()
    table = page.locator("#arch-metadata").inner_text()
    assert HOSTILE in table and "9,000 items" in table and table.count("onerror") < 60
    assert page.locator("#arch-body img, #arch-body a[href^='javascript']").count() == 0


@pytest.mark.parametrize("width", [1024, 1440])
def test_nothing_runs_over_the_edge_of_the_page(server, browse, page, width: int):
    page.set_viewport_size({"width": width, "height": 900})
    for path, ready in (("/graph?model=tiny.gguf&blocks=1&node=10", "#graph-panel .node-name"), ("/architecture?model=tiny.gguf", "#arch-tensors td")):
        browse(path)
        page.wait_for_selector(ready)
        assert page.evaluate("() => document.documentElement.scrollWidth - window.innerWidth") <= 0

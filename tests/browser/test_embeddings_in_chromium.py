"""The Embeddings page in a real browser, against the real server and worker: points, neighbours and paths are NumPy's, and a link gives the same view."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlparse

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from backend.engines.vocabulary import token_texts
from backend.trace import open_trace
from backend.weights import Weights, open_weights
from tests.browser.served import served
from tests.tiny_models import TinyModel

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
WAIT_MS = 100_000  # generous: other tests share the machine
NO_WEBGL = """const get = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...more) { return kind === 'webgl' ? null : get.call(this, kind, ...more); };"""
INKED = """() => { const canvas = window.layerscope.cloud.points, data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
return data.filter((value, i) => i % 4 === 3 && value).length; }"""


@dataclass
class Server:
    address: str
    model: str
    weights: Weights
    texts: list[str]
    traces: list[Path]


@pytest.fixture(scope="module")
def server(tiny_llama: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server with one model as GGUF and two traces of it."""
    models, data = tmp_path_factory.mktemp("embedding-shelf"), tmp_path_factory.mktemp("data")
    name = tiny_llama.gguf.name
    (models / name).write_bytes(tiny_llama.gguf.read_bytes())
    environment = {**os.environ, "LAYERSCOPE_MODELS_DIRS": json.dumps([str(models)]), "LAYERSCOPE_USE_HF_CACHE": "false", "LAYERSCOPE_DATA_DIR": str(data)}
    made = []
    for prompt, category in (("The cat sat on the mat", "cats"), ("A dog ran home", "dogs")):
        words = [sys.executable, "-m", "backend", "trace", "--model", name, "--prompt", prompt, "--category", category, "--precision", "float32", "--json"]
        made.append(Path(json.loads(subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout)["path"]))
    with served(data, [models]) as address:
        yield Server(address, name, open_weights(tiny_llama.gguf), token_texts(tiny_llama.gguf, 320).texts, made)


@pytest.fixture
def visit(server, page):
    """Open the page, wait until the points are drawn, and fail on any error in the browser's console."""
    problems: list[str] = []
    page.set_default_timeout(WAIT_MS)
    page.set_viewport_size({"width": 1440, "height": 1000})
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)

    def go(**query: object):
        page.goto(f"{server.address}/embeddings?{urlencode(query)}")
        drawn(page)
        return page

    yield go
    assert not problems, problems


def drawn(page, n: int | None = None) -> None:
    page.wait_for_function(f"() => window.layerscope?.cloud?.colours && window.layerscope.cloud.n {'> 0' if n is None else f'=== {n}'}")


def places(page) -> np.ndarray:
    """(point, 3) coordinates that the cloud holds."""
    return np.array(page.evaluate("() => Array.from(window.layerscope.cloud.at)"), np.float32).reshape(-1, 3)


def click_point(page, i: int) -> None:
    page.evaluate("() => document.querySelector('#emb-cloud').scrollIntoView({ block: 'center', behavior: 'instant' })")
    before = None
    while (now := (page.locator("#emb-cloud").bounding_box(), page.evaluate(f"() => window.layerscope.cloud.place({i})"))) != before:
        before = now
        page.wait_for_timeout(300)
    box, (x, y) = now
    page.mouse.click(box["x"] + x, box["y"] + y)


def query_of(page) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlparse(page.url).query).items()}


def lone_point(xy: np.ndarray) -> int:
    """The point that lies farthest from its nearest other: it can be hit for certain."""
    apart = np.linalg.norm(xy[:, None] - xy[None], axis=2) + np.where(np.eye(len(xy)), np.inf, 0)
    return int(apart.min(axis=1).argmax())


def near_rows(page, title: str) -> list[list[str]]:
    """(token, place, cosine) of the table whose title begins so."""
    tables = page.evaluate("() => Array.from(document.querySelectorAll('table.near-table'), t => [t.querySelector('th').textContent, "
                           "Array.from(t.querySelectorAll('tbody tr'), r => Array.from(r.cells, c => c.textContent))])")  # fmt: skip
    return next(rows for name, rows in tables if name.startswith(title))


def test_the_points_are_scikit_learns_and_a_click_lists_the_nearest_rows(server, visit):
    page = visit(model=server.model)
    matrix = server.weights["embed.W_E"].astype(np.float64)
    model = PCA(2, svd_solver="full").fit(matrix)
    found = places(page)
    np.testing.assert_allclose(found[:, :2], model.transform(matrix), atol=2e-3)
    assert f"{100 * model.explained_variance_ratio_[0]:.1f} % of the variance" in page.evaluate("() => window.layerscope.cloud.axes[0]")
    row = lone_point(found[:, :2])
    click_point(page, row)
    page.wait_for_function(f"() => new URL(location).searchParams.get('row') === '{row}'")
    for title, other in (("In the input", matrix), ("In the output", server.weights["unembed.W_U"].astype(np.float64))):
        page.wait_for_function(f"() => Array.from(document.querySelectorAll('.near-table th')).some(th => th.textContent.startsWith('{title}'))")
        cosines = other @ matrix[row] / np.linalg.norm(other, axis=1) / np.linalg.norm(matrix[row])
        order = [int(i) for i in np.argsort(-cosines) if other is not matrix or i != row][:20]
        listed = near_rows(page, title)
        assert [int(re.sub(r"\D", "", cells[1])) for cells in listed] == order
        np.testing.assert_allclose([float(cells[2]) for cells in listed], cosines[order], atol=6e-4)
    page.reload()
    drawn(page)
    page.wait_for_function(f"() => window.layerscope.cloud.overlay.chosen === {row}")


def test_a_search_marks_zooms_and_chooses_and_the_link_keeps_it(server, visit):
    page = visit(model=server.model, what="W_U")
    token = next(i for i, text in enumerate(server.texts) if len(text) == 1 and text.isalpha() and text.islower())
    whole = page.evaluate("() => window.layerscope.cloud.k")
    page.locator("#emb-search").fill(server.texts[token])
    page.wait_for_function(f"() => window.layerscope.cloud.overlay.marks?.length > 0 && new URL(location).searchParams.get('row') === '{token}'")
    wanted = {i for i, text in enumerate(server.texts) if server.texts[token].casefold() in text.casefold()}
    marks = page.evaluate("() => window.layerscope.cloud.overlay.marks.map(mark => mark.i)")
    assert set(marks) == wanted and marks[0] == token
    page.locator("#emb-search").fill(f"#{token}")
    page.wait_for_function("() => window.layerscope.cloud.overlay.marks?.length === 1")
    assert page.evaluate("() => window.layerscope.cloud.k") > 2 * whole
    page.locator(".legend-chip", has_text="lower").click()
    page.wait_for_function("() => new URL(location).searchParams.get('only') === 'lower'")
    page.reload()
    drawn(page)
    page.wait_for_function("() => document.querySelector('.legend-chip.chosen')?.textContent.startsWith('lower')")
    assert page.locator("#emb-search").input_value() == f"#{token}" and query_of(page)["what"] == "W_U"


def test_paths_go_through_every_layer_and_the_strip_chooses_them(server, visit):
    with open_trace(server.traces[0]) as trace:
        states = np.concatenate([trace["embed"], *(trace["resid_post", layer] for layer in range(3))]).astype(np.float64)
        n = trace.n_tokens
        page = visit(trace=trace.id, paths="all")
        unit = states / np.linalg.norm(states, axis=1, keepdims=True)
        np.testing.assert_allclose(places(page)[:, :2], PCA(2, svd_solver="full").fit_transform(unit), atol=1e-3)
        page.locator("#token-strip .tok").nth(2).click()
        page.wait_for_function(f"() => window.layerscope.cloud.overlay.paths?.some(path => path.strong && path.points.join() === '{','.join(str(2 + n * k) for k in range(4))}')")
        assert page.evaluate("() => window.layerscope.cloud.overlay.paths.length") == n
        page.wait_for_function("() => document.querySelector('#emb-near-title').textContent === `Nearest to ${window.layerscope.cloud.label(2)}`")
    assert query_of(page)["paths"] == "all" and query_of(page)["pos"] == "2"


def test_several_traces_share_a_projection_and_the_link_restores_all_of_it(server, visit):
    ids = [path.name.removesuffix(".h5") for path in server.traces]
    page = visit(trace=ids[0], traces=ids[1], what="z", layer=1, scale="raw", dims=3, colour="category")
    with open_trace(server.traces[0]) as one, open_trace(server.traces[1]) as two:
        values = np.concatenate([trace["z", 1].reshape(trace.n_tokens, -1) for trace in (one, two)]).astype(np.float64)
    np.testing.assert_allclose(places(page), PCA(3, svd_solver="full").fit_transform(values), atol=1e-3)
    assert page.evaluate("() => window.layerscope.cloud.dims") == 3
    page.wait_for_function("() => document.querySelectorAll('.legend-chip').length === 2")
    assert sorted(chip.split()[0] for chip in page.locator(".legend-chip").all_inner_texts()) == ["cats", "dogs"]
    page.wait_for_function("() => new URL(location).searchParams.get('colour') === 'category'")
    assert {key: query_of(page)[key] for key in ("what", "layer", "scale", "dims", "traces")} == {"what": "z", "layer": "1", "scale": "raw", "dims": "3", "traces": ids[1]}


def test_umap_is_a_job_and_the_model_can_be_drawn_by_it(server, visit):
    page = visit(model=server.model, method="umap")
    found = places(page)
    assert found.shape == (320, 3) and np.isfinite(found).all() and not found[:, 2].any() and np.ptp(found[:, 0]) > 1
    assert "UMAP of Input embeddings" in page.locator("#emb-title").inner_text()


def test_a_theme_changes_the_colours_and_not_the_points(server, visit):
    page = visit(model=server.model)
    before = page.evaluate("() => window.layerscope.cloud.colours.palette[0]")
    same = places(page)
    page.locator("#theme-button").click()
    page.wait_for_function(f"() => window.layerscope.cloud.colours && window.layerscope.cloud.colours.palette[0] !== '{before}'")
    assert np.array_equal(places(page), same)


def test_without_webgl_the_points_are_drawn_all_the_same_and_the_page_says_so(server, page, visit):
    page.add_init_script(NO_WEBGL)
    visit(model=server.model, dims=3)
    page.wait_for_function("() => document.querySelector('#emb-said').textContent.includes('offers no WebGL')")
    assert page.evaluate("() => window.layerscope.cloud.gl") is None and page.evaluate("() => window.layerscope.cloud.dims") == 3
    inked = page.evaluate(INKED)
    assert inked > 320


def test_what_is_shown_is_saved_as_csv_svg_and_png(server, visit, tmp_path):
    page = visit(model=server.model)
    saved = {}
    for kind in ("csv", "svg", "png"):
        with page.expect_download() as waiting:
            page.locator(f"[data-cloud='{kind}']").click()
        saved[kind] = tmp_path / f"embeddings.{kind}"
        waiting.value.save_as(saved[kind])
    with open(saved["csv"], newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["id"]) for line in lines] == list(range(320)) and not any(line["text"].startswith(("=", "+", "-", "@")) for line in lines)
    np.testing.assert_allclose([float(next(iter(line.values()))) for line in lines], places(page)[:, 0], rtol=1e-4, atol=1e-6)
    circles = [part for part in xml.etree.ElementTree.parse(saved["svg"]).iter() if part.tag.endswith("circle")]
    assert len(circles) >= 320
    with Image.open(saved["png"]) as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_the_page_fits_a_narrow_window_and_a_missing_model_is_one_sentence(server, page, visit):
    visit(model=server.model)
    page.set_viewport_size({"width": 1024, "height": 900})
    page.wait_for_timeout(500)
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    page.goto(f"{server.address}/embeddings?model=nonsense")
    assert "nonsense" in page.locator(".state-error").inner_text()

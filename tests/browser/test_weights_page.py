"""The Weights page in a real browser, against the real server and worker: what is drawn is what NumPy finds in the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlparse

import numpy as np
import pytest

from backend.weights import Weights, open_weights
from tests.browser.served import served
from tests.tiny_models import TinyModel

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
WAIT_MS = 100_000  # generous: other tests share the machine


@pytest.fixture(scope="module")
def server(tiny_mixtral: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Weights]]:
    """A running server with a mixture of experts as GGUF on its shelf: (address, the model's name, its weights)."""
    models = tmp_path_factory.mktemp("weights-shelf")
    (models / tiny_mixtral.gguf.name).write_bytes(tiny_mixtral.gguf.read_bytes())
    with served(tmp_path_factory.mktemp("data"), [models]) as address:
        yield address, tiny_mixtral.gguf.name, open_weights(tiny_mixtral.gguf)


@pytest.fixture
def visit(server, page):
    """Open the page of the model, wait until the matrix is drawn, and fail on any error in the browser's console."""
    address, model, _ = server
    problems: list[str] = []
    page.set_default_timeout(WAIT_MS)
    page.set_viewport_size({"width": 1440, "height": 1000})
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)

    def go(**query: object):
        page.goto(f"{address}/weights?{urlencode({'model': model, **query})}")
        page.wait_for_function("() => document.querySelector('#weights-map .js-plotly-plot')?._fullData?.length")
        return page

    yield go
    assert not problems, problems


def drawn(page, graph: str) -> np.ndarray:
    rows = page.evaluate(f"() => Array.from(document.querySelector('#{graph} .js-plotly-plot')._fullData[0].z, row => Array.from(row))")
    return np.array(rows, np.float32)


def resting_box(page, graph: str) -> dict[str, float]:
    """The plotting area of a graph in the middle of the window, once nothing above it grows any more."""
    before: dict[str, float] | None = None
    while True:
        page.evaluate(f"() => document.querySelector('{graph}').scrollIntoView({{ block: 'center', behavior: 'instant' }})")
        page.wait_for_timeout(500)
        box = page.locator(f"{graph} .nsewdrag").bounding_box()
        if box == before:
            return box
        before = box


def query_of(page) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlparse(page.url).query).items()}


def wait_for_title(page, words: str) -> None:
    page.wait_for_function(f"() => document.querySelector('#weights-hist-title')?.textContent === {json.dumps(words)}")


def test_a_model_is_read_when_its_page_is_opened_and_its_table_holds_numpys_numbers(server, visit):
    weights = server[2]
    page = visit()  # nothing was read before: the job runs while this waits
    page.wait_for_function("() => document.querySelectorAll('#weights-grid .ag-center-cols-container .ag-row').length > 5")
    rows = page.evaluate("() => { const rows = []; dash_ag_grid.getApi('weights-grid').forEachNode(node => rows.push(node.data)); return rows; }")
    assert [row["name"] for row in rows] == list(weights.native_names)
    for row in rows:
        values = weights[row["name"]].astype(np.float64)
        assert row["std"] == pytest.approx(values.std(), rel=1e-6) and row["abs_max"] == pytest.approx(np.abs(values).max())
        assert row["kurtosis"] == pytest.approx(((values - values.mean()) ** 4).mean() / values.var() ** 2, rel=1e-5)
    assert any("super-weight candidate" in row["mark"] for row in rows)


def test_the_table_is_searched_and_sorted_and_a_row_opens_its_tensor(server, visit):
    page = visit()
    page.locator("#weights-search").fill("W_router")
    page.wait_for_function("() => document.querySelectorAll('#weights-grid .ag-center-cols-container .ag-row').length === 3")
    page.locator("#weights-grid .ag-header-cell[col-id='std']").click()
    spread = {layer: float(server[2][f"blocks.{layer}.mlp.W_router"].std()) for layer in range(3)}
    most = max(spread, key=lambda layer: spread[layer])
    page.locator("#weights-grid .ag-center-cols-container .ag-row[row-index='0']").click()
    wait_for_title(page, f"blk.{most}.ffn_gate_inp.weight")
    page.wait_for_function(f"() => new URL(location).searchParams.get('tensor') === 'blk.{most}.ffn_gate_inp.weight'")
    page.reload()
    wait_for_title(page, f"blk.{most}.ffn_gate_inp.weight")


def test_the_matrix_is_that_of_the_file_whole_and_zoomed_and_the_link_keeps_the_zoom(server, visit):
    values = server[2]["blk.1.ffn_down_exps.weight"]
    page = visit(tensor="blocks.1.mlp.experts.W_out", index=3)
    page.wait_for_function("() => document.querySelector('#weights-map-facts').textContent.startsWith('All 64 rows and 48 columns')")
    assert np.array_equal(drawn(page, "weights-map"), values[3])
    box = resting_box(page, "#weights-map")
    corners = [(box["x"] + box["width"] * (column + 0.5) / 48, box["y"] + box["height"] * (row + 0.5) / 64) for row, column in ((9.8, 3.8), (40.2, 20.2))]
    page.mouse.move(*corners[0])
    page.mouse.down()
    page.mouse.move(*corners[1], steps=4)
    page.mouse.up()
    page.wait_for_function("() => document.querySelector('#weights-map-facts').textContent.startsWith('Rows 10 to 40, columns 4 to 20')")
    assert np.array_equal(drawn(page, "weights-map"), values[3, 10:41, 4:21])
    assert query_of(page)["zoom"] == "10-41,4-21" and query_of(page)["index"] == "3"
    page.reload()
    page.wait_for_function("() => document.querySelector('#weights-map-facts')?.textContent.startsWith('Rows 10 to 40')")
    page.get_by_role("button", name="Whole matrix").click()
    page.wait_for_function("() => document.querySelector('#weights-map-facts').textContent.startsWith('All 64 rows')")


def test_norms_and_singular_values_come_from_a_job_and_are_numpys(server, visit):
    values = server[2]["blk.2.attn_output.weight"].astype(np.float64)
    page = visit(tensor="blk.2.attn_output.weight")
    page.wait_for_function("() => document.querySelector('#weights-spectrum .js-plotly-plot')?._fullData?.length")
    shown = page.evaluate("() => Array.from(document.querySelector('#weights-spectrum .js-plotly-plot')._fullData[0].y)")
    np.testing.assert_allclose(shown, np.linalg.svd(values, compute_uv=False), rtol=1e-4)
    norms = page.evaluate("() => document.querySelector('#weights-norms .js-plotly-plot')._fullData.map(line => Array.from(line.y))")
    np.testing.assert_allclose(norms[0], np.linalg.norm(values, axis=1), rtol=1e-5)
    np.testing.assert_allclose(norms[1], np.linalg.norm(values, axis=0), rtol=1e-5)


def test_a_candidate_opens_its_tensor_with_its_place_marked(server, visit):
    weights = server[2]
    page = visit(tensor="embed.W_E")
    sigmas = {name: np.abs(weights[name]) / weights[name].astype(float).std() for name in (f"blk.{layer}.ffn_down_exps.weight" for layer in range(3))}
    name = max(sigmas, key=lambda one: sigmas[one].max())
    expert, row, column = np.unravel_index(int(np.argmax(sigmas[name])), sigmas[name].shape)
    page.locator(".candidates button").first.click()
    wait_for_title(page, name)
    page.wait_for_function("() => document.querySelector('#weights-map .js-plotly-plot')._fullData.length === 2")
    mark = page.evaluate("() => { const m = document.querySelector('#weights-map .js-plotly-plot')._fullData[1]; return [m.y[0], m.x[0]]; }")
    assert mark == [row, column]
    page.wait_for_function(f"() => new URL(location).searchParams.get('index') === '{expert}'")
    assert query_of(page)["mark"] == f"{row},{column}"
    page.locator(".candidates a").click()
    page.wait_for_function("(name) => location.pathname === '/sensitivity' && document.querySelector('#sens-model')?.textContent.includes(name)", arg=server[1])


def test_a_cell_of_the_heatmap_opens_its_tensor_and_holds_the_statistic(server, visit):
    weights = server[2]
    page = visit(stat="l2", scale="linear")
    components = page.evaluate("() => document.querySelector('#weights-stat .js-plotly-plot').layout.xaxis.ticktext")
    shown = drawn(page, "weights-stat")
    for column, component in enumerate(components):
        for layer in range(3):
            assert shown[layer, column] == pytest.approx(np.linalg.norm(weights[f"blocks.{layer}.{component}"].astype(float)), rel=1e-5)
    page.evaluate("() => document.querySelector('#weights-stat .js-plotly-plot').scrollIntoView({ block: 'center', behavior: 'instant' })")
    box = None
    while (now := page.locator("#weights-stat .nsewdrag").bounding_box()) != box:  # cards above may still grow
        box = now
        page.wait_for_timeout(500)
    page.mouse.click(box["x"] + box["width"] * 0.5 / len(components), box["y"] + box["height"] * 5 / 6)
    wait_for_title(page, "blk.2.attn_norm.weight")
    page.wait_for_function("() => document.querySelector('#weights-map-facts').textContent === 'A vector of 64.'")


def test_a_model_that_is_not_there_is_one_sentence(server, page):
    page.set_default_timeout(WAIT_MS)
    page.goto(f"{server[0]}/weights?model=nonsense")
    assert "nonsense" in page.locator(".state-error").inner_text()

"""The Quantization page in a real browser, against the real server and worker: a tiny model in Q4_0 compared with its F32 file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlparse

import numpy as np
import pytest

from backend.files.quantizer import quantize
from backend.reports.quantization_report import QuantizationReport
from tests.browser.served import served
from tests.test_quantization import side
from tests.tiny_models import save_tiny

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
PROMPT = "Mary gave the <b>book</b> to John"
WAIT_MS = 100_000  # generous: other tests share the machine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A running server whose shelf holds tiny.hf, tiny-f32.gguf and tiny-q4_0.gguf: (address, the folder)."""
    models, data = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("data")
    tiny = save_tiny("llama", models / "tiny")
    quantize(tiny.gguf, models / "tiny-q4_0.gguf", "Q4_0")
    with served(data, [models]) as address:
        yield address, models


@pytest.fixture(scope="module")
def report(server: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> QuantizationReport:
    """The same comparison made here, without server, queue and cache."""
    from backend.experiments.quantization import compare

    return compare(side(server[1] / "tiny-q4_0.gguf"), side(server[1] / "tiny-f32.gguf"), [PROMPT], tmp_path_factory.mktemp("work"))


@pytest.fixture
def visit(server, page):
    """Open the page with a query, and fail on any error in the browser's console."""
    problems: list[str] = []
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)

    def go(**query: object):
        page.goto(f"{server[0]}/quantization?{urlencode(query)}", wait_until="domcontentloaded")
        page.wait_for_selector("#quant-run")
        return page

    yield go
    assert problems == []


@pytest.fixture
def compared(visit):
    """The page with the report of the tiny model on it."""
    page = visit(model="tiny-q4_0.gguf", reference="tiny-f32.gguf", prompt=PROMPT)
    page.wait_for_selector("#quant-body .state, #quant-sentence")
    if not page.locator("#quant-sentence").count():
        assert "Nothing compared yet" in page.locator("#quant-body").inner_text()
        page.locator("#quant-run").click()
    page.wait_for_selector("#quant-sentence")
    for graph in ("quant-path", "quant-weights", "quant-activations", "quant-positions", "quant-kl"):
        page.wait_for_function(f"() => document.querySelector('#{graph} .js-plotly-plot')?._fullData?.length > 0")
    return page


def drawn(page, graph: str) -> np.ndarray:
    """The numbers of the heatmap that the browser has drawn, NaN for gaps."""
    rows = page.evaluate(f"() => Array.from(document.querySelector('#{graph} .js-plotly-plot')._fullData[0].z, row => Array.from(row, v => Number.isFinite(v) ? v : null))")
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=np.float64)


def query_of(page) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlparse(page.url).query).items()}


def test_a_comparison_runs_as_a_job_and_the_page_shows_what_it_found(compared, report: QuantizationReport) -> None:
    assert compared.locator("#quant-sentence").inner_text() == report.sentence()
    assert report.sentence().startswith("Q4_0 against F32: weights ")
    components = list(dict.fromkeys(row["component"] for row in report.weights if row["layer"] is not None))
    off = {(row["component"], row["layer"]): 100 * row["relative_rmse"] for row in report.weights}
    expected = np.array([[off[name, layer] for layer in range(3)] for name in components])
    np.testing.assert_allclose(drawn(compared, "quant-weights"), expected, rtol=1e-5, atol=1e-7)
    sites = drawn(compared, "quant-activations")
    np.testing.assert_allclose(sites[report.sites.index("resid_post"), 1:-1], 100 * report.by_layer("relative_l2", "resid_post"), rtol=1e-5)
    kl = compared.evaluate("() => Array.from(document.querySelector('#quant-kl .js-plotly-plot')._fullData[0].y)")
    np.testing.assert_allclose(kl, report.prompts[0].shift["kl"], rtol=1e-4, atol=1e-9)
    assert compared.locator("#quant-tensors tbody tr").count() == len(report.weights)
    assert compared.locator("#quant-changed tbody tr.chosen").count() == int(report.prompts[0].changed.sum())


def test_metric_and_site_are_in_the_address_and_a_reload_shows_the_same(compared, report: QuantizationReport) -> None:
    compared.evaluate("() => { window.dash_clientside.set_props('quant-wmetric', { value: 'sqnr_db' }); window.dash_clientside.set_props('quant-site', { value: 'z' }); }")
    compared.wait_for_function("() => document.querySelector('#quant-positions-title').textContent === 'Divergence of z, token by token'")
    compared.wait_for_function("() => new URL(location).searchParams.get('site') === 'z' && new URL(location).searchParams.get('wmetric') === 'sqnr_db'")
    compared.reload()
    compared.wait_for_function("() => document.querySelector('#quant-positions-title')?.textContent === 'Divergence of z, token by token'")
    compared.wait_for_function("() => document.querySelector('#quant-positions .js-plotly-plot')?._fullData?.length > 0")
    np.testing.assert_allclose(drawn(compared, "quant-positions"), 100 * report.at_position(0, "relative_l2", "z"), rtol=1e-4)
    worst = min((row for row in report.weights), key=lambda row: row["sqnr_db"])
    compared.wait_for_function(f"() => document.querySelector('#quant-tensors tbody td')?.textContent === '{worst['name']}'")
    assert query_of(compared)["prompt"] == PROMPT


def test_a_click_on_a_site_shows_it_token_by_token(compared, report: QuantizationReport) -> None:
    compared.evaluate("() => document.querySelector('#quant-activations .js-plotly-plot').scrollIntoView({ block: 'center', behavior: 'instant' })")
    box = compared.locator("#quant-activations .nsewdrag").bounding_box()
    row = report.sites.index("mlp_out")
    compared.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * (row + 0.5) / len(report.sites))
    compared.wait_for_function("() => document.querySelector('#quant-positions-title').textContent === 'Divergence of mlp_out, token by token'")
    # The point under the output matrix of layer 0 in the picture that joins the three.
    at = compared.evaluate("""() => {
        const graph = document.querySelector('#quant-path .js-plotly-plot'), line = graph._fullData.find(t => t.name === 'attention' && t.type === 'scatter');
        graph.scrollIntoView({ block: 'center', behavior: 'instant' });
        const i = line.customdata.findIndex(text => text.startsWith('attn_out at layer 0')), box = graph.getBoundingClientRect();
        const { xaxis3, yaxis3 } = graph._fullLayout;
        return [box.x + xaxis3._offset + xaxis3.d2p(line.x[i]), box.y + yaxis3._offset + yaxis3.d2p(line.y[i])];
    }""")
    compared.mouse.move(*at)
    compared.mouse.click(*at)
    compared.wait_for_function("() => document.querySelector('#quant-positions-title').textContent === 'Divergence of attn_out, token by token'")


def test_token_text_is_shown_as_text(compared) -> None:
    assert compared.locator("#quant-body b").count() == 0
    words = compared.evaluate("() => document.querySelector('#quant-kl .js-plotly-plot').layout.xaxis.ticktext.join('')")
    assert "&lt;" in words and "<b>" not in words


def test_only_unquantized_models_of_the_same_sizes_are_offered_as_reference(visit) -> None:
    page = visit(model="tiny-q4_0.gguf")
    page.wait_for_function("() => new URL(location).searchParams.get('reference') === 'tiny-f32.gguf'")
    page = visit(model="demo-dense")
    page.wait_for_function("() => new URL(location).searchParams.get('reference') === 'demo-dense-f16'")


def test_what_cannot_be_compared_is_said_in_one_sentence(visit) -> None:
    page = visit(model="tiny-q4_0.gguf", reference="tiny-f32.gguf", prompt="x" * 6000)
    page.locator("#quant-run").click()
    page.wait_for_selector("#quant-progress .state-error")
    assert "of the context" in page.locator("#quant-progress .state-error").inner_text()
    page.locator("#quant-prompt").fill("")
    page.locator("#quant-run").click()
    page.wait_for_selector("#quant-refused .state-error")
    assert "The prompt is empty" in page.locator("#quant-refused").inner_text()


def test_a_report_of_files_that_changed_is_not_shown_again(server, compared, visit) -> None:
    os.utime(server[1] / "tiny-q4_0.gguf")
    page = visit(model="tiny-q4_0.gguf", reference="tiny-f32.gguf", prompt=PROMPT)
    page.wait_for_selector("#quant-body .state")
    assert "Nothing compared yet" in page.locator("#quant-body").inner_text()

"""Batch in a real browser: a file becomes traces, the failure is named, the aggregates are those of the traces, the address gives the view back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest

from backend.trace import Trace, open_trace
from tests.browser.served import served
from tests.tiny_models import TinyModel

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
WAIT_MS = 150_000  # generous: other tests share the machine
ROWS = [("The capital of France", "geo"), ("The capital of Italy", "geo"), ("Mary gave John the book", "names"), ("<b>John</b> gave", "names"), ("word " * 1200, "long")]


@pytest.fixture(scope="module")
def server(tiny_mistral: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A running server without a trace: (address, traces folder)."""
    data = tmp_path_factory.mktemp("data")
    with served(data, [tiny_mistral.hf.parent]) as address:
        yield address, data / "traces"


@pytest.fixture
def open_page(server, page):
    """The page; fails on any error in the browser's console."""
    problems: list[str] = []
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(f"{server[0]}/batch", wait_until="domcontentloaded")
    page.wait_for_selector("#batch-preview > *")
    yield page
    assert problems == []


def drawn(page, graph: str) -> np.ndarray:
    rows = page.evaluate(f"() => Array.from(document.querySelector('#{graph} .js-plotly-plot')._fullData[0].z, row => Array.from(row, v => Number.isFinite(v) ? v : null))")
    return np.array([[np.nan if v is None else v for v in row] for row in rows], np.float64)


def wait_for_heads(page, title: str) -> None:
    page.wait_for_function(f"() => document.querySelector('#agg-heads .js-plotly-plot')?.layout?.annotations?.[0]?.text === {json.dumps(title)}")


def traces_of(batch_id: str, folder: Path, category: str) -> list[Trace]:
    return [open_trace(folder / f"{batch_id}_{number:05d}.h5") for number, (_, name) in enumerate(ROWS) if name == category]


def test_a_file_becomes_traces_and_their_aggregates(server, tiny_mistral, open_page, tmp_path):
    page = open_page
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,category,note\n" + "".join(f'"{text}",{category},x\n' for text, category in ROWS))
    page.evaluate(f"() => window.dash_clientside.set_props('batch-model', {{ value: {json.dumps(tiny_mistral.hf.name)} }})")
    page.set_input_files("#batch-upload input[type=file]", str(file))
    page.wait_for_function("() => document.querySelector('#batch-preview-words').textContent === '5 prompts'")
    said = page.locator("#batch-preview").inner_text()
    assert "geo 2" in said and "Ignored: note" in said and "<b>John</b> gave" in said
    page.click("#batch-run")
    page.wait_for_function("() => new URL(location).searchParams.get('batch')")
    batch_id = parse_qs(urlparse(page.url).query)["batch"][0]
    page.wait_for_function("() => document.querySelector('#batch-words')?.textContent === '4 of 5 done, 1 failed'")

    page.wait_for_function("() => document.querySelectorAll('#batch-results tbody a.btn').length === 4")
    rows = page.locator("#batch-results tbody tr")
    with open_trace(server[1] / f"{batch_id}_00000.h5") as trace:
        cells = rows.nth(0).locator("td").all_inner_texts()
        assert cells[1:3] == [ROWS[0][0], "geo"] and float(cells[4]) == pytest.approx(trace.next_logprobs[:-1].mean(), abs=6e-4)
        assert float(cells[5].replace(",", "")) == pytest.approx(np.exp(-trace.next_logprobs[:-1].mean()), rel=1e-3)
    assert "more than the 1,024 of the context" in rows.nth(4).inner_text()

    page.wait_for_function("() => window.dash_component_api.getLayout('agg-a')?.props.options.length === 2")  # a menu takes only what it offers
    page.evaluate("() => { for (const [id, value] of [['agg-a', 'geo'], ['agg-b', 'names'], ['agg-metric', 'sink']]) window.dash_clientside.set_props(id, { value }); }")
    wait_for_heads(page, "First token, geo − names")
    means = [np.mean([trace.result("attn_sink") for trace in traces_of(batch_id, server[1], category)], axis=0) for category in ("geo", "names")]
    np.testing.assert_allclose(drawn(page, "agg-heads"), means[0] - means[1], atol=1e-6)

    page.reload()  # groups and metric come back from the address
    wait_for_heads(page, "First token, geo − names")
    np.testing.assert_allclose(drawn(page, "agg-heads"), means[0] - means[1], atol=1e-6)
    page.evaluate("() => window.dash_clientside.set_props('agg-show', { value: 'b' })")
    wait_for_heads(page, "First token, names")
    np.testing.assert_allclose(drawn(page, "agg-heads"), means[1], atol=1e-6)
    table = page.locator("#agg-predictions").inner_text()
    logprobs = [trace.next_logprobs[:-1].mean() for trace in traces_of(batch_id, server[1], "geo")]
    assert f"{np.mean(logprobs):.3f} ± {np.std(logprobs, ddof=1):.3f}" in table

    page.get_by_role("link", name="In the library").click()
    page.wait_for_function("() => document.querySelector('#library-count')?.textContent === '4 traces'")


def test_pasted_lines_with_nothing_in_them_and_a_broken_file_are_one_sentence(open_page, tmp_path):
    page = open_page
    file = tmp_path / "bad.csv"
    file.write_bytes(b"prompt\nfine\n\xff\n")
    page.set_input_files("#batch-upload input[type=file]", str(file))
    page.wait_for_function("() => document.querySelector('#batch-preview').textContent.includes('Line 3 of bad.csv is not UTF-8')")
    page.click("#batch-run")
    page.wait_for_function("() => document.querySelector('#batch-refused').textContent.includes('Line 3 of bad.csv is not UTF-8')")
    page.click("#batch-remove")
    page.wait_for_function("() => document.querySelector('#batch-preview').textContent.includes('No prompts yet')")
    page.click("#batch-run")
    page.wait_for_function("() => document.querySelector('#batch-refused').textContent.includes('The text holds no prompt')")

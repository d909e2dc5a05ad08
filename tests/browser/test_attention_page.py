"""The Attention page's views in a real browser: what it draws is what the trace holds, changed as its controls say, after clicks and after a reload."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest

from backend.analysis.attention_views import without_first
from backend.trace import Trace, open_trace
from tests.browser.served import served
from tests.tiny_models import TinyModel

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
PROMPT = "Mary\tgave the\nbook to John. <b>Mary</b> שלום gave the book"
N_LONG = 600
WAIT_MS = 100_000  # generous: other tests share the machine


class Site:
    """A running server: its address, the model, and the traces on its shelf."""

    def __init__(self, address: str, model: TinyModel, short: Trace, long: Trace) -> None:
        self.address, self.model, self.short, self.long = address, model, short, long


@pytest.fixture(scope="module")
def site(tiny_mistral: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    from backend.engines import OpenOptions, open_engine
    from backend.experiments.capture import CaptureSpec, capture
    from backend.library import Library
    from config import load_settings

    data = tmp_path_factory.mktemp("data")
    settings = load_settings(data_dir=data, models_dirs=[tiny_mistral.hf.parent])
    engine = open_engine(tiny_mistral.hf, OpenOptions())
    ids = tuple(int(i) for i in np.random.default_rng(0).integers(2, 300, N_LONG))
    specs = (CaptureSpec(prompt=PROMPT, precision="float32"), CaptureSpec(token_ids=ids, sites=("attn_pattern",), lens=False))
    paths = [capture(engine, spec, settings.traces_dir) for spec in specs]
    engine.close()
    for path in paths:
        Library.from_settings(settings).add(path)
    with served(data, [tiny_mistral.hf.parent]) as address:
        with open_trace(paths[0]) as short, open_trace(paths[1]) as long:
            yield Site(address, tiny_mistral, short, long)


@pytest.fixture
def visit(site: Site, page):
    """Open the page in a state, wait for its pattern, and fail on any error in the browser's console."""
    problems: list[str] = []
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)

    def go(trace: Trace, **query: object):
        asked = "&".join(f"{key}={value}" for key, value in {"trace": trace.id, **query}.items())
        page.goto(f"{site.address}/attention?{asked}", wait_until="domcontentloaded")
        page.wait_for_function("() => document.querySelector('#pattern-title')?.textContent.length > 0")
        return page

    yield go
    assert problems == []


def drawn(page, graph: str = "pattern") -> np.ndarray:
    """The numbers that the browser has drawn, NaN for gaps."""
    page.wait_for_function(f"() => document.querySelector('#{graph} .js-plotly-plot')?._fullData?.length > 0")
    rows = page.evaluate(f"() => Array.from(document.querySelector('#{graph} .js-plotly-plot')._fullData[0].z, row => Array.from(row, v => Number.isFinite(v) ? v : null))")
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=np.float64)


def top_of_colours(page, graph: str) -> float:
    return page.evaluate(f"() => document.querySelector('#{graph} .js-plotly-plot')._fullData[0].zmax")


def query_of(page) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlparse(page.url).query).items()}


def wait_title(page, words: str) -> None:
    page.wait_for_function("words => document.querySelector('#pattern-title')?.textContent === words", arg=words)


def choose(page, dropdown: str, words: str) -> None:
    page.locator(f"#{dropdown}").click()
    page.get_by_role("option", name=words, exact=True).or_(page.locator(".dash-dropdown-option", has_text=words)).first.click()


def lower(values: np.ndarray) -> np.ndarray:
    return np.where(np.tril(np.ones(values.shape, bool)), values, np.nan)


def test_hiding_the_first_token_renormalises_the_rows_and_a_reload_keeps_it(site: Site, visit):
    page = visit(site.short, layer=1, head=2)
    np.testing.assert_allclose(drawn(page), lower(site.short.head("attn_pattern", 1, 2)), atol=1e-7)
    page.locator("#pattern-first input").check()
    page.wait_for_function("() => new URL(window.location).searchParams.get('first') === 'hidden'")
    expected = lower(without_first(site.short.head("attn_pattern", 1, 2)))
    page.wait_for_function("() => !Number.isFinite(document.querySelector('#pattern .js-plotly-plot')._fullData[0].z[1][0])")
    np.testing.assert_allclose(drawn(page), expected, atol=1e-6)
    page.reload()
    wait_title(page, "Pattern of 1.2")
    np.testing.assert_allclose(drawn(page), expected, atol=1e-6)


def test_value_weighted_attention_is_attention_times_the_length_of_what_the_head_writes(site: Site, visit):
    """The row of the first token looks at nothing else: its one cell is the length of that head's output there, which the trace derives itself."""
    page = visit(site.short, layer=1, head=3, view="weighted")
    wait_title(page, "Value-weighted of 1.3")
    shown = drawn(page)
    results = site.short["result", 1]  # (pos, head, d_model)
    assert shown[0, 0] == pytest.approx(np.linalg.norm(results[0, 3]), rel=1e-4)
    w_o = _w_o(site)[:, 3]
    norms = np.linalg.norm(site.short["v", 1][:, 3 // (site.short.info.n_heads // site.short.info.n_kv_heads)] @ w_o.T, axis=-1)
    np.testing.assert_allclose(shown, lower(site.short.head("attn_pattern", 1, 3) * norms), rtol=1e-4, atol=1e-7)
    assert query_of(page)["view"] == "weighted"


def _w_o(site: Site) -> np.ndarray:
    from backend.weights import open_weights

    w_o = open_weights(site.model.hf)["blocks.1.attn.W_O"]
    return w_o.reshape(w_o.shape[0], site.short.info.n_heads, -1)


def test_a_view_whose_site_was_not_captured_offers_the_capture(site: Site, visit):
    page = visit(site.short, layer=1, head=0, view="scores")
    page.locator("#pattern-state button", has_text="Capture attn_scores").wait_for()
    assert "attn_scores" in page.locator("#pattern-state").inner_text()


def test_the_mean_of_a_layer_and_rollout_are_chosen_like_heads(site: Site, visit):
    page = visit(site.short, layer=1, head=0)
    choose(page, "pattern-of", "Mean of the layer's heads")
    wait_title(page, "Mean pattern of layer 1")
    np.testing.assert_allclose(drawn(page), lower(site.short["attn_pattern", 1].mean(0)), atol=1e-6)
    choose(page, "pattern-of", "Rollout to this layer")
    wait_title(page, "Rollout to layer 1")
    rolled = np.eye(site.short.n_tokens)
    for layer in range(2):
        rolled = (0.5 * site.short["attn_pattern", layer].mean(0) + 0.5 * np.eye(len(rolled))) @ rolled
    np.testing.assert_allclose(drawn(page), lower(rolled), atol=1e-3)
    assert query_of(page)["of"] == "rollout"


def test_a_pinned_head_stays_beside_the_others_in_the_same_colours(site: Site, visit):
    page = visit(site.short, layer=0, head=1, view="weighted")
    page.locator("#pin-head").click()
    page.wait_for_function("() => document.querySelector('#pinned-title')?.textContent === 'Pinned: 0.1'")
    page.evaluate("() => window.dash_clientside.set_props('chosen-head', { data: { layer: 1, head: 2 } })")
    wait_title(page, "Value-weighted of 1.2")
    page.wait_for_function("() => new URL(window.location).searchParams.get('pin') === '0.1'")
    page.reload()
    wait_title(page, "Value-weighted of 1.2")
    page.wait_for_function("() => document.querySelector('#pinned-title')?.textContent === 'Pinned: 0.1'")
    current, pinned = drawn(page), drawn(page, "pinned")
    assert top_of_colours(page, "pattern") == pytest.approx(top_of_colours(page, "pinned"))
    assert top_of_colours(page, "pattern") == pytest.approx(max(np.nanmax(current), np.nanmax(pinned)), rel=1e-6)
    page.locator("#unpin-head").click()
    page.wait_for_function("() => document.querySelector('#pinned-pane').hidden && !new URL(window.location).searchParams.has('pin')")


def test_a_token_s_card_shows_its_row_and_its_column(site: Site, visit):
    page = visit(site.short, layer=1, head=2, pos=5, scope="all")
    both = "() => Array.from(document.querySelector('#token-attention .js-plotly-plot')?._fullData ?? [], t => Array.from(t.y))"
    page.wait_for_function(f"() => ({both})().length === 2")
    mean = np.mean([site.short["attn_pattern", layer].mean(0) for layer in range(site.short.info.n_layers)], axis=0)
    row, column = page.evaluate(both)
    np.testing.assert_allclose(row, mean[5, :6], atol=1e-3)
    np.testing.assert_allclose(column, mean[5:, 5], atol=1e-3)
    best = page.locator("#token-tables table").first.locator("tbody tr").first
    assert best.get_attribute("data-pos") == str(int(np.argmax(mean[5, :6])))
    words = page.locator("#token-strips").inner_text()
    assert "⇥" in words and "\t" not in words, "a tab is seen as a sign"
    page.locator(".attention-strip [data-at='3']").first.click()
    page.wait_for_function("() => document.querySelector('#token-subtitle').textContent.startsWith('Position 3,')")
    assert query_of(page)["pos"] == "3" and query_of(page)["scope"] == "all"


def test_zooming_in_reads_the_range_again_cell_by_cell(site: Site, visit):
    page = visit(site.long, layer=1, head=2)
    whole = site.long.head("attn_pattern", 1, 2)
    small = drawn(page)
    assert small.shape == (256, 256) and np.nanmax(small) == pytest.approx(whole.max())
    box = page.locator("#pattern .nsewdrag").bounding_box()
    assert box
    page.locator("#pattern").scroll_into_view_if_needed()
    box = page.locator("#pattern .nsewdrag").bounding_box()
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.6 * box["height"], steps=5)
    page.mouse.up()
    page.wait_for_function("() => new URL(window.location).searchParams.has('zoom')")
    top, bottom, left, right = (int(part) for part in query_of(page)["zoom"].split(","))
    assert 0.4 * N_LONG < top < bottom < 0.7 * N_LONG and 0.05 * N_LONG < left < right < 0.3 * N_LONG
    page.wait_for_function("size => document.querySelector('#pattern .js-plotly-plot')._fullData[0].z.length === size", arg=bottom - top)
    np.testing.assert_array_equal(drawn(page), whole[top:bottom, left:right])
    page.reload()
    page.wait_for_function("size => document.querySelector('#pattern .js-plotly-plot')?._fullData?.[0]?.z?.length === size", arg=bottom - top)
    assert page.locator("#pattern-subtitle").inner_text().count("Rows") == 2
    page.locator("#pattern-reset").click()
    page.wait_for_function("() => document.querySelector('#pattern .js-plotly-plot')._fullData[0].z.length === 256")
    assert "zoom" not in query_of(page)


def test_double_clicking_a_zoomed_pattern_shows_the_whole_prompt(site: Site, visit):
    page = visit(site.long, layer=1, head=2, zoom="300,340,20,60")
    page.wait_for_function("() => document.querySelector('#pattern .js-plotly-plot')?._fullData?.[0]?.z?.length === 40")
    page.locator("#pattern").scroll_into_view_if_needed()
    box = page.locator("#pattern .nsewdrag").bounding_box()
    page.mouse.dblclick(box["x"] + 60, box["y"] + 60)
    page.wait_for_function("() => document.querySelector('#pattern .js-plotly-plot')._fullData[0].z.length === 256")


def test_the_tip_of_a_cell_names_both_tokens_as_text_and_the_value(site: Site, visit):
    page = visit(site.short, layer=1, head=2)
    drawn(page)
    page.locator("#pattern").scroll_into_view_if_needed()
    box, n = page.locator("#pattern .nsewdrag").bounding_box(), site.short.n_tokens
    row, column = 9, 4
    page.mouse.move(box["x"] + (column + 0.3) * box["width"] / n, box["y"] + (row + 0.3) * box["height"] / n)
    page.mouse.move(box["x"] + (column + 0.5) * box["width"] / n, box["y"] + (row + 0.5) * box["height"] / n)
    page.wait_for_function("() => document.querySelector('.tip')?.textContent.includes('looks at')")
    said = page.locator(".tip").inner_text()
    assert f"(position {row})" in said and f"(position {column})" in said
    assert float(said.rsplit(" ", 1)[1]) == pytest.approx(site.short.head("attn_pattern", 1, 2)[row, column], rel=1e-3)


def test_sparsity_and_mean_are_columns_of_the_table_with_a_threshold(site: Site, visit):
    page = visit(site.short, layer=1, head=2, metric="below", below=0)
    page.wait_for_function("() => document.querySelector('#head-table')?.textContent.includes('Share below 0.1')")
    cells = np.tril_indices(site.short.n_tokens)
    shares = np.array([[(site.short.head("attn_pattern", layer, head)[cells] < 0.1).mean() for head in range(4)] for layer in range(site.short.info.n_layers)])
    np.testing.assert_allclose(drawn(page, "metric-heads"), shares, atol=1e-6)
    first = page.locator("#head-table tbody tr").first.locator("td")
    layer, head = np.unravel_index(int(np.argmax(shares.astype(np.float32))), shares.shape)
    assert first.first.inner_text() == f"{layer}.{head}"


def test_every_head_of_a_long_trace_is_counted_by_a_job(site: Site, visit, monkeypatch: pytest.MonkeyPatch):
    page = visit(site.long, layer=1, head=2)
    page.wait_for_function("() => document.querySelector('#head-table')?.textContent.includes('Induction')")
    button = page.locator("#count-heads")
    if button.is_visible():
        button.click()
    page.wait_for_function("() => document.querySelector('#head-table')?.textContent.includes('Mean attention')")
    shown = page.locator("#head-table tbody tr").first.locator("td").last.inner_text()
    assert float(shown) == pytest.approx(2 / (N_LONG + 1), abs=1e-4)


def test_the_detector_runs_on_the_model_and_its_rows_open_the_head(site: Site, visit):
    page = visit(site.short, layer=0, head=0)
    page.locator("#detector-run").click()
    page.wait_for_function("() => document.querySelectorAll('#detector-lists table').length === 3")
    assert "8 prompts of 32 random tokens said 2 times" in page.locator("#detector-subtitle").inner_text()
    row = page.locator("#detector-lists table").first.locator("tbody tr").first
    name = row.locator("td").first.inner_text()
    row.click()
    wait_title(page, f"Pattern of {name}")
    page.reload()  # the result is kept
    page.wait_for_function("() => document.querySelectorAll('#detector-lists table').length === 3")


def test_the_csv_holds_what_is_shown_with_both_tokens_named(site: Site, visit, tmp_path: Path):
    page = visit(site.short, layer=1, head=2, scale="sqrt")
    drawn(page)
    with page.expect_download() as download:
        page.locator("[data-tool='csv'][data-graph='pattern']").click()
    download.value.save_as(tmp_path / "pattern.csv")
    rows = list(csv.reader((tmp_path / "pattern.csv").open(encoding="utf-8")))
    n = site.short.n_tokens
    assert len(rows) == n + 1 and all(f"(position {at})" in rows[0][at + 1] and f"(position {at})" in rows[at + 1][0] for at in range(n))
    values = np.array([[float(cell) if cell else np.nan for cell in row[1:]] for row in rows[1:]])
    np.testing.assert_allclose(values, lower(site.short.head("attn_pattern", 1, 2)), rtol=1e-5, atol=1e-7)

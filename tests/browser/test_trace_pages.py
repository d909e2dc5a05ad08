"""Attention, Activations and Logit lens in a real browser, against the real server and worker, on a trace of a tiny model.

What the page shows is held against the trace file read directly: the same head, the same values, after clicks, reloads and links.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
from playwright.sync_api import expect

from backend.analysis import lens as lens_analysis
from backend.trace import Trace, open_trace
from tests.browser.served import served
from tests.tiny_models import TinyModel

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
PROMPT = "Mary gave the book to John. <b>Mary</b> gave the book"
WAIT_MS = 100_000  # generous: other tests share the machine


@pytest.fixture(scope="module")
def server(tiny_mistral: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Trace, TinyModel]]:
    """A running server with one trace on its shelf: (address, the trace, the model)."""
    from backend.engines import OpenOptions, open_engine
    from backend.experiments.capture import CaptureSpec, capture
    from backend.library import Library
    from config import load_settings

    data = tmp_path_factory.mktemp("data")
    settings = load_settings(data_dir=data, models_dirs=[tiny_mistral.hf.parent])
    engine = open_engine(tiny_mistral.hf, OpenOptions())
    path = capture(engine, CaptureSpec(prompt=PROMPT, max_new_tokens=2), settings.traces_dir)
    engine.close()
    Library.from_settings(settings).add(path)
    with served(data, [tiny_mistral.hf.parent]) as address:
        with open_trace(path) as trace:
            yield address, trace, tiny_mistral


@pytest.fixture(scope="module")
def partial(server: tuple[str, Trace, TinyModel]) -> Iterator[Trace]:
    """A second trace on the same shelf: the attention map of one head, some of its rows, and no lens."""
    from backend.engines import OpenOptions, open_engine
    from backend.experiments.capture import CaptureSpec, capture
    from backend.library import Library
    from config import load_settings

    folder = server[1].path.parent
    engine = open_engine(server[2].hf, OpenOptions())
    path = capture(engine, CaptureSpec(prompt=PROMPT, heads=((1, 2),), rows=(3, 9), lens=False), folder)
    engine.close()
    Library.from_settings(load_settings(data_dir=folder.parent)).add(path)
    with open_trace(path) as trace:
        yield trace


@pytest.fixture(scope="module")
def narrow(server: tuple[str, Trace, TinyModel]) -> Trace:
    """A third trace on the shelf: the residual stream and nothing else."""
    from backend.engines import OpenOptions, open_engine
    from backend.experiments.capture import CaptureSpec, capture
    from backend.library import Library
    from config import load_settings

    folder = server[1].path.parent
    engine = open_engine(server[2].hf, OpenOptions())
    path = capture(engine, CaptureSpec(prompt=PROMPT, sites=("resid_post",), lens=False), folder)
    engine.close()
    Library.from_settings(load_settings(data_dir=folder.parent)).add(path)
    with open_trace(path) as trace:
        return trace


@pytest.fixture
def visit(server, page):
    """Open a path of the trace, wait for the named graph, and fail on any error in the browser's console."""
    address, trace, _ = server
    problems: list[str] = []
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)

    def go(path: str, graph: str, **query: object):
        asked = "&".join(f"{key}={value}" for key, value in {"trace": trace.id, **query}.items())
        page.goto(f"{address}/{path}?{asked}", wait_until="domcontentloaded")
        page.wait_for_function(f"() => document.querySelector('#{graph} .js-plotly-plot')?._fullData?.length > 0")
        return page

    yield go
    assert problems == []


def drawn(page, graph: str, trace: int = 0) -> np.ndarray:
    """The numbers that the browser has drawn, NaN for gaps."""
    rows = page.evaluate(
        f"() => Array.from(document.querySelector('#{graph} .js-plotly-plot')._fullData[{trace}].z, row => Array.from(row, v => Number.isFinite(v) ? v : null))"
    )
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=np.float64)


def query_of(page) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlparse(page.url).query).items()}


def lower(pattern: np.ndarray) -> np.ndarray:
    return pattern[np.tril_indices(len(pattern))]


def test_the_pattern_in_the_browser_is_the_head_of_the_trace(server, visit):
    _, trace, _ = server
    page = visit("attention", "pattern", layer=1, head=2)
    np.testing.assert_allclose(lower(drawn(page, "pattern")), lower(trace.head("attn_pattern", 1, 2)), atol=1e-7)
    assert page.locator("#pattern-title").inner_text() == "Pattern of 1.2"
    assert page.locator("#head-grid .head").count() == trace.info.n_layers * trace.info.n_heads


def test_clicking_a_thumbnail_opens_its_head_and_a_reload_or_link_gives_the_same_view(server, visit):
    _, trace, _ = server
    page = visit("attention", "pattern", layer=0, head=0)
    page.locator("#head-grid .head[data-layer='2'][data-head='3']").click()
    page.wait_for_function("() => document.querySelector('#pattern-title').textContent === 'Pattern of 2.3'")
    page.wait_for_function("() => new URL(location).searchParams.get('head') === '3'")
    assert query_of(page)["layer"] == "2"
    page.reload()
    page.wait_for_function("() => document.querySelector('#pattern-title')?.textContent === 'Pattern of 2.3'")
    assert page.locator("#head-grid .head.chosen").get_attribute("data-head") == "3"
    np.testing.assert_allclose(lower(drawn(page, "pattern")), lower(trace.head("attn_pattern", 2, 3)), atol=1e-7)


def test_arrow_keys_step_through_the_heads(visit):
    page = visit("attention", "pattern", layer=0, head=0)
    page.locator("#head-grid").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('#pattern-title').textContent === 'Pattern of 1.1'")


def test_the_table_sorts_by_the_column_that_was_clicked_and_its_first_row_opens_that_head(server, visit):
    _, trace, _ = server
    page = visit("attention", "pattern", layer=0, head=0, metric="induction")
    page.get_by_role("button", name="First token").click()
    page.wait_for_function("() => document.querySelector('#metric-title').textContent.startsWith('First token')")
    sink = trace.result("attn_sink")
    layer, head = np.unravel_index(int(np.argmax(sink)), sink.shape)
    first = page.locator("#head-table tbody tr").first
    expect(first.locator("td").first).to_have_text(f"{layer}.{head}")  # the title's callback answers first, or the table's
    first.click()
    page.wait_for_function(f"() => document.querySelector('#pattern-title').textContent === 'Pattern of {layer}.{head}'")


def test_hostile_token_text_is_shown_as_text(visit):
    page = visit("attention", "pattern", layer=0, head=0)
    assert page.locator(".js-plotly-plot b").count() == 0
    words = page.evaluate("() => document.querySelector('#pattern .js-plotly-plot').layout.xaxis.ticktext.join('')")
    assert "&lt;" in words and "<b>" not in words


def test_a_token_chosen_in_the_strip_frames_its_row_and_enters_the_address(visit):
    page = visit("attention", "pattern", layer=0, head=0)
    page.locator("#token-strip .tok").nth(3).click()
    page.wait_for_function("() => document.querySelector('#pattern .js-plotly-plot').layout.shapes.some(s => s.type === 'rect' && s.y0 === 2.5)")
    assert query_of(page)["pos"] == "3"


def test_norms_in_the_browser_are_those_of_the_trace_and_a_click_opens_the_layer(server, visit):
    _, trace, _ = server
    page = visit("activations", "norms", site="resid_post", layer=0)
    expected = np.stack([np.linalg.norm(trace["resid_post", layer].astype(np.float64), axis=-1) for layer in range(trace.info.n_layers)])
    np.testing.assert_allclose(drawn(page, "norms"), expected, rtol=1e-5)
    page.evaluate("() => document.querySelector('#norms .js-plotly-plot').scrollIntoView({ block: 'center' })")
    box = page.locator("#norms .nsewdrag").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + 6)  # the top row is the last layer
    page.wait_for_function(f"() => document.querySelector('#map-title').textContent === 'resid_post at layer {trace.info.n_layers - 1}'")


def test_one_layer_s_map_holds_the_values_of_the_trace_with_heads_side_by_side(server, visit):
    _, trace, _ = server
    page = visit("activations", "act-map", site="z", layer=1)
    page.wait_for_function("() => document.querySelector('#map-title').textContent === 'z at layer 1'")
    np.testing.assert_allclose(drawn(page, "act-map"), trace["z", 1].reshape(trace.n_tokens, -1), rtol=1e-6)


def test_a_site_that_this_trace_lacks_in_a_link_falls_back_to_one_it_has(visit):
    page = visit("activations", "norms", site="router_logits", layer=77)
    page.wait_for_function("() => document.querySelector('#norms-title').textContent === 'Norm of resid_post'")


def test_the_lens_writes_the_tokens_of_the_trace_and_its_mode_is_in_the_link(server, visit):
    _, trace, _ = server
    page = visit("lens", "lens-table", mode="kl", pos=0)
    shown = drawn(page, "lens-table")
    np.testing.assert_allclose(shown, trace.result("lens_kl")[:, : shown.shape[1]], rtol=1e-5, atol=1e-7)
    assert np.abs(shown[-1]).max() == 0  # the last row is the model itself
    page = visit("lens", "lens-table", mode="rank", pos=0)
    texts = page.evaluate("() => document.querySelector('#lens-table .js-plotly-plot')._fullData[0].text[0]")
    assert texts[0] == f"{trace.result('lens_next_rank')[0, 0] + 1:,}"


def test_a_lens_that_was_not_captured_is_computed_when_the_page_is_opened(server, partial, visit):
    from backend.engines import OpenOptions, open_engine
    from backend.experiments.logit_lens import lens_of_trace

    assert "lens_kl" not in partial.results
    page = visit("lens", "lens-table", trace=partial.id, mode="kl", pos=0)  # the job's time is within the wait for the picture
    engine = open_engine(server[2].hf, OpenOptions())
    rows, expected = lens_of_trace(engine, partial, progress=lambda *_: None, should_stop=lambda: False)
    engine.close()
    shown = drawn(page, "lens-table")
    np.testing.assert_allclose(shown, expected["lens_kl"][:, : shown.shape[1]], rtol=1e-3, atol=1e-5)
    assert query_of(page)["trace"] == partial.id and len(rows) == partial.info.n_layers + 1


def test_a_head_that_was_not_captured_says_so_and_the_one_that_was_shows_its_rows(partial, visit):
    page = visit("attention", "pattern", trace=partial.id, layer=1, head=2)
    shown, expected = drawn(page, "pattern"), partial.head("attn_pattern", 1, 2)
    np.testing.assert_allclose(shown[3:9, :3], expected[3:9, :3], atol=1e-7)
    assert np.isnan(shown[:3]).all() and np.isnan(shown[9:]).all()
    assert "Captured: rows 3 to 8" in page.locator("#pattern-subtitle").inner_text()
    assert page.locator("#head-grid .head").count() == 1 and page.locator("#head-grid .head-absent").count() == partial.info.n_heads - 1
    assert page.locator("#head-table tbody tr").count() == 1
    page.evaluate("() => window.dash_clientside.set_props('chosen-head', { data: { layer: 1, head: 0 } })")
    page.wait_for_function("() => document.querySelector('#pattern .js-plotly-plot')?.layout?.annotations?.[0]?.text.startsWith('Head 1.0 was not captured')")


def test_following_a_token_runs_as_a_job_and_draws_its_probability_through_the_layers(server, visit):
    from backend.engines import OpenOptions, open_engine

    _, trace, model = server
    page = visit("lens", "lens-table", pos=4)
    page.locator("#target-text").fill(" the")
    page.locator("#target-go").click()
    followed = "() => document.querySelector('#target-subtitle')?.textContent.startsWith('Probability and rank of ·the')"
    page.wait_for_function(followed, timeout=4 * WAIT_MS)  # the worker loads torch first
    shown = page.evaluate("() => Array.from(document.querySelector('#target-curves .js-plotly-plot')._fullData[0].y)")
    engine = open_engine(model.hf, OpenOptions())
    token = engine.tokenize(" the", add_bos=False)[0]
    rows = [trace["embed"], *(trace["resid_post", layer] for layer in range(trace.info.n_layers))]
    expected = [np.exp(lens_analysis.target_row(engine.unembed(row[4:5]), token)[0][0]) for row in rows]
    engine.close()
    np.testing.assert_allclose(shown, expected, rtol=1e-3)
    assert query_of(page)["target"] == " the"
    page.reload()  # the link shows it again, from the cache
    page.wait_for_function(followed)


def test_what_was_not_captured_is_one_press_away(server, narrow: Trace, page):
    address, whole, _ = server
    page.set_default_timeout(4 * WAIT_MS)  # the worker loads torch first
    page.goto(f"{address}/attention?trace={narrow.id}&layer=1&head=2")
    page.get_by_role("button", name="Capture attn_pattern").click()
    page.wait_for_function("() => document.querySelector('#pattern .js-plotly-plot')?._fullData?.length > 0")
    asked = query_of(page)
    assert asked["trace"] != narrow.id and (asked["layer"], asked["head"]) == ("1", "2")
    n = narrow.n_tokens
    np.testing.assert_allclose(lower(drawn(page, "pattern")), lower(whole.head("attn_pattern", 1, 2)[:n, :n]), atol=1e-3)
    with open_trace(narrow.path.with_stem(asked["trace"])) as made:
        assert made.prompt == narrow.prompt and made.token_ids == narrow.token_ids and made.layers("resid_post") == narrow.layers("resid_post")


def test_the_dark_theme_redraws_the_figures_in_its_own_colours(visit):
    from components.figures.theme import colours

    page = visit("attention", "pattern", layer=0, head=0)
    page.evaluate("() => window.localStorage.setItem('layerscope-theme', 'dark')")
    page.reload()
    ground = colours("dark")["seq-0"]
    page.wait_for_function(f"() => document.querySelector('#pattern .js-plotly-plot')?._fullData?.[0]?.colorscale?.[0]?.[1] === '{ground}'")

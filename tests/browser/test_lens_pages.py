"""Logits and lens in a real browser: what is drawn is what the trace holds, and the address restores the view."""

from __future__ import annotations

import numpy as np
import pytest

from backend.analysis.logits import cumulative_perplexity
from tests.browser.test_trace_pages import drawn, query_of, server, visit  # noqa: F401  fixtures

pytestmark = pytest.mark.browser


def line(page, graph: str, trace: int) -> np.ndarray:
    values = page.evaluate(f"() => Array.from(document.querySelector('#{graph} .js-plotly-plot')._fullData[{trace}].y, v => Number.isFinite(v) ? v : null)")
    return np.array([np.nan if v is None else v for v in values])


def test_the_lines_are_the_trace_s_predictions_in_the_unit_of_the_link(server, visit):  # noqa: F811
    _, trace, _ = server
    page = visit("logits", "logits-lines", unit="bits", k=5, pos=3, colour="entropy")
    np.testing.assert_allclose(line(page, "logits-lines", 0), -trace.next_logprobs / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(line(page, "logits-lines", 1), trace.entropy / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(line(page, "logits-lines", 2), cumulative_perplexity(trace.next_logprobs), rtol=1e-5)
    page.wait_for_function("() => document.querySelector('#token-strip').dataset.metric === 'entropy'")
    shown = page.evaluate("() => Array.from(document.querySelector('#logits-top .js-plotly-plot')._fullData[0].x)")
    np.testing.assert_allclose(shown[:5], np.exp(trace.top_logprobs[3, :5]), rtol=1e-5)
    assert len(shown) == 6 and {key: query_of(page)[key] for key in ("unit", "k", "colour", "pos")} == {"unit": "bits", "k": "5", "colour": "entropy", "pos": "3"}


def test_choosing_a_row_moves_the_bars_and_the_strip_s_menu_enters_the_link(server, visit):  # noqa: F811
    _, trace, _ = server
    page = visit("logits", "logits-top", pos=1)
    page.locator("#logits-table tr[data-pos='5']").click()
    page.wait_for_function("() => document.querySelector('#logits-top-subtitle').textContent.startsWith('Position 5,')")
    assert f"rank {trace.next_ranks[5] + 1:,}" in page.locator("#logits-top-subtitle").inner_text()
    page.locator("#strip-metric").select_option("entropy")
    page.wait_for_function("() => new URL(location).searchParams.get('colour') === 'entropy'")
    page.reload()
    page.wait_for_function("() => document.querySelector('#logits-top-subtitle')?.textContent.startsWith('Position 5,')")
    page.wait_for_function("() => document.querySelector('#token-strip').dataset.metric === 'entropy'")


def opened_engine(model):
    from backend.engines import OpenOptions, open_engine

    return open_engine(model.hf, OpenOptions())


def test_a_lens_of_another_site_is_a_job_and_its_link_shows_it_again(server, visit):  # noqa: F811
    from backend.experiments.logit_lens import lens_of_trace
    from backend.reports.lens_results import LensChoice

    _, trace, model = server
    engine = opened_engine(model)
    wanted = {choice: lens_of_trace(engine, trace, choice, progress=lambda *_: None, should_stop=lambda: False) for choice in (LensChoice("attn_out"), LensChoice("result", 1))}
    engine.close()
    page = visit("lens", "lens-table", site="attn_out", mode="kl", pos=0)
    rows, found = wanted[LensChoice("attn_out")]
    shown = drawn(page, "lens-table")
    np.testing.assert_allclose(shown, found["lens_kl"][:, : shown.shape[1]], rtol=1e-3, atol=1e-5)
    assert "attn_out at each layer" in page.locator("#lens-body h2").first.inner_text() and page.locator("#lens-layer-field").is_hidden()
    page = visit("lens", "lens-table", site="result", layer=1, mode="entropy", pos=0)
    rows, found = wanted[LensChoice("result", 1)]
    shown = drawn(page, "lens-table")
    np.testing.assert_allclose(shown, found["lens_entropy"][:, : shown.shape[1]], rtol=1e-3, atol=1e-5)
    words = page.evaluate("() => document.querySelector('#lens-table .js-plotly-plot').layout.yaxis.ticktext")
    assert words == ["1.0", "1.1", "1.2", "1.3", "model"]
    page.reload()  # from the cache, as the link says
    page.wait_for_function("() => document.querySelector('#lens-table .js-plotly-plot')?._fullData?.length > 0")
    assert {key: query_of(page)[key] for key in ("site", "layer", "mode")} == {"site": "result", "layer": "1", "mode": "entropy"}


def test_a_tuned_lens_is_trained_from_the_page_and_read_through_at_once(server, visit):  # noqa: F811
    from backend.experiments.logit_lens import lens_of_trace
    from backend.tuned_lens import FOLDER, read_tuned_lens

    _, trace, model = server
    data = trace.path.parent.parent
    (data / "texts").mkdir()
    (data / "texts" / "story.txt").write_text("Mary gave the book to John, John gave the key to Mary. The capital of France is Paris.\n\n" * 40)
    page = visit("lens", "lens-table", pos=0, mode="kl")
    page.locator("#tuned-name").fill("story")
    page.locator("#tuned-steps").fill("2")
    page.locator("#tuned-steps").press("Tab")
    page.locator("#tuned-train").click()
    page.wait_for_function("() => new URL(location).searchParams.get('lens')?.startsWith('story:')", timeout=300_000)
    page.wait_for_function("() => document.querySelector('#tuned-subtitle').textContent.startsWith('story: 2 steps')")
    lens = read_tuned_lens(data / FOLDER / "story")
    engine = opened_engine(model)
    _, found = lens_of_trace(engine, trace, tuned=lens, progress=lambda *_: None, should_stop=lambda: False)
    engine.close()
    page = visit("lens", "lens-table", pos=0, mode="kl", lens=lens.tag)
    shown = drawn(page, "lens-table")
    np.testing.assert_allclose(shown, found["lens_kl"][:, : shown.shape[1]], rtol=1e-3, atol=1e-5)
    assert np.abs(shown[-1]).max() == 0 and np.abs(shown[0] - trace.result("lens_kl")[0, : shown.shape[1]]).max() > 1e-4
    bars = page.evaluate("() => document.querySelector('#tuned-kl .js-plotly-plot')._fullData.map(bar => Array.from(bar.y))")
    np.testing.assert_allclose(np.array(bars).T, list(lens.made["held_out_kl"].values()), rtol=1e-5)

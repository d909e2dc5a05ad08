"""Logits and lens in a real browser: what is drawn is what the trace holds, and the address restores the view."""

from __future__ import annotations

import numpy as np
import pytest

from backend.analysis.logits import cumulative_perplexity
from tests.browser.test_trace_pages import query_of, server, visit  # noqa: F401  fixtures

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

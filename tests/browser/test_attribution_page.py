"""The Attribution page in a real browser: what it draws is the attribution of the trace, and the address gives the same view again."""

from __future__ import annotations

import numpy as np
import pytest

from backend.readout import open_readout
from backend.reports.attribution import attribute
from tests.browser.test_trace_pages import WAIT_MS, drawn, query_of, server, visit  # noqa: F401  fixtures

pytestmark = pytest.mark.browser


def line(page, graph: str, trace: int = 0, axis: str = "y") -> np.ndarray:
    values = page.evaluate(f"() => Array.from(document.querySelector('#{graph} .js-plotly-plot')._fullData[{trace}].{axis}, v => Number.isFinite(v) ? v : null)")
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def test_the_page_draws_the_parts_of_the_best_token_less_the_second(server, visit):  # noqa: F811
    _, trace, model = server
    page = visit("attribution", "attr-heads", pos=5)
    best, second = (int(i) for i in trace.top_ids[5, :2])
    found = attribute(trace, open_readout(model.hf), 5, best, second)
    np.testing.assert_allclose(drawn(page, "attr-heads"), found.heads(trace.info.n_layers, trace.info.n_heads), rtol=1e-5, atol=1e-7)
    _, after = found.through_layers(trace.info.n_layers)
    np.testing.assert_allclose(line(page, "attr-depth")[2::2], after, rtol=1e-5, atol=1e-6)
    mlps = [part.value for part in found.parts if part.kind == "mlp"]
    np.testing.assert_allclose(line(page, "attr-layers", 1, "x")[1:], mlps, rtol=1e-5, atol=1e-7)
    said = page.locator("#attr-sums").inner_text()
    assert f"parts sum to {found.total:.3f}" in said and f"{found.logit:.3f}" in said
    largest = max(found.parts, key=lambda part: abs(part.value))
    first = page.locator("#attr-table tbody tr").first.locator("td")
    assert first.first.inner_text() == largest.name and first.nth(2).inner_text() == f"{largest.value:+.4f}"


def test_a_token_is_found_by_typing_and_the_link_gives_the_same_view(server, visit):  # noqa: F811
    _, trace, model = server
    page = visit("attribution", "attr-heads", pos=3, against="none")
    target = int(trace.token_ids[4])
    page.locator("#attr-token").click()
    page.locator(".dash-dropdown-search").fill(str(trace.token_texts[4]).strip())
    page.locator(".dash-dropdown-options label, .dash-dropdown-option").filter(has_text=f"{target}").first.click()
    page.wait_for_function(f"() => new URL(location).searchParams.get('token') === '{target}'")
    found = attribute(trace, open_readout(model.hf), 3, target)
    page.wait_for_function(f"() => document.querySelector('#attr-sums').textContent.includes('parts sum to {found.total:.3f}')")
    page.locator("#attr-table button").filter(has_text="Value").click()
    page.wait_for_function("() => new URL(location).searchParams.get('sort') === 'value'")
    page.reload()
    page.wait_for_function(f"() => document.querySelector('#attr-sums')?.textContent.includes('parts sum to {found.total:.3f}')")
    best = max(found.parts, key=lambda part: part.value)
    assert page.locator("#attr-table tbody tr").first.locator("td").first.inner_text() == best.name
    assert query_of(page)["against"] == "none" and query_of(page)["pos"] == "3"


def test_a_token_outside_the_trace_is_found_after_the_vocabulary_was_listed(server, visit):  # noqa: F811
    from backend.engines import OpenOptions, open_engine

    _, trace, model = server
    engine = open_engine(model.hf, OpenOptions())
    texts = engine.token_texts(list(range(trace.info.d_vocab)))
    engine.close()
    outside = next(i for i, text in enumerate(texts) if i not in trace.vocabulary and len(text) > 2 and text.isalpha())
    page = visit("attribution", "attr-heads", pos=3)
    page.locator("#attr-list").click()
    page.wait_for_function("() => !document.querySelector('#attr-list')", timeout=4 * WAIT_MS)
    page.locator("#attr-token").click()
    page.locator(".dash-dropdown-search").fill(texts[outside])
    page.locator(".dash-dropdown-options label, .dash-dropdown-option").filter(has_text=f"{outside}").first.click()
    page.wait_for_function(f"() => document.querySelector('#attr-sums').textContent.includes('Logit of {texts[outside]}')")


def test_a_click_on_a_head_opens_its_pattern(server, visit):  # noqa: F811
    page = visit("attribution", "attr-heads", pos=3)
    page.locator("#attr-table tbody a").first.click()
    page.wait_for_function("() => document.querySelector('#pattern-title')?.textContent.startsWith('Pattern of')")
    assert query_of(page)["pos"] == "3"


def test_a_trace_of_some_layers_offers_the_capture_of_all(server, visit, page):  # noqa: F811
    from backend.engines import OpenOptions, open_engine
    from backend.experiments.capture import CaptureSpec, capture
    from backend.library import Library
    from config import load_settings

    address, trace, model = server
    engine = open_engine(model.hf, OpenOptions())
    path = capture(engine, CaptureSpec(prompt="Mary", layers=(1, 2), lens=False), trace.path.parent)
    engine.close()
    some = Library.from_settings(load_settings(data_dir=trace.path.parent.parent)).add(path)
    page.goto(f"{address}/attribution?trace={some.id}")
    page.get_by_role("button", name="Capture attn_out").wait_for()
    assert "It needs attn_out" in page.locator(".state").inner_text()
    assert page.locator("#attr-token").count() == 0

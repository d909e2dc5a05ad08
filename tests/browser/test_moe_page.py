"""The MoE page in a real browser: its numbers are those of the trace's own routing, and the address restores the view."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backend.analysis import moe
from backend.reports.routing import compare, overall, routing_layers
from backend.trace import open_trace
from components.figures.theme import COLOURS
from tests.browser.served import served
from tests.browser.test_trace_pages import PROMPT, drawn, query_of

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def moe_server(tiny_mixtral, tiny_mistral, tmp_path_factory):
    """(address, trace by PyTorch, trace of the same tokens with an expert masked, trace of a dense model)."""
    from backend.engines import OpenOptions, open_engine
    from backend.experiments.capture import CaptureSpec, capture
    from backend.intervention import ablate_experts
    from backend.library import Library
    from config import load_settings

    data = tmp_path_factory.mktemp("data")
    folders = list(dict.fromkeys([tiny_mixtral.hf.parent, tiny_mistral.hf.parent]))
    settings = load_settings(data_dir=data, models_dirs=folders)
    library = Library.from_settings(settings)
    paths = []
    for tiny in (tiny_mixtral, tiny_mistral):
        engine = open_engine(tiny.hf, OpenOptions())
        specs = [CaptureSpec(prompt=PROMPT)]
        if tiny is tiny_mixtral:
            specs.append(CaptureSpec(prompt=PROMPT, interventions=(ablate_experts(engine.places, 1, 2),)))
        paths += [capture(engine, spec, settings.traces_dir) for spec in specs]
        engine.close()
    for path in paths:
        library.add(path)
    with served(data, folders) as address:
        yield address, *(open_trace(path) for path in paths)


@pytest.fixture
def opened(moe_server, page):
    """Open the page of a trace and wait for its last picture; nothing may be logged as an error."""
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(100_000)

    def go(trace, **query):
        asked = "&".join(f"{key}={value}" for key, value in {"trace": trace.id, **query}.items())
        page.goto(f"{moe_server[0]}/moe?{asked}", wait_until="domcontentloaded")
        for graph in ("moe-load", "moe-map", "moe-probs", "moe-margins", "moe-together", "moe-repeats"):
            page.wait_for_function(f"() => document.querySelector('#{graph} .js-plotly-plot')?._fullData?.length > 0")
        page.wait_for_selector("#moe-measures tr.chosen")  # the measures come on their own
        return page

    yield go
    assert problems == []


def test_the_page_shows_the_routing_of_the_trace(moe_server, opened):
    trace = moe_server[1]
    page = opened(trace, layer=1)
    routing = trace.routing(1)
    counts = np.stack([trace.routing(layer).counts for layer in routing_layers(trace)])
    np.testing.assert_allclose(drawn(page, "moe-load"), counts / counts.sum(axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(drawn(page, "moe-map"), [trace.routing(layer).indices[:, 0] for layer in routing_layers(trace)])
    np.testing.assert_allclose(drawn(page, "moe-probs"), routing.probs.T, atol=1e-7)
    titles = page.locator("#moe-strip .moe-tok").evaluate_all("all => all.map(each => each.title)")
    e, w = routing.indices[3], routing.weights[3]
    assert len(titles) == trace.n_tokens and titles[3] == f"position 3: expert {e[0]} ({w[0]:.2f}), {e[1]} ({w[1]:.2f})"
    assert page.locator("#moe-strip b").count() == 0  # the prompt's markup stays text
    row = page.locator("#moe-measures tr.chosen td").all_inner_texts()
    load = moe.load(routing.counts)
    assert row[0] == "1" and float(row[4]) == pytest.approx(load.entropy, abs=6e-4) and float(row[6]) == pytest.approx(load.gini, abs=6e-4)
    assert float(row[9]) == pytest.approx(moe.switch_loss(routing.indices, routing.probs).loss, abs=6e-4)


def test_a_click_on_the_map_chooses_layer_and_token_and_a_reload_gives_the_same_view(moe_server, opened):
    trace = moe_server[1]
    page = opened(trace, layer=1)
    point = "{x: 4, y: 2, curveNumber: 0, pointNumber: [2, 4], data: {}}"
    page.evaluate(f"() => document.querySelector('#moe-map .js-plotly-plot').emit('plotly_click', {{points: [{point}], event: {{}}}})")
    page.wait_for_function("() => document.querySelector('#moe-strip-title').textContent === 'Experts of layer 2'")
    page.wait_for_function("() => new URL(location).searchParams.get('layer') === '2' && new URL(location).searchParams.get('pos') === '4'")
    page.reload()
    page.wait_for_function("() => document.querySelector('#moe-strip-title')?.textContent === 'Experts of layer 2'")
    page.wait_for_function("() => document.querySelector('#moe-strip .chosen')?.title.startsWith('position 4:')")


def test_a_cell_says_its_place_and_value_when_the_pointer_is_over_it(moe_server, opened):
    trace = moe_server[1]
    page = opened(trace, layer=1)
    routing = trace.routing(1)
    for graph, at, says in (
        ("moe-map", {"x": 4, "y": 1}, f"expert {routing.indices[4, 0]} ({routing.weights[4, 0]:.2f}), {routing.indices[4, 1]} ({routing.weights[4, 1]:.2f})"),
        ("moe-probs", {"x": 4, "y": 2}, f"router probability {routing.probs[4, 2]:.4f}"),
        ("moe-together", {"x": 0, "y": 2}, f"{moe.co_activation(routing.indices, 5)[2, 0]} tokens"),
    ):
        page.evaluate("([id, at]) => window.dash_clientside.set_props(id, {hoverData: {points: [at]}})", [graph, at])
        page.wait_for_function("says => document.querySelector('.tip')?.innerText.includes(says)", arg=says)
    assert page.locator(".tip div").first.inner_text() == "expert 2, also expert 0"


def test_two_traces_are_compared_token_by_token(moe_server, opened):
    _, trace, cut, _ = moe_server
    page = opened(trace, layer=1, against=cut.id)
    page.wait_for_function("() => document.querySelectorAll('#moe-alike tbody tr').length > 0")
    found = compare(trace, cut)
    routed = (trace.routing(1).indices == 2).any(axis=1)
    assert found[0].change.share == 0 and found[1].change.sets.tolist() == routed.tolist()
    assert f"The edit changed the routing of {overall(found):.1%} of tokens" in page.locator("#moe-sentence").inner_text()
    assert page.locator("#moe-alike tr.total td").nth(1).inner_text() == f"{overall(found):.1%}"
    assert page.locator("#moe-alike tr.chosen td").nth(1).inner_text() == f"{routed.mean():.1%}"
    assert query_of(page)["against"] == cut.id


def test_the_sweep_over_all_experts_is_run_by_a_job_and_drawn(moe_server, opened):
    from backend.engines import OpenOptions, open_engine
    from backend.experiments.experts import sweep

    trace = moe_server[1]
    page = opened(trace, layer=1)
    page.locator("#moe-sweep").click()
    page.wait_for_function("() => document.querySelectorAll('#moe-ranked tbody tr').length > 0")
    engine = open_engine(Path(trace.info.source), OpenOptions())
    _, found = sweep(engine, trace.token_ids)
    engine.close()
    page.wait_for_function("() => document.querySelector('#moe-effect .js-plotly-plot')?._fullData?.length > 0")
    np.testing.assert_allclose(drawn(page, "moe-effect"), found[0], atol=1e-4)
    assert page.locator("#moe-sweep-offer").is_hidden()


def test_the_use_of_experts_over_all_traces_is_read_by_a_job(moe_server, opened):
    _, trace, cut, _ = moe_server
    page = opened(trace, layer=1, usage="time")
    page.locator("#moe-usage-read").click()
    page.wait_for_function("() => document.querySelector('#moe-usage .js-plotly-plot')?._fullData?.length > 0")
    both = np.stack([each.routing(1).counts for each in sorted((trace, cut), key=lambda each: each.created_at)])
    np.testing.assert_allclose(drawn(page, "moe-usage"), both / both.sum(axis=1, keepdims=True), rtol=1e-6)
    assert page.locator("#moe-usage-said").inner_text().startswith(f"Layer 1, {trace.n_tokens + cut.n_tokens} tokens of 2 traces.")
    assert query_of(page)["usage"] == "time"


def test_a_masked_expert_has_no_load_and_no_probability(moe_server, opened):
    cut = moe_server[2]
    page = opened(cut, layer=1)
    assert drawn(page, "moe-load")[1, 2] == 0 and (drawn(page, "moe-probs")[2] == 0).all()


def test_a_dense_model_gets_a_page_that_says_so(moe_server, page):
    page.goto(f"{moe_server[0]}/moe?trace={moe_server[3].id}")
    page.wait_for_selector(".state")
    assert "is dense: it has no experts" in page.locator(".state").inner_text()


@pytest.mark.parametrize("width", [1440, 1024])
def test_nothing_is_wider_than_the_window(moe_server, opened, page, width):
    page.set_viewport_size({"width": width, "height": 900})
    opened(moe_server[1])
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_what_is_seen_first_comes_with_the_page_in_the_browsers_theme(opened, moe_server):
    """No question to the server stands between the page and its first pictures: `moe-view`'s callback, which would redraw them, is not called."""
    asked: list[str] = []
    page = opened(moe_server[1])
    page.evaluate("() => document.getElementById('theme-button').click()")  # dark, unless it was; a cookie remembers it
    page.wait_for_load_state("networkidle")
    theme = page.evaluate("() => document.documentElement.getAttribute('data-bs-theme')")
    ink = "() => document.querySelector('#moe-load .js-plotly-plot')._fullLayout.font.color"
    colour = COLOURS[theme]["ink-2"]
    page.wait_for_function(f"() => ({ink})() === '{colour}'")  # the figures are redrawn
    page.on("request", lambda request: asked.append(request.post_data or ""))
    opened(moe_server[1])
    page.wait_for_load_state("networkidle")
    assert page.evaluate("() => document.documentElement.getAttribute('data-bs-theme')") == theme
    assert page.evaluate(ink) == colour
    assert not any('"moe-view.data"' in body or '"id":"moe-view"' in body for body in asked)
    assert any('"id":"moe-seen"' in body for body in asked)  # the search sees the callback of the cards below

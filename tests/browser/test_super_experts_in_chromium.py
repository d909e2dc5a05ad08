"""The card of super experts in a real browser: a planted one is framed and listed, and a trace without the outputs offers to capture them."""

from __future__ import annotations

import numpy as np
import pytest

from backend.reports.super_experts import super_experts
from backend.trace import open_trace
from tests.browser.served import served
from tests.browser.test_trace_pages import drawn
from tests.test_super_experts import DIMENSION, EXPERT, LAYER, planted, traced

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, trace with the experts' outputs, trace without them) of a model with a planted super expert."""
    from backend.library import Library
    from backend.sites import STANDARD_SITES
    from config import load_settings

    data, models = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("models")
    tiny = planted(models / "planted-mixtral")
    settings = load_settings(data_dir=data, models_dirs=[models])
    library = Library.from_settings(settings)
    traces = [traced(tiny.hf, settings.traces_dir), traced(tiny.hf, settings.traces_dir, STANDARD_SITES)]
    for trace in traces:
        library.add(trace.path)
    with served(data, [models]) as address:
        yield address, *traces


@pytest.fixture
def opened(server, page):
    """Open the MoE page of a trace; nothing may be logged as an error."""
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(100_000)

    def go(trace):
        page.goto(f"{server[0]}/moe?trace={trace.id}", wait_until="domcontentloaded")
        page.wait_for_selector("#moe-measures tr.chosen")
        return page

    yield go
    assert problems == []


def test_the_planted_super_expert_is_drawn_framed_and_listed(server, opened):
    trace = server[1]
    page = opened(trace)
    page.wait_for_function("() => document.querySelectorAll('#moe-super-table tbody tr').length > 0")
    found = super_experts(trace)
    sizes = np.where(found.sizes > 0, found.sizes, np.nan)
    np.testing.assert_allclose(drawn(page, "moe-super"), np.log10(sizes), rtol=1e-5)
    shapes = page.evaluate("() => document.querySelector('#moe-super .js-plotly-plot').layout.shapes.map(each => [each.x0, each.y0])")
    assert shapes == [[EXPERT - 0.5, LAYER - 0.5]]
    rows = [row.locator("td").all_inner_texts() for row in page.locator("#moe-super-table tbody tr").all()]
    assert rows[0][0] == f"L{LAYER}E{EXPERT}" and rows[0][5] == str(DIMENSION) and rows[0][6:] == ["yes"] and len(rows) == 8
    assert {row[6] for row in rows[1:]} == {"no"}
    assert page.locator("#moe-super-said").inner_text().startswith("1 super expert, framed: above the 99.5th percentile")


def test_a_trace_without_the_outputs_captures_them_by_one_press(server, opened):
    page = opened(server[2])
    assert page.locator("#moe-super").count() == 0
    page.get_by_role("button", name="Capture expert_out").click()
    page.wait_for_function(f"() => !new URL(location).searchParams.get('trace').includes('{server[2].id}')")
    page.wait_for_function("() => document.querySelectorAll('#moe-super-table tbody tr').length > 0")
    assert page.locator("#moe-super-table tbody tr td").first.inner_text() == f"L{LAYER}E{EXPERT}"
    captured = page.evaluate("() => new URL(location).searchParams.get('trace')")
    trace = open_trace(server[2].path.with_name(f"{captured}.h5"))
    assert trace.token_ids == server[2].token_ids and super_experts(trace).verdict.supers[0].expert == EXPERT

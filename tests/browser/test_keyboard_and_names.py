"""The keyboard alone, and what a screen reader is told: every control of every page has a name; strip, head grid, tables and popups work without a mouse.

Also the trace beside its category: what the cards "Over a batch" draw is held against the traces themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest

from backend.trace import Trace, open_trace
from tests.browser.served import served
from tests.tiny_models import TinyModel

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent.parent
WAIT_MS = 100_000  # generous: other tests share the machine
PROMPTS = ("The capital of France is", "Mary gave Mary the book", "The capital of Italy is")
PAGES = ("/", "/library", "/jobs", "/batch", "/generate", "/trace", "/attention", "/activations", "/lens", "/logits", "/attribution", "/neurons", "/embeddings", "/architecture",
         "/graph", "/weights", "/quantization", "/sensitivity")  # fmt: skip
CONTROLS = {"button", "link", "textbox", "combobox", "checkbox", "radio", "slider", "spinbutton", "listbox", "option", "grid", "DisclosureTriangle", "searchbox"}


@pytest.fixture(scope="module")
def server(tiny_mistral: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[Trace]]]:
    """A running server with three traces of one category: (address, the traces)."""
    from backend.aggregates import Aggregates
    from backend.derived import Derived
    from backend.engines import OpenOptions, open_engine
    from backend.experiments.capture import CaptureSpec, capture
    from backend.library import Library
    from config import load_settings

    data = tmp_path_factory.mktemp("data")
    settings = load_settings(data_dir=data, models_dirs=[tiny_mistral.hf.parent])
    engine = open_engine(tiny_mistral.hf, OpenOptions())
    paths = [capture(engine, CaptureSpec(prompt=prompt, category="places"), settings.traces_dir) for prompt in PROMPTS]
    engine.close()
    aggregates = Aggregates(Derived(data / "cache", settings.derived_cache_mb << 20))
    for path in paths:
        Library.from_settings(settings).add(path)
        with open_trace(path) as trace:
            aggregates.put_row(trace)
    with served(data, [tiny_mistral.hf.parent]) as address:
        yield address, [open_trace(path) for path in paths]


@pytest.fixture
def opened(server, page):
    """opened(path, **query) -> the page, when its waiting is over; fails on any error in the browser's console."""
    problems: list[str] = []
    page.set_default_timeout(WAIT_MS)
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)

    def go(path: str, **query: Any):
        words = "&".join(f"{name}={value}" for name, value in {"trace": server[1][1].id, **query}.items())
        page.goto(f"{server[0]}{path}?{words}", wait_until="domcontentloaded")
        page.wait_for_selector("h1")
        page.wait_for_function("() => !document.querySelector('[data-dash-is-loading=true]') && document.title !== 'Updating...'")
        return page

    yield go
    assert problems == []


def accessible(page) -> list[dict[str, str]]:
    """Role, name and HTML of every control, as Chromium hands them to a screen reader."""
    session = page.context.new_cdp_session(page)
    session.send("DOM.enable")
    nodes = [node for node in session.send("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored") and node.get("role", {}).get("value") in CONTROLS]

    def told(node: dict[str, Any]) -> dict[str, str]:
        name = node.get("name", {}).get("value", "").strip()
        html = "" if name else session.send("DOM.getOuterHTML", {"backendNodeId": node["backendDOMNodeId"]})["outerHTML"][:160]
        return {"role": node["role"]["value"], "name": name, "html": html}

    return [told(node) for node in nodes]


def focused(page) -> str:
    return page.evaluate("() => { const e = document.activeElement; return e.id || e.className || e.tagName; }")


def focus_ring(page) -> bool:
    """Whether the focused element, or the frame it stands in, is drawn with a ring that the ground does not swallow."""
    return page.evaluate(
        """() => { for (let e = document.activeElement, up = 0; e && up < 3; e = e.parentElement, up++) {
            const look = getComputedStyle(e);
            if (look.outlineStyle !== 'none' && parseFloat(look.outlineWidth) >= 1 && look.outlineColor !== look.backgroundColor) return true;
            if (look.boxShadow !== 'none' && up < 2) return true; } return false; }"""
    )


@pytest.mark.parametrize("path", PAGES)
def test_every_control_of_a_page_has_a_name(path: str, opened):
    page = opened(path)
    if path == "/weights":
        page.wait_for_selector("#weights-grid .ag-root[data-named]")  # it comes after the page
    nodes = accessible(page)
    assert len(nodes) > 8  # the rail alone has more
    assert [each for each in nodes if not each["name"]] == []


def test_dropdowns_and_tools_are_named_by_their_label_or_their_card(opened):
    page = opened("/activations", site="attn_out")
    page.wait_for_function("() => document.querySelector('#norms-title').textContent === 'Norm of attn_out'")
    names = [each["name"] for each in accessible(page)]
    assert {"Site attn_out", "Norm of attn_out Linear", "About Norm of attn_out", "PNG Norm of attn_out", "Full screen Norm of attn_out"} <= set(names), names


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("path", "arrived"), [("/", "#run-model"), ("/attention", "#head-table tbody tr"), ("/weights", "#weights-grid .ag-row")])
def test_the_tab_key_reaches_every_control_and_shows_where_it_is(path: str, arrived: str, theme: str, opened):
    page = opened(path)
    page.wait_for_selector(arrived)
    page.evaluate(f"() => document.documentElement.setAttribute('data-bs-theme', '{theme}')")
    reachable = "button, a[href], summary, input, select, textarea, [tabindex='0']"
    wanted = page.evaluate(
        """(reachable) => { const all = [...document.querySelectorAll('main :is(' + reachable + ')')]
            .filter(e => e.checkVisibility({ visibilityProperty: true, opacityProperty: true }) && !e.disabled && e.tabIndex >= 0)
            .filter(e => !e.closest('[aria-hidden=true], .ag-root-wrapper'));  // a grid is one stop, arrows go on inside it
            all.forEach((e, i) => e.setAttribute('data-reach', i)); return all.length; }""",
        reachable,
    )
    assert wanted > 5
    reached, ringless = set(), []
    page.evaluate("() => document.activeElement.blur()")
    for _ in range(3 * wanted + 150):  # the rail, and rows that have come since, are stops as well
        page.keyboard.press("Tab")
        at = page.evaluate("() => document.activeElement.getAttribute('data-reach')")
        if at is not None and at not in reached:
            reached.add(at)
            if not focus_ring(page):
                ringless.append(focused(page))
        if len(reached) == wanted:
            break
    unseen = "(seen) => [...document.querySelectorAll('[data-reach]')].filter(e => !seen.includes(e.dataset.reach)).map(e => e.outerHTML.slice(0, 120))"
    missed = page.evaluate(unseen, sorted(reached))
    assert missed == []
    assert ringless == []


def test_strip_grid_and_tables_by_keyboard(server, opened):
    page = opened("/attention", pos=2, layer=0, head=0)
    page.wait_for_selector("#head-table tbody tr")
    page.focus("#token-strip")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => new URL(location).searchParams.get('pos') === '3'")
    page.keyboard.press("Home")
    page.wait_for_function("() => new URL(location).searchParams.get('pos') === '0'")
    page.focus("#head-grid")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('#pattern-title').textContent.includes('1.1')")
    page.locator("#head-table th button", has_text="First token").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#head-table th[aria-sort=descending]')?.textContent.startsWith('First token')")
    page.wait_for_function("() => new URL(location).searchParams.get('metric') === 'sink'")
    assert page.evaluate("() => document.activeElement.textContent").startswith("First token")  # the keyboard stays at the column it sorted by
    assert page.locator("#head-table tr.chosen td").first.inner_text() == "1.1"
    row = page.locator("#head-table tbody tr").nth(2)
    name = row.locator("td").first.inner_text()
    row.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(f"() => document.querySelector('#pattern-title').textContent.includes('{name}')")


def test_a_table_that_comes_late_keeps_the_keyboard_and_the_choice(opened):
    page = opened("/attention", pos=2, layer=0, head=0)
    page.wait_for_selector("#head-table tbody tr")
    late = []

    def asked(route):
        if "head-table-drawing" in (route.request.post_data or ""):
            late.append(route)
        else:
            route.continue_()

    page.route(re.compile("_dash-update-component"), asked)
    page.locator("#head-table th button", has_text="First token").click()
    page.wait_for_function("() => document.querySelector('#head-metric')?.textContent.includes('First token')")
    page.locator("#head-table tr[data-layer='1'][data-head='2']").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#pattern-title').textContent.includes('1.2')")
    assert late  # asked for when 0.0 was the head, answered only now
    for route in late:
        route.continue_()
    page.wait_for_function("() => document.querySelector('#head-table th[aria-sort=descending]')?.textContent.startsWith('First token')")
    here = "document.querySelector('#head-table tr.chosen')"
    assert page.evaluate(f"() => [{here}.firstChild.textContent, document.activeElement === {here}, document.querySelectorAll('#head-table tr.chosen').length]") == ["1.2", True, 1]


def test_about_opens_with_enter_and_space_and_closes_with_escape(opened):
    page = opened("/logits")
    summary = page.locator(".ls-card .popup > summary").first
    for key in ("Enter", "Space"):
        summary.focus()
        page.keyboard.press(key)
        page.wait_for_function("() => document.querySelectorAll('details.popup[open]').length === 1")
        page.keyboard.press("Escape")
        page.wait_for_function("() => document.querySelectorAll('details.popup[open]').length === 0")
        assert page.evaluate("() => document.activeElement.tagName") == "SUMMARY"


def drawn(page, graph: str) -> np.ndarray:
    rows = page.evaluate(f"() => Array.from(document.querySelector('#{graph} .js-plotly-plot')._fullData[0].z, row => Array.from(row, v => Number.isFinite(v) ? v : null))")
    return np.array([[np.nan if v is None else v for v in row] for row in rows], np.float64)


def test_heads_of_a_trace_beside_its_category(server, opened):
    _, traces = server
    page = opened("/attention", overmetric="sink", overshow="difference")
    heading = "() => document.querySelector('#over-heads .js-plotly-plot')?.layout?.annotations?.[0]?.text"
    page.wait_for_function(f"{heading} === 'First token, this trace − mean'")
    scores = np.stack([trace.result("attn_sink") for trace in traces])
    np.testing.assert_allclose(drawn(page, "over-heads"), scores[1] - scores.mean(0), atol=1e-6)
    page.evaluate("() => window.dash_clientside.set_props('over-show', { value: 'mean' })")
    page.wait_for_function(f"{heading} === 'First token, mean of the group'")
    np.testing.assert_allclose(drawn(page, "over-heads"), scores.mean(0), atol=1e-6)
    page.reload()
    page.wait_for_function(f"{heading} === 'First token, mean of the group'")
    query = parse_qs(urlparse(page.url).query)
    assert query["over"] == ["category:places"] and query["overmetric"] == ["sink"] and query["overshow"] == ["mean"]


def test_norms_and_predictions_of_a_trace_beside_its_category(server, opened):
    _, traces = server
    page = opened("/activations", oversite="attn_out")
    page.wait_for_function("() => document.querySelector('#over-norms .js-plotly-plot')?._fullData?.length === 3")
    lines = page.evaluate("() => document.querySelector('#over-norms .js-plotly-plot')._fullData.slice(1).map(line => Array.from(line.y))")
    layers = range(traces[0].info.n_layers)
    norms = np.array([[np.linalg.norm(trace["attn_out", layer][1:].astype(np.float64), axis=-1).mean() for layer in layers] for trace in traces])
    np.testing.assert_allclose(lines, [norms.mean(0), norms[1]], rtol=1e-4)
    page = opened("/logits")
    page.wait_for_selector("#over-predictions tbody tr")
    logprobs = [trace.next_logprobs[: trace.n_prompt - 1].mean() for trace in traces]
    said = page.locator("#over-predictions").inner_text()
    assert f"{logprobs[1]:.3f}" in said and f"{np.mean(logprobs):.3f} ± {np.std(logprobs, ddof=1):.3f}" in said

"""The Sensitivity page in a real browser, against the real server and worker: a run is chosen, shown, compared and deleted, and a real one is made."""

from __future__ import annotations

import json
import re
import shutil
from urllib.parse import parse_qs, urlencode, urlparse

import numpy as np
import pytest
from playwright.sync_api import expect

from backend.reports.sensitivity_check import checked
from backend.reports.sensitivity_run import FOLDER, open_run
from backend.weight_places import place_in_file
from backend.weights import open_weights
from tests.browser.served import served
from tests.browser.test_trace_pages import ROOT
from tests.sensitivity_runs import write_run

pytestmark = pytest.mark.browser

MODEL = ROOT / "models" / "demo-dense"
IDS = {"magnitude": "m" * 26, "grad_x_weight": "g" * 26, "broken": "b" * 26}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, data folder) of a running server with two drawn runs of demo-dense and a damaged one."""
    data = tmp_path_factory.mktemp("data")
    for metric in ("magnitude", "grad_x_weight"):
        write_run(data / FOLDER / IDS[metric], metric=metric)
    (write_run(data / FOLDER / IDS["broken"], metric="obs") / "sensitivity_stats.json").write_text('{"schema": "layerscope.sensitivity/1", "tensors": [{}]}')
    with served(data) as address:
        yield address, data


@pytest.fixture
def visit(server, page):
    """Open the page and wait for its form; nothing may be logged as an error."""
    problems: list[str] = []
    page.set_default_timeout(100_000)
    page.set_viewport_size({"width": 1440, "height": 1000})
    page.on("pageerror", lambda problem: problems.append(str(problem)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)

    def go(**query: str):
        page.goto(f"{server[0]}/sensitivity?{urlencode(query)}")
        page.wait_for_selector("#sens-cost:not(:empty)")
        return page

    yield go
    assert problems == []


def query_of(page) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlparse(page.url).query).items()}


def wait_drawn(page, graph: str) -> None:
    page.wait_for_function(f"() => document.querySelector('#{graph} .js-plotly-plot')?._fullData?.length > 0")


def drawn(page, graph: str, trace: int = 0) -> np.ndarray:
    wait_drawn(page, graph)
    return np.array(page.evaluate(f"() => Array.from(document.querySelector('#{graph} .js-plotly-plot')._fullData[{trace}].z, row => Array.from(row))"))


def test_without_a_run_the_page_says_how_to_get_one(server, visit):
    away = server[1] / "away"
    shutil.move(server[1] / FOLDER, away)
    try:
        page = visit()
        expect(page.locator("#sens-list .state h2")).to_have_text("No run yet")
        expect(page.locator("#sens-body .state h2")).to_have_text("No run chosen")
    finally:
        shutil.move(away, server[1] / FOLDER)


def test_a_run_is_chosen_from_the_list_and_a_reload_gives_the_same_view(server, visit):
    run = open_run(server[1] / FOLDER / IDS["grad_x_weight"])
    page = visit()
    page.locator("#sens-list tr", has_text="grad_x_weight").locator("button", has_text="demo-dense").click()
    expect(page.locator("#sens-sentence")).to_contain_text("Flipping the sign of the 20 top weights of demo-dense by grad_x_weight: perplexity × 3.2")
    wait_drawn(page, "sens-map")
    for picker, choice in (("sens-stat", "Largest score"), ("sens-group", "by layer")):
        page.locator(f"#{picker}").click()
        page.get_by_role("option", name=choice).click()
    page.wait_for_function("() => { const q = new URL(location).searchParams; return q.get('stat') === 'max' && q.get('group') === 'layer'; }")
    assert query_of(page)["run"] == IDS["grad_x_weight"]
    page.reload()
    page.wait_for_function("() => document.querySelector('#sens-stat')?.textContent.includes('Largest score')")
    largest = {row["name"]: row["max"] for row in run.stats["tensors"]}
    components = page.evaluate("() => document.querySelector('#sens-map .js-plotly-plot')?.layout?.xaxis?.ticktext") or []
    shown = drawn(page, "sens-map")
    for layer in range(4):
        for at, component in enumerate(components):
            assert shown[layer, at] == pytest.approx(np.log10(largest[f"blocks.{layer}.{component}"]), rel=1e-5)
    assert drawn(page, "sens-scores", 1).shape[0] == 4  # rows are layers
    for graph in ("sens-effects", "sens-stability", "sens-pruning", "sens-divergence", "sens-flow"):
        wait_drawn(page, graph)
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def test_a_row_of_the_table_leads_to_the_weight_in_its_matrix(server, visit):
    page = visit(run=IDS["magnitude"])
    cells = page.locator("#sens-grid .ag-row[row-index='0'] .ag-cell")
    expect(cells.first).to_be_visible()
    run = open_run(server[1] / FOLDER / IDS["magnitude"])
    best = max((row for row in run.top if row["rank"] == 1), key=lambda row: row["score"])
    place = place_in_file(open_weights(MODEL), best["name"], best["row"], best["column"])
    cells.nth(3).click()
    page.wait_for_url(re.compile("/weights"))
    page.wait_for_function("() => document.querySelector('#weights-map .js-plotly-plot')?._fullData?.length === 2")
    mark = page.evaluate("() => { const m = document.querySelector('#weights-map .js-plotly-plot')._fullData[1]; return [m.y[0], m.x[0]]; }")
    assert mark == [place.row, place.column] and query_of(page)["tensor"] == place.tensor
    page.go_back()
    expect(page.locator("#sens-sentence")).to_be_visible()


def test_a_click_on_the_map_narrows_the_table_down(visit):
    page = visit(run=IDS["magnitude"])
    wait_drawn(page, "sens-map")
    expect(page.locator("#sens-grid .ag-row").first).to_be_visible()
    point = "{x: 6, y: 2, curveNumber: 0, pointNumber: [2, 6], data: {}}"
    page.evaluate(f"() => document.querySelector('#sens-map .js-plotly-plot').emit('plotly_click', {{points: [{point}], event: {{}}}})")
    page.wait_for_function("() => document.querySelector('#sens-search input, input#sens-search')?.value === 'blocks.2.mlp.W_out'")
    page.wait_for_function("() => [...document.querySelectorAll('#sens-grid .ag-row [col-id=component]')].every(cell => cell.textContent === 'mlp.W_out')")
    page.wait_for_function("() => [...document.querySelectorAll('#sens-grid .ag-row [col-id=layer]')].every(cell => cell.textContent === '2')")


@pytest.mark.parametrize(("run", "said"), [
    (IDS["broken"], "is damaged: 'metric' is missing."), ("nowhere", "There is no sensitivity run 'nowhere'"), ("../traces", "is not the id of a"),
])  # fmt: skip
def test_a_run_that_cannot_be_shown_is_one_sentence(visit, run: str, said: str):
    page = visit(run=run)
    expect(page.locator("#sens-body .state-error")).to_contain_text(said)
    assert page.locator("#sens-body .ls-card").count() == 0


def test_runs_are_compared(server, visit):
    page = visit(run=IDS["magnitude"], **{"with": IDS["grad_x_weight"]})
    shown = drawn(page, "sens-overlap")
    sets = [{(row["name"], row["row"], row["column"]) for row in open_run(server[1] / FOLDER / IDS[name]).top} for name in ("magnitude", "grad_x_weight")]
    np.testing.assert_allclose(shown, [[len(a & b) / len(a | b) for b in sets] for a in sets], atol=1e-6)
    assert query_of(page)["with"] == IDS["grad_x_weight"]


def test_a_run_is_deleted_after_a_question(server, visit):
    folder = write_run(server[1] / FOLDER / ("d" * 26), metric="hutchinson")
    page = visit(run="d" * 26)
    row = page.locator("#sens-list tr", has_text="hutchinson")
    asked: list[str] = []
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    row.get_by_role("button", name="Delete").click()
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
    row.get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
    expect(page.locator("#sens-body .state h2")).to_have_text("No run chosen")
    assert len(asked) == 2 and "hutchinson" in asked[0] and not folder.exists() and "run" not in query_of(page)


def test_what_the_engine_cannot_give_is_disabled_and_a_wrong_field_is_said(visit):
    page = visit(model="demo-dense-q8_0")
    page.locator("#sens-metric").click()
    expect(page.get_by_role("option", name=re.compile("hutchinson .needs gradients"))).to_have_count(1)
    page.keyboard.press("Escape")
    page.locator("#sens-seeds").fill("0, x")
    page.locator("#sens-seeds").press("Tab")
    expect(page.locator("#sens-cost.refused")).to_contain_text("Seeds '0, x' are not whole numbers")


def test_a_real_run_is_made_by_a_job_and_shown(server, visit):
    page = visit(model="demo-dense")
    for preset, top in (("Standard protocol", "100"), ("Quick look", "20")):  # each has filled the form before somebody types
        page.get_by_role("button", name=preset).click()
        expect(page.locator("#sens-topk")).to_have_value(top)
    for field, value in (("topk", "5"), ("samples", "2"), ("length", "64")):
        page.locator(f"#sens-{field}").fill(value)
        page.locator(f"#sens-{field}").press("Tab")
    expect(page.locator("#sens-cost")).to_contain_text("At most 2 windows of 64 tokens, 128 in all.")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("#sens-progress .job")).to_be_visible()
    page.wait_for_function("() => new URL(location).searchParams.get('run')", timeout=300_000)
    expect(page.locator("#sens-sentence")).to_contain_text("Flipping the sign of the 20 top weights of demo-dense by grad_x_weight", timeout=100_000)
    run = checked(open_run(server[1] / FOLDER / query_of(page)["run"]))
    assert (run.manifest["spec"]["topk"], run.manifest["text"]["n_tokens"], len(run.top)) == (5, 128, 20)
    command = page.locator("#sens-command").inner_text()
    assert "--model demo-dense --metric grad_x_weight --topk 5" in command
    expect(page.locator("#sens-list tr.chosen")).to_contain_text("2 × 64 tokens")
    assert json.loads((run.folder / "manifest.json").read_text())["command"] == []

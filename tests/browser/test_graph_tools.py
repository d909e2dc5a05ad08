"""What a graph's tools give: the CSV and the table hold the numbers of the trace, under the names of their tokens, layers and dimensions."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.browser.test_trace_pages import server, visit  # noqa: F401  fixtures

pytestmark = pytest.mark.browser

PLOT = """(figure) => {
    const card = document.createElement('section');
    card.className = 'ls-card';
    card.innerHTML = '<h2 class="card-title">Made here</h2><div id="made"></div><button data-tool="csv" data-graph="made" data-name="made">CSV</button>'
        + '<button data-tool="table" data-graph="made" data-name="made">Table</button>';
    document.getElementById('main').append(card);
    return window.Plotly.newPlot(document.getElementById('made'), figure.data, figure.layout).then(() => 1);
}"""


def saved(page, graph: str) -> list[list[list[str]]]:
    """The blocks of the CSV that the browser saves: rows of cells."""
    with page.expect_download() as download:
        page.locator(f"[data-tool='csv'][data-graph='{graph}']").click()
    return blocks(Path(download.value.path()).read_text(encoding="utf-8"))


def blocks(text: str) -> list[list[list[str]]]:
    found: list[list[list[str]]] = [[]]
    for row in csv.reader(io.StringIO(text)):
        if row:
            found[-1].append(row)
        else:
            found.append([])
    return found


def numbers(rows: list[list[str]]) -> np.ndarray:
    return np.array([[float(cell) for cell in row[1:]] for row in rows[1:]])


@pytest.fixture
def made(server, visit) -> Iterator:  # noqa: F811
    """Puts a figure of this test's own beside a page's, with the tools that every card has."""
    page = visit("activations", "norms", site="resid_post", layer=0)

    def draw(data: list[dict], layout: dict | None = None) -> list[list[list[str]]]:
        page.evaluate(PLOT, {"data": data, "layout": layout or {}})
        page.made = "made"
        return saved(page, "made")

    draw.page = page
    yield draw


def test_a_heatmap_s_csv_is_exact_and_names_every_token(server, visit):  # noqa: F811
    _, trace, _ = server
    page = visit("activations", "norms", site="resid_post", layer=1)
    values, hovers = saved(page, "norms")
    expected = np.stack([np.linalg.norm(trace["resid_post", layer].astype(np.float64), axis=-1) for layer in range(trace.info.n_layers)])
    np.testing.assert_array_equal(numbers(values), expected.astype(np.float32).astype(np.float64))
    assert values[0][0] == "L2 norm" and len(values[0]) == trace.n_tokens + 1 and [row[0] for row in values[1:]] == [f"L{i}" for i in range(trace.info.n_layers)]
    words = "".join(values[0][1:]).replace("·", " ").replace("'", "")
    assert "<b>Mary</b>" in words and "‹s›" in words  # special tokens and markup as they are written on screen
    assert hovers[0][0] == "hover" and "layer 0, ‹s› (position 0) | norm" in hovers[1][1]


def test_the_map_of_tokens_and_dimensions_names_heads_and_dimensions(server, visit):  # noqa: F811
    _, trace, _ = server
    page = visit("activations", "act-map", site="z", layer=1)
    page.wait_for_function("() => document.querySelector('#map-title').textContent === 'z at layer 1'")
    values = saved(page, "act-map")[0]
    np.testing.assert_array_equal(numbers(values), trace["z", 1].reshape(trace.n_tokens, -1).astype(np.float64))
    width = trace.info.d_head
    assert values[0][1 + width] == "1.0" and values[0][-1] == f"{trace.info.n_heads - 1}.{width - 1}" and values[1][0] == "0 ‹s›"


def test_lines_and_bars_carry_their_names(server, visit):  # noqa: F811
    _, trace, _ = server
    page = visit("activations", "act-statistics", site="resid_post", layer=0)
    found = {block[0][1]: block for block in saved(page, "act-statistics")}
    np.testing.assert_allclose([float(row[1]) for row in found["largest |x|"][1:]], [np.abs(trace["resid_post", i]).max() for i in range(trace.info.n_layers)], rtol=1e-6)
    assert [row[0] for row in found["kurtosis"][1:]] == [str(i) for i in range(trace.info.n_layers)]


def test_a_line_with_hover_text_a_bar_lying_down_and_what_is_hidden(made):
    found = made(
        [
            {"type": "scatter", "x": [0, 1], "y": [1.5, -2], "name": "a", "customdata": ["first &lt;b&gt;<br>line", "=cmd()"], "text": ["T", "U"]},
            {"type": "bar", "orientation": "h", "x": [3, 0.25], "y": [0, 1], "name": "b"},
            {"type": "scatter", "x": [0], "y": [9], "name": "unseen", "visible": "legendonly"},
        ],
        {"xaxis": {"title": {"text": "layer"}}, "yaxis": {"tickvals": [0, 1], "ticktext": ["embed", "L0"]}},
    )
    assert found == [
        [["layer", "a", "text", "hover"], ["0", "1.5", "T", "first <b> | line"], ["1", "-2", "U", "'=cmd()"]],
        [["y", "label", "b"], ["0", "embed", "3"], ["1", "L0", "0.25"]],
    ]


def test_three_dimensions_groups_colours_and_values_that_are_not_finite(made):
    places = {"x": [1, 2], "y": [3, 4], "z": [5, None], "marker": {"color": [0.5, 1]}, "customdata": [["Paris", 7], ["Nice", 8]]}
    found = made([{"type": "scatter3d", "name": "France", "mode": "markers", **places}], {"scene": {"xaxis": {"title": {"text": "PC 1"}}}})
    assert found == [[["group", "PC 1", "y", "z", "hover", "colour"], ["France", "1", "3", "5", "Paris | 7", "0.5"], ["France", "2", "4", "", "Nice | 8", "1"]]]


def test_nan_and_infinity_are_written_as_such(made):
    page = made.page
    page.evaluate("() => { window.__z = [[NaN, Infinity, -Infinity, 1]]; }")
    page.evaluate(PLOT.replace("figure.data", "[{type: 'heatmap', z: window.__z, name: 'x'}]"), {"layout": {}})
    assert saved(page, "made") == [[["x", "0", "1", "2", "3"], ["0", "NaN", "inf", "-inf", "1"]]]


def test_the_table_holds_the_same_rows_opens_by_keyboard_and_gives_the_focus_back(server, visit):  # noqa: F811
    _, trace, _ = server
    page = visit("activations", "norms", site="resid_post", layer=1)
    button = page.locator("[data-tool='table'][data-graph='norms']")
    button.focus()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog.graph-table")
    assert dialog.locator("h2").inner_text() == "Norm of resid_post, as a table"
    first = dialog.locator("table").first
    assert first.locator("tbody tr").count() == trace.info.n_layers and first.locator("thead th").count() == trace.n_tokens + 1
    expected = np.linalg.norm(trace["resid_post", 1][2].astype(np.float64))
    assert float(first.locator("tbody tr").nth(1).locator("td").nth(2).inner_text()) == pytest.approx(expected, rel=1e-5)
    assert page.evaluate("() => document.activeElement.closest('dialog') !== null")
    assert dialog.locator("b").count() == 0  # token text is text
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert page.evaluate("() => document.activeElement.dataset.tool === 'table'")


def test_a_long_table_says_how_much_of_it_is_shown(made):
    made([{"type": "heatmap", "z": [[row * 60 + column for column in range(60)] for row in range(300)]}])
    made.page.locator("[data-tool='table'][data-graph='made']").click()
    dialog = made.page.locator("dialog.graph-table")
    assert dialog.locator("p").first.inner_text() == "The first 200 of 300 rows and 40 of 60 columns; the CSV has all."
    assert dialog.locator("tbody tr").count() == 200 and dialog.locator("tbody tr").first.locator("td").count() == 40

"""Claims about the pictures of weights: exact where a cell is one weight, no outlier lost, hostile names shown as text, zooms inside the matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backend.analysis.activations import reduce_signed
from backend.analysis.weights import bin_edges
from backend.reports.weight_matrix import Matrix
from backend.reports.weight_results import TensorDetail
from backend.weights import open_weights
from components import weight_source
from components.figures.weights import LONGEST_LINE, component_histograms, histogram, norm_lines, singular_values, statistic_heatmap, vector_line, weight_map
from components.weight_source import clipped, picture, read_region
from tests.test_weight_report import WIDTH, Types, heavy, write


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Matrix, np.ndarray]:
    values = heavy(1500)
    values[777, 333] = -50.0
    path: Path = write(tmp_path_factory.mktemp("matrix") / "model.gguf", {"blk.0.ffn_down.weight": (values, Types.F32)})
    return Matrix(open_weights(path).stored("blk.0.ffn_down.weight")), values


def nothing() -> None:
    return None


def test_a_small_part_is_exact_and_the_whole_keeps_the_outlier(matrix: tuple[Matrix, np.ndarray]) -> None:
    read, values = matrix
    cells, (rows, columns) = picture(read, (700, 800, 300, 400), nothing) or pytest.fail("it is small enough to be read")
    assert np.array_equal(cells, values[700:800, 300:400]) and rows.tolist() == list(range(700, 801)) and columns.tolist() == list(range(300, 401))
    cells, (rows, columns) = picture(read, None, nothing) or pytest.fail("it is small enough to be read")
    want, want_rows, want_columns = reduce_signed(values, weight_source.MAP_ROWS, weight_source.MAP_COLUMNS)
    assert np.array_equal(cells, want) and np.array_equal(rows, want_rows) and np.array_equal(columns, want_columns)
    assert cells.min() == -50.0


def test_what_is_too_large_to_be_read_is_cut_out_of_the_map_of_the_job(matrix: tuple[Matrix, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    read, values = matrix
    monkeypatch.setattr(weight_source, "READ_AT_ONCE", 10)
    assert picture(read, None, nothing) is None
    cells, edges, _ = reduce_signed(values, weight_source.MAP_SIDE, weight_source.MAP_SIDE)
    detail = TensorDetail(np.zeros(0, np.float32), np.zeros(0, np.float32), cells, None)
    shown, (rows, columns) = picture(read, (760, 800, 320, 352), lambda: detail) or pytest.fail("the map is there")
    assert rows[0] <= 760 < rows[1] and rows[-2] < 800 <= rows[-1] and (columns[0], columns[-1]) == (320, 352)
    for i in range(len(rows) - 1):
        part = values[rows[i] : rows[i + 1], 320:352]
        assert np.array_equal(np.abs(shown[i]), np.abs(part).max(axis=0))
    assert np.isin(rows, edges).all()


def test_a_zoom_is_cut_to_the_matrix_and_what_is_no_zoom_is_the_whole() -> None:
    assert clipped((-5.0, 3.2, 10.7, 9000.0), (100, 50)) == (0, 4, 10, 50)
    assert clipped((-5.0, 100.0, 0.0, 50.0), (100, 50)) is None
    assert clipped((99.9, 99.95, 3.0, 3.0), (100, 50)) == (96, 100, 3, 7)
    assert clipped((0.0, 1.0, 0.0, 1.0), (2, 1)) is None
    assert read_region("10-20,0-30", (100, 50)) == (10, 20, 0, 30)
    for text in (None, "", "nonsense", "1-2", "1-2,x-y", "9e999-1,1-2", "nan-1,1-2"):
        assert read_region(text, (100, 50)) is None


def test_names_from_a_file_are_shown_as_text() -> None:
    hostile = "<b>x</b><a href='javascript:1'>"
    found = statistic_heatmap(np.ones((2, 1)), [0, 1], [hostile], "standard deviation", "linear", (0, hostile))
    assert "<b>x" not in str(found.layout.xaxis.ticktext) and "<b>x" not in str(found.data[0].customdata)
    assert "<b>x" not in str(component_histograms(np.ones((1, 512), np.int64), bin_edges(0), [hostile]).layout.yaxis.ticktext)


def test_long_lines_keep_their_peaks() -> None:
    values = np.ones(100_000, np.float32)
    values[54_321] = 99.0
    rows = norm_lines(values, values[:10], ("row", "column")).data[0]
    assert len(rows.y) == LONGEST_LINE and rows.y.max() == 99.0 and rows.x[int(np.argmax(rows.y))] == 54_321
    assert len(vector_line(values[:10]).data[0].y) == 10


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_pictures_of_odd_numbers_are_drawn(theme: str) -> None:
    """All zero, all NaN, one value: a figure, and no exception."""
    nothing_finite = histogram(np.zeros(512, np.int64), bin_edges(0), np.nan, np.nan, theme=theme)
    assert "finite" in nothing_finite.layout.annotations[0].text
    one = np.zeros(512, np.int64)
    one[256] = 7
    assert histogram(one, bin_edges(0), 0.0, 0.0, True, theme).data[0].y.tolist()[1] == 7
    for scale in ("each", "linear", "log"):
        assert statistic_heatmap(np.array([[np.nan, 0.0], [np.nan, 0.0]]), [0, 1], ["a", "b"], "mean", scale, theme=theme).data
    assert weight_map(np.full((3, 4), np.nan), (np.arange(4), np.arange(5)), 1.0, ("row", "column"), (1, 1), theme).data
    assert singular_values(np.zeros(5), True, theme).data and WIDTH == 512

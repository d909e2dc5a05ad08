"""What a figure draws is what it was given: values kept through every reduction, labels kept apart, hostile text kept harmless."""

from __future__ import annotations

import numpy as np
import pytest

from backend.analysis import logits
from backend.analysis.activations import reduce_signed
from backend.analysis.attention import reduce_max
from components.figures import theme
from components.figures.activations import norms_heatmap, statistics_lines, token_dimension_map
from components.figures.attention import attention_pattern, head_heatmap
from components.figures.attention_token import token_attention
from components.figures.attribution import cumulative_line, head_contributions, part_bars
from components.figures.distributions import followed_lines, quantile_lines
from components.figures.lens import depth_curves, held_out_bars, lens_table, target_curves
from components.figures.logits import PositionCurves, prediction_lines, top_bars
from components.figures.neurons import neuron_bars

HOSTILE = '<a href="javascript:alert(1)">x</a><br>%{z}'
RNG = np.random.default_rng(0)


def causal(n: int) -> np.ndarray:
    weights = np.tril(RNG.random((n, n))) + np.eye(n) * 0.01
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_pattern_is_drawn_cell_by_cell_and_blank_above_the_diagonal():
    pattern = causal(6)
    drawn = attention_pattern(pattern, list("abcdef")).data[0].z
    lower = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(drawn[lower], pattern[lower])
    assert np.isnan(drawn[~lower]).all()


def test_a_long_pattern_keeps_its_strongest_link_and_says_where_it_is():
    n = 600
    pattern = np.zeros((n, n), np.float32)
    pattern[500, 37] = 1
    reduced, rows, columns = reduce_max(pattern, 256, 256)
    cells = attention_pattern(reduced, [f"t{i}" for i in range(n)], edges=(rows, columns)).data[0]
    at = np.unravel_index(np.nanargmax(cells.z), cells.z.shape)
    assert cells.z[at] == 1
    assert rows[at[0]] <= 500 < rows[at[0] + 1] and columns[at[1]] <= 37 < columns[at[1] + 1]
    name = attention_pattern(reduced, [f"t{i}" for i in range(n)], edges=(rows, columns)).layout.meta["x"][at[1]]
    assert name == f"positions {columns[at[1]]}-{columns[at[1] + 1] - 1}: t{columns[at[1]]} ... t{columns[at[1] + 1] - 1}" or name == "t37 (position 37)"
    assert columns[at[1]] <= cells.x[at[1]] < columns[at[1] + 1], "the axis counts positions"


def test_a_reduced_cell_on_the_diagonal_is_not_blanked():
    reduced, rows, columns = reduce_max(causal(600), 256, 256)
    drawn = attention_pattern(reduced, ["t"] * 600, edges=(rows, columns)).data[0].z
    assert not np.isnan(np.diag(drawn)).any()
    assert np.isnan(drawn[0, 1:]).all()


def test_the_square_root_changes_the_colour_and_neither_the_hover_nor_the_scale_bar_s_words():
    pattern = causal(3)
    figure = attention_pattern(pattern, list("abc"), sqrt=True)
    assert figure.data[0].z[2, 1] == pytest.approx(pattern[2, 1] ** 0.5)
    assert figure.layout.meta["sqrt"] is True, "the browser squares what it says of a cell"
    bar = figure.data[0].colorbar
    for place, word in zip(bar.tickvals, bar.ticktext, strict=True):
        assert place**2 == pytest.approx(float(word))


def test_equal_tokens_keep_rows_and_columns_of_their_own():
    figure = attention_pattern(causal(4), ["the", "the", "the", "the"])
    assert list(figure.data[0].x) == [0, 1, 2, 3] and figure.data[0].z.shape == (4, 4)
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2, 3]
    reduced, rows, columns = reduce_signed(RNG.normal(size=(4, 10)), 256, 512)
    names = token_dimension_map(reduced, (rows, columns), ["the"] * 4, 1.0).data[0].y
    assert len(set(names)) == 4


def test_the_colour_of_attention_spans_probability_whatever_the_head_holds():
    cells = attention_pattern(causal(5) * 0.01, list("abcde")).data[0]
    assert (cells.zmin, cells.zmax) == (0, 1)


def test_a_part_of_a_pattern_lies_where_it_is_in_the_prompt():
    pattern = causal(60)
    figure = attention_pattern(pattern[20:30, 5:25], [f"t{i}" for i in range(60)], edges=(np.arange(20, 31), np.arange(5, 26)), position=22)
    assert tuple(figure.layout.xaxis.range) == (4.5, 24.5) and tuple(figure.layout.yaxis.range) == (29.5, 19.5)
    assert list(figure.layout.yaxis.ticktext) == [f"t{i}" for i in range(20, 30)] and list(figure.layout.yaxis.tickvals) == list(range(20, 30))
    assert figure.layout.meta["y"][2] == "t22 (position 22)"
    frame = next(shape for shape in figure.layout.shapes if shape.type == "rect")
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (4.5, 22.5, 21.5, 22.5)
    blank = np.isnan(figure.data[0].z)
    np.testing.assert_array_equal(blank, np.arange(5, 25)[None, :] > np.arange(20, 30)[:, None])


def test_scores_run_to_both_sides_of_zero_and_weighted_values_to_their_own_limit():
    cells = attention_pattern(causal(3) - 0.5, list("abc"), unit="score", limit=4.0, signed=True, sqrt=True).data[0]
    assert (cells.zmin, cells.zmax) == (-4, 4) and cells.z[2, 1] < 0.5
    cells = attention_pattern(causal(3), list("abc"), unit="length", limit=2.5, sqrt=True).data[0]
    assert cells.zmax == pytest.approx(2.5**0.5)
    for place, word in zip(cells.colorbar.tickvals, cells.colorbar.ticktext, strict=True):
        assert place**2 == pytest.approx(float(word))


@pytest.mark.parametrize(
    "make",
    [
        lambda: attention_pattern(causal(2), [HOSTILE, "b"]),
        lambda: norms_heatmap(np.ones((1, 2)), [0], [HOSTILE, "b"]),
        lambda: token_dimension_map(*(lambda r: (r[0], r[1:]))(reduce_signed(np.ones((2, 3)), 9, 9)), [HOSTILE, "b"], 1.0),
        lambda: lens_table(np.ones((1, 2)), [[[HOSTILE], ["b"]]], np.zeros((1, 2, 1)), ["0"], [HOSTILE, "b"], following=["b", HOSTILE]),
        lambda: target_curves(np.zeros(2), np.zeros(2, int), ["embed", "0"], HOSTILE),
        lambda: part_bars([HOSTILE, "L0"], np.zeros(1), np.zeros(2)),
        lambda: cumulative_line([HOSTILE, "b"], np.zeros(2), 1.0),
        lambda: neuron_bars(np.zeros(2), [HOSTILE, "b"], 0),
        lambda: followed_lines(np.ones((1, 2)), [HOSTILE], [0, 1], [True], 100.0),
    ],
)  # fmt: skip
def test_token_text_never_reaches_plotly_as_markup_or_as_a_template(make):
    figure = make()
    assert "<a " not in figure.to_json().replace("\\u003c", "<")
    for trace in figure.data:
        assert "javascript" not in (trace.hovertemplate or "") and "javascript" not in (getattr(trace, "texttemplate", None) or "")


def test_a_signed_map_is_symmetric_and_zero_is_the_card_s_ground():
    reduced, rows, columns = reduce_signed(RNG.normal(size=(3, 8)) + 5, 9, 9)
    for name in ("light", "dark"):
        cells = token_dimension_map(reduced, (rows, columns), list("abc"), 2.5, name).data[0]
        assert (cells.zmin, cells.zmid, cells.zmax) == (-2.5, 0, 2.5)
        assert cells.colorscale[1] == (0.5, theme.colours(name)["surface"])


def test_a_wide_layer_is_reduced_below_the_pixels_of_a_card_and_keeps_its_outlier():
    values = RNG.normal(size=(5, 4096)).astype(np.float32)
    values[2, 4000] = -300
    reduced, rows, columns = reduce_signed(values, 256, 512)
    cells = token_dimension_map(reduced, (rows, columns), list("abcde"), 3.0).data[0]
    assert cells.z.shape == (5, 512) and cells.z.min() == -300
    assert cells.x[int(np.argmin(cells.z[2]))] == 4000
    assert "8 dimensions" in cells.hovertemplate


def test_a_norm_that_is_not_a_number_has_no_colour_and_says_so():
    cells = norms_heatmap(np.array([[1.0, np.nan, np.inf]]), [3], list("abc")).data[0]
    assert np.isfinite(cells.z).tolist() == [[True, False, False]]
    assert "nan" in cells.customdata[0, 1] and "inf" in cells.customdata[0, 2]


def test_the_log_scale_s_marks_stand_at_their_norms():
    cells = norms_heatmap(np.array([[0.5, 3.0, 800.0]]), [0], list("abc"), log=True).data[0]
    assert cells.z[0, 2] == pytest.approx(np.log10(800))
    for place, word in zip(cells.colorbar.tickvals, cells.colorbar.ticktext, strict=True):
        assert 10**place == pytest.approx(float(word))
    assert len(cells.colorbar.tickvals) >= 2


def test_a_metric_s_heads_keep_their_layer_numbers_when_layers_were_left_out():
    figure = head_heatmap(np.array([[0.1, 0.9], [np.nan, 0.2]]), [5, 9], "Induction", (9, 1))
    assert list(figure.layout.yaxis.ticktext) == ["L5", "L9"]
    assert "head 9.1" in figure.data[0].customdata[1, 1] and "0.2000" in figure.data[0].customdata[1, 1]
    frame = figure.layout.shapes[0]
    assert (frame.x0, frame.y0) == (0.5, 0.5)


def test_statistics_are_drawn_over_the_layers_they_belong_to():
    found = statistics_lines({"std": np.array([1.0, 2.0]), "kurtosis": np.array([3.0, 900.0])}, [4, 7], names=("std", "kurtosis"))
    assert [list(line.x) for line in found.data] == [[4, 7], [4, 7]]
    assert list(found.data[1].y) == [3, 900]


def lens(mode: str, values: np.ndarray):
    texts = [[[f"w{r}{p}", "other"] for p in range(3)] for r in range(2)]
    return lens_table(values, texts, np.log(np.full((2, 3, 2), 0.25)), ["embed", "0"], ["a", "b", "c"], first=40, mode=mode, position=41)


def test_the_lens_writes_the_top_token_and_hovers_all_with_their_probabilities():
    cells = lens("probability", np.full((2, 3), 0.25)).data[0]
    assert cells.text[1][2] == "w12"
    assert list(cells.x) == [40, 41, 42]
    assert "0.2500  w12" in cells.customdata[1, 2] and "other" in cells.customdata[1, 2] and "position 42" in cells.customdata[1, 2]


def test_the_best_rank_is_the_darkest_and_the_last_position_has_none():
    cells = lens("rank", np.array([[0, 9, -1], [999, 0, -1]])).data[0]
    assert cells.z[0, 0] == cells.zmax and cells.z[1, 0] == pytest.approx(-3)
    assert np.isnan(cells.z[:, 2]).all()
    assert cells.text[1][0] == "1,000" and cells.text[0][2] == ""


def test_rows_of_a_lens_are_drawn_from_the_embedding_up():
    figure = lens("entropy", np.ones((2, 3)))
    assert list(figure.layout.yaxis.ticktext) == ["embed", "L0"]
    assert figure.layout.yaxis.autorange != "reversed"


def test_ranks_of_a_target_are_counted_from_one_and_improve_upwards():
    found = target_curves(np.log(np.array([0.1, 0.8])), np.array([120, 0]), ["embed", "0"], "·Paris")
    np.testing.assert_allclose(found.data[0].y, [0.1, 0.8], rtol=1e-6)
    assert list(found.data[1].y) == [121, 1]
    low, high = found.layout.yaxis2.range
    assert low > np.log10(121) - 1e-9 and high < 0


def test_curves_in_different_units_never_share_an_axis():
    found = depth_curves({"KL, nats": np.ones(3), "entropy, nats": np.ones(3)}, ["embed", "0", "1"])
    assert {line.yaxis for line in found.data} == {"y", "y2"}


@pytest.mark.parametrize("name", ["light", "dark"])
def test_sequential_scales_run_one_way_in_luminance_from_the_ground(name):
    steps = [luminance(colour) for _, colour in theme.sequential(name)]
    rising = np.diff(steps)
    assert (rising < 0).all() if name == "light" else (rising > 0).all()
    assert theme.sequential(name)[0][1] == theme.colours(name)["surface"]


def test_the_figures_colours_are_those_of_the_style_sheet():
    from pathlib import Path
    from re import search

    css = (Path(__file__).parent.parent / "assets" / "layerscope.css").read_text()
    light, dark = css.split('[data-bs-theme="dark"]', 1)
    for sheet, name in ((light, "light"), (dark, "dark")):
        for colour in ("surface", "line", "ink", "accent", "seq-0", "seq-2", "seq-4", "neg", "pos"):
            found = search(rf"--{colour}: (#[0-9a-f]{{6}})", sheet)
            assert found and found[1] == theme.colours(name)[colour], colour


def test_arrays_travel_as_numbers_and_not_as_text():
    sent = attention_pattern(causal(40).astype(np.float16), ["t"] * 40).to_dict()["data"][0]["z"]
    assert sent["dtype"] == "f4"


def test_heads_are_coloured_symmetrically_and_a_head_that_is_unknown_is_a_gap():
    cells = head_contributions(np.array([[0.5, -2.0], [np.nan, 1.0]])).data[0]
    assert (cells.zmin, cells.zmid, cells.zmax) == (-2, 0, 2) and np.isnan(cells.z[1, 0])
    assert "nan" in cells.customdata[1, 0]


def test_attention_s_bars_lie_in_the_rows_of_their_layers():
    attention, other = part_bars(["embed", "L0", "L1"], np.array([1.0, 2.0]), np.array([9.0, 3.0, 4.0])).data
    assert list(attention.y) == [1, 2] and list(other.y) == [0, 1, 2]


def test_quantile_lines_hold_every_quantile_and_the_inner_range_leaves_the_extremes_out():
    bands = np.array([[-100, -2, -1, 0, 1, 2, 100]] * 3, np.float32)
    figure = quantile_lines(bands, ("min", "1 %", "25 %", "median", "75 %", "99 %", "max"), [0, 1, 2], whole=False)
    assert {line.name: float(line.y[0]) for line in figure.data} == {"min": -100, "1 %": -2, "25 %": -1, "median": 0, "75 %": 1, "99 %": 2, "max": 100}
    low, high = figure.layout.yaxis.range
    assert -3 < low < -2 and 2 < high < 3


def test_followed_values_are_drawn_by_size_and_hovered_as_they_are():
    lines = followed_lines(np.array([[-5.0, 0.0, np.inf]]), ["a"], [0, 1, 2], [True], 100.0).data
    np.testing.assert_array_equal(lines[0].y, [5, np.nan, np.inf])
    assert list(lines[0].customdata) == ["-5", "0", "inf"]


def curves(surprise: list[float], entropy: list[float]) -> PositionCurves:
    values = np.array(surprise), np.array(entropy)
    return PositionCurves(*values, np.exp(values[0]), np.arange(len(surprise) + 1))


def test_predictions_are_drawn_at_their_positions_and_nan_is_marked_not_left_out():
    figure = prediction_lines(curves([1.0, np.nan, 0.5], [2.0, np.nan, 0.25]), ["a", "b", HOSTILE], 2, "bits", position=2)
    surprise, entropy, perplexity, broken = figure.data
    np.testing.assert_array_equal(surprise.y, np.float32([1, np.nan, 0.5]))
    np.testing.assert_array_equal(entropy.y, np.float32([2, np.nan, 0.25]))
    assert list(broken.x) == [1] and broken.name == "NaN" and "entropy nan bits" in broken.customdata[0]
    assert perplexity.yaxis == "y2" and "nothing follows" in surprise.customdata[2] and "<a" not in surprise.customdata[2]
    tint, line = figure.layout.shapes
    assert (tint.x0, tint.x1, line.x0) == (0.5, 2.5, 2)  # position 1, the prompt's last, predicts the first generated token


def test_many_positions_are_drawn_as_the_largest_of_each_run():
    values = np.zeros(5000)
    values[3210] = 7
    surprise, edges = logits.strongest(values, 1024)
    figure = prediction_lines(PositionCurves(surprise, surprise, surprise + 1, edges), ["t"] * 5000, 5000, "nats")
    at = int(np.argmax(figure.data[0].y))
    assert len(figure.data[0].y) == 1024 and figure.data[0].y[at] == 7 and edges[at] <= 3210 < edges[at + 1]
    assert f"positions {edges[at]}-{edges[at + 1] - 1}" in figure.data[0].customdata[at]
    assert np.isnan(logits.strongest(np.array([np.nan, np.nan, 1, np.nan]), 2)[0]).tolist() == [True, False]


def test_the_best_tokens_are_bars_with_the_rest_of_the_vocabulary_last():
    bars = top_bars(np.array([0.5, 0.25]), ["a", HOSTILE], [7, 9], follows=9).data[0]
    np.testing.assert_allclose(bars.x, [0.5, 0.25, 0.25])
    assert bars.marker.color[1] != bars.marker.color[0] and "id 9" in bars.customdata[1] and "<a" not in bars.customdata[1]
    broken = top_bars(np.array([np.nan, np.nan]), ["a", "b"], [0, 1], follows=None).data[0]
    assert list(broken.text) == ["NaN"] * 3


def test_a_followed_token_colours_the_lens_by_its_own_probability_and_generated_tokens_are_marked_off():
    texts = [[["a", "b"]] * 3] * 2
    values = np.array([[0.25, np.nan, 0.5], [0.75, 0.125, 1.0]])
    figure = lens_table(values, texts, np.log(np.full((2, 3, 2), 0.25)), ["1.0", "model"], ["x", "y", "z"], first=40, mode="chosen", token=HOSTILE, n_prompt=42)
    cells = figure.data[0]
    np.testing.assert_array_equal(cells.z, values.astype(np.float32))
    assert (cells.zmin, cells.zmax) == (0, 1) and "probability 0.125" in cells.customdata[1, 1] and "<a" not in cells.customdata[1, 1]
    assert [shape.x0 for shape in figure.layout.shapes] == [41.5]
    assert not lens_table(values, texts, np.zeros((2, 3, 2)), ["0", "1"], ["x", "y", "z"], first=40, n_prompt=40).layout.shapes
    assert depth_curves({"KL": np.ones(2)}, ["1.0", "model"]).data[0].mode == "markers"


def test_held_out_kl_is_a_bar_before_and_one_after_for_each_row():
    before, after = held_out_bars(np.array([[3.0, 1.0], [2.0, 0.5]]), ["embed", "0"]).data
    assert list(before.x) == ["embed", "L0"]
    np.testing.assert_array_equal([before.y, after.y], [[3, 2], [1, 0.5]])


def test_a_token_s_bars_are_its_row_and_its_column_and_a_long_prompt_keeps_its_strongest_link():
    labels = [f"t{i}" for i in range(6)]
    figure = token_attention(np.array([0.1, 0.7, 0.2]), np.array([0.2, 0.3, 0.4, 0.1]), 2, labels)
    assert [list(bars.x) for bars in figure.data] == [[0, 1, 2], [2, 3, 4, 5]]
    np.testing.assert_allclose(figure.data[1].y, [0.2, 0.3, 0.4, 0.1], rtol=1e-6)
    assert "is looked at by t4 (position 4)" in figure.data[1].customdata[2]
    n = 5000
    column = np.full(n, 1e-5, np.float32)
    column[4321] = 0.9
    long = token_attention(np.ones(1), column, 0, [HOSTILE] * n)
    line = long.data[1]
    assert len(line.x) <= 512 and line.x[int(np.argmax(line.y))] == 4321
    assert "<a " not in long.to_json().replace("\\u003c", "<")

"""The pictures of aggregates draw what they were given; names of categories stay text."""

from __future__ import annotations

import numpy as np

from components.figures.aggregate import Group, depth_bands, head_aggregate

HOSTILE = '<a href="javascript:alert(1)">x</a><br>%{z}'
MEAN = np.array([[0.1, -0.4], [np.nan, 0.2]])
GROUP = Group(HOSTILE, MEAN, np.full((2, 2), 0.05), np.array([[3, 3], [0, 3]]))


def test_a_difference_has_its_zero_in_the_middle_and_its_largest_at_the_end() -> None:
    cells = head_aggregate(GROUP, "Induction", limit=1.0, signed=True).data[0]
    np.testing.assert_array_equal(cells.z, MEAN.astype(np.float32))
    assert cells.zmin == -cells.zmax and np.isclose(cells.zmax, 0.4)
    assert cells.customdata[0][1].startswith("head 0.1<br>Induction -0.4000<br>standard error 0.0500<br>3 prompts")


def test_a_mean_is_drawn_on_the_metric_s_own_scale() -> None:
    assert head_aggregate(GROUP, "Induction", limit=1.0).data[0].zmax == 1.0
    assert np.isclose(head_aggregate(GROUP, "Entropy").data[0].zmax, 0.4)


def test_a_band_reaches_one_spread_to_each_side_and_leaves_out_layers_without_a_value() -> None:
    group = Group("a", np.array([1.0, np.nan, 3.0]), np.array([0.5, np.nan, np.nan]), np.array([4, 0, 1]))
    band, line = depth_bands([group], "L2 norm").data
    np.testing.assert_allclose(band.y, [1.5, 3.0, 3.0, 0.5])
    assert list(band.x) == [0, 2, 2, 0] and np.isnan(line.y[1]) and line.y[2] == 3


def test_hostile_names_are_escaped() -> None:
    for figure in (head_aggregate(GROUP, "x", signed=True), depth_bands([Group(HOSTILE, np.ones(2), np.ones(2), np.ones(2, int))], "L2 norm")):
        assert "<a" not in figure.to_json().replace("\\u003c", "<")

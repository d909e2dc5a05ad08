"""The pictures of a generation draw what they were given, and token text stays text."""

from __future__ import annotations

import numpy as np

from components.figures.generation import MOST_COLUMNS, attention_row, depth_norms, step_curves, step_norms

HOSTILE = '<a href="javascript:alert(1)">x</a><br>%{z}'
RNG = np.random.default_rng(0)


def test_curves_hold_the_values_and_the_sampler_is_drawn_only_where_it_differs() -> None:
    p, h = RNG.random(5), RNG.random(5)
    same, other = step_curves(p, h, list("abcde"), sampler=p), step_curves(p, h, list("abcde"), sampler=p / 2)
    np.testing.assert_allclose(same.data[0].y, p.astype(np.float32))
    np.testing.assert_allclose(same.data[1].y, h.astype(np.float32))
    assert [trace.name for trace in same.data] == ["model", "entropy"] and [trace.name for trace in other.data] == ["model", "sampler", "entropy"]
    assert same.data[0].y.dtype == np.float32 and list(same.data[0].x) == [1, 2, 3, 4, 5]


def test_of_more_steps_than_pixels_the_newest_are_drawn_under_their_numbers() -> None:
    n = MOST_COLUMNS + 100
    norms = RNG.random((3, n)).astype(np.float32)
    labels = [f"t{i}" for i in range(n)]
    cells = step_norms(norms, labels).data[0]
    np.testing.assert_array_equal(cells.z, norms[:, 100:])
    assert cells.x[0] == 101 and cells.text[0][0] == "101: t100"
    curves = step_curves(norms[0], norms[1], labels)
    assert len(curves.data[0].y) == MOST_COLUMNS and curves.data[0].x[-1] == n


def test_a_norm_that_is_no_number_has_no_colour_and_does_not_set_the_scale() -> None:
    cells = step_norms(np.array([[1.0, np.nan], [np.inf, 3.0]]), ["a", "b"]).data[0]
    assert cells.zmax == 3 and np.isnan(cells.z[0, 1]) and np.isnan(cells.z[1, 0])
    assert step_norms(np.full((2, 2), np.nan), ["a", "b"]).data[0].zmax == 1


def test_hostile_tokens_are_escaped_in_every_picture() -> None:
    figures = [
        step_curves(np.array([0.5]), np.array([1.0]), [HOSTILE], chosen=0),
        step_norms(np.array([[1.0]]), [HOSTILE], chosen=0),
        attention_row(np.array([1.0]), np.array([0, 1]), [HOSTILE], 1),
        depth_norms({"resid_post": np.array([1.0, 2.0])}, [0, 1]),
    ]
    for figure in figures:
        assert "<a" not in figure.to_json().replace("\\u003c", "<")


def test_bars_tell_the_prompt_from_what_was_written_and_a_reduced_bar_says_so() -> None:
    bars = attention_row(np.array([0.2, 0.8]), np.array([0, 1, 3]), ["a", "b", "c"], n_prompt=1).data[0]
    assert bars.marker.color[0] != bars.marker.color[1]
    assert list(bars.customdata) == ["a (position 0)", "positions 1-2, the largest"]

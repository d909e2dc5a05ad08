"""Pictures of routing draw what they are given, and hostile tokens stay text."""

from __future__ import annotations

import numpy as np
import pytest

from backend.analysis.moe import Routing, repeats
from components.figures import moe as figures
from components.figures.moe_alike import alike_heatmap, load_bars, usage_heatmap
from components.moe_tables import strip

HOSTILE = '<a href="javascript:alert(1)">x</a><br>%{z}'
INDICES = np.array([[0, 1], [3, 0], [2, 3]])
WEIGHTS = np.array([[0.75, 0.25], [0.6, 0.4], [0.9, 0.1]], np.float32)
ROUTING = Routing(4, 5, INDICES, WEIGHTS)


def test_a_load_is_drawn_as_shares_of_the_layers_choices():
    found = figures.load_heatmap(np.array([[3, 1, 0], [0, 0, 0]]), [2, 5], 5)
    np.testing.assert_allclose(found.data[0].z, [[0.75, 0.25, 0], [0, 0, 0]])
    assert "3 of 4 choices, 75.0%" in found.data[0].customdata[0][0] and "2.25 × an even share" in found.data[0].customdata[0][0]


def test_the_map_draws_first_choices_and_names_all_with_their_weights():
    found = figures.first_choice_map([ROUTING], ["a", HOSTILE], 1, (4, 2))
    assert found.data[0].z.tolist() == [[3, 2]]
    assert found.data[0].customdata[0][0] == "expert 3 (0.60), 0 (0.40)"
    assert found.layout.meta["x"][0] == "1 a" and found.layout.meta["y"] == ["L4"]
    assert "<a" not in str(found.layout.meta) and "<a" not in str(found.layout.xaxis.ticktext)
    assert (found.layout.shapes[0].x0, found.layout.shapes[0].x1) == (0.5, 1.5)


@pytest.mark.parametrize("n", [2, 8, 64, 128])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_expert_has_a_colour_of_its_own(n, theme):
    assert len(set(figures.expert_colours(n, theme))) == n


def test_probabilities_are_drawn_expert_by_token():
    probs = np.array([[0.1, 0.9], [0.5, 0.5], [0.2, 0.8]], np.float32)
    found = figures.router_heatmap(probs, ["a", HOSTILE, "c"], 10, 11)
    np.testing.assert_array_equal(found.data[0].z, probs.T)
    assert found.layout.meta["x"][2] == "12 c" and found.layout.meta["y"] == ["expert 0", "expert 1"] and "<a" not in str(found.layout.meta)


def test_pairs_without_tokens_are_gaps():
    values = np.array([[np.nan, 0.5], [np.nan, np.nan]])
    found = figures.expert_pairs(values, np.array([[4, 2], [0, 0]]), "expert", "also expert", "share")
    assert found.data[0].zmax == 0.5 and found.data[0].customdata.tolist() == [[4, 2], [0, 0]] and found.layout.meta["x"][1] == "also expert 1"


def test_repeats_stand_beside_their_random_baselines():
    each = repeats(np.array([[0, 1], [0, 2], [3, 4]]), 8)
    found = figures.repeat_lines([each], [3], 2, 3)
    assert [line.name for line in found.data] == ["first choice", "first choice, random", "first or second", "first or second, random"]
    assert found.data[0].y[0] == pytest.approx(0.5) and found.data[1].y[0] == 0.125 and found.data[3].y[0] == pytest.approx(0.464, abs=1e-3)


def test_margins_mark_ties_and_effects_take_both_signs():
    bars = figures.margin_bars(np.array([0.0, 1.5, -2.0]), ["a", HOSTILE, "c"], 0, 1, "logits")
    assert "(a tie)" in bars.data[0].customdata[0] and "(a tie)" not in bars.data[0].customdata[1] and "<a" not in bars.data[0].customdata[1]
    effects = figures.effect_heatmap(np.array([[0.5, -0.25]]), [1], "nats")
    assert (effects.data[0].zmin, effects.data[0].zmax) == (-0.5, 0.5)


def test_change_is_a_line_for_the_set_and_one_for_the_first_choice():
    found = figures.change_lines([0, 1], np.array([0.0, 0.5]), np.array([0.0, 0.25]), 1)
    assert found.data[0].y.tolist() == [0, 0.5] and found.data[1].y.tolist() == [0, 0.25]


def test_a_row_that_counted_nothing_is_a_gap():
    found = usage_heatmap(np.array([[1, 3], [0, 0]]), ["sums", HOSTILE])
    np.testing.assert_allclose(found.data[0].z, [[0.25, 0.75], [np.nan, np.nan]])
    assert "3 of 4 choices, 75.0%" in found.data[0].customdata[0][1] and "<a" not in str(found.layout.yaxis.ticktext) + found.data[0].customdata[1][0]


def test_categories_against_each_other_say_this_layer_and_the_mean():
    found = alike_heatmap(np.array([[1, 0.5], [0.5, 1]]), np.array([[1, 0.25], [0.25, 1]]), ["sums", HOSTILE], "cosine")
    assert found.data[0].zmax == 1 and "0.5000 in this layer<br>0.2500 mean over all layers" in found.data[0].customdata[0][1]
    assert "<a" not in found.data[0].customdata[0][1] + str(found.layout.xaxis.ticktext)
    signed = alike_heatmap(np.array([[1, -0.5], [-0.5, 1]]), np.eye(2), ["a", "b"], "Pearson correlation")
    assert (signed.data[0].zmin, signed.data[0].zmax) == (-1, 1)


def test_two_loads_stand_side_by_side():
    found = load_bars(np.array([0.25, 0.75]), np.array([1.0, 0.0]), ("this", HOSTILE))
    assert [bar.y.tolist() for bar in found.data] == [[0.25, 0.75], [1, 0]] and "<a" not in found.data[1].name and "%{z}" not in found.data[1].hovertemplate


def test_the_strip_names_every_expert_of_a_token():
    found = strip(ROUTING, ["a", HOSTILE, "c"], 0, 1, "light")
    assert found[1].children == HOSTILE and found[1].title == "position 1: expert 3 (0.60), 0 (0.40)" and found[1].className == "moe-tok chosen"
    without = strip(Routing(4, 5, INDICES), ["a", "b", "c"], 0, 1, "light")
    assert without[0].title == "position 0: expert 0, 1"

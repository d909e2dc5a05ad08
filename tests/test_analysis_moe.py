"""Routing metrics against values worked out by hand and against scipy."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cosine, jensenshannon

from backend.analysis import moe
from backend.analysis.moe_compare import changed, pairwise, similarity, within_between

MAPPING = {0: 15, 1: 8, 2: 12, 3: 3, 4: 20, 5: 7, 6: 14, 7: 2}  # 81 choices
# two tokens chose (0, 1), one (0, 2), one (3, 1)
INDICES = np.array([[0, 1], [1, 0], [0, 2], [3, 1]], np.int32)


def test_the_mapping_by_hand():
    found = moe.load(MAPPING)
    # sum of (2i - 9) x_(i) over 2 3 7 8 12 14 15 20: -14 -15 -21 -8 +12 +42 +75 +140 = 211, over 8 * 81
    assert found.gini == pytest.approx(211 / 648)
    # squares: 225 64 144 9 400 49 196 4 = 1091; variance 1091 / 8 - (81 / 8)^2 = 136.375 - 102.515625
    assert found.variation == pytest.approx(math.sqrt(33.859375) / 10.125)
    assert found.balance == pytest.approx(10.125 / 20)
    assert (found.n_used, found.busiest) == (8, 4)
    assert found.busiest_share == pytest.approx(20 / 81)
    counts = np.array(list(MAPPING.values()))
    assert found.entropy == pytest.approx(stats.entropy(counts), rel=1e-12)
    assert found.entropy == pytest.approx(math.log(81) - sum(c * math.log(c) for c in counts) / 81, rel=1e-12)
    assert found.entropy_norm == pytest.approx(found.entropy / math.log(8))
    assert found.variation == pytest.approx(stats.variation(counts))
    assert moe.load(counts) == found


def test_an_even_load_and_one_expert_that_takes_all():
    even, one = moe.load([5] * 8), moe.load({3: 40}, n_experts=8)
    assert (even.entropy, even.entropy_norm, even.gini, even.variation, even.balance) == pytest.approx((math.log(8), 1, 0, 0, 1))
    assert (one.entropy, one.entropy_norm, one.gini, one.variation, one.balance) == pytest.approx((0, 0, 7 / 8, math.sqrt(7), 1 / 8))
    assert (one.n_used, one.busiest, one.busiest_share) == (1, 3, 1)
    assert math.isnan(moe.load([0, 0, 0]).entropy) and moe.load([0, 0, 0]).n_used == 0


def test_experts_never_used_count_as_zero():
    assert moe.load({0: 3, 1: 3}).gini == 0
    assert moe.load({0: 3, 1: 3}, n_experts=4).gini == pytest.approx(0.5)
    assert moe.expert_counts(INDICES, 5).tolist() == [3, 3, 1, 1, 0]


def test_the_switch_loss_is_one_for_an_even_router_and_e_for_a_collapsed_one():
    rows = np.array([[0, 1], [2, 3], [1, 0], [3, 2]])
    assert moe.switch_loss(rows, np.full((4, 4), 0.25)).loss == pytest.approx(1.0)
    assert moe.switch_loss(np.zeros((6, 1), int), np.eye(4)[np.zeros(6, int)]).loss == pytest.approx(4.0)
    probs = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    found = moe.switch_loss(np.array([[0], [1]]), probs)
    assert found.f.tolist() == [0.5, 0.5, 0] and found.p.tolist() == pytest.approx([0.4, 0.4, 0.2]) and found.loss == pytest.approx(3 * 0.4)


def test_the_z_loss_and_the_entropy_of_a_router():
    assert moe.z_loss(np.zeros((3, 8))) == pytest.approx(math.log(8) ** 2)
    assert moe.router_entropy(np.array([[0.25] * 4, [1, 0, 0, 0]])).tolist() == pytest.approx([math.log(4), 0])
    assert moe.router_entropy(np.full((1, 4), 0.9)).tolist() == pytest.approx([math.log(4)])


def test_co_activation_counts_all_pairs():
    found = moe.co_activation(INDICES, 4)
    assert found.tolist() == [[3, 2, 1, 0], [2, 3, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    share = moe.co_activation_share(INDICES, 5)
    assert share[0, 1] == pytest.approx(2 / 3) and share[2, 0] == 1 and np.isnan(share[4]).all() and np.isnan(np.diag(share)).all()
    three = moe.co_activation(np.array([[0, 1, 2]]), 3)
    assert three.tolist() == np.ones((3, 3), int).tolist()  # 0 and 2 are no neighbours in rank, and count


def test_transitions_follow_first_choices():
    later = np.array([[2, 1], [1, 0], [2, 0], [2, 1]])
    found = moe.transitions(INDICES, later, 4)
    assert found[0, 2] == 2 and found[1, 1] == 1 and found[3, 2] == 1 and found.sum() == 4


def test_repeats_and_their_random_baselines():
    found = moe.repeats(INDICES, 8)
    assert (found.first, found.any, found.overlap) == pytest.approx((0, 2 / 3, 1.0))
    assert found.first_random == 1 / 8
    assert found.any_random == pytest.approx(1 - (6 / 8) * (5 / 7)) and found.overlap_random == 0.5
    draws = np.random.default_rng(0).random((40_000, 8)).argsort(axis=1)[:, :2]
    random = moe.repeats(draws, 8)
    assert (random.first, random.any, random.overlap) == pytest.approx((random.first_random, random.any_random, random.overlap_random), abs=0.01)
    assert math.isnan(moe.repeats(INDICES[:1], 8).first)


def test_specialisation_is_the_share_of_a_labels_tokens():
    labels, n, share = moe.specialisation(INDICES, ["a", "b", "b", "b"], 4)
    assert labels == ["b", "a"] and n.tolist() == [3, 1]
    assert share[0].tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3]) and share[1].tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="3 labels for 4 tokens"):
        moe.specialisation(INDICES, ["a", "b", "c"], 4)


def test_margins_name_ties_and_choices_by_another_rule():
    scores = np.array([[3.0, 2.0, 0.5, 0], [1, 1, 1, 0], [0, 5, 1, 9]])
    indices = np.array([[0, 1], [0, 1], [3, 2]])  # the last as a router with groups would: expert 1 scores more than 2
    assert moe.margins(scores, indices).tolist() == [1.5, 0, -4]
    assert moe.ties(scores, indices) == [(1, [0, 1, 2])]


def test_the_margin_of_a_router_that_takes_all_is_no_number():
    assert np.isnan(moe.margins(np.array([[3.0, 2.0]]), np.array([[0, 1]]))).all()


def test_similarity_against_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 50, 8), rng.integers(0, 50, 8)
    found = similarity(a, b)
    assert found.cosine == pytest.approx(1 - cosine(a / a.sum(), b / b.sum()))
    assert found.pearson == pytest.approx(stats.pearsonr(a, b).statistic)
    assert found.jensen_shannon == pytest.approx(jensenshannon(a, b) ** 2)
    same, apart = similarity(MAPPING, MAPPING), similarity({0: 4}, {1: 9})
    assert (same.cosine, same.pearson, same.jensen_shannon) == pytest.approx((1, 1, 0))
    assert (apart.cosine, apart.pearson, apart.jensen_shannon) == pytest.approx((0, -1, math.log(2)))
    assert math.isnan(similarity([3, 3, 3], [1, 2, 3]).pearson) and math.isnan(similarity([0, 0], [1, 2]).cosine)
    matrix = pairwise([a, b])["cosine"]
    assert matrix[0, 1] == matrix[1, 0] == found.cosine and matrix[0, 0] == pytest.approx(1)


def test_pairs_within_and_between_labels():
    within, between = within_between([[4, 0], [2, 0], [0, 1], [0, 5]], ["a", "a", "b", "b"])
    assert (within, between) == pytest.approx((0, math.log(2)))
    assert math.isnan(within_between([[1, 1], [2, 1]], ["a", "b"])[0]) and math.isnan(within_between([[1, 1]], ["a"])[1])
    rng = np.random.default_rng(2)
    loads = list(rng.integers(0, 9, (5, 6))) + [np.zeros(6, int)]
    by_hand = [similarity(loads[i], loads[j]).jensen_shannon for i, j in ((0, 2), (0, 4), (2, 4), (1, 3))]
    assert within_between(loads, ["x", "y", "x", "y", "x", "y"])[0] == pytest.approx(np.mean(by_hand))
    with pytest.raises(ValueError, match="1 labels for 2 loads"):
        within_between([[1], [1]], ["a"])


def test_what_changed_between_two_routings():
    other = np.array([[1, 0], [1, 0], [0, 3], [3, 1]])
    found = changed(INDICES, other)
    assert found.sets.tolist() == [False, False, True, False]  # the order within a set is no change of the set
    assert found.first.tolist() == [True, False, False, False]
    assert found.share == 0.25 and found.slots == pytest.approx(1 / 8)
    with pytest.raises(ValueError, match="4 tokens x 2 experts and of 2 x 2"):
        changed(INDICES, other[:2])


@pytest.mark.parametrize("counts", [{}, [], {0: -1}, [1, math.nan], [math.inf]])
def test_what_are_no_counts_is_refused(counts):
    with pytest.raises(ValueError, match="finite numbers"):
        moe.load(counts)


def test_an_expert_outside_the_model_is_named():
    with pytest.raises(ValueError, match="Expert 9 is outside 0-7"):
        moe.expert_counts(np.array([[0, 9]]), 8)
    with pytest.raises(ValueError, match="Expert 9 is outside 0-7"):
        moe.load({9: 1}, n_experts=8)

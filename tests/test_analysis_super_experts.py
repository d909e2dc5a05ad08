"""Super experts: the largest output of every expert and the paper's criterion, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from backend.analysis.super_experts import PUBLISHED, Peaks, SuperExpert, forms_massive, judge, published

# 3 tokens, 2 of 4 experts each, 2 dimensions; outputs are times their weights.
INDICES = np.array([[0, 1], [1, 0], [2, 0]], np.int32)
WEIGHTS = np.array([[0.5, 0.5], [0.8, 0.2], [0.9, 0.1]], np.float32)
OUTPUTS = np.array([[[1.0, -2.0], [3.0, 0.0]], [[-4.0, 1.0], [0.0, 0.5]], [[0.9, 0.0], [0.0, -0.6]]], np.float32)


def peaks(*pieces: slice) -> Peaks:
    found = Peaks.none(4)
    for piece in pieces:
        found.add(OUTPUTS[piece], INDICES[piece], WEIGHTS[piece], piece.start or 0)
    return found


@pytest.mark.parametrize("pieces", [(slice(0, 3),), (slice(0, 1), slice(1, 3))], ids=["whole", "in pieces"])
def test_the_largest_output_of_every_expert_by_hand(pieces):
    """Expert 0: 2 / 0.5 = 4 at token 0, 0.5 / 0.2 = 2.5 at token 1, 0.6 / 0.1 = 6 at token 2. Expert 1: 3 / 0.5 = 6 and 4 / 0.8 = 5. Expert 3: nothing."""
    found = peaks(*pieces)
    assert np.allclose(found.size, [6, 6, 1, 0])
    assert np.allclose(found.added, [2, 4, 0.9, 0])
    assert found.position.tolist() == [2, 0, 2, -1] and found.dimension.tolist() == [1, 0, 0, -1]


def test_a_weight_of_nothing_and_a_value_that_is_no_number_make_no_peak():
    found = Peaks.none(2)
    found.add(np.array([[[np.nan, 1.0], [0.0, 0.0]]], np.float32), np.array([[0, 1]]), np.array([[0.5, 0.0]], np.float32))
    assert np.allclose(found.size, [2, 0]) and np.allclose(found.added, [1, 0])


def layer_of(sizes: list[float]) -> Peaks:
    n = len(sizes)
    return Peaks(np.array(sizes, np.float32), np.array(sizes, np.float32) / 2, np.arange(n), np.arange(n))


def test_the_criterion_by_hand():
    """401 sizes, 1 to 399 in two layers and 1,000 and 5,000 in the third: the 99.5th percentile is that at rank 0.995 * 400 = 398 from 0, so 399."""
    layers = [(0, layer_of([float(i) for i in range(1, 201)])), (2, layer_of([float(i) for i in range(201, 400)])), (3, layer_of([1000.0, 5000.0]))]
    verdict = judge(layers, {0, 3})
    assert verdict.percentile == 399 and verdict.largest == 5000
    assert verdict.by_size == [SuperExpert(3, 1, 5000.0, 2500.0, 1, 1, 1.0), SuperExpert(3, 0, 1000.0, 500.0, 0, 0, 0.2)]
    assert verdict.supers == verdict.by_size
    assert [each.size for each in verdict.ranked] == [5000, 1000, 399, 398, 397, 396, 395, 394]
    assert judge(layers, {0}).supers == [] and judge(layers, {0}).by_size == verdict.by_size
    # a tenth of the largest is a limit of its own
    assert [each.expert for each in judge([*layers[:2], (3, layer_of([500.0, 5000.0]))], {3}).supers] == [1]


def test_a_layer_forms_massive_activations_where_what_leaves_it_is_massive_and_grew():
    before = np.ones((4, 50), np.float32) * 0.1
    after = before.copy()
    after[0, 7] = -300.0
    assert forms_massive(before, after)
    assert not forms_massive(after, after)  # it was there before
    grown = after.copy()
    grown[0, 7] = -390.0
    assert not forms_massive(after, grown)  # by 90 only
    grown[0, 7] = -401.0
    assert forms_massive(after, grown)
    assert not forms_massive(after, before)  # what takes it away forms none
    assert not forms_massive(before, after + 1)  # 300 times the median is not massive
    assert not forms_massive(before, np.where(np.arange(50) == 7, 90.0, 0.01).astype(np.float32) * np.ones((4, 1), np.float32))  # below 100


def test_published_super_experts_are_found_by_the_name_of_a_file_or_preset():
    assert published("Qwen3-30B-A3B-Q4_K_M") == PUBLISHED["Qwen3-30B-A3B"] == ((1, 68), (2, 92), (3, 82))
    assert published("mixtral-8x7b-instruct-v0.1") == ((1, 3),)
    assert published("deepseek_v2_lite.Q8_0") == PUBLISHED["DeepSeek-V2-Lite"]
    assert published("demo-moe") == () and published("mixtral-8x22b") == ()

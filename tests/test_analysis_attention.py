"""Head scores against hand-computed patterns, scipy, and TransformerLens' definitions on a repeated random block."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from backend.analysis import attention


def causal(rng: np.random.Generator, heads: int, n: int) -> np.ndarray:
    scores = np.where(np.tril(np.ones((n, n), bool)), rng.normal(size=(heads, n, n)), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def uniform(n: int) -> np.ndarray:
    rows = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    return rows[None].astype(np.float32)


def test_entropy_agrees_with_scipy_on_random_patterns():
    pattern = causal(np.random.default_rng(0), 3, 17)
    np.testing.assert_allclose(attention.entropy(pattern), stats.entropy(pattern.astype(np.float64), axis=-1), atol=1e-6)


def test_uniform_attention_has_the_full_entropy_and_looks_halfway_back():
    pattern = uniform(12)
    np.testing.assert_allclose(attention.entropy(pattern)[0], np.log(np.arange(1, 13)), atol=1e-6)
    normalised = attention.entropy_normalised(pattern)[0]
    assert normalised[0] == 0
    np.testing.assert_allclose(normalised[1:], 1, atol=1e-6)
    assert attention.mean_distance(pattern)[0] == pytest.approx(np.mean([i / 2 for i in range(1, 12)]), abs=1e-5)


def test_a_head_that_looks_only_at_the_first_token_is_a_pure_sink():
    pattern = np.zeros((1, 5, 5), np.float32)
    pattern[0, :, 0] = 1
    assert attention.sink_mass(pattern)[0] == 1
    assert attention.entropy(pattern).max() == 0
    assert attention.previous_token_score(pattern)[0] == pytest.approx(1 / 4)  # only row 1 has its previous token at 0


def test_sink_mass_leaves_out_the_first_row():
    pattern = uniform(3)
    assert attention.sink_mass(pattern)[0] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_previous_token_head_scores_one():
    pattern = np.eye(6, k=-1, dtype=np.float32)[None].copy()
    pattern[0, 0, 0] = 1
    assert attention.previous_token_score(pattern)[0] == 1
    assert attention.mean_distance(pattern)[0] == 1


def test_duplicate_and_induction_scores_on_a_sentence_worked_out_by_hand():
    ids = [7, 1, 2, 1, 3]  # only position 3 repeats: its copy is at 1, the successor of the copy at 2
    pattern = uniform(5)
    pattern[0, 3] = [0.1, 0.2, 0.6, 0.1, 0]
    assert attention.duplicate_token_score(pattern, ids)[0] == pytest.approx(0.2)
    assert attention.induction_score(pattern, ids)[0] == pytest.approx(0.6)


def test_scores_sum_over_every_earlier_occurrence():
    ids = [4, 5, 4, 6, 4]
    pattern = uniform(5)
    pattern[0, 2] = [0.5, 0.3, 0.2, 0, 0]
    pattern[0, 4] = [0.1, 0.2, 0.3, 0.25, 0.15]
    assert attention.duplicate_token_score(pattern, ids)[0] == pytest.approx((0.5 + (0.1 + 0.3)) / 2)
    assert attention.induction_score(pattern, ids)[0] == pytest.approx((0.3 + (0.2 + 0.25)) / 2)


def test_repeating_oneself_at_once_is_not_induction():
    pattern = uniform(3)
    assert np.isnan(attention.induction_score(pattern, [9, 3, 3])[0])
    assert attention.duplicate_token_score(pattern, [9, 3, 3])[0] == pytest.approx(1 / 3)


def test_no_repeated_token_means_no_score_rather_than_zero():
    scores = attention.head_metrics(uniform(4), [1, 2, 3, 4])
    assert np.isnan(scores["duplicate"][0]) and np.isnan(scores["induction"][0])
    assert not np.isnan(scores["previous"][0])


@pytest.mark.parametrize("block", [2, 5, 25])
def test_on_a_repeated_random_block_the_scores_are_transformerlens_diagonals(block):
    rng = np.random.default_rng(block)
    ids = np.tile(rng.permutation(1000)[:block], 2)
    pattern = causal(rng, 4, 2 * block)
    stripe = pattern.diagonal(offset=1 - block, axis1=-2, axis2=-1)[:, 1:]  # the first entry belongs to the first block's last token
    np.testing.assert_allclose(attention.induction_score(pattern, ids), stripe.mean(-1), atol=1e-6)
    same = pattern.diagonal(offset=-block, axis1=-2, axis2=-1)
    np.testing.assert_allclose(attention.duplicate_token_score(pattern, ids), same.mean(-1), atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_prompt_in_pieces_has_the_scores_of_the_whole(size):
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 6, 14).tolist()
    pattern = causal(rng, 3, 14)
    joint = attention.RowMeans()
    for a in range(0, 14, size):
        joint.add(attention.row_scores(pattern[:, a : a + size, : a + size], ids, a))
    joined = joint.means()
    whole = attention.head_metrics(pattern, ids)
    for name in attention.METRICS:
        np.testing.assert_allclose(joined[name], whole[name], atol=1e-6)


def test_head_metrics_are_the_single_scores():
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 5, 12).tolist()
    pattern = causal(rng, 2, 12)
    scores = attention.head_metrics(pattern, ids)
    np.testing.assert_allclose(scores["sink"], attention.sink_mass(pattern), atol=1e-6)
    np.testing.assert_allclose(scores["induction"], attention.induction_score(pattern, ids), atol=1e-6)
    np.testing.assert_allclose(scores["entropy"], attention.entropy(pattern)[:, 1:].mean(-1), atol=1e-6)
    np.testing.assert_allclose(scores["previous"], pattern.diagonal(offset=-1, axis1=-2, axis2=-1).mean(-1), atol=1e-6)


def test_a_thumbnail_of_a_long_prompt_keeps_a_single_strong_link():
    pattern = np.zeros((1, 1000, 1000), np.float32)
    pattern[0, 777, 123] = 1
    picture = attention.thumbnails(pattern)
    assert picture.shape == (1, 48, 48)
    assert picture[0, 777 * 48 // 1000, 123 * 48 // 1000] == 255
    assert np.count_nonzero(picture) == 1


def test_a_short_prompt_is_painted_cell_by_cell():
    pattern = causal(np.random.default_rng(3), 2, 9)
    np.testing.assert_array_equal(attention.thumbnails(pattern), np.rint(pattern * 255).astype(np.uint8))


def test_thumbnails_from_pieces_equal_the_thumbnail_of_the_whole():
    pattern = causal(np.random.default_rng(4), 2, 101)
    painted = np.zeros((2, *2 * (attention.thumbnail_side(101),)), np.uint8)
    for start in range(0, 101, 13):
        stop = min(start + 13, 101)
        attention.add_to_thumbnails(painted, pattern[:, start:stop, :stop], start, 101)
    np.testing.assert_array_equal(painted, attention.thumbnails(pattern))


def test_reduce_max_says_which_rows_and_columns_a_cell_stands_for():
    pattern = causal(np.random.default_rng(5), 1, 300)[0]
    reduced, rows, columns = attention.reduce_max(pattern, 256, 100)
    assert reduced.shape == (256, 100)
    assert (rows[0], rows[-1], columns[-1]) == (0, 300, 300)
    for a, b in [(0, 0), (100, 7), (255, 99)]:
        assert reduced[a, b] == pattern[rows[a] : rows[a + 1], columns[b] : columns[b + 1]].max()


def test_one_pass_over_a_pattern_finds_what_numpy_does(start=37, cell=7):
    rng = np.random.default_rng(6)
    padded = np.zeros((3, 20, 64), np.float32)  # a kernel's own memory has rows that are longer than the keys
    padded[:, :, : start + 20] = causal(rng, 3, start + 20)[:, start:]
    pattern = padded[:, :, : start + 20]
    for part in (pattern, pattern.astype(np.float64), pattern[:, ::-1][:, ::-1], pattern[[2, 0, 1]]):
        read, exact = attention.read_pattern(part, start, cell), part.astype(np.float64)
        np.testing.assert_allclose(read.mass, exact.sum(-1), rtol=1e-6)
        np.testing.assert_allclose(read.entropy, stats.entropy(exact, axis=-1), atol=2e-6)
        np.testing.assert_allclose(read.distance, (exact * (start + np.arange(20)[:, None] - np.arange(start + 20))).sum(-1), rtol=1e-5)
        assert read.finite and not read.least.any() and not read.beyond.any()
        for c in range(read.peaks.shape[1]):
            rows = slice(max((start // cell + c) * cell - start, 0), (start // cell + c + 1) * cell - start)
            for d in range(read.peaks.shape[2]):
                np.testing.assert_array_equal(read.peaks[:, c, d], part[:, rows, d * cell : (d + 1) * cell].max((-2, -1)))


def test_one_pass_over_a_pattern_finds_what_is_wrong_with_it():
    pattern = uniform(6).repeat(4, 0)
    pattern[0, 2, 1] = -0.25
    pattern[1, 2, 4], pattern[1, 0, 5] = -0.5, 0.125
    pattern[2, 3, 1] = np.nan
    pattern[3, 3, 5] = np.nan
    read = attention.read_pattern(pattern)
    assert read.least.tolist() == [-0.25, -0.5, 0, 0]
    assert read.beyond.tolist() == [0, 0.5, 0, np.inf]
    assert np.isnan(read.mass[2]).tolist() == [False, False, False, True, False, False]
    assert not read.finite and attention.read_pattern(pattern[:2]).finite
    assert read.mass[1, 2] == pytest.approx(0.5) and read.mass[0, 2] == pytest.approx(1 - 0.25 - 1 / 3)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30, 2.0**-14, 1 / 3, 0.70710677, 0.9999999, 1.0])
def test_entropy_holds_from_the_smallest_number_to_one(value):
    pattern = np.full((1, 1, 1), value, np.float32)
    expected = -float(pattern[0, 0, 0]) * np.log(float(pattern[0, 0, 0])) if value else 0.0
    assert attention.entropy(pattern)[0, 0] == pytest.approx(expected, rel=3e-7, abs=1e-36)


def test_a_pattern_whose_keys_do_not_fit_its_rows_is_refused():
    with pytest.raises(ValueError, match="rows 3 to 7 are given has 7 keys, not 6"):
        attention.read_pattern(uniform(6)[:, 2:], start=3)


def test_where_no_folder_can_be_written_the_loops_are_compiled_each_time(monkeypatch):
    from numba.core import caching

    from backend.compute.compiling import compiled

    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert compiled()(lambda x: x + 1)(1) == 2

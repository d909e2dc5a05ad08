"""Logits, divergences and lens rows against scipy and against identities that define them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from backend.analysis import divergence, lens, logits

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(6, 40)).astype(np.float32) * 5
OTHER = RNG.normal(size=(6, 40)).astype(np.float32) * 5
IDS = RNG.integers(0, 40, 6)


def test_log_softmax_and_logsumexp_agree_with_scipy_even_at_large_logits():
    big = VALUES + 1e4
    np.testing.assert_allclose(logits.log_softmax(big), special.log_softmax(big.astype(np.float64), axis=-1), atol=1e-10)
    np.testing.assert_allclose(logits.logsumexp(big), special.logsumexp(big.astype(np.float64), axis=-1), rtol=1e-14)


def test_a_vocabulary_larger_than_a_block_gives_the_same_numbers():
    wide = RNG.normal(size=(70, 50_000)).astype(np.float32)
    np.testing.assert_allclose(logits.logsumexp(wide), special.logsumexp(wide.astype(np.float64), axis=-1), rtol=1e-12)


def test_top_k_is_best_first_with_true_probabilities():
    ids, logprobs = logits.top_k(VALUES, 5)
    np.testing.assert_array_equal(ids, np.argsort(-VALUES, axis=-1, kind="stable")[:, :5])
    np.testing.assert_allclose(logprobs, np.take_along_axis(special.log_softmax(VALUES.astype(np.float64), -1), ids, -1), atol=1e-6)


def test_equal_logits_stand_in_the_order_of_their_ids():
    ids, _ = logits.top_k(np.array([[1.0, 3.0, 3.0, 0.0, 3.0]]), 2)
    assert ids.tolist() == [[1, 2]]
    assert logits.rank_of(np.array([[1.0, 3.0, 3.0, 0.0, 3.0]]), [4]).tolist() == [2]


def test_k_larger_than_the_vocabulary_gives_the_whole_vocabulary():
    assert logits.top_k(VALUES, 99)[0].shape == (6, 40)


def test_entropy_agrees_with_scipy_and_masked_tokens_add_nothing():
    np.testing.assert_allclose(logits.entropy(VALUES), stats.entropy(special.softmax(VALUES.astype(np.float64), -1), axis=-1), atol=1e-6)
    assert logits.entropy(np.array([[0.0, 0.0, -np.inf]]))[0] == pytest.approx(np.log(2))


def test_the_next_token_s_logprob_is_that_of_the_token_that_follows():
    found = logits.next_token_logprobs(VALUES, IDS)
    assert np.isnan(found[-1])
    assert found[2] == pytest.approx(special.log_softmax(VALUES[2].astype(np.float64))[IDS[3]], abs=1e-6)


def test_rank_zero_is_the_best_token():
    ids, _ = logits.top_k(VALUES, 40)
    for place in (0, 1, 7, 39):
        assert (logits.rank_of(VALUES, ids[:, place]) == place).all()


def test_kl_js_and_total_variation_agree_with_scipy():
    p_log, q_log = logits.log_softmax(VALUES), logits.log_softmax(OTHER)
    p, q = np.exp(p_log), np.exp(q_log)
    np.testing.assert_allclose(divergence.kl(p_log, q_log), special.rel_entr(p, q).sum(-1), rtol=1e-9)
    middle = (p + q) / 2
    oracle = (special.rel_entr(p, middle).sum(-1) + special.rel_entr(q, middle).sum(-1)) / 2
    np.testing.assert_allclose(divergence.js(p_log, q_log), oracle, rtol=1e-9)
    np.testing.assert_allclose(divergence.js(p_log, q_log), divergence.js(q_log, p_log), rtol=1e-9)
    np.testing.assert_allclose(divergence.total_variation(p_log, q_log), np.abs(p - q).sum(-1) / 2)


def test_kl_is_not_symmetric_and_infinite_where_the_other_says_never():
    with np.errstate(divide="ignore"):
        p, q = np.log([0.5, 0.5, 0.0]), np.log([1.0, 0.0, 0.0])
    assert divergence.kl(q, p) == pytest.approx(np.log(2))
    assert divergence.kl(p, q) == np.inf


def test_divergences_have_their_known_limits_on_distributions_that_share_nothing():
    with np.errstate(divide="ignore"):
        p, q = np.log([1.0, 0.0]), np.log([0.0, 1.0])
    assert divergence.js(p, q) == pytest.approx(np.log(2))
    assert divergence.total_variation(p, q) == 1


def test_the_lens_of_the_last_layer_is_the_model_itself():
    row = lens.lens_row(VALUES, VALUES, IDS, k=3)
    assert np.abs(row["kl"]).max() == 0
    np.testing.assert_array_equal(row["top_ids"], logits.top_k(VALUES, 3)[0])
    np.testing.assert_array_equal(row["next_logprob"], logits.next_token_logprobs(VALUES, IDS))


def test_a_lens_row_measures_the_model_against_the_row_and_not_the_reverse():
    row = lens.lens_row(OTHER, VALUES, IDS)
    np.testing.assert_allclose(row["kl"], divergence.kl(logits.log_softmax(VALUES), logits.log_softmax(OTHER)), rtol=1e-6)
    assert row["next_rank"][-1] == -1
    assert row["next_rank"][0] == (OTHER[0] > OTHER[0, IDS[1]]).sum()


def test_the_target_of_a_lens_is_followed_at_every_position():
    logprobs, ranks = lens.target_row(VALUES, 11)
    np.testing.assert_allclose(logprobs, logits.log_softmax(VALUES)[:, 11], atol=1e-6)
    np.testing.assert_array_equal(ranks, (VALUES > VALUES[:, [11]]).sum(-1))


def test_what_a_trace_keeps_of_a_row_is_what_the_single_functions_say():
    wide = RNG.normal(size=(9, 5_000)).astype(np.float32) * 4
    following = RNG.integers(0, 5_000, 9)
    kept = logits.summary(wide, following, 12)
    ids, logprobs = logits.top_k(wide, 12)
    np.testing.assert_array_equal(kept["top_ids"], ids)
    np.testing.assert_allclose(kept["top_logprobs"], logprobs, atol=3e-6)
    np.testing.assert_allclose(kept["logsumexp"], logits.logsumexp(wide), rtol=1e-6)
    np.testing.assert_allclose(kept["entropy"], logits.entropy(wide), atol=3e-6)
    np.testing.assert_allclose(kept["next_logprobs"], special.log_softmax(wide.astype(np.float64), -1)[np.arange(9), following], atol=3e-6)
    np.testing.assert_array_equal(kept["next_ranks"], logits.rank_of(wide, following))


@pytest.mark.parametrize(("d_vocab", "k"), [(16_384, 20), (5_003, 20), (161, 20), (160, 20), (50, 5), (15, 20), (7, 1)])
def test_many_rows_are_read_as_single_ones_are(d_vocab, k):
    """A compiled loop reads eight rows and more, NumPy fewer. Whole numbers, so that many are equal; masked and broken rows among them."""
    rows = np.round(RNG.normal(size=(24, d_vocab)) * 3).astype(np.float32)
    rows[8:, 2:6] = -np.inf
    rows[3, 1], rows[4, 2], rows[5], rows[6] = np.nan, np.inf, -np.inf, 0
    following = RNG.integers(0, d_vocab, 24)
    many, single = logits.summary(rows, following, k), [logits.summary(rows[i : i + 1], following[i : i + 1], k) for i in range(24)]
    for name, values in many.items():
        expected = np.concatenate([row[name] for row in single])
        assert values.dtype == expected.dtype
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=4e-6, err_msg=name)
    np.testing.assert_array_equal(many["top_ids"], np.concatenate([row["top_ids"] for row in single]))


def test_a_next_token_outside_the_vocabulary_is_refused_and_not_read():
    with pytest.raises(ValueError, match="9 rows of 50 logits have 9 next tokens, from 0 to 50"):
        logits.summary(np.zeros((9, 50), np.float32), np.array([*range(8), 50]), 5)


def test_a_masked_logit_and_a_broken_row_are_kept_as_they_are():
    rows = np.array([[2.0, -np.inf, 0.0], [np.nan, 1.0, 3.0], [np.inf, 1.0, 0.0]], np.float32)
    kept = logits.summary(rows, np.array([2, 2, 1]), 2)
    np.testing.assert_allclose(kept["entropy"][0], stats.entropy(special.softmax(rows[0].astype(np.float64))), rtol=1e-6)
    assert kept["top_ids"].tolist() == [[0, 2], [2, 1], [0, 1]]
    assert kept["next_ranks"].tolist() == [1, -1, 1]
    for name in ("entropy", "logsumexp", "next_logprobs"):
        assert np.isnan(kept[name][1:]).all()
    row = lens.lens_row(rows, np.zeros((3, 3), np.float32), [0, 2, 2])
    assert row["kl"][0] == np.inf  # the model gives a third to what the row rules out
    assert np.isnan(row["kl"][1:]).all()
    ruled_out = lens.lens_row(np.zeros((1, 3), np.float32), rows[:1], [0])
    assert ruled_out["kl"][0] == pytest.approx(np.log(3) - stats.entropy(special.softmax(rows[0].astype(np.float64))), rel=1e-6)


def test_perplexity_so_far_is_the_exponential_of_the_mean_surprise():
    found = logits.cumulative_perplexity(np.log([0.5, 0.125, 0.25, np.nan]))
    np.testing.assert_allclose(found[:3], [2, 4, 4])  # 2; sqrt(2 * 8); cube root of 2 * 8 * 4
    assert np.isnan(found[3])
    assert np.isnan(logits.cumulative_perplexity(np.array([-1.0, np.nan, -1.0, np.nan]))).tolist() == [False, True, True, True]
    assert logits.cumulative_perplexity(np.array([-1e4, np.nan]))[0] == np.inf

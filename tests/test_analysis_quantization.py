"""The formulas of quantization error and divergence, against numbers worked out by hand, scipy, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import cosine as scipy_cosine
from scipy.special import log_softmax
from scipy.stats import entropy as scipy_kl
from scipy.stats import ortho_group

from backend.analysis import divergence
from backend.analysis.quantization import METRICS, ErrorSums, prediction_shift


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_the_error_of_a_tensor_by_hand():
    """p = (3, 4, 0, 0), q = (3, 2, 0, 1): d = (0, -2, 0, 1), sum d^2 = 5, sum p^2 = 25, sum q^2 = 14, p.q = 17."""
    sums = ErrorSums.of(np.array([[3, 4], [0, 0]], np.float32), np.array([[3, 2], [0, 1]], np.float32))
    assert sums.rmse == pytest.approx(math.sqrt(5 / 4))
    assert sums.relative_rmse == pytest.approx(math.sqrt(5 / 25))
    assert sums.sqnr_db == pytest.approx(10 * math.log10(5))
    assert sums.cosine == pytest.approx(17 / math.sqrt(25 * 14))
    assert sums.max_error == 2
    assert set(sums.metrics()) == set(METRICS)


def test_the_parts_of_a_tensor_add_up_to_its_error(rng):
    p, q = rng.normal(size=(2, 40, 33)).astype(np.float32)
    whole = ErrorSums.of(p, q).metrics()
    parts = sum((ErrorSums.of(p[i : i + 7], q[i : i + 7]) for i in range(0, 40, 7)), ErrorSums()).metrics()
    assert parts == pytest.approx(whole, rel=1e-12)
    assert whole["cosine"] == pytest.approx(1 - scipy_cosine(p.ravel(), q.ravel()), abs=1e-6)


def test_halving_the_noise_adds_six_decibels(rng):
    """20 log10 2 = 6.02 dB a bit: the law of uniform quantizers (Widrow and Kollar 2008)."""
    p, noise = rng.normal(size=(2, 1000))
    assert ErrorSums.of(p, p + noise / 2).sqnr_db - ErrorSums.of(p, p + noise).sqnr_db == pytest.approx(20 * math.log10(2))


def test_a_tensor_against_itself_has_no_error(rng):
    p = rng.normal(size=100)
    assert ErrorSums.of(p, p).metrics() == pytest.approx({"rmse": 0, "relative_rmse": 0, "sqnr_db": math.inf, "max_error": 0, "cosine": 1})


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([0, 0], [0, 0], {"relative_rmse": 0.0, "sqnr_db": math.inf, "cosine": 1.0}),
        ([0, 0], [1, 0], {"relative_rmse": math.inf, "sqnr_db": -math.inf, "cosine": math.nan}),
        ([1, 2], [0, 0], {"relative_rmse": 1.0, "sqnr_db": 0.0, "cosine": math.nan}),
    ],
)
def test_tensors_of_zeros_have_a_defined_error(p, q, expected):
    got = ErrorSums.of(np.array(p, float), np.array(q, float)).metrics()
    assert {name: got[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_a_nan_weight_is_not_hidden_by_the_blocks_after_it():
    bad = ErrorSums.of(np.ones(2), np.array([1.0, np.nan])) + ErrorSums.of(np.ones(2), np.ones(2))
    assert math.isnan(bad.rmse) and math.isnan(bad.cosine) and math.isnan(bad.max_error)


def test_relative_l2_and_cosine_of_rows_by_hand_and_by_scipy(rng):
    p = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    q = np.array([[3.0, 4.5], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert divergence.relative_l2(p, q) == pytest.approx([0.1, 0.0, math.inf, 2.0])
    assert divergence.cosine(p, q) == pytest.approx([(9 + 18) / (5 * math.hypot(3, 4.5)), 1.0, math.nan, -1.0], nan_ok=True)
    a, b = rng.normal(size=(2, 6, 50)).astype(np.float32)
    assert divergence.cosine(a, b) == pytest.approx([1 - scipy_cosine(x, y) for x, y in zip(a, b, strict=True)], abs=1e-6)


def test_cka_by_hand():
    """X = (-1, 0, 1), Y = (1, -2, 1): <X, Y>^2 = 0; with Z = (-1, 0, 2), centred (-4/3, -1/3, 5/3): (3)^2 / (2 * 42/9) = 27/28."""
    x, y, z = np.array([[-1.0], [0], [1]]), np.array([[1.0], [-2], [1]]), np.array([[-1.0], [0], [2]])
    assert divergence.linear_cka(x, y) == pytest.approx(0, abs=1e-15)
    assert divergence.linear_cka(x, z) == pytest.approx(27 / 28)


@pytest.mark.parametrize("n", [5, 30])  # fewer and more positions than features: two ways to the same number
def test_cka_is_its_definition_with_a_centring_matrix(rng, n):
    x, y = rng.normal(size=(n, 12)), rng.normal(size=(n, 9))
    h = np.eye(n) - 1 / n
    gram_x, gram_y = h @ x @ x.T @ h, h @ y @ y.T @ h
    assert divergence.linear_cka(x, y) == pytest.approx(np.sum(gram_x * gram_y) / np.sqrt(np.sum(gram_x**2) * np.sum(gram_y**2)))
    assert divergence.linear_hsic(x, y)[0] == pytest.approx(np.trace(x @ x.T @ h @ y @ y.T @ h) / (n - 1) ** 2)


@pytest.mark.parametrize("n", [5, 30])
def test_cka_does_not_see_rotations_scales_and_shifts_but_sees_other_maps(rng, n):
    x, y = rng.normal(size=(2, n, 12))
    rotation = ortho_group.rvs(12, random_state=3)
    assert divergence.linear_cka(x, 3.5 * x @ rotation + 2) == pytest.approx(1)
    assert divergence.linear_cka(x, -0.1 * y @ rotation - 7) == pytest.approx(divergence.linear_cka(x, y))
    assert divergence.linear_cka(x, y) == pytest.approx(divergence.linear_cka(y, x))
    assert divergence.linear_cka(x, x * np.geomspace(1, 100, 12)) < 0.9  # not invariant to every invertible map


def test_cka_of_one_position_or_of_a_constant_is_not_a_number(rng):
    assert math.isnan(divergence.linear_cka(rng.normal(size=(1, 4)), rng.normal(size=(1, 4))))
    assert math.isnan(divergence.linear_cka(np.ones((3, 4)), rng.normal(size=(3, 4))))


def test_hsics_of_several_prompts_are_joined_before_the_ratio(rng):
    pairs = [(rng.normal(size=(n, 6)), rng.normal(size=(n, 6))) for n in (4, 9)]
    total = sum(divergence.linear_hsic(x, y) for x, y in pairs)
    assert divergence.cka_of_hsic(total) == pytest.approx(total[0] / np.sqrt(total[1] * total[2]))
    same = sum(divergence.linear_hsic(x, x) for x, _ in pairs)
    assert divergence.cka_of_hsic(same) == pytest.approx(1)


def test_predictions_against_scipy_and_by_hand(rng):
    p, q = rng.normal(size=(2, 5, 11)).astype(np.float32) * 3
    ids = [4, 0, 10, 3, 3]
    got = prediction_shift(p, q, ids)
    logp, logq = log_softmax(p.astype(float), axis=-1), log_softmax(q.astype(float), axis=-1)
    assert got["kl"] == pytest.approx(scipy_kl(np.exp(logp), np.exp(logq), axis=-1))
    assert got["reference_top"].tolist() == p.argmax(-1).tolist() and got["top"].tolist() == q.argmax(-1).tolist()
    assert got["reference_prob"] == pytest.approx(np.exp(logp).max(-1), rel=1e-5) and got["prob"] == pytest.approx(np.exp(logq).max(-1), rel=1e-5)
    expected = [logq[i, ids[i + 1]] - logp[i, ids[i + 1]] for i in range(4)]
    assert got["next_logprob_change"][:4] == pytest.approx(expected, abs=1e-5) and math.isnan(got["next_logprob_change"][4])


def test_a_coin_that_becomes_unfair_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln(2/3) = ln 2 - ln 3 / 2."""
    got = prediction_shift(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]]), [0])
    assert got["kl"][0] == pytest.approx(math.log(2) - math.log(3) / 2)
    assert (got["reference_top"][0], got["top"][0]) == (0, 1)


def test_predictions_of_a_model_against_itself_do_not_shift(rng):
    p = rng.normal(size=(4, 300)).astype(np.float32) * 10
    got = prediction_shift(p, p, [1, 2, 3, 4])
    assert got["kl"].max() == 0 and np.array_equal(got["top"], got["reference_top"]) and not got["next_logprob_change"][:3].any()

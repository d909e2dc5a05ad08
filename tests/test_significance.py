"""Tests of significance against scipy, exact counting, and numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from backend.analysis.significance import agreement, corrected, effect, kruskal, overlap, rank_p, shares


def test_holm_by_hand() -> None:
    # sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2 (but never below the one before), 0.5 x 1
    np.testing.assert_allclose(corrected([0.03, 0.01, 0.5, 0.02], "holm"), [0.06, 0.04, 0.5, 0.06])
    np.testing.assert_allclose(corrected([0.9, 0.8], "holm"), [1, 1])


def test_benjamini_hochberg_is_scipys() -> None:
    p = np.random.default_rng(0).uniform(0, 0.2, 40)
    np.testing.assert_allclose(corrected(p, "benjamini-hochberg"), scipy.stats.false_discovery_control(p, method="bh"))


def test_a_test_that_could_not_be_made_is_none_of_the_family() -> None:
    np.testing.assert_allclose(corrected([0.01, math.nan, 0.04], "holm"), [0.02, math.nan, 0.04])
    np.testing.assert_allclose(corrected([math.nan], "benjamini-hochberg"), [math.nan])
    with pytest.raises(ValueError, match="'sidak'; there are holm, benjamini-hochberg"):
        corrected([0.1], "sidak")


def test_agreement_by_hand() -> None:
    found = agreement([1, 2, 3, 4, 5, math.nan], [2, 1, 4, 3, 5, 9])
    # d = 1, 1, 1, 1, 0: rho = 1 - 6 * 4 / (5 * 24); 8 of 10 pairs agree, 2 do not
    assert (found.n, found.rho, found.tau) == (5, pytest.approx(0.8), pytest.approx(0.6))
    # exact p of tau: the permutations of 5 with at most 2 inversions are 1 + 4 + 9 of 120, twice
    assert found.tau_p == pytest.approx(2 * 14 / 120)
    half = 1.959963984540054 * math.sqrt((1 + 0.32) / 2)
    assert found.ci == pytest.approx((math.tanh(math.atanh(0.8) - half), math.tanh(math.atanh(0.8) + half)))


def test_p_of_spearman_is_exact_for_few_and_never_0() -> None:
    assert agreement([1, 2, 3, 4], [1, 2, 3, 4]).p == pytest.approx(2 / 24)
    x, y = np.random.default_rng(1).normal(size=(2, 7))
    oracle = scipy.stats.permutation_test((x,), lambda each: scipy.stats.spearmanr(each, y).statistic, permutation_type="pairings", n_resamples=math.inf)
    assert agreement(x, y).p == pytest.approx(oracle.pvalue)
    x, y = np.random.default_rng(2).normal(size=(2, 30))
    assert agreement(x, y).p == pytest.approx(float(scipy.stats.spearmanr(x, y).pvalue))
    assert agreement(range(12), range(12)).p == pytest.approx(2 / math.factorial(12))


def test_agreement_of_what_does_not_vary_is_none() -> None:
    assert math.isnan(agreement([1, 1, 1, 1], [1, 2, 3, 4]).rho) and math.isnan(agreement([1, 2], [1, 2]).p)
    with pytest.raises(ValueError, match="3 scores cannot be set beside 2"):
        agreement([1, 2, 3], [1, 2])


def test_overlap_of_one_scope_is_the_hypergeometric_tail() -> None:
    found = overlap([50], [10], [8], 4)
    assert found.p == pytest.approx(float(scipy.stats.hypergeom.sf(3, 50, 10, 8)))
    assert (found.expected, found.jaccard) == (pytest.approx(1.6), pytest.approx(4 / 14))


def test_overlap_of_scopes_is_counted_exactly() -> None:
    """All ways to draw 2 of 4 twice in the first scope, and 1 of 3 twice in the second."""
    ways = [len(set(a) & set(b)) + (c == d) for a in itertools.combinations(range(4), 2) for b in itertools.combinations(range(4), 2) for c in range(3) for d in range(3)]
    for both in range(4):
        found = overlap([4, 3], [2, 1], [2, 1], both)
        assert found.p == pytest.approx(sum(each >= both for each in ways) / len(ways))
    assert found.expected == pytest.approx(np.mean(ways))
    assert overlap([10], [7], [6], 3).p == pytest.approx(1)  # at least 3 are in both
    assert overlap([10], [7], [6], 6).p == pytest.approx(float(scipy.stats.hypergeom.pmf(6, 10, 7, 6)))


def test_overlap_of_many_large_scopes_is_finite() -> None:
    found = overlap([200_000_000] * 80, [1000] * 80, [1000] * 80, 5000)
    assert 0 <= found.p < 1e-200 and found.expected == pytest.approx(0.4)
    assert overlap([10], [0], [3], 0).p == 1
    with pytest.raises(ValueError, match="cannot be in sets"):
        overlap([10], [2], [2], 3)


def test_shares_of_one_scope_tend_to_chi_square() -> None:
    observed, sizes = np.array([260, 410, 330]), np.array([[3000.0, 4000.0, 3000.0]])
    found = shares(observed, [1000], sizes)
    oracle = scipy.stats.chisquare(observed, [300, 400, 300])
    assert found.statistic == pytest.approx(oracle.statistic)
    assert found.p_all == pytest.approx(oracle.pvalue, abs=0.01)
    assert found.effect == pytest.approx(math.sqrt(oracle.statistic / 1000))
    for i, each in enumerate(observed):
        exact = scipy.stats.binom(1000, [0.3, 0.4, 0.3][i])
        assert found.p[i] == pytest.approx(2 * min(exact.cdf(each), exact.sf(each - 1)), abs=0.02)


def test_shares_are_expected_scope_by_scope() -> None:
    """A category that only the second scope has can be drawn there alone: 10 of 10 there is what must come, not what is odd."""
    found = shares([10, 10], [10, 10], [[1000, 0], [0, 10]])
    np.testing.assert_allclose(found.expected, [10, 10])
    assert found.p_all == 1 and (found.p == 1).all() and found.statistic == 0
    strange = shares([0, 20], [10, 10], [[500, 500], [500, 500]])
    assert strange.p_all == pytest.approx(1e-4) and strange.p == pytest.approx([2e-4, 2e-4])
    with pytest.raises(ValueError, match="are not the 3 that were drawn"):
        shares([1, 1], [3], [[5, 5]])


def test_an_effect_by_hand() -> None:
    z95 = 1.959963984540054
    run = lambda log, error: (math.exp(log), math.exp(log - z95 * error), math.exp(log + z95 * error))  # noqa: E731
    found = effect([run(1.0, 0.3)], [run(0.1, 0.2), run(0.3, 0.2)])
    # controls: mean 0.2, errors 0.2 that do not average out, and between the seeds a variance of 0.02 / 2
    error = math.sqrt(0.3**2 + 0.2**2 + 0.02 / 2)
    assert (found.difference, found.error) == (pytest.approx(0.8), pytest.approx(error))
    assert found.p == pytest.approx(2 * float(scipy.stats.norm.sf(0.8 / error)))
    assert found.ci == pytest.approx((0.8 - z95 * error, 0.8 + z95 * error))
    with pytest.raises(ValueError, match="empty"):
        effect([run(1, 1)], [])
    with pytest.raises(ValueError, match="not above 0"):
        effect([(1, 0, 2)], [run(1, 1)])


def test_rank_among_controls() -> None:
    assert rank_p(3.0, [1.0, 1.1, 1.2]) == 0.25 and rank_p(1.1, [1.0, 1.1, 1.2]) == 0.75 and rank_p(2.0, []) == 1


def test_kruskal_is_scipys_with_its_effect() -> None:
    groups = [[1, 2, 3, 4], [2, 3, 9, 10], [11, 12, 13]]
    statistic, p, epsilon, n = kruskal(groups)
    oracle = scipy.stats.kruskal(*groups)
    assert (statistic, p, n) == (pytest.approx(oracle.statistic), pytest.approx(oracle.pvalue), 11)
    assert epsilon == pytest.approx(oracle.statistic / 10)  # H (n + 1) / (n^2 - 1)
    assert math.isnan(kruskal([[1, 1], [1, 1]])[0]) and math.isnan(kruskal([[1, 2], []])[1]) and math.isnan(kruskal([[1, 2]])[1])

"""Tests of what is said when sensitivity runs are compared: how likely it is by chance, how large it is, and over how many observations.

    rank agreement      Spearman's rho (interval: Bonett and Wright 2000; p exact up to 8 things) and Kendall's tau-b of two scores of the same things
    overlap             of two top-k sets drawn scope by scope: exact, the sum of independent hypergeometric counts
    shares              of categories among what was drawn scope by scope, against the sizes of the categories: Pearson's chi-square, its
                        distribution by Monte Carlo under the multinomial null (drawing is with replacement: k is small beside the weights)
    effects             two groups of log ratios with intervals over the same windows: z test of their difference
    rank among controls the share of controls at least as bad, (1 + b) / (1 + m): exact whatever the distribution (Phipson and Smyth 2010)
    groups              Kruskal-Wallis H with epsilon squared (Tomczak and Tomczak 2014)
    correction          Holm 1979 (family-wise error), Benjamini and Hochberg 1995 (false discovery rate)

All p-values are two-sided but those of overlap and of rank among controls, which ask for more than chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import scipy  # its parts load when they are named: scipy.stats takes a second
from numpy.typing import ArrayLike, NDArray

CORRECTIONS = {"holm": "Holm", "benjamini-hochberg": "Benjamini-Hochberg"}
MONTE_CARLO = 9_999  # draws: the smallest p-value is 1 in 10,000
_EXACT = 8  # things whose orders are all gone through: 40,320
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Agreement:
    """Two scores of the same n things. NaN where one of them does not vary, or n < 3. ci: 95 % of rho."""

    n: int
    rho: float
    ci: tuple[float, float]
    p: float
    tau: float
    tau_p: float


@dataclass(frozen=True)
class Overlap:
    """Two sets. expected: entries in both if each were drawn at random in its scopes; p: of so many or more."""

    n_a: int
    n_b: int
    both: int
    expected: float
    p: float

    @property
    def jaccard(self) -> float:
        either = self.n_a + self.n_b - self.both
        return self.both / either if either else math.nan


@dataclass(frozen=True)
class Shares:
    """Categories. expected, p: (category,); statistic, p_all, effect (Cohen's w, sqrt(chi2 / n)): of all together."""

    n: int
    expected: NDArray[np.float64]
    p: NDArray[np.float64]
    statistic: float
    effect: float
    p_all: float


@dataclass(frozen=True)
class Effect:
    """The difference of two mean log ratios, a - b, with its standard error."""

    difference: float
    error: float
    z: float
    p: float

    @property
    def ci(self) -> tuple[float, float]:
        return self.difference - _Z95 * self.error, self.difference + _Z95 * self.error


def agreement(a: ArrayLike, b: ArrayLike) -> Agreement:
    """Rank agreement of two (thing,) scores; things that lack one of them are left out. Raises ValueError where their lengths differ."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    if x.shape != y.shape:
        raise ValueError(f"{x.size} scores cannot be set beside {y.size}.")
    both = np.isfinite(x) & np.isfinite(y)
    x, y, n = x[both], y[both], int(both.sum())
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(n, math.nan, (math.nan, math.nan), math.nan, math.nan, math.nan)
    rho, tau = scipy.stats.spearmanr(x, y), scipy.stats.kendalltau(x, y)
    r = float(rho.statistic)
    return Agreement(n, r, _interval(r, n), _spearman_p(x, y, r, float(rho.pvalue)), float(tau.statistic), float(tau.pvalue))


def _spearman_p(x: NDArray[np.float64], y: NDArray[np.float64], rho: float, approximate: float) -> float:
    """Of up to 8 things exact, over all orders; of more by the t distribution, which says 0 of a perfect order: 2 of n! orders are perfect."""
    if len(x) > _EXACT:
        return max(approximate, 2 * math.exp(-math.lgamma(len(x) + 1)))
    a, b = (scipy.stats.rankdata(each) for each in (x, y))
    a, b = ((each - each.mean()) / math.sqrt(float(((each - each.mean()) ** 2).sum())) for each in (a, b))
    orders = a[np.array(list(permutations(range(len(a)))))] @ b
    return float((np.abs(orders) >= abs(rho) - 1e-12).mean())


def _interval(rho: float, n: int) -> tuple[float, float]:
    if n < 4 or abs(rho) >= 1:
        return (math.nan, math.nan) if n < 4 else (rho, rho)
    error = math.sqrt((1 + rho**2 / 2) / (n - 3))
    return math.tanh(math.atanh(rho) - _Z95 * error), math.tanh(math.atanh(rho) + _Z95 * error)


def overlap(population: ArrayLike, a: ArrayLike, b: ArrayLike, both: int) -> Overlap:
    """population, a, b: (scope,) how many there are, and how many of them each set holds; both: how many are in both, over all scopes.

    Raises ValueError where a set is larger than what it was drawn from, or the intersection than a set.
    """
    size, first, second = (np.atleast_1d(np.asarray(each, np.int64)) for each in (population, a, b))
    if (first > size).any() or (second > size).any() or both > np.minimum(first, second).sum():
        raise ValueError(f"{both} entries cannot be in sets of {first.tolist()[:5]} and {second.tolist()[:5]} of {size.tolist()[:5]}.")
    found = np.ones(1)
    for n, i, j in zip(size.tolist(), first.tolist(), second.tolist(), strict=True):
        mass = _hypergeometric(n, i, j)
        # what is below the smallest double is nothing; without it, the distribution of 80 scopes of 1,000 is soon made
        found = np.convolve(found, mass[: int(np.flatnonzero(mass > 0)[-1]) + 1])
        found = found[: int(np.flatnonzero(found > 0)[-1]) + 1]
    expected = float(np.divide(first * second.astype(float), size, out=np.zeros(len(size)), where=size > 0).sum())
    return Overlap(int(first.sum()), int(second.sum()), both, expected, float(min(found[both:].sum(), 1.0)))


def _hypergeometric(n: int, i: int, j: int) -> NDArray[np.float64]:
    """(count,) chances that i and j of n have 0, 1, ... in common, by the ratio of each to the one before: right, and quick, for any n."""
    first, last = max(0, i + j - n), min(i, j)
    x = np.arange(first, last, dtype=float)
    logs = np.concatenate([[0.0], np.cumsum(np.log((i - x) * (j - x) / ((x + 1) * (n - i - j + x + 1))))])
    mass = np.exp(logs - logs.max())
    return np.concatenate([np.zeros(first), mass / mass.sum()])


def shares(observed: ArrayLike, drawn: ArrayLike, sizes: ArrayLike, draws: int = MONTE_CARLO, seed: int = 0) -> Shares:
    """observed: (category,) counts over all scopes; drawn: (scope,) how many were drawn from each; sizes: (scope, category) how many there are.

    p of a category: twice the smaller tail, at most 1. Raises ValueError where the counts are not those that were drawn.
    """
    counts, taken, there = np.asarray(observed, float), np.atleast_1d(np.asarray(drawn, np.int64)), np.atleast_2d(np.asarray(sizes, float))
    if counts.sum() != taken.sum() or (there.sum(axis=1)[taken > 0] == 0).any():
        raise ValueError(f"{counts.sum():g} entries of categories are not the {taken.sum()} that were drawn from what is there.")
    chances = there[taken > 0] / there[taken > 0].sum(axis=1, keepdims=True)  # (scope, category)
    taken = taken[taken > 0]
    expected = (taken[:, None] * chances).sum(axis=0)
    random = np.random.default_rng(seed)
    drawn_counts = np.zeros((draws, len(counts)))
    for k, chance in zip(taken, chances, strict=True):
        drawn_counts += random.multinomial(k, chance, size=draws)
    statistic, under_null = _chi_square(counts, expected), _chi_square(drawn_counts, expected)
    below, above = (drawn_counts <= counts).sum(axis=0), (drawn_counts >= counts).sum(axis=0)
    p = np.minimum(2 * (1 + np.minimum(below, above)) / (1 + draws), 1.0)
    n = int(counts.sum())
    p_all = (1 + int((under_null >= statistic * (1 - 1e-12)).sum())) / (1 + draws)
    return Shares(n, expected, p, float(statistic), math.sqrt(statistic / n) if n else math.nan, p_all if n else math.nan)


def _chi_square(counts: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """(...,) of (..., category); a category that nothing can be drawn from is left out."""
    known = expected > 0
    return np.asarray((((counts - expected)[..., known]) ** 2 / expected[known]).sum(axis=-1))


def effect(a: Sequence[tuple[float, float, float]], b: Sequence[tuple[float, float, float]]) -> Effect:
    """a, b: (ratio, low, high) of each run of a group, intervals of 95 %, all of the same windows.

    The error of a group's mean log ratio: its runs share their windows, so that their errors do not average out and the mean of the squared
    errors stays; what differs between its runs (seeds) does, and adds variance / runs. Groups are taken as independent, which is careful:
    they share their windows, too. Raises ValueError for an empty group, and for a ratio that is not above 0.
    """
    mean_a, error_a = _group(a)
    mean_b, error_b = _group(b)
    difference, error = mean_a - mean_b, math.hypot(error_a, error_b)
    z = difference / error if error else math.nan
    return Effect(difference, error, z, float(2 * scipy.stats.norm.sf(abs(z))))


def _group(runs: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    values = np.array(runs, float)
    if not len(values) or not (values > 0).all():
        raise ValueError("A group of ratios is empty, or one of them or of their limits is not above 0.")
    logs = np.log(values)
    errors = (logs[:, 2] - logs[:, 1]) / (2 * _Z95)
    between = float(logs[:, 0].var(ddof=1)) / len(logs) if len(logs) > 1 else 0.0
    return float(logs[:, 0].mean()), math.sqrt(float((errors**2).mean()) + between)


def rank_p(value: float, controls: Sequence[float]) -> float:
    """(1 + how many controls are at least `value`) / (1 + controls): the chance to come out on top of so many alike."""
    return (1 + sum(each >= value for each in controls)) / (1 + len(controls))


def kruskal(groups: Sequence[ArrayLike]) -> tuple[float, float, float, int]:
    """H, p, epsilon squared (0: groups alike, 1: apart) and n of at least two groups; NaN where all values are equal or a group is empty."""
    values = [np.asarray(each, float) for each in groups]
    n = sum(map(len, values))
    if len(values) < 2 or not all(map(len, values)) or np.ptp(np.concatenate(values)) == 0:
        return math.nan, math.nan, math.nan, n
    found = scipy.stats.kruskal(*values)
    return float(found.statistic), float(found.pvalue), float(found.statistic) / (n - 1), n


def corrected(p: ArrayLike, method: str) -> NDArray[np.float64]:
    """(test,) adjusted p-values of one family; NaN stays NaN and counts as no test. Raises ValueError for an unknown method."""
    if method not in CORRECTIONS:
        raise ValueError(f"There is no correction {method!r}; there are {', '.join(CORRECTIONS)}.")
    values = np.asarray(p, float)
    found, known = np.full(values.shape, np.nan), np.flatnonzero(np.isfinite(values))
    order, m = known[np.argsort(values[known], kind="stable")], len(known)
    steps = np.arange(m)
    if method == "holm":
        found[order] = np.minimum(np.maximum.accumulate((m - steps) * values[order]), 1.0)
    elif m:
        found[order] = np.minimum(np.minimum.accumulate((m / (steps + 1) * values[order])[::-1])[::-1], 1.0)
    return found

"""How far one distribution lies from another, and one set of vectors from another.

The only home of these formulas. kl, js and total_variation take natural log-probabilities (..., d_vocab) and give nats (total
variation: no unit). relative_l2, cosine and linear_cka compare vectors, a row of features for each position, the reference first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

_CELLS = 1 << 22  # of one float64 working block: 32 MB


def kl(p_log: Floats, q_log: Floats) -> NDArray[np.float64]:
    """Kullback-Leibler divergence KL(p || q) = sum p ln(p / q) over the last axis, in nats; p is the reference.

    p_log, q_log: (..., d_vocab) natural log-probabilities. Infinite where q is 0 and p is not. Returns (...,).
    Source: Kullback and Leibler 1951.
    """
    p_log, q_log = np.asarray(p_log, np.float64), np.asarray(q_log, np.float64)
    held = np.isneginf(p_log)  # 0 ln 0 = 0, whatever q is there
    with np.errstate(invalid="ignore"):
        terms = np.exp(p_log) * (p_log - q_log)
    return np.where(held, 0.0, terms).sum(axis=-1)


def js(p_log: Floats, q_log: Floats) -> NDArray[np.float64]:
    """Jensen-Shannon divergence in nats: the mean of KL(p || m) and KL(q || m) with m = (p + q) / 2. Between 0 and ln 2.

    Symmetric; its square root is a metric. Source: Lin 1991.
    """
    p_log, q_log = np.asarray(p_log, np.float64), np.asarray(q_log, np.float64)
    middle = np.logaddexp(p_log, q_log) - np.log(2.0)
    return (kl(p_log, middle) + kl(q_log, middle)) / 2


def total_variation(p_log: Floats, q_log: Floats) -> NDArray[np.float64]:
    """Half the sum of |p - q|: the most that the probability of any event can differ. Between 0 and 1."""
    return np.abs(np.exp(np.asarray(p_log, np.float64)) - np.exp(np.asarray(q_log, np.float64))).sum(axis=-1) / 2


def relative_l2(reference: Floats, other: Floats) -> NDArray[np.float64]:
    """|other - reference| / |reference| of each row: 0 where they are equal, infinite where only the reference is 0.

    reference, other: (pos, feature). Returns (pos,).
    """
    reference, other = np.asarray(reference), np.asarray(other)
    difference = np.subtract(other, reference, dtype=np.float64)
    return _ratio(np.sqrt(_row_products(difference, difference)), np.sqrt(_row_products(reference, reference)), equal=0.0)


def cosine(reference: Floats, other: Floats) -> NDArray[np.float64]:
    """Cosine of the angle between the rows, -1 to 1; 1 where both are 0, NaN where one of them is. (pos, feature) twice -> (pos,)."""
    reference, other = np.asarray(reference), np.asarray(other)
    lengths = np.sqrt(_row_products(reference, reference)) * np.sqrt(_row_products(other, other))
    both_zero = ~(reference.any(axis=-1) | other.any(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.clip(_row_products(reference, other) / lengths, -1.0, 1.0)
    return np.where(both_zero, 1.0, found)


def linear_cka(reference: Floats, other: Floats) -> float:
    """Linear centred kernel alignment of two representations of the same positions: 1 when they are equal up to rotation and scale.

    reference: (pos, feature), other: (pos, feature'), each centred over the positions here. NaN where one of them does not vary.
    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = X X^T. Source: Kornblith et al. 2019, arXiv:1905.00414, section 3.
    """
    return cka_of_hsic(linear_hsic(reference, other))


def linear_hsic(reference: Floats, other: Floats) -> NDArray[np.float64]:
    """HSIC of (reference, other), (reference, reference) and (other, other) with linear kernels: float64 (3,); NaN for fewer than 2 positions.

    HSIC(K, L) = tr(K H L H) / (n - 1)^2 (Gretton et al. 2005), here as <K, L> of centred rows. Several sets of positions, each
    centred on its own, are joined by adding their HSICs before the ratio is taken (minibatch CKA, Nguyen et al. 2021, arXiv:2010.15327).
    """
    n = len(reference)
    if n < 2:
        return np.full(3, np.nan)
    if n <= max(reference.shape[1], other.shape[1]):
        gram_x, gram_y = _centred_gram(reference), _centred_gram(other)
        products = np.array([np.vdot(gram_x, gram_y), np.vdot(gram_x, gram_x), np.vdot(gram_y, gram_y)])
    else:  # <X X^T, Y Y^T> = |X^T Y|^2: the smaller matrix where there are more positions than features
        x, y = _centred(reference), _centred(other)
        products = np.array([np.sum(np.square(a.T @ b)) for a, b in ((x, y), (x, x), (y, y))])
    return products / (n - 1) ** 2


def cka_of_hsic(hsic: Floats) -> float:
    """CKA from the three numbers of `linear_hsic`, or from their sums over several sets of positions."""
    between, own, others = (float(value) for value in hsic)
    return between / np.sqrt(own * others) if own * others > 0 else float("nan")


def _centred(values: Floats) -> NDArray[np.float64]:
    rows = np.asarray(values, np.float64)
    return rows - rows.mean(axis=0)


def _centred_gram(values: Floats) -> NDArray[np.float64]:
    """X X^T of the centred rows, (pos, pos), some columns at a time: an attention map has heads x positions of them."""
    gram = np.zeros((len(values), len(values)))
    step = max(1, _CELLS // len(values))
    for start in range(0, values.shape[1], step):
        columns = _centred(values[:, start : start + step])
        gram += columns @ columns.T
    return gram


def _row_products(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    return np.einsum("pf,pf->p", a, b, dtype=np.float64)


def _ratio(over: NDArray[np.float64], under: NDArray[np.float64], equal: float) -> NDArray[np.float64]:
    """over / under, and `equal` where both are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((over == 0) & (under == 0), equal, over / under)

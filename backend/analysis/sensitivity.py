"""What single weights are worth, by six measures; how their scores are spread; and how far two rankings agree.

All scores are float32 in the shape of the weight: (out, in), or (expert, out, in).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.linalg import lapack

Array = NDArray[np.float32]
DAMPING = 0.01  # SparseGPT's percdamp: lambda as a share of the mean diagonal of 2 X X^T
N_BINS = 40
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
_BLOCK = 1 << 18


def magnitude(weight: Array) -> Array:
    """|w|."""
    return np.abs(weight)


def grad_x_weight(weight: Array, gradient: Array) -> Array:
    """|w dL/dw|, to first order the change of the loss when the weight is removed (Molchanov et al., arXiv:1611.06440; SNIP, arXiv:1810.02340)."""
    score = weight * gradient
    return np.abs(score, out=score)


def hutchinson(diagonal: Array) -> Array:
    """|d2L/dw2| of an estimate of the Hessian's diagonal, which noise and a loss that is no minimum also leave negative."""
    return np.abs(diagonal)


def wanda(weight: Array, norms: NDArray[np.float64]) -> Array:
    """|w_ij| ||x_j||_2 (Sun et al., arXiv:2306.11695). norms: (in,), or (expert, in) of what each expert is given."""
    return np.abs(weight) * norms.astype(np.float32)[..., None, :]


def obs(weight: Array, diagonal: NDArray[np.float64]) -> Array:
    """w_ij^2 / [H^-1]_jj (Frantar and Alistarh, arXiv:2301.00774, after Hassibi and Stork 1992). diagonal: of H^-1, (in,) or (expert, in); infinite where no input came."""
    score = np.square(weight)
    return np.multiply(score, (1 / diagonal).astype(np.float32)[..., None, :], out=score)


def inverse_diagonal(gram: NDArray[np.float64], damping: float = DAMPING) -> NDArray[np.float64]:
    """(in,) the diagonal of H^-1, H = 2 X X^T + lambda I with lambda = damping x the mean diagonal of 2 X X^T.

    gram: (in, in) X X^T summed over tokens, its upper triangle; it is overwritten where it lies in Fortran order. All zero, as of an
    expert that no token reached: infinite. Not finite: NaN.
    """
    diagonal = np.diagonal(gram)
    if not np.isfinite(diagonal).all():
        return np.full(len(gram), np.nan)
    if not diagonal.any():
        return np.full(len(gram), np.inf)
    shift = damping * 2 * diagonal.mean()
    hessian = np.asfortranarray(gram)
    hessian *= 2
    hessian[np.diag_indices_from(hessian)] += shift
    factor, failed = lapack.dpotrf(hessian, lower=0, clean=0, overwrite_a=1)
    if failed:
        raise ValueError(f"H is not positive definite at row {failed}: gram is not X X^T")
    inverse, _ = lapack.dpotri(factor, lower=0, overwrite_c=1)
    return np.diagonal(inverse).copy()


def summary(scores: Array) -> dict[str, Any]:
    """n, mean, std, max, p50 to p999, zeros (share), not_finite (count) and a histogram of log10 of the scores above 0.

    Scores that are not finite are counted and left out of everything else. A number that does not exist, as of no scores, is None.
    """
    flat = scores.reshape(-1)
    finite = np.isfinite(flat)
    n_finite = int(np.count_nonzero(finite))
    kept = flat.copy() if n_finite == flat.size else flat[finite]
    if not n_finite:
        empty = dict.fromkeys(("mean", "std", "max", *QUANTILES, "zeros"), None)
        return {"n": flat.size, **empty, "not_finite": flat.size, "histogram": histogram(kept)}
    mean = float(kept.mean(dtype=np.float64))
    deviations = sum(float(np.square(kept[i : i + _BLOCK].astype(np.float64) - mean).sum()) for i in range(0, n_finite, _BLOCK))
    facts = {
        "n": flat.size, "mean": mean, "std": math.sqrt(deviations / n_finite), "max": float(kept.max()),
        "zeros": (n_finite - int(np.count_nonzero(kept))) / n_finite, "not_finite": flat.size - n_finite, "histogram": histogram(kept),
    }  # fmt: skip
    quantiles = np.quantile(kept, list(QUANTILES.values()), overwrite_input=True)
    return facts | dict(zip(QUANTILES, map(float, quantiles), strict=True))


def histogram(scores: Array) -> dict[str, list[float] | list[int]]:
    """log10_edges, N_BINS + 1, and counts of the scores above 0; scores are finite. Both empty where none is."""
    above = scores[scores > 0]
    if not above.size:
        return {"log10_edges": [], "counts": []}
    logs = np.log10(above, out=above)
    low, high = float(logs.min()), float(logs.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(logs, N_BINS, (low, high))
    return {"log10_edges": edges.tolist(), "counts": counts.tolist()}


def jaccard(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """|A and B| / |A or B| of two sets of numbers, each without repeats. Two empty sets are the same: 1."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    union = len(a) + len(b) - common
    return common / union if union else 1.0


def spearman(a: NDArray[np.int64], rank_a: NDArray[np.int64], b: NDArray[np.int64], rank_b: NDArray[np.int64]) -> float | None:
    """Spearman's correlation of two rankings over the union of what they kept. a, b: what was kept; rank: 1 is the best.

    What only the other kept comes after all that was kept, tied. None where one of the two puts all of the union in one rank.
    """
    union = np.union1d(a, b)

    def ranks(kept: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.full(len(union), rank.max(initial=0) + 1, np.int64)
        found[np.searchsorted(union, kept)] = rank
        return found

    of_a, of_b = ranks(a, rank_a), ranks(b, rank_b)
    if len(union) < 2 or (of_a == of_a[0]).all() or (of_b == of_b[0]).all():
        return None
    return float(stats.spearmanr(of_a, of_b).statistic)

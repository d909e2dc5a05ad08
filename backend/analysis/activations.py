"""The size and shape of activations: norms, moments, outliers, and the reductions that make them drawable.

Non-finite values are counted, never hidden: moments are taken over the finite ones and the counts stand beside them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NEAR_ZERO = 1e-5  # |x| below this counts as inactive: the "% active" limit of llama.cpp's imatrix statistics

STATISTICS = ("mean", "std", "min", "max", "abs_max", "sparsity", "kurtosis", "n_nan", "n_inf")


def l2_norms(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """The Euclidean length of each position's vector, all axes after the first taken together. (pos, ...) -> (pos,)."""
    flat = np.asarray(values).reshape(len(values), -1).astype(np.float64)
    return np.sqrt(np.einsum("pd,pd->p", flat, flat)).astype(np.float32)


def site_statistics(values: NDArray[np.floating]) -> dict[str, float]:
    """Moments of all values of one site at one layer.

    mean, std (population), min, max, abs_max, sparsity (share of |x| < NEAR_ZERO), kurtosis (Pearson: 3 for a normal
    distribution; thousands mean a few values dwarf the rest), n_nan, n_inf. Moments are over the finite values; NaN if there
    are none.
    """
    flat = np.asarray(values).ravel()
    finite = flat[np.isfinite(flat)].astype(np.float64)
    counts = {"n_nan": float(np.isnan(flat).sum()), "n_inf": float(np.isinf(flat).sum())}
    if not len(finite):
        return {name: counts.get(name, float("nan")) for name in STATISTICS}
    mean = finite.mean()
    centred = finite - mean
    variance = np.mean(centred**2)
    return {
        "mean": float(mean),
        "std": float(np.sqrt(variance)),
        "min": float(finite.min()),
        "max": float(finite.max()),
        "abs_max": float(np.abs(finite).max()),
        "sparsity": float(np.mean(np.abs(finite) < NEAR_ZERO)),
        "kurtosis": float(np.mean(centred**4) / variance**2) if variance else float("nan"),
        **counts,
    }


def robust_range(values: NDArray[np.floating], percentile: float = 99.5) -> float:
    """Half-width r of a symmetric colour range [-r, r]: the percentile of |x|, so that one outlier does not turn the rest blank.

    Falls back to the largest |x| where the percentile is 0, and to 1 where every value is 0 or none is finite.
    """
    size = np.abs(np.asarray(values, np.float32).ravel())
    size = size[np.isfinite(size)]
    if not len(size) or not size.max():
        return 1.0
    return float(np.percentile(size, percentile)) or float(size.max())


def bucket_edges(n: int, buckets: int) -> NDArray[np.int64]:
    """Edges (buckets + 1,) that cut n indices into equal runs; index i lies in bucket i * buckets // n."""
    return -(-np.arange(buckets + 1) * n // buckets)


def reduce_signed(values: NDArray[np.floating], rows: int, columns: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Shrink a signed map to at most rows x columns, keeping in each cell the value with the largest magnitude.

    values: (pos, dim). Returns the map and the edges of its rows and columns in the original indices: cell (a, b) stands for
    values[row_edges[a]:row_edges[a+1], column_edges[b]:column_edges[b+1]]. No outlier is lost; a plain mean would hide it.
    """
    values = np.asarray(values, np.float32)
    row_edges = bucket_edges(values.shape[0], min(rows, values.shape[0]))
    column_edges = bucket_edges(values.shape[1], min(columns, values.shape[1]))
    high = np.maximum.reduceat(np.maximum.reduceat(values, row_edges[:-1], axis=0), column_edges[:-1], axis=1)
    low = np.minimum.reduceat(np.minimum.reduceat(values, row_edges[:-1], axis=0), column_edges[:-1], axis=1)
    return np.where(-low > high, low, high), row_edges, column_edges


def top_dimensions(values: NDArray[np.floating], n: int) -> NDArray[np.int64]:
    """The n dimensions with the largest |x| at any position, largest first. values: (pos, dim) -> (n,)."""
    peaks = np.nan_to_num(np.abs(np.asarray(values, np.float32)), nan=np.inf).max(axis=0)
    return np.argsort(-peaks, kind="stable")[:n]

"""How the values of a site are spread: quantiles of a layer, and the energy of each input channel as llama.cpp's imatrix counts it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from backend.analysis.activations import NEAR_ZERO

QUANTILES = (0.0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
QUANTILE_TITLES = ("min", "1 %", "25 %", "median", "75 %", "99 %", "max")

_ROWS = 256  # tokens whose double-precision copies are held at a time

CHANNEL_STATISTICS = {
    "sum": "Σ(Act²)", "min": "min", "max": "max", "mean": "mean", "std": "σ", "active": "active", "n": "N", "entropy": "entropy, bits", "entropy_norm": "entropy, share",
    "zd": "ZD", "cossim": "CosSim",
}  # fmt: skip


def quantile_bands(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """The QUANTILES of all finite values of one layer, (7,), linearly interpolated; NaN where none is finite."""
    flat = np.asarray(values, np.float32).ravel()
    finite = flat[np.isfinite(flat)]
    return np.quantile(finite, QUANTILES).astype(np.float32) if len(finite) else np.full(len(QUANTILES), np.nan, np.float32)


def channel_energy(values: NDArray[np.floating]) -> tuple[NDArray[np.float64], int]:
    """The mean square of each input channel over the tokens, (channel,), and how many values were not finite and left out.

    values: (pos, ...), the input of a matrix product, all axes after the first together its channels. This is what llama-imatrix stores
    as in_sum2 / counts. A channel without a finite value is NaN.
    """
    flat = np.asarray(values).reshape(len(values), -1)
    total, n = np.zeros(flat.shape[1]), np.zeros(flat.shape[1])
    for start in range(0, len(flat), _ROWS):
        rows = flat[start : start + _ROWS].astype(np.float64)
        finite = np.isfinite(rows)
        total += np.square(np.where(finite, rows, 0)).sum(axis=0)
        n += finite.sum(axis=0)
    return total / np.where(n, n, np.nan), int(flat.size - n.sum())


def channel_statistics(energy: NDArray[np.floating], previous: NDArray[np.floating] | None = None) -> dict[str, float]:
    """The statistics that `llama-imatrix --show-statistics` prints of one tensor (llama.cpp, tools/imatrix/imatrix.cpp).

    energy: (channel,) mean square of each input channel; previous: that of the layer before. sum, min, max, mean, std (population) of the
    energies; active: share above 1e-5; n; entropy, bits, of energy / sum, and entropy_norm, its share of log2(n); zd: share with a
    z-score above 1 (arXiv:2406.17415, section 3.1); cossim with the layer before, NaN where there is none. Channels that are NaN are left out.
    """
    known = np.asarray(energy, np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return {name: 0.0 if name == "n" else float("nan") for name in CHANNEL_STATISTICS}
    total, mean, std = float(known.sum()), float(known.mean()), float(known.std())
    shares = known[known > 0] / total if total > 0 else known[:0]
    entropy = float(-(shares * np.log2(shares)).sum())
    return {
        "sum": total, "min": float(known.min()), "max": float(known.max()), "mean": mean, "std": std, "active": float(np.mean(known > NEAR_ZERO)), "n": float(len(known)),
        "entropy": entropy, "entropy_norm": entropy / np.log2(len(known)) if len(known) > 1 else float("nan"),
        "zd": float(np.mean((known - mean) / std > 1)) if std else 0.0, "cossim": _cosine(energy, previous),
    }  # fmt: skip


def _cosine(a: NDArray[np.floating], b: NDArray[np.floating] | None) -> float:
    if b is None or a.shape != b.shape:
        return float("nan")
    both = np.isfinite(a) & np.isfinite(b)
    lengths = np.linalg.norm(a[both]) * np.linalg.norm(b[both])
    return float(a[both] @ b[both] / lengths) if lengths else float("nan")

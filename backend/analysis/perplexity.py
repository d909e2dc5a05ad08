"""Perplexity over windows of a text, and how sure it is: percentile bootstrap over windows (Efron 1979), paired for a ratio.

Tokens of one window are not independent of each other, so whole windows are drawn. nll: (token,) nats of every predicted token;
window: (token,) the window that each is of.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
_CELLS = 1 << 21  # of one block of resamples

Nats = NDArray[np.float64]
Windows = NDArray[np.int64]


def perplexity(nll: float) -> float:
    """exp(mean negative log-likelihood): perplexity of a mean loss in nats per token; infinite where that overflows."""
    return math.exp(nll) if nll < 709 else (math.inf if not math.isnan(nll) else math.nan)


def interval(nll: Nats, window: Windows, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """95 % interval of the perplexity exp(sum nll / n tokens). None where there is one window, which says nothing of others, or a loss is not finite."""
    return _interval(nll, window, seed, resamples)


def ratio_interval(nll: Nats, reference: Nats, window: Windows, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float] | None:
    """95 % interval of perplexity / reference perplexity on the same tokens; each resample draws the same windows for both. None as for `interval`."""
    with np.errstate(invalid="ignore"):
        return _interval(nll - reference, window, seed, resamples)


def _interval(nats: Nats, window: Windows, seed: int, resamples: int) -> tuple[float, float] | None:
    _, of = np.unique(window, return_inverse=True)
    counts = np.bincount(of).astype(np.float64)
    if len(counts) < 2 or not np.isfinite(nats).all():
        return None
    sums = np.bincount(of, nats)
    means = np.concatenate([draws @ sums / (draws @ counts) for draws in _draws(len(counts), seed, resamples)])
    low, high = np.quantile(means, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return perplexity(float(low)), perplexity(float(high))


def _draws(n_windows: int, seed: int, resamples: int) -> list[NDArray[np.int64]]:
    """How often each window is drawn in each resample, (resample, window), in blocks; the same for the same seed and number of windows."""
    rng, step = np.random.default_rng(seed), max(1, _CELLS // n_windows)
    equal = np.full(n_windows, 1 / n_windows)
    return [rng.multinomial(n_windows, equal, min(step, resamples - start)) for start in range(0, resamples, step)]

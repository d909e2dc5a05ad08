"""Aggregates over prompts: mean and spread of arrays of one shape, each prompt counting once, cell by cell.

Values that are not finite (an undefined head score, a broken activation) are left out of their cell, and the count of each cell says so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Moments:
    """Running count, mean and variance, one sample at a time: Welford, Technometrics 4 (1962); no sample is kept.

    count: int64, mean and m2 (sum of squared distances from the mean): float64, all of the samples' shape.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count: NDArray[np.int64] = np.zeros(shape, np.int64)
        self._mean: NDArray[np.float64] = np.zeros(shape, np.float64)
        self._m2: NDArray[np.float64] = np.zeros(shape, np.float64)

    @classmethod
    def restored(cls, state: NDArray[np.float64]) -> Moments:
        """From `state`: what was kept of another."""
        found = cls(state.shape[1:])
        found.count, found._mean, found._m2 = state[0].astype(np.int64), state[1].copy(), state[2].copy()
        return found

    @property
    def state(self) -> NDArray[np.float64]:
        """(3, ...): count, mean (0 where nothing was counted), m2."""
        return np.stack([self.count.astype(np.float64), self._mean, self._m2])

    def add(self, values: ArrayLike) -> None:
        """One more sample. Raises ValueError for another shape."""
        sample = np.asarray(values, np.float64)
        if sample.shape != self.count.shape:
            raise ValueError(f"a sample of shape {sample.shape} among samples of shape {self.count.shape}")
        seen = np.isfinite(sample)
        self.count += seen
        distance = np.where(seen, sample, 0.0) - self._mean
        step = np.where(seen, distance / np.maximum(self.count, 1), 0.0)
        self._mean += step
        self._m2 += np.where(seen, distance * (distance - step), 0.0)

    @property
    def mean(self) -> NDArray[np.float64]:
        """NaN where nothing was counted."""
        return np.where(self.count > 0, self._mean, np.nan)

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of the sample, divisor n - 1; NaN where fewer than two were counted."""
        return np.where(self.count > 1, np.sqrt(self._m2 / np.maximum(self.count - 1, 1)), np.nan)


def difference(a: Moments, b: Moments) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean of a minus mean of b, and the standard error of that difference, sqrt(s_a^2 / n_a + s_b^2 / n_b) (Welch, Biometrika 34, 1947).

    NaN where one of them has no value; the error also where one has fewer than two.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(a.std**2 / a.count + b.std**2 / b.count)
    return a.mean - b.mean, error


def mean_or_nan(values: ArrayLike) -> float:
    """Mean of the finite values, NaN if there are none."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    return float(finite.mean()) if len(finite) else float("nan")

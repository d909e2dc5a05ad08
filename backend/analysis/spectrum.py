"""The singular values of a matrix that is read in blocks of rows, and what they say of its rank.

A matrix is a function that gives its blocks: `blocks()` yields (first row, (n, column) float32), each call anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Blocks = Callable[[], Iterable[tuple[int, NDArray[np.float32]]]]

FULL_SIDE = 2048  # a matrix whose shorter side is at most this gets every singular value
FULL_SIZE = 1 << 26  # and has at most this many weights where its rows are the shorter side, since it is then held in memory
N_LEADING = 128  # singular values of a larger one
_OVERSAMPLE, _POWER_ITERATIONS = 64, 4


@dataclass(frozen=True)
class Spectrum:
    """values: (k,), the k largest singular values, descending; n: how many there are; energy: the sum of all their squares, exactly."""

    values: NDArray[np.float64]
    n: int
    energy: float

    @property
    def is_full(self) -> bool:
        return len(self.values) == self.n

    @property
    def stable_rank(self) -> float:
        """||W||_F^2 / sigma_1^2 (Rudelson and Vershynin 2007)."""
        return self.energy / float(self.values[0]) ** 2 if self.values[0] else math.nan

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of sigma / sum(sigma) (Roy and Vetterli 2007).

        Where only the leading values are known, the rest are taken to be equal and to hold the energy that is left: an estimate from above.
        """
        values = self.values
        if not self.is_full:
            left = max(self.energy - float(np.sum(values**2)), 0.0)
            rest = self.n - len(values)
            values = np.concatenate([values, np.full(rest, math.sqrt(left / rest))])
        total = float(values.sum())
        if not total:
            return math.nan
        p = values[values > 0] / total
        return math.exp(-float(np.sum(p * np.log(p))))


def spectrum(blocks: Blocks, shape: tuple[int, int], seed: int = 0) -> Spectrum:
    """All singular values of a matrix with a short side, by the eigenvalues of its Gram matrix in float64 (what lies below about
    1e-7 of the largest is rounding); else the N_LEADING largest, by a randomized SVD. The values must be finite.
    """
    if min(shape) <= FULL_SIDE and (shape[1] <= shape[0] or shape[0] * shape[1] <= FULL_SIZE):
        return _by_gram_matrix(blocks, shape)
    return randomized(blocks, shape, N_LEADING, seed)


def _by_gram_matrix(blocks: Blocks, shape: tuple[int, int]) -> Spectrum:
    rows, columns = shape
    if columns <= rows:
        gram = np.zeros((columns, columns))
        for _, block in blocks():
            wide = block.astype(np.float64)
            gram += wide.T @ wide
    else:
        matrix = np.empty(shape, np.float32)
        for first, block in blocks():
            matrix[first : first + len(block)] = block
        gram = np.zeros((rows, rows))
        for start in range(0, columns, 4096):
            wide = matrix[:, start : start + 4096].astype(np.float64)
            gram += wide @ wide.T
    values = np.sqrt(np.clip(scipy.linalg.eigvalsh(gram, check_finite=False)[::-1], 0, None))
    return Spectrum(values, len(values), float(np.trace(gram)))


def randomized(blocks: Blocks, shape: tuple[int, int], k: int, seed: int = 0) -> Spectrum:
    """The k largest singular values (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1, with power iterations), reading the
    matrix 2 * _POWER_ITERATIONS + 2 times and holding no more of it than k + _OVERSAMPLE rows and columns.
    """
    rows, columns = shape
    width = min(k + _OVERSAMPLE, rows, columns)
    right = np.random.default_rng(seed).standard_normal((columns, width), np.float32)
    energy = 0.0
    for step in range(_POWER_ITERATIONS + 1):
        left = np.empty((rows, width), np.float32)
        for first, block in blocks():
            left[first : first + len(block)] = block @ right
            if not step:
                energy += float(np.sum(np.square(block, dtype=np.float64)))
        left = scipy.linalg.qr(left, mode="economic", overwrite_a=True, check_finite=False)[0]
        right = np.zeros((columns, width), np.float32)
        for first, block in blocks():
            right += block.T @ left[first : first + len(block)]
        if step < _POWER_ITERATIONS:
            right = scipy.linalg.qr(right, mode="economic", overwrite_a=True, check_finite=False)[0]
    values = scipy.linalg.svdvals(right.astype(np.float64), check_finite=False)[:k]
    return Spectrum(values, min(rows, columns), energy)

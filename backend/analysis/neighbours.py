"""Nearest neighbours of vectors, exactly: by cosine among rows that are read in blocks, and by distance among all pairs of a few dimensions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from backend.analysis.spectrum import Blocks

_TILE_ROWS, _TILE_COLUMNS, _GROUP = 1024, 16384, 64


def cosine_neighbours(blocks: Blocks, queries: NDArray[np.floating], k: int, exclude: NDArray[np.integer] | None = None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k rows with the largest cosine to each query: their numbers and cosines, (query, k), best first, equal ones by number.

    blocks: the rows, as `backend.analysis.spectrum` describes. queries: (query, dimension), finite and not 0. exclude: (query,) a row that each query leaves out, its own.
    Rows that are 0, NaN or infinite have no cosine and are never found; where fewer than k are left, numbers are -1 and cosines NaN.
    """
    scale = np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    unit = (queries / scale).astype(np.float32)
    best, at = np.full((len(unit), k), -np.inf, np.float32), np.full((len(unit), k), -1, np.int64)
    for first, block in blocks():
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            lengths = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
            cosines = (unit @ block.T) / lengths.astype(np.float32)
        cosines[:, ~np.isfinite(lengths) | (lengths == 0)] = -np.inf
        if exclude is not None:
            inside = np.flatnonzero((exclude >= first) & (exclude < first + len(block)))
            cosines[inside, exclude[inside] - first] = -np.inf
        numbers = np.broadcast_to(np.arange(first, first + len(block)), cosines.shape)
        best, at = _largest(np.concatenate([best, cosines], axis=1), np.concatenate([at, numbers], axis=1), k)
    missing = np.isneginf(best)
    at[missing], best[missing] = -1, np.nan
    return at, np.clip(best, -1, 1)


def _largest(values: NDArray[np.float32], numbers: NDArray[np.int64], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(numbers, order, axis=1)


def nearest_neighbours(points: NDArray[np.float32], k: int, report: Callable[[int, int], None] = lambda done, total: None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k nearest points to each point by Euclidean distance, itself first: numbers and distances, (point, k).

    All pairs, in tiles of a fixed size: 150,000 points of 50 dimensions take about a minute on two cores and give the same answer every time, as an approximate
    index does not. k is at most the number of points.
    """
    n = len(points)
    centred = np.ascontiguousarray(points - points.mean(axis=0, dtype=np.float64).astype(np.float32))  # the difference of squares below cancels less
    squares = np.einsum("nd,nd->n", centred, centred)
    found, distances = np.empty((n, k), np.int64), np.empty((n, k), np.float32)
    for start in range(0, n, _TILE_ROWS):
        rows = slice(start, min(start + _TILE_ROWS, n))
        near = np.empty((rows.stop - start, 0), np.float32)
        at = np.empty((rows.stop - start, 0), np.int64)
        for left in range(0, n, _TILE_COLUMNS):
            columns = slice(left, min(left + _TILE_COLUMNS, n))
            closeness = centred[rows] @ centred[columns].T
            closeness -= squares[columns] / 2  # -|a - b|^2 / 2 up to |a|^2 / 2, which is the same for the whole row
            own = np.arange(max(start, left), min(rows.stop, columns.stop))
            closeness[own - start, own - left] = np.inf  # a point is nearest to itself, before its equals
            values, numbers = _leading(closeness, k)
            near, at = _largest(np.concatenate([near, values], axis=1), np.concatenate([at, numbers + left], axis=1), k)
        found[rows] = at
        # Once more by the differences themselves: what the squares lost is back, and equal points are at distance 0.
        apart = centred[rows, None, :] - centred[at]
        distances[rows] = np.sqrt(np.einsum("nkd,nkd->nk", apart, apart))
        report(rows.stop, n)
    return found, distances


def _leading(values: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k largest of each row, in no order: they lie in those k groups of columns whose greatest values are largest. A group is every n_groups-th column."""
    n_groups = values.shape[1] // _GROUP
    if n_groups <= 2 * k:
        numbers = np.broadcast_to(np.arange(values.shape[1]), values.shape)
        return _largest(values, numbers, k)
    groups = np.argpartition(values[:, : n_groups * _GROUP].reshape(len(values), _GROUP, n_groups).max(axis=1), n_groups - k, axis=1)[:, n_groups - k :]
    numbers = (groups[:, :, None] + n_groups * np.arange(_GROUP)).reshape(len(values), -1)
    inside = np.take_along_axis(values, numbers, axis=1)
    over = np.arange(n_groups * _GROUP, values.shape[1])
    inside = np.concatenate([inside, values[:, over]], axis=1)
    numbers = np.concatenate([numbers, np.broadcast_to(over, (len(values), len(over)))], axis=1)
    kept = np.argpartition(inside, inside.shape[1] - k, axis=1)[:, inside.shape[1] - k :]
    return np.take_along_axis(inside, kept, axis=1), np.take_along_axis(numbers, kept, axis=1)

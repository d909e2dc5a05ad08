"""Nearest vectors by cosine: among the vectors that are looked at, and among the model's W_E and W_U. For jobs and pages alike, in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.neighbours import cosine_neighbours
from backend.reports.vectors import MatrixRows, Vectors
from backend.weights import Weights

VERSION = 1
Advance = Callable[[int], None]
Found = list[list[float]]  # [row, cosine], best first


def matrices(weights: Weights) -> dict[str, MatrixRows]:
    """W_E and W_U; W_E alone where both are one matrix or the model has no W_U."""
    found = {"W_E": MatrixRows(weights, "W_E")}
    unembed = MatrixRows(weights, "W_U")
    return found if unembed.tied else {**found, "W_U": unembed}


def neighbours(vectors: Vectors, row: int, among: Mapping[str, MatrixRows], k: int, advance: Advance = lambda n: None) -> dict[str, Any]:
    """The k nearest of one vector: {"norm": its length, "here": among the vectors themselves, name: among the rows of a matrix that is as wide}.

    A vector that is 0 or not finite has its norm alone, None where there is none. A matrix that is the vectors themselves is not looked through twice.
    advance: told the rows that were read.
    """
    query = np.asarray(vectors.row(row), np.float32)
    norm = float(np.linalg.norm(query.astype(np.float64)))
    found: dict[str, Any] = {"norm": norm if np.isfinite(norm) else None}
    if not np.isfinite(norm) or norm == 0:
        return found
    found["here"] = nearest(vectors, query, k, row, advance)
    own = getattr(vectors, "weight", None)
    for name, matrix in among.items():
        if matrix.shape[1] == len(query) and (own is None or matrix.weight.native != own.native):
            found[name] = nearest(matrix, query, k, None, advance)
    return found


def nearest(vectors: Vectors, query: NDArray[np.float32], k: int, exclude: int | None = None, advance: Advance = lambda n: None) -> Found:
    """[row, cosine] of the k nearest to one vector, (dimension,)."""

    def told() -> Iterator[tuple[int, NDArray[np.float32]]]:
        for first, block in vectors.blocks():
            yield first, block
            advance(len(block))

    at, cosines = cosine_neighbours(told, query[None], k, None if exclude is None else np.array([exclude]))
    return [[int(i), float(c)] for i, c in zip(at[0], cosines[0], strict=True) if i >= 0]


def n_values(vectors: Vectors, among: Mapping[str, MatrixRows]) -> int:
    """How many numbers `neighbours` reads."""
    wide = [matrix.shape for matrix in among.values() if matrix.shape[1] == vectors.shape[1]]
    return sum(rows * columns for rows, columns in (vectors.shape, *wide))


def neighbours_key(projection_key: str, row: int, k: int) -> tuple[str | int, ...]:
    """Where the answer of a job lies in the cache."""
    return "neighbours", VERSION, projection_key, row, k

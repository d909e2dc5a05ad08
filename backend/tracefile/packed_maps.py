"""Causal maps without the half that the mask hides: (head, n, n) as (head, n (n + 1) / 2), row after row up to the diagonal.

Zeros compress to nothing, but a row's end among them costs Zstandard four times as long as the values themselves.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKED_TOKENS = 512  # prompts that are longer have maps in tiles, of which those after the diagonal are absent


def n_cells(n_tokens: int) -> int:
    return n_tokens * (n_tokens + 1) // 2


def pack(values: NDArray[Any], fill: float, causal: bool | None = None) -> NDArray[Any] | None:
    """The cells of maps (head, n, n) up to the diagonal, (head, n_cells(n)); None where one after it is not `fill`. `causal`: whether that is so, if known."""
    n_heads, n, _ = values.shape
    flat = np.ascontiguousarray(values).reshape(n_heads, n * n)
    kept, hidden = _places(n)
    if causal is None:
        causal = bool((np.take(flat, hidden, axis=1, mode="clip") == fill).all())
    return np.take(flat, kept, axis=1, mode="clip") if causal else None  # "clip" spares a check of every place


def unpack(cells: NDArray[Any], n_tokens: int, fill: float) -> NDArray[Any]:
    """The maps whose `cells` (..., n_cells(n_tokens)) `pack` took out: (..., n_tokens, n_tokens), `fill` after the diagonal."""
    out = np.full((*cells.shape[:-1], n_tokens * n_tokens), fill, cells.dtype)
    out[..., _places(n_tokens)[0]] = cells
    return out.reshape(*cells.shape[:-1], n_tokens, n_tokens)


@functools.lru_cache(4)
def _places(n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where the cells up to the diagonal, and those after it, lie in a map taken row after row."""
    below = np.tril(np.ones((n, n), bool))
    return np.flatnonzero(below), np.flatnonzero(~below)

"""Causal maps without the half that the mask hides: (head, n, n) as (head, n (n + 1) / 2), row after row up to the diagonal.

Zeros compress to nothing, but a row's end among them costs Zstandard four times as long as the values themselves.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.compute.flat_maps import flat_maps

PACKED_TOKENS = 512  # prompts that are longer have maps in tiles, of which those after the diagonal are absent


def n_cells(n_tokens: int) -> int:
    return n_tokens * (n_tokens + 1) // 2


def pack(values: NDArray[Any], fill: float, causal: bool | None = None) -> NDArray[Any] | None:
    """The cells of maps (head, n, n) up to the diagonal, (head, n_cells(n)); None where one after it is not `fill`. `causal`: whether that is so, if known."""
    n_heads, n, _ = values.shape
    if causal is None:
        flat = np.ascontiguousarray(values).reshape(n_heads, n * n)
        causal = bool((np.take(flat, _places(n)[1], axis=1, mode="clip") == fill).all())  # "clip" spares a check of every place
    if not causal:
        return None
    from backend.tracefile import compiled_bytes

    cells = np.empty((n_heads, n_cells(n)), np.float32)
    compiled_bytes.lower_triangles(*flat_maps(values), n, cells)
    return cells


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

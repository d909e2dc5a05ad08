"""Compiled loops that put the bytes of values in the order in which a trace stores them; see backend.compute.compiling for what compiling costs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.compute.compiling import compiled


@compiled()
def shuffle_halves(words: NDArray[Any], out: NDArray[Any]) -> None:
    """Of flat uint16 words: the low bytes of all, then the high bytes of all, into `out` (2 n,) uint8."""
    n = len(words)
    low, high = out[:n], out[n : 2 * n]
    for i in range(n):
        word = words[i]
        low[i], high[i] = np.uint8(word & 0xFF), np.uint8(word >> 8)


@compiled()
def lower_triangles(cells: NDArray[Any], head_step: int, row_step: int, n: int, out: NDArray[Any]) -> None:
    """Of maps (head, n, n) in `cells` as `flat_maps` gives them: the cells up to the diagonal, row after row, into `out` (head, n (n + 1) / 2)."""
    for h in range(len(out)):
        at = 0
        for i in range(n):
            begin = h * head_step + i * row_step
            row, kept = cells[begin : begin + i + 1], out[h, at : at + i + 1]
            for k in range(i + 1):
                kept[k] = row[k]
            at += i + 1

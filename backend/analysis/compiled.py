"""Compiled loops over what a capture looks at value by value, each in one pass while the values lie in the processor's cache.

NumPy needs a pass, and an array as large as the values, for each question. `attention`, `identities` and `logits` are how these are called.
See backend.compute.compiling for what that costs.

No flag allows the compiler to leave NaN or infinities out of account: a broken model's numbers stay NaN. Comparisons of floats, which NaN can be
among, are not made eight at once; those of their bits are, and for values without sign they are the same, with NaN above infinity.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from backend.compute.compiling import FAST, compiled

_TINY = np.float32(1.2e-38)  # 0 ln 0 is 0: the logarithm of a zero is taken of this instead and multiplied with the zero


@numba.njit(fastmath=FAST, inline="always")
def _ln(x: Any) -> Any:
    """Natural logarithm of a normal positive float32, in steps that the compiler takes for eight values at once; errs by 1e-7 relative.

    Source: the Cephes library's logf (Moshier), its coefficients and its split of ln 2.
    """
    bits = np.float32(x).view(np.int32)
    exponent = np.float32((bits >> 23) - 126)
    fraction = np.int32((bits & 0x007FFFFF) | 0x3F000000).view(np.float32)
    small = fraction < np.float32(0.70710678)
    exponent -= np.float32(1) if small else np.float32(0)
    f = (fraction + fraction if small else fraction) - np.float32(1)
    y = np.float32(7.0376836292e-2)
    y = y * f - np.float32(1.1514610310e-1)
    y = y * f + np.float32(1.1676998740e-1)
    y = y * f - np.float32(1.2420140846e-1)
    y = y * f + np.float32(1.4249322787e-1)
    y = y * f - np.float32(1.6668057665e-1)
    y = y * f + np.float32(2.0000714765e-1)
    y = y * f - np.float32(2.4999993993e-1)
    y = y * f + np.float32(3.3333331174e-1)
    z = f * f
    return f + (y * f * z + exponent * np.float32(-2.12194440e-4) - np.float32(0.5) * z) + exponent * np.float32(0.693359375)


@compiled(fastmath=FAST, error_model="numpy")
def read_rows(cells: NDArray[Any], head_step: int, row_step: int, start: int, cell: int, mass: NDArray[Any], entropy: NDArray[Any], distance: NDArray[Any],
              least: NDArray[Any], beyond: NDArray[Any], peaks: NDArray[Any], row_peaks: NDArray[Any]) -> None:  # fmt: skip
    """What `attention.PatternRows` holds, of rows `start` on; every array but `cells` is filled, all are float32 and contiguous.

    cells: flat, so that the innermost step is known to be one value; row i of head h begins at h head_step + i row_step and has start + n keys.
    mass, entropy, distance: (head, n). least, beyond: (head,). peaks: (head, c, d), its values not below 0 and those of earlier pieces kept;
    row_peaks: (start + n,), to work in.
    """
    n_heads, n = mass.shape
    n_keys = start + n
    bits = cells.view(np.int32)
    for h in range(n_heads):
        lowest, later = np.float32(0), np.float32(0)
        for i in range(n):
            query = start + i
            at = h * head_step + i * row_step
            row, row_bits = cells[at : at + n_keys], bits[at : at + n_keys]
            total, moment, signs = np.float32(0), np.float32(0), np.int32(0)
            for k in range(query + 1):
                a = row[k]
                total += a
                moment += a * np.float32(np.int32(query - k))
                signs |= row_bits[k]
            information = np.float32(0)
            for k in range(query + 1):
                a = row[k]
                information += a * _ln(a if a > _TINY else _TINY)
            hidden = np.int32(0)
            for k in range(query + 1, n_keys):
                hidden |= row_bits[k] & 0x7FFFFFFF
            if signs < 0:  # seldom: something is negative
                for k in range(query + 1):
                    lowest = min(lowest, row[k])
            if hidden:  # seldom: something looks ahead
                for k in range(query + 1, n_keys):
                    later = np.float32(np.inf) if np.isnan(row[k]) else max(later, abs(row[k]))
                    total += row[k]
                    lowest = min(lowest, row[k])
            mass[h, i], distance[h, i], entropy[h, i] = total, moment, np.float32(0) - information
            if i == 0 or query % cell == 0:
                row_peaks[:] = 0
            for k in range(n_keys):
                a, b = row[k], row_peaks[k]
                row_peaks[k] = a if a > b else b
            if query % cell == cell - 1 or i == n - 1:
                c = query // cell - start // cell
                for d in range(peaks.shape[2]):
                    top = peaks[h, c, d]
                    for k in range(d * cell, min((d + 1) * cell, n_keys)):
                        top = row_peaks[k] if row_peaks[k] > top else top
                    peaks[h, c, d] = top
        least[h], beyond[h] = lowest, later


@compiled()
def pair_mass(cells: NDArray[Any], head_step: int, row_step: int, rows: NDArray[Any], columns: NDArray[Any], out: NDArray[Any]) -> None:
    """Add the cells (rows[i], columns[i]) of every head to `out` (head, n) float64, each to its row; `cells` as in `read_rows`."""
    for h in range(out.shape[0]):
        for pair in range(len(rows)):
            out[h, rows[pair]] += cells[h * head_step + rows[pair] * row_step + columns[pair]]


@compiled()
def sum_error(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any]) -> tuple[np.float32, np.float32]:
    """Of flat float32 arrays of one length: the largest |a + b - c| and the largest |c|; NaN where any is."""
    difference, size = np.int32(0), np.int32(0)
    for i in range(len(c)):
        difference = max(difference, np.float32(a[i] + b[i] - c[i]).view(np.int32) & np.int32(0x7FFFFFFF))
        size = max(size, np.float32(c[i]).view(np.int32) & np.int32(0x7FFFFFFF))
    return np.int32(difference).view(np.float32), np.int32(size).view(np.float32)


@compiled()
def largest(a: NDArray[Any]) -> np.float32:
    """The largest |a| of a flat float32 array; NaN where any is, 0 of nothing."""
    size = np.int32(0)
    for i in range(len(a)):
        size = max(size, np.float32(a[i]).view(np.int32) & np.int32(0x7FFFFFFF))
    return np.int32(size).view(np.float32)


@compiled()
def copy_largest(a: NDArray[Any], out: NDArray[Any]) -> np.float32:
    """`largest`, with a copy in `out`."""
    size = np.int32(0)
    for i in range(len(a)):
        out[i] = a[i]
        size = max(size, np.float32(a[i]).view(np.int32) & np.int32(0x7FFFFFFF))
    return np.int32(size).view(np.float32)

"""A compiled loop over rows of logits: what `logits.summary` says of a row, in three passes while the row lies in the processor's cache.

`logits` is how this is called; see backend.compute.compiling for what compiling costs and what its flags allow. Only rows of finite numbers, and of -inf where the
largest is finite, are read: another is marked and left to NumPy.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from backend.compute.compiling import FAST, compiled

_BLOCK = 4096  # columns whose sums are taken in float32, before they are added in float64
_LEAST = np.float32(-87)  # e^-87 = 1.6e-38 stands for what is smaller, which changes no sum


@numba.njit(fastmath=FAST, inline="always")
def _exp(x: Any) -> Any:
    """e^x of -87 <= x <= 0, float32, in steps that the compiler takes for many values at once; errs by 1e-7 relative.

    Source: the Cephes library's expf (Moshier), its coefficients and its split of ln 2.
    """
    n = np.int32(x * np.float32(1.44269504088896341) - np.float32(0.5))  # towards 0: to the nearest, for x is not positive
    power = np.float32(n)
    f = x - power * np.float32(0.693359375) - power * np.float32(-2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * f + np.float32(1.3981999507e-3)
    y = y * f + np.float32(8.3334519073e-3)
    y = y * f + np.float32(4.1665795894e-2)
    y = y * f + np.float32(1.6666665459e-1)
    y = y * f + np.float32(5.0000001201e-1)
    y = y * f * f + f + np.float32(1)
    return y * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@numba.njit(fastmath=FAST, error_model="numpy")
def _largest(row: NDArray[Any], groups: int, maxima: NDArray[Any]) -> tuple[np.float32, bool]:
    """The largest logit, and whether any is NaN; the groups' maxima go into `maxima`."""
    n_grouped = len(row) // groups * groups if groups else 0
    maxima[:] = -np.inf
    missing = np.int32(0)
    for begin in range(0, n_grouped, max(groups, 1)):
        part = row[begin : begin + groups]
        for j in range(groups):
            a = part[j]
            missing |= np.int32(a != a)
            maxima[j] = a if a > maxima[j] else maxima[j]
    top = np.float32(-np.inf)
    for j in range(groups):
        top = max(top, maxima[j])
    for j in range(n_grouped, len(row)):
        missing |= np.int32(row[j] != row[j])
        top = max(top, row[j])
    return top, missing != 0


@numba.njit(fastmath=FAST, error_model="numpy")
def _sums(row: NDArray[Any], top: np.float32) -> tuple[float, float]:
    """sum w and sum w x over the row, x = logit - top and w = e^x."""
    total, moment = 0.0, 0.0
    for begin in range(0, len(row), _BLOCK):
        block_total, block_moment = np.float32(0), np.float32(0)
        part = row[begin : begin + _BLOCK]
        for j in range(len(part)):
            shifted = part[j] - top
            shifted = shifted if shifted > _LEAST else _LEAST
            weight = _exp(shifted)
            block_total += weight
            block_moment += weight * shifted
        total += float(block_total)
        moment += float(block_moment)
    return total, moment


@numba.njit(fastmath=FAST, error_model="numpy")
def _rank(row: NDArray[Any], token: int) -> np.int32:
    """How many tokens stand before `token`: larger logits, and equal ones with a smaller id."""
    value, before = row[token], np.int32(0)
    part = row[:token]
    for j in range(len(part)):
        before += np.int32(part[j] >= value)
    part = row[token:]
    for j in range(len(part)):
        before += np.int32(part[j] > value)
    return before


@numba.njit(fastmath=FAST, error_model="numpy")
def _best(row: NDArray[Any], groups: int, maxima: NDArray[Any], best: NDArray[Any], ids: NDArray[Any]) -> None:
    """The largest logits, best first and equal ones in the order of their ids, into `best` and `ids`, both (k,)."""
    k = len(best)
    threshold = np.float32(-np.inf)
    if groups:
        best[:] = -np.inf
        for a in maxima:
            if a > best[k - 1]:
                at = k - 1
                while at > 0 and best[at - 1] < a:
                    best[at] = best[at - 1]
                    at -= 1
                best[at] = a
        threshold = best[k - 1]
    n_grouped, n_best = len(row) // groups * groups if groups else 0, 0
    for group in range(groups + 1):  # the last one is of the columns that no group has
        if group < groups and maxima[group] < threshold:
            continue
        begin, end, step = (group, n_grouped, groups) if group < groups else (n_grouped, len(row), 1)
        for j in range(begin, end, step):
            a = row[j]
            if a < threshold or (n_best == k and (a < best[k - 1] or (a == best[k - 1] and j > ids[k - 1]))):
                continue
            n_best = min(n_best + 1, k)
            at = n_best - 1
            while at > 0 and (best[at - 1] < a or (best[at - 1] == a and ids[at - 1] > j)):
                best[at], ids[at] = best[at - 1], ids[at - 1]
                at -= 1
            best[at], ids[at] = a, j


@compiled(fastmath=FAST, error_model="numpy")
def read_rows(logits: NDArray[Any], following: NDArray[Any], groups: int, top_ids: NDArray[Any], top_logprobs: NDArray[Any], scalars: NDArray[Any],
              ranks: NDArray[Any], odd: NDArray[Any]) -> None:  # fmt: skip
    """Fill what `logits.summary` returns, of logits (pos, d_vocab) float32, contiguous.

    top_ids, top_logprobs: (pos, k). scalars: (pos, 3) float64, logsumexp, entropy and the log-probability of `following`. ranks: (pos,).
    odd: (pos,) bool, rows of which the rest says nothing. groups: at least k, of every `groups`-th column each, or 0: k values are
    no smaller than the k-th largest of the groups' maxima, so that few columns need to be compared with each other.
    """
    maxima, best = np.empty(groups, np.float32), np.empty(top_ids.shape[1], np.float32)
    for i in range(len(logits)):
        row, token = logits[i], following[i]
        top, missing = _largest(row, groups, maxima)
        odd[i] = missing or not np.isfinite(top)
        if odd[i]:
            continue
        total, moment = _sums(row, top)
        log_total = np.log(total)
        log_sum = top + log_total
        scalars[i, 0], scalars[i, 1], scalars[i, 2] = log_sum, log_total - moment / total, row[token] - log_sum
        ranks[i] = _rank(row, token)
        _best(row, groups, maxima, best, top_ids[i])
        for at in range(len(best)):
            top_logprobs[i, at] = best[at] - log_sum

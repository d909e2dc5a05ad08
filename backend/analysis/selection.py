"""The best of a stream of scores: top-k over arrays that pass by one after the other, in memory that grows with k and not with the stream.

Equal scores stand in the order of their places, so that the same scores always give the same selection. A score that is not finite
is never selected; how many there are is `backend.analysis.sensitivity.summary`'s to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 18  # scores looked at together: their copies stay near the core


@dataclass(frozen=True)
class Selected:
    """Columns (n,): number of the array, place in it (flat), what stands there, and its score."""

    tensor: NDArray[np.int64]
    at: NDArray[np.int64]
    value: NDArray[np.float32]
    score: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, index: slice | NDArray[np.int64] | NDArray[np.bool_]) -> Selected:
        return Selected(self.tensor[index], self.at[index], self.value[index], self.score[index])


def joined(parts: Sequence[Selected]) -> Selected:
    if not parts:
        return Selected(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))
    return Selected(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("tensor", "at", "value", "score")))


class TopK:
    """The k largest scores (largest=False: the k smallest) of what was added; memory for 2 k + BLOCK of them at most.

    A score must beat the k-th best so far to be kept; when twice k are kept, a partial partition throws the lower half away.
    """

    def __init__(self, k: int, *, largest: bool = True) -> None:
        self._k, self._sign = k, np.float32(1 if largest else -1)
        self._kept: list[Selected] = []
        self._n, self._least = 0, np.float32(-np.inf)
        self._last = -1

    def add(self, tensor: int, scores: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """scores, values: the same shape. `tensor` is larger than that of every array before: its order decides between equal scores."""
        if tensor <= self._last:
            raise ValueError(f"array {tensor} is added after array {self._last}, and ties go by their order")
        self._last = tensor
        flat, beside = scores.reshape(-1), values.reshape(-1)
        for start in range(0, flat.size if self._k else 0, BLOCK):
            keys = flat[start : start + BLOCK] * self._sign
            at = np.flatnonzero((keys > self._least) & np.isfinite(keys))  # an equal one comes later, and loses
            if at.size:
                self._kept.append(Selected(np.full(at.size, tensor, np.int64), at + start, beside[at + start].astype(np.float32), keys[at]))
                self._n += at.size
            if self._n >= 2 * self._k:
                self._shrink()

    def _shrink(self) -> None:
        """Leave the k best, in the order of their places, and raise the bar to the last of them."""
        kept = joined(self._kept)
        if len(kept) > self._k:
            limit = np.partition(kept.score, len(kept) - self._k)[len(kept) - self._k]
            keep = kept.score > limit
            keep[np.flatnonzero(kept.score == limit)[: self._k - int(keep.sum())]] = True
            kept = kept[keep]
        if len(kept) == self._k and self._k:
            self._least = kept.score.min()
        self._kept, self._n = [kept], len(kept)

    def per_tensor(self) -> dict[int, int]:
        """Number of each array -> how many of its scores are among the k best so far."""
        self._shrink()
        counts = np.bincount(self._kept[0].tensor)
        return {int(tensor): int(counts[tensor]) for tensor in np.flatnonzero(counts)}

    def best(self) -> Selected:
        """The k best (fewer where fewer were added), best first."""
        self._shrink()
        kept = self._kept[0]
        ordered = kept[np.argsort(-kept.score, kind="stable")]
        return Selected(ordered.tensor, ordered.at, ordered.value, ordered.score * self._sign)


class TopAndBottom:
    """The k largest scores, and of each array as many of its smallest as it has among them.

    An array's share of the top only falls as others are added, so its smallest are chosen when it passes and cut as the share
    falls: there are never more than k of them, however many arrays pass.
    """

    def __init__(self, k: int) -> None:
        self._top = TopK(k)
        self._bottom: dict[int, Selected] = {}

    def add(self, tensor: int, scores: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """As TopK.add."""
        self._top.add(tensor, scores, values)
        share = self._top.per_tensor()
        least = TopK(share.get(tensor, 0), largest=False)
        least.add(tensor, scores, values)
        self._bottom[tensor] = least.best()
        self._bottom = {of: kept[: share[of]] for of, kept in self._bottom.items() if of in share}

    def top(self) -> Selected:
        """Largest first."""
        return self._top.best()

    def bottom(self) -> Selected:
        """Smallest first, of all arrays together."""
        every = joined([self._bottom[of] for of in sorted(self._bottom)])
        return every[np.argsort(every.score, kind="stable")]

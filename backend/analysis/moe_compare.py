"""Two routings against each other: how alike their loads are, and which tokens chose other experts.

    cosine, Pearson   of the two vectors of shares
    Jensen-Shannon    divergence, nats, 0 to ln 2 (Lin 1991): the mean KL of both to their average
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from backend.analysis.moe import Counts, Indices, as_counts, shares


@dataclass(frozen=True)
class Similarity:
    """How alike two loads are. `pearson` is NaN where one of them is perfectly even: there is nothing to correlate with."""

    cosine: float
    pearson: float
    jensen_shannon: float


@dataclass(frozen=True)
class Change:
    """Tokens of one layer that chose other experts. `sets`: (pos,) the set of k differs; `first`: (pos,) the first choice does;
    slots: the share of all choices that the other run did not make."""

    sets: NDArray[np.bool_]
    first: NDArray[np.bool_]
    slots: float

    @property
    def share(self) -> float:
        return float(self.sets.mean()) if len(self.sets) else math.nan


def similarity(a: Counts, b: Counts, n_experts: int | None = None) -> Similarity:
    """Similarity of two loads, each as counts (arrays or mappings) of the same experts; NaN where one counted nothing."""
    size = n_experts if n_experts is not None else max(_size(a), _size(b))
    p, q = shares(_padded(a, size)), shares(_padded(b, size))
    if np.isnan(p).any() or np.isnan(q).any():
        return Similarity(math.nan, math.nan, math.nan)
    cosine = float(p @ q / (np.linalg.norm(p) * np.linalg.norm(q)))
    # an even load has no variance, up to the rounding of 1 / E
    even = min(np.ptp(p), np.ptp(q)) < 1e-12
    pearson = math.nan if even else float(np.corrcoef(p, q)[0, 1])
    middle = (p + q) / 2
    return Similarity(cosine, pearson, float((rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / 2))


def changed(a: Indices, b: Indices) -> Change:
    """What changed between two routings (pos, k) of the same tokens at the same layer. Raises ValueError where their shapes differ."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"Routings of {a.shape[0]} tokens x {a.shape[1]} experts and of {b.shape[0]} x {b.shape[1]} cannot be compared token by token.")
    kept = (a[:, :, None] == b[:, None, :]).any(axis=2)
    slots = float(1 - kept.mean()) if kept.size else math.nan
    return Change(~kept.all(axis=1), a[:, 0] != b[:, 0], slots)


def pairwise(loads: Sequence[Counts], n_experts: int | None = None) -> dict[str, NDArray[np.float64]]:
    """(load, load) matrices cosine, pearson and jensen_shannon of every pair."""
    found = {name: np.full((len(loads), len(loads)), np.nan) for name in ("cosine", "pearson", "jensen_shannon")}
    for i, a in enumerate(loads):
        for j, b in enumerate(loads):
            alike = similarity(a, b, n_experts)
            for name, matrix in found.items():
                matrix[i, j] = getattr(alike, name)
    return found


def within_between(loads: Sequence[Counts], labels: Sequence[Hashable]) -> tuple[float, float]:
    """Mean Jensen-Shannon divergence, nats, over pairs of loads with the same label, and over pairs with different labels.

    NaN without such pairs; loads that counted nothing are left out.
    """
    if len(loads) != len(labels):
        raise ValueError(f"There are {len(labels)} labels for {len(loads)} loads.")
    size = max((_size(each) for each in loads), default=0)
    rows = [(label, p) for label, p in ((label, shares(_padded(each, size))) for label, each in zip(labels, loads, strict=True)) if not np.isnan(p).any()]
    sums, pairs = [0.0, 0.0], [0, 0]
    for i, (label, p) in enumerate(rows[:-1]):
        others = np.stack([q for _, q in rows[i + 1 :]])
        middle = (others + p) / 2
        apart = (rel_entr(p, middle) + rel_entr(others, middle)).sum(axis=1) / 2
        same = np.array([other == label for other, _ in rows[i + 1 :]])
        for kind, chosen in enumerate((same, ~same)):
            sums[kind] += float(apart[chosen].sum())
            pairs[kind] += int(chosen.sum())
    within, between = (total / n if n else math.nan for total, n in zip(sums, pairs, strict=True))
    return within, between


def _size(counts: Counts) -> int:
    return max((int(e) for e in counts), default=-1) + 1 if isinstance(counts, Mapping) else len(counts)


def _padded(counts: Counts, size: int) -> NDArray[Any]:
    return as_counts(counts, size if isinstance(counts, Mapping) else None)

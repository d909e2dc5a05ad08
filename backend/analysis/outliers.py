"""Massive activations and outlier dimensions of the residual stream, found and followed through depth.

Massive activations: Sun et al. 2024 (arXiv:2402.17762), a value beyond 100 that is also 1,000 times the median |x| of its hidden state.
Outlier dimensions: Dettmers et al. 2022 (LLM.int8(), arXiv:2208.07339), a dimension with |x| >= 6 in at least a quarter of the layers and
6 % of the tokens of all layers. Layers are taken one after the other: nothing here holds more than one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

LARGEST = 64  # values of a layer that are remembered: a handful of (token, dimension) pairs carry massive activations, in every layer


@dataclass(frozen=True)
class Limits:
    """size, ratio: of a massive activation, |x| > size and |x| > ratio * median|x|. dimension, layer_share, token_share: of an outlier dimension."""

    size: float = 100.0
    ratio: float = 1000.0
    dimension: float = 6.0
    layer_share: float = 0.25
    token_share: float = 0.06


@dataclass(frozen=True)
class Peak:
    """One (position, dimension), where its |x| is largest: value there, the layer, the median |x| of that layer, and in how many layers it is massive."""

    position: int
    dimension: int
    layer: int
    value: float
    median: float
    massive_in: int

    @property
    def ratio(self) -> float:
        return abs(self.value) / self.median if self.median else float("inf")


@dataclass(frozen=True)
class OutlierDimension:
    """A dimension beyond the limit: in which share of the layers (at any token), of all tokens of all layers, and its largest |x|."""

    dimension: int
    layer_share: float
    token_share: float
    abs_max: float


@dataclass
class Outliers:
    """What a scan of all layers found.

    peaks: massive (position, dimension) pairs first, then the largest values that are not, |x| falling. n_massive: massive values, all
    layers together. n_bad: values that are NaN or infinite, which take part in neither.
    """

    peaks: list[Peak] = field(default_factory=list)
    dimensions: list[OutlierDimension] = field(default_factory=list)
    n_massive: int = 0
    n_bad: int = 0


def find_outliers(layers: Iterable[tuple[int, NDArray[np.floating]]], limits: Limits = Limits()) -> Outliers:
    """Scan layer after layer. layers: (number, (pos, d_model))."""
    found, pairs = Outliers(), dict[tuple[int, int], Peak]()
    beyond, in_layers, abs_max, n_layers, n_tokens = np.zeros(0), np.zeros(0), np.zeros(0), 0, 0
    for layer, values in layers:
        finite = np.isfinite(values)
        size = np.where(finite, np.abs(np.asarray(values, np.float32)), 0)
        median = float(np.median(size[finite])) if finite.any() else 0.0
        found.n_bad += int(values.size - finite.sum())
        massive = (size > limits.size) & (size > limits.ratio * median)
        found.n_massive += int(massive.sum())
        for at in _largest(size, LARGEST):
            position, dimension = (int(i) for i in np.unravel_index(at, size.shape))
            _add(pairs, Peak(position, dimension, layer, float(values[position, dimension]), median, int(massive[position, dimension])))
        if not n_layers:
            beyond, in_layers, abs_max = (np.zeros(values.shape[1]) for _ in range(3))
        over = size >= limits.dimension
        beyond, in_layers, abs_max = beyond + over.sum(axis=0), in_layers + over.any(axis=0), np.maximum(abs_max, size.max(axis=0))
        n_layers, n_tokens = n_layers + 1, n_tokens + len(values)
    found.peaks = sorted(pairs.values(), key=lambda peak: (not peak.massive_in, -abs(peak.value)))
    if n_layers:
        chosen = np.flatnonzero((in_layers >= limits.layer_share * n_layers) & (beyond >= limits.token_share * n_tokens) & (beyond > 0))
        found.dimensions = [OutlierDimension(int(d), float(in_layers[d] / n_layers), float(beyond[d] / n_tokens), float(abs_max[d])) for d in chosen[np.argsort(-abs_max[chosen])]]
    return found


def follow(layers: Iterable[tuple[int, NDArray[np.floating]]], pairs: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """The values of some (position, dimension) pairs in every layer: (pair, layer)."""
    at = tuple(np.array(pairs, np.int64).reshape(-1, 2).T)
    return np.stack([np.asarray(values[at], np.float32) for _, values in layers], axis=1) if pairs else np.zeros((0, 0), np.float32)


def _largest(size: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    flat = size.ravel()
    return np.argpartition(-flat, min(n, len(flat)) - 1)[:n] if len(flat) > n else np.arange(len(flat))


def _add(pairs: dict[tuple[int, int], Peak], peak: Peak) -> None:
    """Keep of a pair its largest layer, and count those in which it is massive."""
    known = pairs.get((peak.position, peak.dimension))
    if known is None:
        pairs[peak.position, peak.dimension] = peak
        return
    best, other = (peak, known) if abs(peak.value) > abs(known.value) else (known, peak)
    pairs[peak.position, peak.dimension] = Peak(best.position, best.dimension, best.layer, best.value, best.median, best.massive_in + other.massive_in)

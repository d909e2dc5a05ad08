"""Super experts: the few experts of a mixture whose outputs are so large that they make the massive activations of the residual stream.

Su et al. 2025, "Unveiling Super Experts in Mixture-of-Experts Large Language Models" (arXiv:2507.23279). With a the largest |value| of an
expert's output (of its W_out, before the router's weight) over all tokens, an expert is super if

    a > the 99.5th percentile of all experts' a,  a > 0.1 of the largest a,  and its layer forms massive activations.

The paper takes the layers from a plot of massive activations. Here a layer forms one where, at some (token, dimension), what leaves the block
is massive by the limits of backend.analysis.outliers (|x| > 100 and > 1,000 times the median) and larger by more than 100 than what came in.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend.analysis.outliers import Limits

PERCENTILE, SHARE_OF_LARGEST = 99.5, 0.1
LISTED = 8

# Super experts of models by part of their name, (layer, expert) from 0, the layer in the whole model: table 8 of the paper.
# DeepSeek-V2-Lite's are as in the version of ICLR 2026; the preprint has L2E54 and L3E38, counted otherwise (its first layer is dense).
PUBLISHED: Mapping[str, tuple[tuple[int, int], ...]] = {
    "Qwen3-30B-A3B": ((1, 68), (2, 92), (3, 82)),
    "Mixtral-8x7B": ((1, 3),),
    "DeepSeek-V2-Lite": ((3, 54), (4, 38)),
}


def published(model: str) -> tuple[tuple[int, int], ...]:
    """Those that the paper found in a model of this name; () of one that it does not name."""
    plain = re.sub(r"[^a-z0-9]", "", model.lower())
    return next((places for name, places in PUBLISHED.items() if re.sub(r"[^a-z0-9]", "", name.lower()) in plain), ())


@dataclass
class Peaks:
    """The largest output of every expert of one layer, all (expert,). An expert that no token chose put out nothing: 0, and position -1.

    size       a: the largest |value| of its output before the router's weight
    added      the largest |value| of its output times that weight, as it is added to the residual stream
    position, dimension   where `size` is
    """

    size: NDArray[np.float32]
    added: NDArray[np.float32]
    position: NDArray[np.int64]
    dimension: NDArray[np.int64]

    @classmethod
    def none(cls, n_experts: int) -> Peaks:
        nothing = np.zeros(n_experts, np.float32)
        return cls(nothing, nothing.copy(), np.full(n_experts, -1), np.full(n_experts, -1))

    def add(self, outputs: NDArray[np.floating], indices: NDArray[np.integer], weights: NDArray[np.floating], start: int = 0) -> None:
        """Take positions `start` on. outputs: (pos, k, d_model) times their weights, indices and weights: (pos, k)."""
        size = np.nan_to_num(np.abs(np.asarray(outputs, np.float32)), nan=0.0)
        dimension = size.argmax(axis=-1)
        added = np.take_along_axis(size, dimension[..., None], axis=-1)[..., 0]
        weight = np.abs(np.asarray(weights, np.float32))
        plain = np.divide(added, weight, out=np.zeros_like(added), where=weight > 0)
        np.maximum.at(self.added, indices, added)
        for expert in np.unique(indices):
            mine = np.where(indices == expert, plain, -1)
            at = np.unravel_index(int(mine.argmax()), mine.shape)
            if mine[at] > self.size[expert] or self.position[expert] < 0:
                self.size[expert], self.position[expert], self.dimension[expert] = mine[at], start + int(at[0]), dimension[at]


@dataclass(frozen=True)
class SuperExpert:
    """One expert by its place; `size` as in Peaks, `share` of the largest of all."""

    layer: int
    expert: int
    size: float
    added: float
    position: int
    dimension: int
    share: float


@dataclass(frozen=True)
class Verdict:
    """percentile: the 99.5th of all experts' sizes; largest: the largest; ranked: the LISTED largest experts, largest first.

    by_size: all experts beyond both limits, largest first, whatever their layer; supers: those of them in a layer that forms massive activations.
    """

    percentile: float
    largest: float
    ranked: list[SuperExpert]
    by_size: list[SuperExpert]
    supers: list[SuperExpert]


def forms_massive(before: NDArray[np.floating], after: NDArray[np.floating], limits: Limits = Limits()) -> bool:
    """Whether a block makes a massive activation of what came in. before, after: (pos, d_model), the residual stream around it."""
    size = np.nan_to_num(np.abs(np.asarray(after, np.float32)), nan=0.0, posinf=0.0)
    median = float(np.median(size)) if size.size else 0.0
    massive = (size > limits.size) & (size > limits.ratio * median)
    return bool((massive & (size - np.abs(np.asarray(before, np.float32)) > limits.size)).any())


def judge(peaks: Sequence[tuple[int, Peaks]], forming: Collection[int]) -> Verdict:
    """Which experts are super. peaks: (layer, its experts'); forming: the layers that form massive activations."""
    sizes = np.concatenate([each.size for _, each in peaks]) if peaks else np.zeros(1, np.float32)
    percentile, largest = float(np.percentile(sizes, PERCENTILE)), float(sizes.max())
    used = [
        SuperExpert(layer, int(e), float(of.size[e]), float(of.added[e]), int(of.position[e]), int(of.dimension[e]), float(of.size[e]) / largest)
        for layer, of in peaks
        for e in np.flatnonzero(of.size)
    ]
    used.sort(key=lambda each: -each.size)
    by_size = [each for each in used if each.size > percentile and each.size > SHARE_OF_LARGEST * largest]
    return Verdict(percentile, largest, used[:LISTED], by_size, [each for each in by_size if each.layer in set(forming)])

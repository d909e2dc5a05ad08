"""Neurons of an MLP: which are largest at a token, what each writes into the logits, and where over many texts each is largest.

A neuron is one entry of mlp_post; what it writes is its column of W_out (Geva et al. 2022, "Transformer Feed-Forward Layers Build
Predictions by Promoting Concepts in the Vocabulary Space", arXiv:2203.14680).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend.analysis.attribution import Ending


@dataclass(frozen=True)
class Neuron:
    """One neuron at one position: its layer, its number in the layer, its value."""

    layer: int
    neuron: int
    value: float


def top_neurons(layers: Iterable[tuple[int, NDArray[np.floating]]], k: int) -> tuple[list[Neuron], int]:
    """The k neurons with the largest |value| of all layers, largest first, and how many values are not finite.

    layers: (number, (d_mlp,)) of one position. An infinite value is the largest there is; NaN is counted and takes no place.
    """
    found, bad = [], 0
    for layer, values in layers:
        size = np.nan_to_num(np.abs(np.asarray(values, np.float32)), nan=-1.0, posinf=np.inf)
        bad += int(values.size - np.isfinite(values).sum())
        order = np.argsort(-size, kind="stable")[:k]
        found += [Neuron(layer, int(i), float(values[i])) for i in order if size[i] >= 0]
    return sorted(found, key=lambda each: -abs(each.value))[:k], bad


def written_direction(ending: Ending, column: NDArray[np.floating], post_gain: NDArray[np.floating] | None = None) -> NDArray[np.float64]:
    """What the columns of W_out are before W_U, up to the norm's scale: the final norm's gain folded in, its mean off for LayerNorm.

    column: (..., d_model); post_gain: (d_model,) of the norm that follows the MLP in some architectures.
    """
    written = np.asarray(column, np.float64) * (1.0 if post_gain is None else np.asarray(post_gain, np.float64))
    if ending.norm == "layer":
        written = written - written.mean(axis=-1, keepdims=True)
    return written * np.asarray(ending.gain, np.float64)


def merge_top(known: tuple[NDArray[np.float32], NDArray[np.int64]] | None, values: NDArray[np.floating], first_id: int, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Keep the k largest of each column, largest first: (k or fewer, column) values and ids.

    known: what was kept of earlier rows; values: (row, column), NaN never kept; the id of a row is first_id + its number. Where a column has
    fewer than k values, -inf with id -1 fills it.
    """
    rows = np.where(np.isnan(values), -np.inf, np.asarray(values, np.float32))
    ids = np.broadcast_to(np.arange(first_id, first_id + len(rows), dtype=np.int64)[:, None], rows.shape)
    ids = np.where(np.isnan(values), -1, ids)
    if known is not None:
        rows, ids = np.concatenate([known[0], rows]), np.concatenate([known[1], ids])
    if len(rows) > k:
        kept = np.argpartition(-rows, k - 1, axis=0)[:k]
        rows, ids = np.take_along_axis(rows, kept, 0), np.take_along_axis(ids, kept, 0)
    order = np.argsort(-rows, axis=0, kind="stable")
    return np.take_along_axis(rows, order, 0), np.take_along_axis(ids, order, 0)

"""Weights changed in a loaded model, and put back to the bit: what is asked for, and what the stored format made of it.

    with engine.perturbed([WeightChange("blocks.1.mlp.W_out", at, values)]) as written:
        engine.run(...)                 # the model with those weights
    # the model as it was, every stored byte the same, after an exception too

Nothing on disk is touched: the change lives in the memory that the model runs from, GGUF's quantized blocks included.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class WeightChange:
    """New values, or a flipped bit, of some entries of one weight.

    name    canonical name (backend.weights)
    at      (n,) int64 places in the canonical tensor, flattened in C order, each once
    values  (n,) float32 that the entries shall have; None with `bit`
    bit     the bit that is flipped in each entry's own stored code, 0 the least significant; None with `values`
    """

    name: str
    at: NDArray[np.int64]
    values: NDArray[np.float32] | None = None
    bit: int | None = None


@dataclass(frozen=True)
class Written:
    """What became of a WeightChange: all (n,) float32, in the order of `at`.

    after       what the format could store: differs from `wanted` where it could not represent it (wanted = after for a flipped bit)
    n_others    weights that were not named and changed too, as they share a quantized block with one that was
    worst_other the largest |change| among those, 0.0 where there are none
    storage     the type that the weight is stored in: "Q4_K", "F16", "float32", ...
    """

    name: str
    before: NDArray[np.float32]
    wanted: NDArray[np.float32]
    after: NDArray[np.float32]
    n_others: int
    worst_other: float
    storage: str


class EditsWeights(Protocol):
    def perturbed(self, changes: Sequence[WeightChange]) -> AbstractContextManager[tuple[Written, ...]]:
        """The model with these weights, for the length of the block. Raises LayerscopeError for a weight that the model does not have, a place
        outside it, a bit that its storage does not have, or a model whose weights cannot be written (a GGUF file opened without `editable_weights`)."""

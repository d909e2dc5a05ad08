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

from backend.errors import LayerscopeError


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
        """The model with these weights, for the length of the block. Blocks may be nested; changes of one block hold together, each entry changed once.

        Tied matrices (embed.W_E and unembed.W_U where the model stores one for both) are one weight: changing one changes the other.
        Raises LayerscopeError for a weight that the model does not have, a place outside it or named twice, a value that is not finite, a bit that its
        storage does not have, or a model whose weights cannot be written (a GGUF file opened without `editable_weights`).
        """

    def code_bits(self, name: str) -> int:
        """How many bits the stored code of one entry of a weight has, and `WeightChange.bit` can name; the most significant is the last.

        The bits that belong to the entry alone: 16 of F16, 4 of Q4_K; 0 where entries share their codes. Raises LayerscopeError for an unknown weight.
        """


def check_change(change: WeightChange, size: int, bits: int, storage: str) -> None:
    """The checks that every engine makes before it writes. size: entries of the weight; bits: of the code of one, stored as `storage`."""
    outside = change.at[(change.at < 0) | (change.at >= size)]
    if len(outside):
        raise LayerscopeError(f"Place {outside[0]:,} is outside 0-{size - 1:,} of {change.name}.")
    if (change.values is None) == (change.bit is None):
        raise LayerscopeError(f"The change of {change.name} has {'both values and a bit' if change.bit is not None else 'neither values nor a bit'}; it takes one of them.")
    if change.bit is not None and not 0 <= change.bit < bits:
        has = f"bits 0-{bits - 1}" if bits else "no code of its own"
        raise LayerscopeError(f"There is no bit {change.bit} to flip in {change.name}: an entry stored as {storage} has {has}.")
    if change.values is not None:
        if change.values.shape != change.at.shape:
            raise LayerscopeError(f"The change of {change.name} has {change.values.size:,} values for {change.at.size:,} places.")
        if not np.isfinite(change.values).all():
            wrong = int(np.flatnonzero(~np.isfinite(change.values))[0])
            raise LayerscopeError(f"Entry {change.at[wrong]:,} of {change.name} cannot be set to {change.values[wrong]}: a weight is a finite number.")


def check_each_once(places: NDArray[np.int64], names: Sequence[str]) -> None:
    """Raise LayerscopeError where two of the changes called `names` meet. places: where the entries of all of them are stored."""
    steps = np.diff(places)
    n_twice = 0 if (steps > 0).all() else int(np.count_nonzero(np.diff(np.sort(places)) == 0))
    if n_twice:
        raise LayerscopeError(f"{n_twice:,} stored weight{'s are' if n_twice > 1 else ' is'} named more than once in the changes of {', '.join(dict.fromkeys(names))}; "
                              "each is changed once, and tied matrices are one.")  # fmt: skip

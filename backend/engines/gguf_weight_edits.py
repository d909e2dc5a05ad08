"""Weights of a GGUF model changed where llama.cpp keeps them, and put back: only the blocks concerned are read, rewritten and restored.

    StoredTensors   the file's tensors in llama.cpp's memory, found as the sources of the graph's nodes
    perturbed       the changes of a WeightChange, written for the length of a block
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend.engines.ggml import Tensor, can_dequantize, read_bytes, type_traits, write_bytes
from backend.engines.ggml_codes import code_bits, flipped, rewritten, values_of
from backend.engines.weight_edits import WeightChange, Written, check_change, check_each_once
from backend.errors import LayerscopeError
from backend.files.ggml_types import GGML_TYPES
from backend.weights import Weight, Weights

_GAP = 64  # blocks that are carried along between two that are changed, so that a pruned matrix is a few copies and not thousands
_AT_ONCE = 1 << 18  # entries of the blocks that are worked on together
_TYPE_IDS = {name: number for number, (name, _, _) in GGML_TYPES.items()}

Undo = list[tuple[Tensor, int, NDArray[np.uint8]]]  # tensor, offset, bytes that were there


class StoredTensors:
    """Where llama.cpp keeps the file's tensors. `note` is given the address of every node of a graph.

    A tensor may lie in two places: a matrix that is embedding and unembedding, where the first layer and the last are on different devices.
    """

    def __init__(self, weights: Weights) -> None:
        self._names = frozenset(weights.native_names)
        self._found: dict[str, dict[int, Tensor]] = {}

    def note(self, address: int) -> None:
        for source in Tensor.from_address(address).src:
            if source:
                tensor = source.contents
                tensor = tensor.view_src.contents if tensor.view_src else tensor
                name = tensor.name.decode("utf-8", "replace")
                if name in self._names:
                    self._found.setdefault(name, {})[int(tensor.data or 0)] = tensor

    def of(self, weight: Weight) -> list[Tensor]:
        """Every copy of the tensor that stores `weight`. Raises LayerscopeError where no node takes it, or it lies otherwise than in the file."""
        name, type_id = weight.native[0], type_of(weight)
        tensors = list(self._found.get(name, {}).values())
        if not tensors:
            raise LayerscopeError(f"{weight.name} cannot be changed: no node of the graph takes the tensor {name}.")
        for tensor in tensors:
            if tensor.type != type_id or tensor.nb[0] != type_traits(type_id)[2]:
                raise LayerscopeError(f"{weight.name} cannot be changed: llama.cpp keeps {name} as {type_traits(tensor.type)[0]}, and the file as {weight.dtype}.")
        return tensors


@dataclass
class _Part:
    """One change, resolved: its weight, and where its entries are stored (flat, in the native tensor)."""

    change: WeightChange
    weight: Weight
    places: NDArray[np.int64]

    @property
    def n(self) -> int:
        return len(self.places)


def type_of(weight: Weight) -> int:
    """ggml's type of a stored weight. Raises LayerscopeError for one that has no numbers."""
    type_id = _TYPE_IDS[weight.dtype]
    if not can_dequantize(type_id):
        raise LayerscopeError(f"{weight.name} is stored as {weight.dtype}, which ggml cannot convert to float32.")
    return type_id


@contextmanager
def perturbed(weights: Weights, stored: StoredTensors, changes: Sequence[WeightChange], is_open: Callable[[], bool]) -> Iterator[tuple[Written, ...]]:
    """See EditsWeights.perturbed. is_open: whether the model is still in memory when the block ends; if it is not, there is nothing to put back."""
    parts = [_resolved(weights, change) for change in changes]
    by_tensor: dict[str, list[int]] = {}
    for i, part in enumerate(parts):
        by_tensor.setdefault(part.weight.native[0], []).append(i)
    for group in by_tensor.values():
        stored.of(parts[group[0]].weight)
        check_each_once(np.concatenate([parts[i].places for i in group]), [parts[i].change.name for i in group])
    undo: Undo = []
    written: dict[int, Written] = {}
    try:
        for group in by_tensor.values():
            written |= zip(group, _write([parts[i] for i in group], stored, undo), strict=True)
        yield tuple(written[i] for i in range(len(parts)))
    finally:
        if is_open():
            for tensor, offset, raw in reversed(undo):
                write_bytes(tensor, offset, raw)


def _resolved(weights: Weights, change: WeightChange) -> _Part:
    weight = weights.lazy(change.name)
    check_change(change, weight.size, code_bits(type_of(weight)), weight.dtype)
    return _Part(change, weight, weight.places(change.at))


@dataclass
class _Entries:
    """The entries of one stored tensor that change, ordered by block. All (n,): block, place in it, value as it shall be stored, bit (-1: a value), change."""

    block: NDArray[np.int64]
    entry: NDArray[np.int64]
    wanted: NDArray[np.float32]
    bit: NDArray[np.int64]
    owner: NDArray[np.int64]
    order: NDArray[np.int64]  # where each stands among the entries of all changes, one change after the other

    @classmethod
    def of(cls, parts: list[_Part], n_values: int) -> _Entries:
        block, entry = np.divmod(np.concatenate([part.places for part in parts]), n_values)
        wanted = [np.zeros(part.n, np.float32) if part.change.values is None else part.change.values - np.float32(part.weight.plus) for part in parts]
        counts = [part.n for part in parts]
        bit = np.repeat([-1 if part.change.bit is None else part.change.bit for part in parts], counts)
        order = np.argsort(block, kind="stable")
        return cls(block[order], entry[order], np.concatenate(wanted)[order], bit[order], np.repeat(np.arange(len(parts)), counts)[order], order)

    def pieces(self, n_blocks: int) -> Iterator[tuple[NDArray[np.int64], slice, NDArray[np.int64]]]:
        """(blocks, which entries are in them, each one's place among the blocks), at most `n_blocks` at a time."""
        begins = np.flatnonzero(np.diff(self.block, prepend=-1))
        touched, ends = self.block[begins], np.append(begins[1:], len(self.block))
        for start in range(0, len(touched), n_blocks):
            blocks = touched[start : start + n_blocks]
            here = slice(begins[start], ends[start + len(blocks) - 1])
            yield blocks, here, np.searchsorted(blocks, self.block[here])


def _write(parts: list[_Part], stored: StoredTensors, undo: Undo) -> list[Written]:
    """Change the entries of one stored tensor. Others of a block that several changes share are counted once, with the first of them."""
    tensors, type_id = stored.of(parts[0].weight), type_of(parts[0].weight)
    n_values = type_traits(type_id)[1]
    entries = _Entries.of(parts, n_values)
    before, after = np.empty(len(entries.order), np.float32), np.empty(len(entries.order), np.float32)
    n_others, worst = np.zeros(len(parts), np.int64), np.zeros(len(parts), np.float32)
    for blocks, here, block in entries.pieces(max(1, _AT_ONCE // n_values)):
        entry, owner = entries.entry[here], entries.owner[here]
        change = _Changing(type_id, block, entry, entries.wanted[here], entries.bit[here])
        was, now = _exchange(tensors, blocks, change, undo)
        before[entries.order[here]], after[entries.order[here]] = was[block, entry], now[block, entry]
        with np.errstate(invalid="ignore"):
            moved = np.where(was == now, np.float32(0), np.abs(now - was))
        moved[block, entry] = 0
        first = np.full(len(blocks), len(parts))
        np.minimum.at(first, block, owner)
        np.add.at(n_others, first, np.count_nonzero(moved, axis=1))
        np.maximum.at(worst, first, moved.max(1))
    ends = np.cumsum([part.n for part in parts])
    return [_report(part, before[end - part.n : end], after[end - part.n : end], int(n_others[i]), float(worst[i])) for i, (part, end) in enumerate(zip(parts, ends, strict=True))]


def _report(part: _Part, before: NDArray[np.float32], after: NDArray[np.float32], n_others: int, worst: float) -> Written:
    if part.weight.plus:  # 0 would turn -0.0 into 0.0
        before, after = before + np.float32(part.weight.plus), after + np.float32(part.weight.plus)
    return Written(part.change.name, before, after if part.change.values is None else part.change.values, after, n_others, worst, part.weight.dtype)


@dataclass(frozen=True)
class _Changing:
    """What becomes of some blocks."""

    type_id: int
    block: NDArray[np.int64]
    entry: NDArray[np.int64]
    wanted: NDArray[np.float32]
    bit: NDArray[np.int64]

    def __call__(self, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Values first, since a block that is quantized anew gets other codes; then flipped bits."""
        valued, bits = self.bit < 0, self.bit >= 0
        if valued.any():
            blocks = rewritten(self.type_id, blocks, self.block[valued], self.entry[valued], self.wanted[valued])
        if bits.any():
            blocks = flipped(self.type_id, blocks, self.block[bits], self.entry[bits], self.bit[bits])
        return blocks


def _exchange(tensors: list[Tensor], blocks: NDArray[np.int64], change: _Changing, undo: Undo) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read ascending `blocks`, change them, write them into every copy of the tensor; what was there is added to `undo` first.

    Returns their values before and after, (block, entry).
    """
    n_bytes = type_traits(change.type_id)[2]
    spans = _spans(blocks)
    raw = [read_bytes(tensors[0], first * n_bytes, n * n_bytes).reshape(n, n_bytes) for first, n in spans]
    whole = np.concatenate(raw)
    mine = np.searchsorted(np.concatenate([np.arange(first, first + n) for first, n in spans]), blocks)
    before = whole[mine]
    after = change(before)
    whole[mine] = after
    starts = np.cumsum([0] + [n for _, n in spans])
    for tensor in tensors:
        undo += [(tensor, first * n_bytes, span) for (first, _), span in zip(spans, raw, strict=True)]
        for (first, n), start in zip(spans, starts[:-1], strict=True):
            write_bytes(tensor, first * n_bytes, whole[start : start + n])
    return values_of(change.type_id, before), values_of(change.type_id, after)


def _spans(blocks: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(first, count) of the stretches that hold ascending `blocks`, those with small gaps taken together."""
    runs = np.split(blocks, np.flatnonzero(np.diff(blocks) > _GAP) + 1)
    return [(int(run[0]), int(run[-1] - run[0] + 1)) for run in runs]

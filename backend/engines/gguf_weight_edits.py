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


def _write(parts: list[_Part], stored: StoredTensors, undo: Undo) -> list[Written]:
    """Change the entries of one stored tensor; what was there is added to `undo` before anything is written."""
    tensors, type_id = stored.of(parts[0].weight), type_of(parts[0].weight)
    _, n_values, n_bytes = type_traits(type_id)
    places = np.concatenate([part.places for part in parts])
    block_of, entry = np.divmod(places, n_values)
    touched, block = np.unique(block_of, return_inverse=True)
    spans = _spans(touched)
    raw = [read_bytes(tensors[0], first * n_bytes, n * n_bytes) for first, n in spans]
    before = np.concatenate([span.reshape(-1, n_bytes) for span in raw]) if raw else np.zeros((0, n_bytes), np.uint8)
    rows = np.concatenate([np.arange(first, first + n) for first, n in spans]) if spans else touched
    changed = np.searchsorted(rows, touched)
    blocks = _changed(type_id, before[changed], block, entry, parts)
    after = before.copy()
    after[changed] = blocks
    undo += [(tensor, first * n_bytes, span) for tensor in tensors for (first, _), span in zip(spans, raw, strict=True)]
    for tensor in tensors:
        at = 0
        for first, n in spans:
            write_bytes(tensor, first * n_bytes, after[at : at + n])
            at += n
    return _reports(parts, block, entry, values_of(type_id, before[changed]), values_of(type_id, blocks))


def _changed(type_id: int, blocks: NDArray[np.uint8], block: NDArray[np.int64], entry: NDArray[np.int64], parts: list[_Part]) -> NDArray[np.uint8]:
    """The blocks after every change: values first, since a block that is quantized anew gets other codes, then flipped bits."""
    ends = np.cumsum([part.n for part in parts])
    slices = [slice(end - part.n, end) for end, part in zip(ends, parts, strict=True)]
    valued = [(part.change.values - np.float32(part.weight.plus), here) for part, here in zip(parts, slices, strict=True) if part.change.values is not None]
    if valued:
        at = np.concatenate([np.arange(here.start, here.stop) for _, here in valued])
        wanted = np.concatenate([values for values, _ in valued])
        order = np.argsort(block[at], kind="stable")
        blocks = rewritten(type_id, blocks, block[at][order], entry[at][order], wanted[order])
    for part, here in zip(parts, slices, strict=True):
        if part.change.bit is not None:
            blocks = flipped(type_id, blocks, block[here], entry[here], part.change.bit)
    return blocks


def _reports(parts: list[_Part], block: NDArray[np.int64], entry: NDArray[np.int64], before: NDArray[np.float32], after: NDArray[np.float32]) -> list[Written]:
    """What became of each change. Others of a block that several changes share are counted once, with the first of them."""
    with np.errstate(invalid="ignore"):
        moved = np.where(before == after, np.float32(0), np.abs(after - before))
    moved[block, entry] = 0
    owner = np.full(len(before), len(parts))
    np.minimum.at(owner, block, np.repeat(np.arange(len(parts)), [part.n for part in parts]))
    reports, start = [], 0
    for i, part in enumerate(parts):
        here = slice(start, start + part.n)
        start += part.n
        of_block = moved[owner == i]
        was, now = (values[block[here], entry[here]] for values in (before, after))
        if part.weight.plus:  # 0 would turn -0.0 into 0.0
            was, now = was + np.float32(part.weight.plus), now + np.float32(part.weight.plus)
        wanted = now if part.change.values is None else part.change.values
        reports.append(Written(part.change.name, was, wanted, now, int(np.count_nonzero(of_block)), float(of_block.max(initial=0.0)), part.weight.dtype))
    return reports


def _spans(blocks: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(first, count) of the stretches that hold ascending `blocks`, those with small gaps taken together."""
    runs = np.split(blocks, np.flatnonzero(np.diff(blocks) > _GAP) + 1) if len(blocks) else []
    return [(int(run[0]), int(run[-1] - run[0] + 1)) for run in runs]

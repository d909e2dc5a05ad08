"""The way from a canonical weight name to the parameters that hold it: read as a float32 copy, or changed where it is and put back.

    find        a canonical weight in a loaded model
    perturbed   the changes of a WeightChange, written for the length of a block
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.engines.hf_architecture import Architecture, Weight
from backend.engines.hf_placement import PACKED
from backend.engines.hf_taps import has_module, to_numpy
from backend.engines.weight_edits import WeightChange, Written, check_change, check_each_once
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo
from backend.weight_names import section_rows

_UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Found:
    """A canonical weight in memory. parts: its values as views of the parameters, (out, in), one for each entry of the axis `each` or a single one.

    rows: which of the part's rows are the weight's; None: all, in order. parameters: what the parts are views of.
    """

    name: str
    entry: Weight
    parts: tuple[Any, ...]
    rows: NDArray[np.int64] | None
    parameters: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.parts[0].shape)
        return (len(self.parts), *shape) if self.entry.each else shape if self.rows is None else (len(self.rows), *shape[1:])

    @property
    def storage(self) -> str:
        return str(self.parts[0].dtype).removeprefix("torch.")

    @property
    def code_bits(self) -> int:
        return 8 * int(self.parts[0].element_size())

    def read(self, rows: NDArray[np.int64] | None) -> NDArray[np.float32]:
        """A float32 copy, of its first axis `rows` only."""
        tensor = self._joined(self.parts)
        tensor = tensor if rows is None else tensor[rows.tolist()]
        plus = self.entry.plus
        return to_numpy(tensor) + np.float32(plus) if plus else np.ascontiguousarray(to_numpy(tensor)).copy()

    def of(self, tensors: Sequence[Any]) -> Any:
        """What belongs to this weight in `tensors` of the shapes of its parameters, as their gradients: (out, in), or with the axis `each` before them."""
        return self._joined([_view(tensor, self.entry) for tensor in tensors])

    def _joined(self, parts: Sequence[Any]) -> Any:
        import torch

        tensor = torch.stack(tuple(parts)) if self.entry.each else parts[0]
        return tensor if self.rows is None else tensor[self.rows]


def find(model: Any, row: Architecture, info: ModelInfo, name: str) -> Found:
    """Raises LayerscopeError for a name that the model does not have, and for values that are packed or not in memory."""
    block, _, rest = name.removeprefix("blocks.").partition(".") if name.startswith("blocks.") else ("", "", "")
    entry = row.weights.get(f"blocks.{{}}.{rest}" if rest else name)
    if entry is None or (rest and not (block.isdecimal() and int(block) < info.n_layers)):
        raise LayerscopeError(f"{info.name} has no weight {name[:80]!r}.")
    n_each = info.dims[entry.each] if entry.each else 1
    tensors = [_parameter(model, entry.parameter.format(block, i)) for i in range(n_each)]
    if any(tensor is None for tensor in tensors):
        raise LayerscopeError(f"{info.name} has no weight {name[:80]!r}.")
    if any(tensor.is_meta or not tensor.is_floating_point() for tensor in tensors):
        why = "it is not in memory" if any(tensor.is_meta for tensor in tensors) else PACKED
        raise LayerscopeError(f"Weight {name[:80]!r} of {info.name} can be neither handed out nor changed: {why}.")
    parts = tuple(_view(tensor.detach(), entry) for tensor in tensors)
    return Found(name, entry, parts, section_rows(entry.section, info, len(parts[0])) if entry.section else None, tuple(tensors))


def _parameter(model: Any, path: str) -> Any:
    """A parameter or buffer by its path, or None where the model has none there."""
    module, _, parameter = path.rpartition(".")
    return getattr(model.get_submodule(module), parameter, None) if has_module(model, module) else None


def _view(tensor: Any, entry: Weight) -> Any:
    """The part of a parameter that the row of the table says, still its memory."""
    if entry.step:
        tensor = tensor[..., entry.step[0] :: entry.step[1]]
    if entry.transposed:
        tensor = tensor.mT
    return tensor if entry.half is None else tensor.chunk(2, dim=-2)[entry.half]


@contextmanager
def perturbed(found: Sequence[Found], changes: Sequence[WeightChange]) -> Iterator[tuple[Written, ...]]:
    """See EditsWeights.perturbed. found: the weight of each change."""
    for weight, change in zip(found, changes, strict=True):
        check_change(change, int(np.prod(weight.shape)), weight.code_bits, weight.storage)
    pieces = [_located(weight, change.at) for weight, change in zip(found, changes, strict=True)]
    addresses = [piece.addresses for of_change in pieces for piece in of_change]
    check_each_once(np.concatenate(addresses) if addresses else np.zeros(0, np.int64), [change.name for change in changes])
    undo: list[tuple[_Piece, Any]] = []
    try:
        written = []
        for weight, change, of_change in zip(found, changes, pieces, strict=True):
            undo += [(piece, piece.stored()) for piece in of_change]
            written.append(_write(weight, change, of_change))
        yield tuple(written)
    finally:
        for piece, bits in reversed(undo):
            piece.put(bits)


@dataclass(frozen=True)
class _Piece:
    """Entries of one part of a weight. where: which of the change's entries they are; index: their places in the part, one array an axis."""

    part: Any
    where: NDArray[np.int64]
    index: tuple[NDArray[np.int64], ...]

    @property
    def addresses(self) -> NDArray[np.int64]:
        """Where each lies in memory: the same for one that is reached by two names."""
        steps = sum((at * stride for at, stride in zip(self.index, self.part.stride(), strict=True)), np.zeros(len(self.where), np.int64))
        return self.part.data_ptr() + steps * self.part.element_size()

    def stored(self) -> NDArray[Any]:
        """Their bits as unsigned integers, copied."""
        return self._bits()[self._places()].cpu().numpy().view(_UINTS[self.part.element_size()])

    def put(self, bits: NDArray[Any]) -> None:
        import torch

        ints = self._bits()
        ints[self._places()] = torch.from_numpy(bits.view(f"i{bits.itemsize}")).to(ints.device)

    def encoded(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """The bits of `values` rounded to the part's dtype, the largest finite number for what is beyond it."""
        import torch

        limit = torch.finfo(self.part.dtype).max
        rounded = torch.from_numpy(values).clamp(-limit, limit).to(self.part.dtype)
        return rounded.view(_int_of(self.part)).numpy().view(_UINTS[self.part.element_size()])

    def decoded(self, bits: NDArray[Any]) -> NDArray[np.float32]:
        import torch

        return to_numpy(torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(self.part.dtype))

    def _bits(self) -> Any:
        return self.part.view(_int_of(self.part))

    def _places(self) -> tuple[Any, ...]:
        import torch

        return tuple(torch.from_numpy(at).to(self.part.device) for at in self.index)


def _int_of(part: Any) -> Any:
    import torch

    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[part.element_size()]


def _located(weight: Found, at: NDArray[np.int64]) -> list[_Piece]:
    """The entries at the places `at` of the canonical weight, part by part."""
    index = tuple(np.asarray(axis, np.int64) for axis in np.unravel_index(at, weight.shape))
    if weight.rows is not None:
        index = (weight.rows[index[0]], *index[1:])
    if not weight.entry.each:
        return [_Piece(weight.parts[0], np.arange(len(at)), index)]
    owned = [(part, np.flatnonzero(index[0] == i)) for i, part in enumerate(weight.parts)]
    return [_Piece(part, where, tuple(axis[where] for axis in index[1:])) for part, where in owned if len(where)]


def _write(weight: Found, change: WeightChange, pieces: list[_Piece]) -> Written:
    """Change the entries of one weight. Nothing else changes with them: every entry has its own place."""
    plus = np.float32(weight.entry.plus)
    before, after = np.zeros(len(change.at), np.float32), np.zeros(len(change.at), np.float32)
    for piece in pieces:
        old = piece.stored()
        if change.values is not None:
            new = piece.encoded(change.values[piece.where] - plus)
        else:
            new = old ^ old.dtype.type(1 << (change.bit or 0))
        before[piece.where], after[piece.where] = piece.decoded(old), piece.decoded(new)
        piece.put(new)
    if plus:  # 0 would turn -0.0 into 0.0
        before, after = before + plus, after + plus
    return Written(change.name, before, after if change.values is None else change.values, after, 0, 0.0, weight.storage)

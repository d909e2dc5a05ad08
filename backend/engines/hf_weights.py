"""Canonical weights as parameters of a PyTorch model: which parameters one lies in, and its place in them. No torch before it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from backend.engines.hf_architecture import Architecture, Weight
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo
from backend.weight_names import section_rows

if TYPE_CHECKING:
    from torch import Tensor


def located(row: Architecture, info: ModelInfo, name: str) -> tuple[Weight, list[str]]:
    """(entry of the table, paths of its parameters) of a canonical name. Raises LayerscopeError for a name that the architecture does not have."""
    block, _, rest = name.removeprefix("blocks.").partition(".") if name.startswith("blocks.") else ("", "", "")
    entry = row.weights.get(f"blocks.{{}}.{rest}" if rest else name)
    if entry is None or (rest and not (block.isdecimal() and int(block) < info.n_layers)):
        raise LayerscopeError(f"{info.name} has no weight {name[:80]!r}.")
    return entry, [entry.parameter.format(block, i) for i in range(info.dims[entry.each] if entry.each else 1)]


def canonical(entry: Weight, tensors: Sequence[Tensor], info: ModelInfo) -> Tensor:
    """(out, in), or (expert, out, in), of what lies in the parameters of `entry`: their values, or anything else of their shapes, as gradients.

    What `entry.plus` adds to values is left to the caller. A view where the order allows one.
    """
    import torch

    tensor = torch.stack(list(tensors)) if entry.each else tensors[0]
    if entry.step:
        tensor = tensor[..., entry.step[0] :: entry.step[1]]
    if entry.transposed:
        tensor = tensor.mT
    if entry.half is not None:
        tensor = tensor.chunk(2, dim=-2)[entry.half]
    if entry.section:
        tensor = tensor[section_rows(entry.section, info, len(tensor))]
    return tensor

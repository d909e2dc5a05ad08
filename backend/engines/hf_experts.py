"""What each expert adds, out of modules of transformers that compute all experts at once and put out their sum.

An experts module takes hidden states (row, d_model), indices and weights (row, k), and returns (row, d_model). Called once more with each
pair of a token and one of its experts as a row of its own, and k = 1, the same code on the same weights puts out what that expert
adds to that token. The model goes on with its own sum, bit for bit, unless the site is edited: then with the sum of what was edited.
So a layer whose `expert_out` nobody asks for costs nothing, and one that is asked for computes its experts twice, (pos * k, d_model) more in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from backend.engines import Where
from backend.engines.hf_architecture import Experts, GatedExpert

if TYPE_CHECKING:
    from torch import Tensor, nn

    from backend.engines.hf_taps import Tap


def hang_experts(model: nn.Module, tap: Tap, experts: Experts, layer: int, places: Collection[Where]) -> list[Any]:
    """The hooks of one layer's `expert_out`, where it is touched. The router's hook has put the best expert first before this one runs."""
    if ("expert_out", layer) not in places or not tap.touches("expert_out", layer):
        return []
    name = experts.module.format(layer)
    factor = float(getattr(model.config, experts.times)) if experts.times else 1.0

    def on_output(module: nn.Module, args: tuple[Tensor, Tensor, Tensor], output: Tensor) -> Tensor | None:
        hidden, indices, weights = args
        n, k = indices.shape
        # `forward`, not a call: a call would come back here.
        each = module.forward(hidden.repeat_interleave(k, dim=0), indices.reshape(-1, 1), weights.reshape(-1, 1)).reshape(n, k, -1)
        changed = tap.through("expert_out", layer, each if factor == 1.0 else each * factor, f"{name}, each expert")
        return None if changed is None else (changed.sum(dim=1) / factor).to(output.dtype)

    return [model.get_submodule(name).register_forward_hook(on_output)]


def hang_gated(model: nn.Module, tap: Tap, shared: GatedExpert, layer: int, places: Collection[Where]) -> list[Any]:
    """The hooks of `shared_expert_out` where the block multiplies it with the sigmoid of a gate: the product is no module's output."""
    if ("shared_expert_out", layer) not in places or not tap.touches("shared_expert_out", layer):
        return []
    name, gate = shared.module.format(layer), shared.gate.format(layer)
    held: list[Tensor] = []

    def on_expert(module: nn.Module, args: Any, output: Tensor) -> None:
        held[:] = [output]

    def on_gate(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        import torch

        ungated = held.pop()
        changed = tap.through("shared_expert_out", layer, torch.sigmoid(output) * ungated, f"sigmoid({gate}) * {name}")
        if changed is None:
            return None
        ungated.copy_(changed)  # the block multiplies this with the sigmoid of what is returned here: 1
        return torch.full_like(output, float("inf"))

    return [model.get_submodule(name).register_forward_hook(on_expert), model.get_submodule(gate).register_forward_hook(on_gate)]


@contextmanager
def one_by_one(model: Any) -> Iterator[None]:
    """Let transformers compute each expert in products of its own, with its slice of the weights, for the length of a `with`."""
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)

"""The instruments of one run of a PyTorch model: a Tap edits and hands out values, `installed` hangs it into the model.

`installed` is a context manager: whatever happens inside (a full disk in the sink, a cancel, a bug), every hook is gone when
it ends, and the model answers as before to the bit. A value goes through in one place only, `Tap.through`: first the edits,
then the sink, so what is handed out is what the rest of the model sees. Nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backend.engines import Piece, Request, ShouldStop, Sink, Where
from backend.engines.hf_architecture import Architecture, Place, Router
from backend.engines.hf_experts import hang_experts, hang_gated
from backend.engines.hf_router import best_first, probabilities, reroute
from backend.errors import Cancelled
from backend.intervention import Intervention, apply, edits_by_place
from backend.model_info import ModelInfo
from backend.sites import SITES
from backend.weight_names import section

if TYPE_CHECKING:
    from torch import Tensor, nn

TAP = "layerscope_tap"  # the attribute of an attention module under which hf_attention finds the run it belongs to


class Tap:
    """What one run captures and edits. `start` is the position of the first token of the piece that runs now.

    steady: the model is known to write into nothing that it has handed out. An edit is written in place and may reach what came before it.
    """

    def __init__(self, info: ModelInfo, request: Request, sink: Sink, edits: tuple[Intervention, ...], should_stop: ShouldStop, n_tokens: int, steady: bool = False) -> None:
        self.info, self.request, self.sink, self.should_stop, self.n_tokens = info, request, sink, should_stop, n_tokens
        self.steady = steady and not edits
        self.edits = edits_by_place(edits)
        self.start = 0

    def touches(self, site: str, layer: int | None, n: int = 1) -> bool:
        """Whether the site is edited, or anything of it wanted of the `n` positions that run now."""
        return self.edited(site, layer) or self.request.wants(site, layer, self.start, n)

    def edited(self, site: str, layer: int | None) -> bool:
        return (site, layer) in self.edits

    def through(self, site: str, layer: int | None, tensor: Tensor, source: str, valid: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """Edit one value and hand it out; returns the new tensor where an edit changed it, else None.

        tensor: the site's dims. `valid` restores what no edit may break (the causal mask) before the value is handed out.
        """
        changed = None
        if self.edited(site, layer):
            values = to_numpy(tensor)
            for edit in self.edits[site, layer]:
                values = apply(edit, values, self.start, self.n_tokens)
            changed = _to_tensor(values, tensor)
            changed = valid(changed) if valid else changed
        if self.request.wants(site, layer, self.start, tensor.shape[1 if SITES[site].is_attention_map else 0]):
            kept = tensor if changed is None else changed
            values = to_numpy(kept).view()
            values.flags.writeable = False  # on a CPU it is the model's own memory
            owned = values.__array_interface__["data"][0] != kept.data_ptr()
            self.sink(Piece(site, layer, self.start, values, source, owned, self.steady))
        return changed


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """float32 (int32 for integers) on the CPU; shares memory with a float32 CPU tensor."""
    import torch

    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else torch.int32).numpy()


def _to_tensor(values: NDArray[np.float32], like: Tensor) -> Tensor:
    import torch

    return torch.from_numpy(values).to(like.device, like.dtype)


def has_module(model: nn.Module, path: str) -> bool:
    """Whether the model has a module there; an attribute that the configuration left None is none."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


@contextmanager
def installed(model: nn.Module, row: Architecture, tap: Tap, places: Collection[Where]) -> Iterator[None]:
    """Hang `tap` into `model`, at those of `places` that it touches, for the length of a `with`."""
    handles: list[Any] = []
    tapped: list[nn.Module] = []
    try:
        for layer in range(tap.info.n_layers):
            handles.append(model.get_submodule(row.layer.format(layer)).register_forward_pre_hook(_stop_hook(tap)))
            if row.attends is None or layer in row.attends:
                attention = model.get_submodule(row.attention.format(layer))
                setattr(attention, TAP, tap)
                tapped.append(attention)
            if row.router and ("router_logits", layer) in places:
                name = row.router.module.format(layer)
                handles.append(model.get_submodule(name).register_forward_hook(_router_hook(tap, layer, row.router, name)))
            handles += hang_experts(model, tap, row.experts, layer, places) if row.experts else []
            handles += hang_gated(model, tap, row.shared, layer, places) if row.shared else []
        for site, place in row.places.items():
            for at in range(tap.info.n_layers) if SITES[site].per_layer else (None,):
                if (site, at) in places and (tap.touches(site, at) or (place.collected and site in tap.request.sites)):
                    handles.append(_hang(model, tap, site, at, place))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in tapped:
            delattr(attention, TAP)


def _stop_hook(tap: Tap) -> Callable[..., None]:
    def stop_between_layers(module: nn.Module, args: Any) -> None:
        if tap.should_stop():
            raise Cancelled

    return stop_between_layers


def _hang(model: nn.Module, tap: Tap, site: str, layer: int | None, place: Place) -> Any:
    name = next(path for path in place.paths(layer) if has_module(model, path))
    module = model.get_submodule(name)
    columns = section(place.section, tap.info) if place.section else slice(None)
    factor = float(getattr(model.config, place.times)) if place.times else 1.0

    def through(value: Tensor) -> Tensor | None:
        """value: (1, pos, ...) as the module has it."""
        mine = value[0][:, columns] if factor == 1.0 else value[0] * factor
        rows = mine.reshape(len(mine), -1, tap.info.d_head) if place.heads else mine
        changed = tap.through(site, layer, rows, f"{name or 'model'}.{place.side}")
        if changed is None or not place.section:
            return None if changed is None else changed.reshape(value.shape) / factor
        value = value.clone()
        value[0][:, columns] = changed.reshape(mine.shape)
        return value

    def on_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        changed = through(args[0])
        if changed is not None:
            args[0].copy_(changed)

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        if place.part is None:
            return through(output)
        changed = through(output[place.part])
        if place.collected:  # else one map a layer would stay in memory until the end of the pass
            changed = output[place.part].new_empty(0)
        if changed is None:
            return None
        if isinstance(output, tuple):
            return tuple(changed if i == place.part else item for i, item in enumerate(output))
        output[place.part] = changed
        return output

    return module.register_forward_pre_hook(on_input) if place.side == "input" else module.register_forward_hook(on_output)


def _router_hook(tap: Tap, layer: int, router: Router, name: str) -> Callable[..., Any]:
    """The four router sites are one computation: an edit of an early one must reach the later ones, so they are recomputed."""

    def on_route(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = output
        changed = tap.through("router_logits", layer, logits, name)
        logits = logits if changed is None else changed
        scores = probabilities(router, logits)
        rerouted = tap.through("router_probs", layer, scores, f"{router.probs}({name})") if "router_probs" in router.sites else None
        if changed is None and rerouted is None:
            weights, indices = best_first(router, module, scores, weights, indices)
        else:
            rerouted_weights, indices = reroute(router, module, scores if rerouted is None else rerouted, indices.shape[-1])
            weights = rerouted_weights.to(weights.dtype)
        tap.through("expert_indices", layer, indices, name)
        reweighted = tap.through("expert_weights", layer, weights, name)
        return logits, weights if reweighted is None else reweighted, indices

    return on_route

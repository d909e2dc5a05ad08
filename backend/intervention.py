"""Intervention: one edit of one site while the model runs, and how it applies to an array.

Both engines hand the site's array, in the dims of `sites.SITES`, to `apply`; so zero, mean, set, add, scale, noise and mask mean
the same thing in a PyTorch module and inside llama.cpp's graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from backend.errors import LayerscopeError
from backend.model_info import ModelInfo
from backend.sites import SITES, resolve_site

Op = Literal["zero", "mean", "set", "add", "scale", "noise", "mask"]
OPS: tuple[str, ...] = get_args(Op)

# Integers that index experts, and sites computed only on reading, cannot be changed in a running model. resid_pre can: it is the
# previous layer's resid_post (layer 0: embed).
NOT_EDITABLE = ("expert_indices", "result")


@dataclass(frozen=True, eq=False)
class Intervention:
    """Edit `site` at `layer` by `op`, restricted to heads, positions and dimensions where given.

    op      what happens to the selected values x
    zero    0
    mean    `value` if given (an array that broadcasts to the selection), else the mean of x over the selected positions
    set     `value` (a number, or an array that broadcasts to the selection)
    add     x + value
    scale   x * value
    noise   x + value * standard normal noise, from `seed` and the position
    mask    -inf, for router_logits and router_probs: the experts `dim` are not chosen any more

    `head` selects along the head axis (kv heads for k, v), `pos` along positions (query positions for attention maps; negative
    counts from the end of the prompt), `dim` along the last axis. None selects all. Attention maps are not renormalised after an edit.
    """

    site: str
    layer: int | None
    op: Op
    value: Any = None
    head: int | tuple[int, ...] | None = None
    pos: int | tuple[int, ...] | None = None
    dim: int | tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        site, layer = resolve_site(self.site)
        object.__setattr__(self, "site", site)
        if layer is not None:
            object.__setattr__(self, "layer", layer)
        if self.op not in OPS:
            raise LayerscopeError(f"There is no edit {self.op!r}; edits are {', '.join(OPS)}.")
        if site in NOT_EDITABLE:
            raise LayerscopeError(f"Site {site!r} cannot be edited; edit the values it is computed from.")
        if self.op == "mask" and (site not in ("router_logits", "router_probs") or self.dim is None):
            raise LayerscopeError(f"Edit 'mask' takes experts out of the choice of a router: it is for router_logits and router_probs, with experts as dim, not for {site!r}.")
        if self.op in ("set", "add", "scale", "noise") and self.value is None:
            raise LayerscopeError(f"Edit {self.op!r} of {site!r} needs a value.")
        if not SITES[site].per_layer:
            object.__setattr__(self, "layer", None)
        elif self.layer is None:
            raise LayerscopeError(f"Site {site!r} exists in every layer; name the layer to edit.")

    @property
    def spans_positions(self) -> bool:
        """Whether the edit means something else when the prompt arrives in pieces, so that it has to run whole."""
        site, shape = SITES[self.site], np.shape(self.value)
        if site.is_attention_map or (self.op == "mean" and self.value is None):
            return True
        if "pos" not in site.dims:
            return False
        from_right = len(site.dims) - site.dims.index("pos")
        return len(shape) >= from_right and shape[-from_right] != 1

    def check(self, info: ModelInfo, n_tokens: int) -> None:
        """Raise LayerscopeError, with the value and the limit, if layer, head, pos or dim lie outside the model or the prompt."""
        site = SITES[self.site]
        if self.layer is not None and not 0 <= self.layer < info.n_layers:
            raise LayerscopeError(f"Layer {self.layer} of an edit is outside 0-{info.n_layers - 1} of {info.name}.")
        head_axis = next((d for d in site.dims if d in ("head", "kv_head")), None)
        if self.head is not None:
            if head_axis is None:
                raise LayerscopeError(f"Site {self.site!r} has no heads to select.")
            _check_range("Head", _tuple(self.head), info.dims[head_axis], 0)
        _check_range("Position", _tuple(self.pos), n_tokens, -n_tokens)
        size = n_tokens if site.dims[-1] == "k_pos" else info.dims[site.dims[-1]]
        _check_range("Expert" if site.dims[-1] == "expert" else "Dimension", _tuple(self.dim), size, 0)
        if self.op == "mask" and info.n_experts - len(set(_tuple(self.dim))) < info.n_experts_used:
            left, needed = info.n_experts - len(set(_tuple(self.dim))), info.n_experts_used
            raise LayerscopeError(f"{left} of {info.n_experts} experts are left in layer {self.layer}, and each token needs {needed}: mask {info.n_experts - needed} at most.")

    def from_prompt_end(self, n_prompt: int) -> Intervention:
        """The same edit with negative positions counted from the end of the prompt, whatever is generated after it."""
        if self.pos is None:
            return self
        pos = tuple(p + n_prompt if p < 0 else p for p in _tuple(self.pos))
        return dataclasses.replace(self, pos=pos[0] if isinstance(self.pos, int) else pos)

    def to_json(self) -> dict[str, Any]:
        """A record for the trace; an array value is summarised by shape and norm, not stored."""
        value = self.value
        if isinstance(value, np.ndarray) and value.ndim:
            value = {"shape": list(value.shape), "l2_norm": float(np.linalg.norm(value))}
        record = {"site": self.site, "layer": self.layer, "op": self.op, "value": value, "head": self.head, "pos": self.pos, "dim": self.dim, "seed": self.seed}
        return {key: item for key, item in record.items() if item is not None}


def apply(edit: Intervention, values: NDArray[np.float32], start: int = 0, n_tokens: int | None = None) -> NDArray[np.float32]:
    """Return an edited copy of `values`.

    values: one layer's array in the site's dims, holding positions `start` to `start + n` of a prompt of `n_tokens`.
    A long prompt arrives in several pieces; positions outside this piece are left to the others.
    """
    dims = SITES[edit.site].dims
    pos_axis = dims.index("q_pos" if "q_pos" in dims else "pos")
    n_here = values.shape[pos_axis]
    total = n_tokens if n_tokens is not None else start + n_here
    out = np.array(values, dtype=np.float32, copy=True)
    index: list[Any] = [np.arange(size) for size in out.shape]
    if edit.pos is not None:
        wanted = [p + total if p < 0 else p for p in _tuple(edit.pos)]
        local = [p - start for p in wanted if start <= p < start + n_here]
        if not local:
            return out
        index[pos_axis] = np.array(local)
    if edit.head is not None:
        index[next(i for i, d in enumerate(dims) if d in ("head", "kv_head"))] = np.array(_tuple(edit.head))
    if edit.dim is not None:
        index[-1] = np.array(_tuple(edit.dim))
    where = np.ix_(*index)
    picked = out[where]
    if edit.op == "mean" and edit.value is None and (start or n_here < total):
        raise LayerscopeError(f"The mean over positions needs the whole prompt in one pass, but it ran in pieces of {n_here} of {total} tokens; give the mean as value.")
    out[where] = _new_values(edit, picked, pos_axis, start + index[pos_axis])
    return out


def _noise(seed: int, positions: NDArray[np.int64], shape: tuple[int, ...], pos_axis: int) -> NDArray[np.float32]:
    """Standard normal noise that depends on the seed and the position alone, however the prompt is cut into pieces."""
    rest = shape[:pos_axis] + shape[pos_axis + 1 :]
    rows = [np.random.default_rng([seed, int(p)]).standard_normal(rest, dtype=np.float32) for p in positions]
    return np.stack(rows, axis=pos_axis)


def _new_values(edit: Intervention, picked: NDArray[np.float32], pos_axis: int, positions: NDArray[np.int64]) -> NDArray[np.float32] | np.floating[Any]:
    if edit.op == "zero":
        return np.zeros_like(picked)
    if edit.op == "mask":
        return np.full_like(picked, -np.inf)
    if edit.op == "mean" and edit.value is None:
        return np.broadcast_to(picked.mean(axis=pos_axis, keepdims=True), picked.shape)
    if edit.op == "scale":
        return picked * np.float32(edit.value)
    if edit.op == "noise":
        return picked + np.float32(edit.value) * _noise(edit.seed, positions, picked.shape, pos_axis)
    try:
        value = np.broadcast_to(np.asarray(edit.value, dtype=np.float32), picked.shape)
    except ValueError:
        raise LayerscopeError(f"The value of edit {edit.op!r} has shape {np.shape(edit.value)}, which does not fit {picked.shape} at {edit.site}.") from None
    return picked + value if edit.op == "add" else value


def ablate_experts(places: Collection[tuple[str, int | None]], layer: int, experts: int | Sequence[int], pos: int | tuple[int, ...] | None = None) -> Intervention:
    """Take experts out of one layer's choice; the router chooses among the rest, and shares the weights among them where it renormalises.

    places: the engine's. The probabilities are masked where the router has any, so that a model that does not renormalise (OLMoE) keeps the
    weights of every token that had not chosen these experts. With groups of experts (DeepSeek V3) a group may lose its place with them.
    """
    site = "router_probs" if ("router_probs", layer) in places else "router_logits"
    if (site, layer) not in places:
        raise LayerscopeError(f"Layer {layer} has no router: there are no experts to take out.")
    return Intervention(site, layer, "mask", dim=_tuple(experts), pos=pos)


def edits_by_place(edits: Iterable[Intervention]) -> dict[tuple[str, int | None], list[Intervention]]:
    """Group edits by (site, layer), in the order given; resid_pre is rewritten as what it is: the previous resid_post, or embed."""
    places: dict[tuple[str, int | None], list[Intervention]] = {}
    for edit in edits:
        place: tuple[str, int | None] = (edit.site, edit.layer)
        if edit.site == "resid_pre":
            place = ("resid_post", edit.layer - 1) if edit.layer else ("embed", None)
        places.setdefault(place, []).append(edit)
    return places


def _tuple(value: int | Sequence[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (int(value),) if isinstance(value, (int, np.integer)) else tuple(int(v) for v in value)


def _check_range(what: str, values: Iterable[int], stop: int, start: int) -> None:
    for value in values:
        if not start <= value < stop:
            raise LayerscopeError(f"{what} {value} of an edit is outside {max(start, 0)}-{stop - 1}.")

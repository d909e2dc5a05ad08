"""A model type of transformers without a row in the table: the row is found in the model itself, by probing it with a few tokens.

The decoder's layers are the one list of modules with as many entries as the model has layers. What a layer puts out is resid_post if
the next layer takes it in unchanged. Attention patterns are transformers' own eager ones: where our attention function is called in
every layer that has them and makes the same pattern, it is used (with z, and with edits); where a model's attention does not go
through transformers' interface, the model runs with eager attention and its patterns are read from it. The final norm is what lies
between the last layer and W_U. Whatever fails its check is not offered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from backend.analysis.identities import relative_error, tolerances
from backend.engines import Piece, Request, never_stop, no_sink
from backend.engines.hf_architecture import Architecture, Place, finished
from backend.engines.hf_attention import NAME
from backend.engines.hf_taps import TAP, Tap, to_numpy
from backend.engines.hf_tokenizer import first_line
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

NO_ROW = "no table row: modules are found by their place in the model, meaning unverified"
NO_UNEMBED = "no module between the last layer and W_U makes this model's logits of its last layer"
_PROBE = 5  # tokens
# What transformers' model classes raise for an attention implementation, a cache or an output they do not have.
_UNSUPPORTED = (AssertionError, AttributeError, ImportError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Generic:
    """What was found. in_pieces: a prompt may run in pieces over a cache, and tokens be generated over one."""

    row: Architecture
    in_pieces: bool
    unchecked: dict[str, str]


@dataclass
class _Seen:
    """What one eager pass over the probe's tokens showed. `calls`: how often each module was called; one that was called several
    times hands out several values, and is no place of a site. Outputs of the modules inside a layer go by their path below it."""

    inputs: dict[int, Any] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    inside: dict[int, dict[str, Any]] = field(default_factory=dict)
    beside: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # modules outside the layers: (input, output)
    calls: Counter[str] = field(default_factory=Counter)
    patterns: list[Tensor] = field(default_factory=list)
    logits: Any = None


def find(model: nn.Module, info: ModelInfo) -> Generic:
    """The row of a loaded model. Raises LayerscopeError where its layers cannot be told, or nothing of them can be shown."""
    import torch

    ids = torch.tensor([[info.d_vocab * (i + 1) // (_PROBE + 2) for i in range(_PROBE)]], device=next(model.parameters()).device)
    layers = _layers(model, info)
    limits = tolerances("hf", str(model.dtype))  # type: ignore[arg-type]
    with torch.no_grad():
        try:
            model.set_attn_implementation("eager")  # type: ignore[operator]
            seen = _look(model, layers, info, ids)
        except _UNSUPPORTED as error:
            raise LayerscopeError(f"{info.name} ({info.architecture}) has no row, and a probe of it failed: {first_line(error)}.") from error
        places = _stream(seen, layers, info)
        places["logits"] = Place("", part="logits")
        row = Architecture(f"{layers}.{{}}", "", "", _path(model, model.get_output_embeddings()), places, {}, rotary=False, attends=frozenset(), attention_sites=())  # type: ignore[operator]
        row = _with_attention(model, row, info, ids, seen, limits.matmul)
        row = _with_ending(model, row, seen, limits.matmul)
        with _tapped(model, {row.attention.format(layer): _idle(info) for layer in row.attends or ()}):
            in_pieces = _runs_in_pieces(model, ids, limits.matmul)
    if set(row.places) == {"logits"} and not row.attention_sites:
        raise LayerscopeError(f"{info.name} ({info.architecture}) has no row, and neither its residual stream nor its attention can be told from its modules.")
    return Generic(row, in_pieces, {"table_row": NO_ROW} | ({} if row.final_norm else {"unembed": NO_UNEMBED}))


def _layers(model: nn.Module, info: ModelInfo) -> str:
    """The path of the decoder's layers: the one ModuleList of n_layers entries that is inside no other."""
    import torch

    lists = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    outer = {name: module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    found = [name for name, module in outer.items() if len(module) == info.n_layers]
    if len(found) != 1:
        lists_of = f"{len(found)} lists of {info.n_layers} modules that could be its layers"
        raise LayerscopeError(f"{info.name} ({info.architecture}) has no row, and {lists_of}: {', '.join(found) or 'none'}.")
    return found[0]


def _path(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _look(model: nn.Module, layers: str, info: ModelInfo, ids: Tensor) -> _Seen:
    """One eager pass, with everything noted that the checks need."""
    seen, handles = _Seen(), []

    def note(name: str) -> Any:
        below = name.removeprefix(f"{layers}.") if name.startswith(f"{layers}.") else ""
        number, _, rest = below.partition(".")

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            taken = args[0] if args else kwargs.get("hidden_states")
            seen.calls[name] += 1
            if not below:
                seen.beside[name] = (taken, output)
            elif rest:
                seen.inside.setdefault(int(number), {})[rest] = output
            else:
                seen.inputs[int(number)], seen.outputs[int(number)] = taken, output

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(note(name), with_kwargs=True))
    try:
        output = model(input_ids=ids, use_cache=False, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    seen.logits = output.logits
    seen.patterns = [pattern for pattern in getattr(output, "attentions", None) or () if pattern is not None]
    return seen


def _stream(seen: _Seen, layers: str, info: ModelInfo) -> dict[str, Place]:
    """resid_post, if every layer but the first takes in just what the one before it put out."""
    import torch

    part = 0 if isinstance(seen.outputs.get(0), tuple) else None
    streams = [seen.outputs[i] if part is None else seen.outputs[i][part] for i in range(info.n_layers) if seen.calls[f"{layers}.{i}"] == 1]
    whole = len(streams) == info.n_layers and all(isinstance(each, torch.Tensor) and each.shape == (1, _PROBE, info.d_model) for each in streams)
    if not whole or not all(_same(seen.inputs[i + 1], streams[i]) for i in range(info.n_layers - 1)):
        return {}
    return {"resid_post": Place(f"{layers}.{{}}", part=part)}


def _same(a: Any, b: Any) -> bool:
    import torch

    return isinstance(a, torch.Tensor) and a.shape == b.shape and bool(torch.equal(a, b))


def _with_attention(model: Any, row: Architecture, info: ModelInfo, ids: Tensor, seen: _Seen, limit: float) -> Architecture:
    """Attention through our function where it is called and right, else read from the modules that eager attention leaves it in."""
    if not seen.patterns or any(pattern.shape != (1, info.n_heads, _PROBE, _PROBE) for pattern in seen.patterns):
        return row
    layers = row.layer.removesuffix(".{}")
    try:
        model.set_attn_implementation(NAME)
        found, pieces, logits = _our_attention(model, layers, info, ids)
    except _UNSUPPORTED:
        found, pieces, logits = "", {}, []
    attending = sorted({layer for _, layer in pieces})
    if found and len(attending) == len(seen.patterns) and all(relative_error(each, to_numpy(seen.logits)) <= limit for each in logits):
        patterns = zip(attending, seen.patterns, strict=True)
        if all(relative_error(pieces["attn_pattern", layer], to_numpy(pattern[0])) <= limit for layer, pattern in patterns):
            sites = ("attn_pattern", "z") if all(("z", layer) in pieces for layer in attending) else ("attn_pattern",)
            return replace(row, attention=f"{row.layer}.{found}", attends=frozenset(attending), attention_sites=sites)
    model.set_attn_implementation("eager")
    place = _collected(seen, layers)
    return replace(row, places={**row.places, "attn_pattern": Place(f"{row.layer}.{place[0]}", part=place[1], collected=True)}) if place else row


def _our_attention(model: nn.Module, layers: str, info: ModelInfo, ids: Tensor) -> tuple[str, dict[tuple[str, int], Any], list[Any]]:
    """Two passes with our attention function: the path of the modules that call it, what it saw there, and the logits of a pass
    that shows the patterns and of one that goes through the fused kernel.

    The path is empty if it is not the same one in every layer, or if one layer calls the function twice.
    """
    pieces: dict[tuple[str, int], Any] = {}
    paths: dict[int, list[str]] = {}

    def tap(path: str, layer: int) -> Tap:
        def sink(piece: Piece) -> None:
            if piece.site == "attn_pattern":
                paths.setdefault(layer, []).append(path)
            if piece.site == "attn_pattern" or piece.values.shape == (_PROBE, info.n_heads, info.d_head):
                pieces[piece.site, layer] = piece.values.copy()

        return Tap(info, Request(("attn_pattern", "z")), sink, (), never_stop, _PROBE)

    with _tapped(model, {name: tap(path, layer) for name, layer, path in _numbered(model, layers)}):
        logits = [to_numpy(model(input_ids=ids, use_cache=False).logits)]
    with _tapped(model, {name: _idle(info) for name, _, _ in _numbered(model, layers)}):
        logits.append(to_numpy(model(input_ids=ids, use_cache=False).logits))
    relative = {path for found in paths.values() for path in found}
    once = all(len(found) == 1 for found in paths.values())
    return relative.pop() if once and len(relative) == 1 else "", pieces, logits


def _idle(info: ModelInfo) -> Tap:
    """A tap that looks at nothing: a soft-cap on scores needs one all the same."""
    return Tap(info, Request(()), no_sink, (), never_stop, _PROBE)


def _numbered(model: nn.Module, layers: str) -> Iterator[tuple[str, int, str]]:
    """Modules inside a layer that carry its number, which is what the attention function reads: path, layer, path below the layer."""
    for name, module in model.named_modules():
        number, _, below = name.removeprefix(f"{layers}.").partition(".")
        if name.startswith(f"{layers}.") and below and getattr(module, "layer_idx", None) == int(number):
            yield name, int(number), below


@contextmanager
def _tapped(model: nn.Module, taps: Mapping[str, Tap]) -> Iterator[None]:
    modules = {name: model.get_submodule(name) for name in taps}
    try:
        for name, module in modules.items():
            setattr(module, TAP, taps[name])
        yield
    finally:
        for module in modules.values():
            if hasattr(module, TAP):
                delattr(module, TAP)


def _collected(seen: _Seen, layers: str) -> tuple[str, int] | None:
    """(path below the layer, index) of the part of a module's output that is the layer's pattern, the same in every layer that has one."""
    found: list[set[tuple[str, int]]] = []
    patterns = iter(seen.patterns)
    for layer in sorted(seen.inside):
        tuples = [(name, output) for name, output in seen.inside[layer].items() if isinstance(output, tuple) and seen.calls[f"{layers}.{layer}.{name}"] == 1]
        parts = [(name, i, part) for name, output in tuples for i, part in enumerate(output)]
        maps = [(name, i, part) for name, i, part in parts if hasattr(part, "shape") and part.shape == seen.patterns[0].shape]
        pattern = next(patterns, None)
        if pattern is None:
            return None
        found.append({(name, i) for name, i, part in maps if _same(part, pattern)})
    common = set.intersection(*found) if found and next(patterns, None) is None else set()
    return min(common, key=lambda place: len(place[0])) if common else None


def _with_ending(model: Any, row: Architecture, seen: _Seen, limit: float) -> Architecture:
    """The final norm: the module that makes what W_U takes in of what the last layer put out; with what is done to the logits last."""
    from_last = seen.outputs.get(max(seen.outputs, default=-1))
    last = from_last[0] if isinstance(from_last, tuple) else from_last
    taken = seen.beside.get(row.unembed, (None, None))[0] if row.unembed else None
    if taken is None or "resid_post" not in row.places:
        return row
    norms = [name for name, (given, output) in seen.beside.items() if _same(given, last) and _same(output, taken) and name != row.unembed]
    if not norms:
        return row
    product_with_w_u, config = seen.beside[row.unembed][1], model.config
    for divisor, scale, cap in product(("", "logits_scaling"), ("", "logit_scale"), ("", "final_logit_softcapping")):
        keys = [getattr(config, key, None) if key else 1.0 for key in (divisor, scale, cap)]
        if not all(isinstance(value, int | float) and value for value in keys):
            continue
        ended = replace(row, final_norm=norms[-1], logit_divisor=divisor, logit_scale=scale, logit_softcap=cap)
        if relative_error(to_numpy(finished(ended, config, product_with_w_u)), to_numpy(seen.logits)) <= limit:
            return replace(ended, places={**row.places, "ln_final_out": Place(norms[-1])}) if seen.calls[norms[-1]] == 1 else ended
    return row


def _runs_in_pieces(model: Any, ids: Tensor, limit: float) -> bool:
    """Whether two pieces over a cache that keeps every key give the logits of one pass."""
    from transformers import DynamicCache

    whole = to_numpy(model(input_ids=ids, use_cache=False).logits)
    try:
        cache = DynamicCache()
        parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in (ids[:, :2], ids[:, 2:])]
    except _UNSUPPORTED:
        return False
    errors = [relative_error(to_numpy(part), want) for part, want in zip(parts, (whole[:, :2], whole[:, 2:]), strict=True)]
    return bool(cache.get_seq_length() == ids.shape[1] and max(errors) <= limit)

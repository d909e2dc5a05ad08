"""The routing of a trace as one report: every layer's load and measures, and two traces against each other. docs/moe.md documents the JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.analysis import moe
from backend.analysis.moe_compare import Change, Similarity, changed, similarity
from backend.errors import LayerscopeError
from backend.trace import Trace

_SIZES = ("n_layers", "n_heads", "d_model", "d_vocab")
SITES = ("router_logits", "router_probs", "expert_indices", "expert_weights")


@dataclass(frozen=True)
class LayerComparison:
    """One layer of two traces: `change` token by token, None where the tokens are not the same."""

    layer: int
    alike: Similarity
    change: Change | None


def routing_layers(trace: Trace) -> list[int]:
    """Layers whose chosen experts are in the trace."""
    return trace.stored.get("expert_indices", [])


def layer_measures(routing: moe.Routing) -> dict[str, Any]:
    """The load's measures, Switch loss, z-loss and mean router entropy of one layer; None where the trace lacks the scores they need."""
    return {
        "layer": routing.layer, **dataclasses.asdict(moe.load(routing.counts)),
        "switch_loss": None if routing.probs is None else moe.switch_loss(routing.indices, routing.probs).loss,
        "router_entropy": None if routing.probs is None else float(moe.router_entropy(routing.probs).mean()),
        "z_loss": None if routing.logits is None else moe.z_loss(routing.logits),
    }  # fmt: skip


def routing_report(trace: Trace, full: bool = False) -> dict[str, Any]:
    """Every layer of a trace as JSON; `full`: with pairs, transitions, texts and each token's margin and entropy as well.

    Raises LayerscopeError for a dense model or a trace without its chosen experts.
    """
    if not trace.info.is_moe:
        raise LayerscopeError(f"{trace.info.name} is dense: it has no experts and no routing.")
    layers = routing_layers(trace)
    if not layers:
        raise LayerscopeError(f"The trace {trace.id} holds no expert_indices: run the prompt again with them captured.")
    return {
        "trace_id": trace.id, "path": str(trace.path), "model": trace.info.name, "prompt": trace.prompt, "response": trace.response, "n_tokens": trace.n_tokens,
        "layers": [{**_layer(trace.routing(layer)), **(_full(trace, layer) if full else {})} for layer in layers],
    }  # fmt: skip


def _full(trace: Trace, layer: int) -> dict[str, Any]:
    """What grows with experts x experts or with tokens, of one layer."""
    routing, n = trace.routing(layer), trace.info.n_experts
    later = [each for each in routing_layers(trace) if each > layer]
    scores = routing.logits if routing.logits is not None else routing.probs
    labels, counts, share = moe.specialisation(routing.indices, trace.token_texts, n)
    rows = [{"token": label, "n": int(count), "experts": {str(e): round(float(row[e]), 6) for e in np.flatnonzero(row)}}
            for label, count, row in zip(labels, counts, share, strict=True)]  # fmt: skip
    return {
        "co_activation": moe.co_activation(routing.indices, n).tolist(),
        "transitions": {"to": later[0], "counts": moe.transitions(routing.indices, trace["expert_indices", later[0]], n).tolist()} if later else None,
        "specialisation": rows,
        "margins": None if scores is None else [finite(float(value)) for value in moe.margins(scores, routing.indices)],
        "ties": None if scores is None else [{"position": at, "experts": experts} for at, experts in moe.ties(scores, routing.indices)],
        "token_entropy": None if routing.probs is None else [float(value) for value in moe.router_entropy(routing.probs)],
    }  # fmt: skip


def _layer(routing: moe.Routing) -> dict[str, Any]:
    kept = moe.repeats(routing.indices, routing.n_experts)
    scores = routing.logits if routing.logits is not None else routing.probs
    margins = None if scores is None else moe.margins(scores, routing.indices)
    return {
        **{name: finite(value) for name, value in layer_measures(routing).items()}, "counts": {str(e): int(n) for e, n in enumerate(routing.counts)},
        "repeats": {name: finite(value) for name, value in dataclasses.asdict(kept).items()},
        "median_margin": None if margins is None or not np.isfinite(margins).any() else float(np.nanmedian(margins)),
    }  # fmt: skip


def compare(trace: Trace, other: Trace) -> list[LayerComparison]:
    """Every layer that both traces hold. Raises LayerscopeError where their experts cannot be compared."""
    if trace.info.n_experts != other.info.n_experts:
        raise LayerscopeError(f"{trace.info.name} has {trace.info.n_experts} experts and {other.info.name} {other.info.n_experts}: their routing cannot be compared.")
    same = trace.token_ids == other.token_ids and trace.info.n_experts_used == other.info.n_experts_used
    found = []
    for layer in [each for each in routing_layers(trace) if each in routing_layers(other)]:
        a, b = trace["expert_indices", layer], other["expert_indices", layer]
        alike = similarity(moe.expert_counts(a, trace.info.n_experts), moe.expert_counts(b, trace.info.n_experts))
        found.append(LayerComparison(layer, alike, changed(a, b) if same else None))
    if not found:
        raise LayerscopeError("The two traces hold the routing of no layer in common.")
    return found


def overall(found: Sequence[LayerComparison]) -> float | None:
    """Share of (token, layer) places whose set of experts differs, over all layers; None where the tokens differ."""
    every = [each.change.sets for each in found if each.change is not None]
    return float(np.concatenate(every).mean()) if every else None


def changed_in_some_layer(found: Sequence[LayerComparison]) -> float | None:
    """Share of tokens whose set of experts differs in one layer at least; None where the tokens differ."""
    every = [each.change.sets for each in found if each.change is not None]
    return float(np.mean(np.any(every, axis=0))) if every else None


def comparison_words(trace: Trace, other: Trace, found: Sequence[LayerComparison]) -> str:
    """The comparison in one sentence, which names what differs between the two runs: "Quantization changed the routing of 3.1% of tokens ..."."""
    share, some = overall(found), changed_in_some_layer(found)
    if share is None or some is None:
        mean = _mean([finite(each.alike.cosine) for each in found])
        alike = "nothing to compare" if mean is None else f"a mean cosine of {mean:.3f}"
        return f"Different tokens: the loads of {trace.info.name} and {other.info.name} have {alike} over {len(found)} layers."
    layers = f"mean over {len(found)} layers" if len(found) > 1 else "one layer"
    return f"{_cause(trace, other)} changed the routing of {share:.1%} of tokens ({layers}); {some:.1%} of {trace.n_tokens:,} tokens have other experts in some layer."


def _cause(trace: Trace, other: Trace) -> str:
    a, b = trace.info, other.info
    if any(getattr(a, size) != getattr(b, size) for size in _SIZES):  # the two engines name an architecture differently
        return f"The other model ({b.name} for {a.name})"
    if trace.metadata.get("interventions", []) != other.metadata.get("interventions", []):
        return "The edit"
    if a.quantization != b.quantization:
        return f"Quantization ({a.quantization} to {b.quantization})"
    return f"The other engine ({trace.engine} to {other.engine})" if trace.engine != other.engine else "The other run"


def comparison_report(trace: Trace, other: Trace) -> dict[str, Any]:
    """`compare` as JSON, with means over the layers."""
    found = compare(trace, other)
    rows = []
    for each in found:
        change = None if each.change is None else {"sets": each.change.share, "first": float(each.change.first.mean()), "slots": each.change.slots}
        rows.append({"layer": each.layer, **{name: finite(value) for name, value in dataclasses.asdict(each.alike).items()}, "changed": change})
    mean = {name: _mean([row[name] for row in rows]) for name in ("cosine", "pearson", "jensen_shannon")}
    whole = {**mean, "changed": overall(found), "changed_in_some_layer": changed_in_some_layer(found)}
    return {"a": trace.id, "b": other.id, "says": comparison_words(trace, other, found), "overall": whole, "layers": rows}


def finite(value: Any) -> Any:
    """JSON has no NaN: it becomes None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None

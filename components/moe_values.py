"""What the MoE page reads of a trace: the routing of every layer, its measures, and how it differs from another trace's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.analysis import moe
from backend.analysis.moe_compare import Change, Similarity, changed, similarity
from backend.errors import LayerscopeError
from backend.trace import Trace
from components.services import services
from components.trace_view import one_line, short_date

WINDOW = 256  # tokens that a picture shows at once: more would be finer than its pixels
NONE = "none"
_LISTED = 100


@dataclass(frozen=True)
class LayerComparison:
    """One layer of two traces: `change` token by token, None where the tokens are not the same."""

    layer: int
    alike: Similarity
    change: Change | None


def routing_layers(trace: Trace) -> list[int]:
    return trace.stored.get("expert_indices", [])


def chosen_experts(trace: Trace) -> list[moe.Routing]:
    """The chosen experts and their weights of every layer; without the router's scores, which are E / k times as large."""
    return [moe.Routing(layer, trace.info.n_experts, trace["expert_indices", layer], trace["expert_weights", layer] if trace.has("expert_weights", layer) else None)
            for layer in routing_layers(trace)]  # fmt: skip


def measures(trace: Trace) -> list[dict[str, Any]]:
    """The load's measures, Switch loss and z-loss of every layer, as JSON; computed once a trace. What needs scores that are not there is None."""
    key = ("moe_measures", trace.id)
    known = services().derived.get_json(key)
    if known is None:
        known = [_measures(trace.routing(layer)) for layer in routing_layers(trace)]
        services().derived.put_json(key, known)
    return known


def _measures(routing: moe.Routing) -> dict[str, Any]:
    return {
        "layer": routing.layer, **dataclasses.asdict(moe.load(routing.counts)),
        "switch_loss": None if routing.probs is None else moe.switch_loss(routing.indices, routing.probs).loss,
        "router_entropy": None if routing.probs is None else float(moe.router_entropy(routing.probs).mean()),
        "z_loss": None if routing.logits is None else moe.z_loss(routing.logits),
    }  # fmt: skip


def window(trace: Trace, position: int) -> tuple[int, int]:
    """First position and the one after the last of the block of tokens that pictures show."""
    start = position // WINDOW * WINDOW
    return start, min(start + WINDOW, trace.n_tokens)


def others(trace: Trace) -> list[dict[str, str]]:
    """Traces that a comparison may be made with: the same number of experts, the same tokens first."""
    found = [each for each in services().library.traces(limit=_LISTED) if each.is_moe and each.id != trace.id and "expert_indices" in each.sites]
    found.sort(key=lambda each: (each.prompt != trace.prompt, each.n_tokens != trace.n_tokens))
    return [{"value": each.id, "label": f"{each.model_name} · {one_line(each.prompt, 36)} · {short_date(each.created_at)}"} for each in found]


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


def overall(found: list[LayerComparison]) -> float | None:
    """Share of (token, layer) choices whose set of experts differs, over all layers; None where tokens differ."""
    every = [each.change.sets for each in found if each.change is not None]
    return float(np.concatenate(every).mean()) if every else None

"""What the MoE page reads of a trace: the routing of every layer and its measures; and the traces it can be compared with."""

from __future__ import annotations

from typing import Any

from backend.analysis import moe
from backend.reports.routing import layer_measures, routing_layers
from backend.trace import Trace
from components.services import services
from components.token_label import token_label
from components.trace_view import one_line, short_date

WINDOW = 256  # tokens that a picture shows at once: more would be finer than its pixels
NONE = "none"
_LISTED = 100


def chosen_experts(trace: Trace) -> list[moe.Routing]:
    """The chosen experts and their weights of every layer; without the router's scores, which are E / k times as large."""
    return [chosen_expert(trace, layer) for layer in routing_layers(trace)]


def chosen_expert(trace: Trace, layer: int) -> moe.Routing:
    """The same of one layer."""
    weights = trace["expert_weights", layer] if trace.has("expert_weights", layer) else None
    return moe.Routing(layer, trace.info.n_experts, trace["expert_indices", layer], weights)


def measures(trace: Trace) -> list[dict[str, Any]]:
    """The load's measures, Switch loss and z-loss of every layer, as JSON; computed once a trace. What needs scores that are not there is None."""
    key = ("moe_measures", trace.id)
    known = services().derived.get_json(key)
    if known is None:
        known = [layer_measures(trace.routing(layer)) for layer in routing_layers(trace)]
        services().derived.put_json(key, known)
    return known


def window(trace: Trace, position: int) -> tuple[int, int]:
    """First position and the one after the last of the block of tokens that pictures show."""
    start = position // WINDOW * WINDOW
    return start, min(start + WINDOW, trace.n_tokens)


def labels(trace: Trace, start: int, stop: int) -> list[str]:
    """Labels of the tokens from start up to stop."""
    return [token_label(trace.token_texts[at], at in trace.special, 12) for at in range(start, stop)]


def shown(trace: Trace, start: int, stop: int) -> str:
    """Which part of the prompt a picture shows; nothing where it shows all."""
    return "" if stop - start == trace.n_tokens else f"Positions {start} to {stop - 1} of {trace.n_tokens:,}. "


def rows_height(trace: Trace) -> int:
    """Pixels of a picture with a row for each layer."""
    return 100 + min(24 * len(routing_layers(trace)), 480)


def others(trace: Trace) -> list[dict[str, str]]:
    """Traces that a comparison may be made with: the same number of experts, the same tokens first."""
    found = [each for each in services().library.traces(limit=_LISTED) if each.is_moe and each.id != trace.id and "expert_indices" in each.sites]
    found.sort(key=lambda each: (each.prompt != trace.prompt, each.n_tokens != trace.n_tokens))
    return [{"value": each.id, "label": f"{each.model_name} · {one_line(each.prompt, 36)} · {short_date(each.created_at)}"} for each in found]

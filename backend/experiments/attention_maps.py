"""The job that reads every head of a trace once: layer means, rollout and counts (backend.reports.attention_maps) go to the derived cache."""

from __future__ import annotations

from typing import Any

from backend.experiments import Context
from backend.reports.attention_maps import Summary, summarise
from backend.trace import Trace


def attention_maps_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {trace_id} -> {layers, side}; see `attention_maps.Summary`."""
    with Trace(context.library.path_of(params["trace_id"])) as trace:
        if Summary.load(context.derived, trace) is None:
            summarise(trace, context.derived, context.progress, context.should_stop)
        found = Summary.load(context.derived, trace)
    return {"layers": found.layers, "side": found.side} if found else {}

"""The super experts of a trace: the largest output of every expert, the layers that form massive activations, and the paper's criterion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.super_experts import Peaks, SuperExpert, Verdict, forms_massive, judge
from backend.errors import LayerscopeError
from backend.trace import Trace

SITES = ("expert_out", "expert_indices", "expert_weights")
_BLOCK_VALUES = 1 << 24  # values of expert_out that are in memory at once


@dataclass(frozen=True)
class SuperExperts:
    """layers: those whose experts' outputs are in the trace; sizes: (layer, expert) float32, the largest |output| before the router's weight.

    forming: layers that form massive activations; unknown: layers of which that cannot be told, as the residual stream around them was not captured.
    """

    layers: list[int]
    sizes: NDArray[np.float32]
    forming: list[int]
    unknown: list[int]
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "sizes": [[float(size) for size in row] for row in self.sizes]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SuperExperts:
        verdict = data["verdict"]
        lists = {name: [SuperExpert(**each) for each in verdict[name]] for name in ("ranked", "by_size", "supers")}
        return cls(**{**data, "sizes": np.array(data["sizes"], np.float32), "verdict": Verdict(**{**verdict, **lists})})


def outputs_layers(trace: Trace) -> list[int]:
    """Layers whose experts' outputs, and what is needed to read them, are in the trace."""
    return [layer for layer in trace.stored.get("expert_out", []) if all(trace.has(site, layer) for site in SITES)]


def super_experts(trace: Trace) -> SuperExperts:
    """Read every layer's outputs, a block of positions at a time. Raises LayerscopeError for a trace without them."""
    layers = outputs_layers(trace)
    if not layers:
        raise LayerscopeError(f"The trace {trace.id} does not hold {', '.join(SITES)}: run the prompt again with them captured.")
    peaks = [(layer, _peaks(trace, layer)) for layer in layers]
    known = [layer for layer in layers if trace.has("resid_pre", layer) and trace.has("resid_post", layer)]
    forming = [layer for layer in known if forms_massive(trace["resid_pre", layer], trace["resid_post", layer])]
    unknown = [layer for layer in layers if layer not in known]
    return SuperExperts(layers, np.stack([each.size for _, each in peaks]), forming, unknown, judge(peaks, forming))


def _peaks(trace: Trace, layer: int) -> Peaks:
    found, indices, weights = Peaks.none(trace.info.n_experts), trace["expert_indices", layer], trace["expert_weights", layer]
    step = max(_BLOCK_VALUES // (indices.shape[1] * trace.info.d_model), 1)
    for start in range(0, trace.n_tokens, step):
        rows = slice(start, min(start + step, trace.n_tokens))
        found.add(trace.position("expert_out", layer, rows), indices[rows], weights[rows], start)
    return found

"""Cards of experts against experts: which are chosen together in the chosen layer, and which follows which in the next one."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Output, html

from backend.analysis import moe
from backend.reports.routing import routing_layers
from backend.trace import Trace
from components.card import card
from components.figures import moe as figures
from components.figures.theme import no_figure
from components.graph import graph, graph_tools

ABOUT_TOGETHER = (
    "Of the tokens that chose the expert of the row, the share that also chose the one of the column: N_ij / N_i (Muennighoff et al. 2024, OLMoE). All pairs of the k chosen "
    "experts count, not only neighbours in rank as in OLMoE's own script.",
)  # fmt: skip
ABOUT_NEXT = ("Of the tokens whose first choice in this layer was the expert of the row, the share whose first choice in the next layer with experts was that of the column.",)


def together_card(trace: Trace) -> html.Section:
    """Co-activation over all pairs of the k experts."""
    return card("Chosen together", graph("moe-together", height=_square(trace)), html.Span("", id="moe-together-said"), graph_tools("moe-together", "co-activation"),
                list(ABOUT_TOGETHER))  # fmt: skip


def next_card(trace: Trace) -> html.Section:
    """First choices of this layer and of the next one with experts."""
    return card("From layer to layer", graph("moe-next", height=_square(trace)), html.Span("", id="moe-next-said"), graph_tools("moe-next", "expert-transitions"),
                list(ABOUT_NEXT))  # fmt: skip


def _square(trace: Trace) -> int:
    return 330 if trace.info.n_experts <= 32 else 430


OUTPUTS = {
    "together": Output("moe-together", "figure"), "together_said": Output("moe-together-said", "children"), "next": Output("moe-next", "figure"),
    "next_said": Output("moe-next-said", "children"),
}  # fmt: skip


def draw(trace: Trace, layer: int, theme: str) -> dict[str, Any]:
    """What the two cards show; keys are those of OUTPUTS."""
    indices, n = trace["expert_indices", layer], trace.info.n_experts
    if indices.shape[1] > 1:
        counts = moe.co_activation(indices, n)
        together = figures.expert_pairs(moe.co_activation_share(indices, n), counts, "expert", "also expert", "share of the row's tokens", theme)
    else:
        together = no_figure(theme, "Each token has one expert only.")
    said = f"Layer {layer}, all pairs; a row without colour is an expert that no token chose."
    later = [each for each in routing_layers(trace) if each > layer]
    if not later:
        return {"together": together, "together_said": said, "next": no_figure(theme, "No layer with experts follows."), "next_said": f"From layer {layer}."}
    moved = moe.transitions(indices, trace["expert_indices", later[0]], n)
    total = moved.sum(axis=1, keepdims=True)
    share = np.divide(moved, total, out=np.full(moved.shape, np.nan), where=total > 0)
    after = figures.expert_pairs(share, moved, f"layer {layer}, expert", f"layer {later[0]}, expert", "share of the row's tokens", theme)
    return {"together": together, "together_said": said, "next": after, "next_said": f"First choices of layers {layer} and {later[0]}."}

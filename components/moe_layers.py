"""Cards of all layers together: the load of the experts, the measures of it, and how often a token keeps an expert of the one before."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Output, html

from backend.analysis import moe
from backend.reports.routing import routing_layers
from backend.trace import Trace
from components import moe_values as values
from components.card import card
from components.drawn import drawing, draws, elements
from components.figures import moe as figures
from components.figures.theme import no_figure
from components.graph import graph, graph_tools
from components.moe_tables import measures_table

ABOUT_LOAD = (
    "How often each expert was among a token's k chosen ones, as a share of all choices of the layer (tokens × k). Experts that were never chosen are 0.",
    "A prompt is a small sample: an uneven load here is not yet an uneven load of the model.",
)
ABOUT_MEASURES = (
    "Of the load n_i of E experts, with p_i = n_i / Σ n. Entropy −Σ p ln p in nats (at most ln E), and divided by ln E. Gini Σ (2i − E − 1) n_(i) / (E Σ n), 0 when all are equal. "
    "CV: standard deviation (population) over mean. Balance: mean load over largest load, 1 when all are equal.",
    "Switch loss E Σ f_i P_i (Fedus et al. 2021, equation 4): f_i the share of choices, P_i the mean router probability. An even router has 1. Transformers sums over "
    "the k choices instead, so its value is k times this one.",
    "z-loss: mean of logsumexp(logits)² (Zoph et al. 2022, ST-MoE). Router entropy: mean over tokens of the entropy of the router's probabilities, nats.",
)  # fmt: skip
ABOUT_REPEATS = (
    "How often a token keeps an expert of the token before it (Jiang et al. 2024, Mixtral, table 5). Dashed: what a random choice of k different experts of E gives, 1 / E for the "
    "first choice and 1 − C(E−k, k) / C(E, k) for any of the k: 12.5 % and 46 % for 2 of 8.",
)  # fmt: skip


def load_card(trace: Trace, figure: Any) -> html.Section:
    """Experts across, layers down; `figure`: that of `draw_load`."""
    return card("Load of the experts", graph("moe-load", values.rows_height(trace), figure), "One row a layer, one column an expert. Click a cell to choose its layer.",
                graph_tools("moe-load", "expert-load"), list(ABOUT_LOAD), className="wide")  # fmt: skip


def measures_card() -> html.Section:
    """Every measure of every layer's load."""
    body = [html.Div(id="moe-measures", className="table-scroll table-tall"), drawing("moe-measures")]
    return card("Measures of each layer", body, html.Span("", id="moe-measures-said"), (), list(ABOUT_MEASURES), className="wide")


def repeats_card() -> html.Section:
    """Share of consecutive tokens that keep an expert, beside random choice."""
    return card("Experts kept from token to token", graph("moe-repeats", height=280), "Dashed: random choice. The chosen layer is dotted.",
                graph_tools("moe-repeats", "repeated-experts"), list(ABOUT_REPEATS))  # fmt: skip


draws("moe-measures")


LOAD_OUTPUT = Output("moe-load", "figure")
OUTPUTS = {
    "repeats": Output("moe-repeats", "figure"), "measures": Output("moe-measures-drawing", "data"),
    "said": Output("moe-measures-said", "children"),
}  # fmt: skip


def draw_load(trace: Trace, layer: int, theme: str) -> Any:
    """The figure of LOAD_OUTPUT."""
    layers, n = routing_layers(trace), trace.info.n_experts
    return figures.load_heatmap(np.stack([moe.expert_counts(trace["expert_indices", each], n) for each in layers]), layers, layer, theme)


def draw(trace: Trace, layer: int, theme: str) -> dict[str, Any]:
    """What the other two cards show; keys are those of OUTPUTS."""
    layers, n = routing_layers(trace), trace.info.n_experts
    indices = [trace["expert_indices", each] for each in layers]
    if trace.n_tokens > 1:
        kept = figures.repeat_lines([moe.repeats(each, n) for each in indices], layers, indices[0].shape[1], layer, theme)
    else:
        kept = no_figure(theme, "A single token follows no other.")
    k = indices[0].shape[1]
    said = f"{trace.n_tokens:,} tokens, {k} of {n} experts each. An even load has entropy ln {n} = {np.log(n):.3f}, Gini 0, CV 0, balance 1, Switch loss 1."
    return {"repeats": kept, "measures": elements(measures_table(values.measures(trace), n, layer)), "said": said}

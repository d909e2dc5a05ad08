"""Cards of the router's scores in the chosen layer: the probability of every expert at every token, and how near each choice was to another."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Output, html
from numpy.typing import NDArray

from backend.analysis import moe
from backend.trace import Trace
from components import moe_values as values
from components.card import card
from components.figures import moe as figures
from components.figures.theme import no_figure
from components.graph import graph, graph_tools

ABOUT_PROBS = (
    "What the router gave every expert before the choice: softmax of its logits over all experts (sigmoid in DeepSeek V3, where a row does not sum to 1).",
    "Models of the gpt-oss kind take a softmax over the chosen experts only, and have no such probabilities.",
)
ABOUT_MARGIN = (
    "The lowest score among the chosen experts less the highest among the others: how near the choice was to another. At 0 two experts tie, and the engine's sort decides. "
    "Scores are stored in the trace's precision, which can round a near tie to a tie.",
    "Below 0 the choice was not by these scores alone: DeepSeek chooses groups of experts first, or adds a correction.",
)  # fmt: skip


def probs_card(trace: Trace) -> html.Section:
    """Tokens across, experts down."""
    return card("Router probabilities", graph("moe-probs", height=140 + min(22 * trace.info.n_experts, 420)), html.Span("", id="moe-probs-said"),
                graph_tools("moe-probs", "router-probabilities"), list(ABOUT_PROBS), className="wide")  # fmt: skip


def margins_card() -> html.Section:
    """A bar a token: the k-th expert's lead over the next; ties are named."""
    return card("Margin of the choice", graph("moe-margins", height=280), html.Span("", id="moe-margins-said"), graph_tools("moe-margins", "margins"), list(ABOUT_MARGIN))


OUTPUTS = {
    "probs": Output("moe-probs", "figure"), "probs_said": Output("moe-probs-said", "children"), "margins": Output("moe-margins", "figure"),
    "margins_said": Output("moe-margins-said", "children"),
}  # fmt: skip


def draw(trace: Trace, layer: int, at: int, theme: str) -> dict[str, Any]:
    """What the two cards show around position `at`; keys are those of OUTPUTS."""
    (start, stop), routing = values.window(trace, at), trace.routing(layer)
    labels = values.labels(trace, start, stop)
    if routing.probs is None:
        probs, said = no_figure(theme, "This trace holds no router_probs."), f"Layer {layer}."
    else:
        probs = figures.router_heatmap(routing.probs[start:stop], labels, start, at, theme)
        said = f"Layer {layer}: one row an expert, one column a token. {values.shown(trace, start, stop)}"
    scores, unit = (routing.logits, "logits") if routing.logits is not None else (routing.probs, "probability")
    if scores is None:
        bars, words = no_figure(theme, "This trace holds neither router_logits nor router_probs."), f"Layer {layer}."
    else:
        margins = moe.margins(scores, routing.indices)
        bars, words = figures.margin_bars(margins[start:stop], labels, start, at, unit, theme), margin_words(layer, margins, moe.ties(scores, routing.indices))
    return {"probs": probs, "probs_said": said, "margins": bars, "margins_said": words}


def margin_words(layer: int, margins: NDArray[np.floating], ties: list[tuple[int, list[int]]]) -> str:
    """The median, the choices that these scores do not explain (groups, a correction bias), and the ties by name."""
    finite = margins[np.isfinite(margins)]
    if not len(finite):
        return f"Layer {layer} uses all its experts."
    words = f"Layer {layer}: median {np.median(finite):.3g}."
    below = int((finite < 0).sum())
    words += f" {below:,} choices by more than these scores." if below else ""
    if not ties:
        return words + " No ties."
    names = "; ".join(f"position {at}: experts {', '.join(map(str, experts))}" for at, experts in ties[:3])
    return words + f" {len(ties):,} {'tie' if len(ties) == 1 else 'ties'} ({names}{', …' if len(ties) > 3 else ''})."

"""Cards of who serves which token: tokens x layers as a map, the tokens of the chosen layer as a strip, and which expert serves which text."""

from __future__ import annotations

from typing import Any

from dash import Output, html

from backend.analysis import moe
from backend.trace import Trace
from components import moe_values as values
from components.card import card
from components.drawn import drawing, draws, elements
from components.figures import moe as figures
from components.graph import graph, graph_tools
from components.moe_tables import legend, strip, token_table
from components.token_label import token_labels

ABOUT_MAP = (
    "The expert with the largest weight at every token and layer; the hover names all k with their weights. A colour is an expert, the same in all layers, but experts of "
    "different layers have nothing to do with each other.",
    f"A longer prompt is shown {values.WINDOW} tokens at a time: the block of the chosen token.",
)  # fmt: skip
ABOUT_TOKENS = (
    "Tokens by how often they occur, and for each the expert that served most of its occurrences (N_x,e / N_x, vocabulary specialisation of OLMoE). With one occurrence the share "
    "is always 100 %.",
)  # fmt: skip


def map_card(trace: Trace, shown: dict[str, Any]) -> html.Section:
    """Tokens across, layers down; `shown`: what `draw` says."""
    picture = graph("moe-map", values.rows_height(trace), shown["map"])
    return card("First expert of every token", picture, html.Span(shown["map_said"], id="moe-map-said"), graph_tools("moe-map", "routing"), list(ABOUT_MAP), className="wide")


def strip_card(shown: dict[str, Any]) -> html.Section:
    """The tokens as text, coloured by their first expert in the chosen layer; `shown`: what `draw` says."""
    tokens = [html.Div(id="moe-strip", className="moe-strip"), drawing("moe-strip", drawn=shown["strip"])]
    body = [*tokens, html.Div(id="moe-legend", className="moe-legend"), drawing("moe-legend", drawn=shown["legend"])]
    return card(html.Span(shown["title"], id="moe-strip-title"), body, html.Span(shown["said"], id="moe-strip-said"), (), list(ABOUT_MAP), className="wide")


def tokens_card() -> html.Section:
    """Specialisation by token, in this trace."""
    body = [html.Div(id="moe-tokens", className="table-scroll table-tall"), drawing("moe-tokens")]
    return card("Tokens and their experts", body, html.Span("", id="moe-tokens-said"), (), list(ABOUT_TOKENS), className="wide")


for _id in ("moe-strip", "moe-legend", "moe-tokens"):
    draws(_id)


OUTPUTS = {
    "map": Output("moe-map", "figure"), "map_said": Output("moe-map-said", "children"), "strip": Output("moe-strip-drawing", "data"),
    "legend": Output("moe-legend-drawing", "data"), "title": Output("moe-strip-title", "children"), "said": Output("moe-strip-said", "children"),
}  # fmt: skip
TEXT_OUTPUTS = {"tokens": Output("moe-tokens-drawing", "data"), "said": Output("moe-tokens-said", "children")}


def draw(trace: Trace, layer: int, at: int, theme: str) -> dict[str, Any]:
    """What map and strip show around position `at`; keys are those of OUTPUTS."""
    (start, stop), every = values.window(trace, at), values.chosen_experts(trace)
    routing, labels, part = next(each for each in every if each.layer == layer), values.labels(trace, start, stop), values.shown(trace, start, stop)
    return {
        "map": figures.first_choice_map(every, labels, start, (layer, at), theme),
        "map_said": f"One row a layer, one column a token; colour is the first expert. {part}Click a cell to choose its layer and token.",
        "strip": elements(strip(routing, labels, start, at, theme)), "legend": elements(legend(routing, theme)), "title": f"Experts of layer {layer}",
        "said": f"{part}Colour is the first expert; the hover names all {routing.k} with their weights.",
    }  # fmt: skip


def draw_texts(trace: Trace, layer: int) -> dict[str, Any]:
    """The table of texts; keys are those of TEXT_OUTPUTS."""
    labels, n, share = moe.specialisation(trace["expert_indices", layer], token_labels(trace.token_texts, trace.special), trace.info.n_experts)
    said = f"In layer {layer}: {len(labels):,} different tokens, {int((n > 1).sum()):,} of which occur more than once."
    return {"tokens": elements(token_table([str(label) for label in labels], n, share)), "said": said}

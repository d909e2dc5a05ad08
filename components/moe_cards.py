"""The cards of the MoE page, empty: its callbacks fill them. Every "About" names the formula and where it comes from."""

from __future__ import annotations

from typing import Any

from dash import dcc, html

from components.card import card, cards
from components.graph import graph, graph_tools
from components.moe_values import NONE, WINDOW

ABOUT_LOAD = (
    "How often each expert was among a token's k chosen ones, as a share of all choices of the layer (tokens × k). Experts that were never chosen are 0.",
    "A prompt is a small sample: an uneven load here is not yet an uneven load of the model.",
)
ABOUT_MAP = (
    "The expert with the largest weight at every token and layer; the hover names all k with their weights. A colour is an expert, the same in all layers, but experts of "
    "different layers have nothing to do with each other.",
    f"A longer prompt is shown {WINDOW} tokens at a time: the block of the chosen token.",
)  # fmt: skip
ABOUT_PROBS = (
    "What the router gave every expert before the choice: softmax of its logits over all experts (sigmoid in DeepSeek V3, where a row does not sum to 1).",
    "Models of the gpt-oss kind take a softmax over the chosen experts only, and have no such probabilities.",
)
ABOUT_MEASURES = (
    "Of the load n_i of E experts, with p_i = n_i / Σ n. Entropy −Σ p ln p in nats (at most ln E), and divided by ln E. Gini Σ (2i − E − 1) n_(i) / (E Σ n), 0 when all are equal. "
    "CV: standard deviation (population) over mean. Balance: mean load over largest load, 1 when all are equal.",
    "Switch loss E Σ f_i P_i (Fedus et al. 2021, equation 4): f_i the share of choices, P_i the mean router probability. An even router has 1. Transformers sums over "
    "the k choices instead, so its value is k times this one.",
    "z-loss: mean of logsumexp(logits)² (Zoph et al. 2022, ST-MoE). Router entropy: mean over tokens of the entropy of the router's probabilities, nats.",
)  # fmt: skip
ABOUT_TOGETHER = (
    "Of the tokens that chose the expert of the row, the share that also chose the one of the column: N_ij / N_i (Muennighoff et al. 2024, OLMoE). All pairs of the k chosen "
    "experts count, not only neighbours in rank as in OLMoE's own script.",
)  # fmt: skip
ABOUT_NEXT = ("Of the tokens whose first choice in this layer was the expert of the row, the share whose first choice in the next layer with experts was that of the column.",)
ABOUT_REPEATS = (
    "How often a token keeps an expert of the token before it (Jiang et al. 2024, Mixtral, table 5). Dashed: what a random choice of k different experts of E gives, 1 / E for the "
    "first choice and 1 − C(E−k, k) / C(E, k) for any of the k: 12.5 % and 46 % for 2 of 8.",
)  # fmt: skip
ABOUT_MARGIN = (
    "The lowest score among the chosen experts less the highest among the others: how near the choice was to another. At 0 two experts tie, and the engine's sort decides. "
    "Scores are stored in the trace's precision, which can round a near tie to a tie.",
    "Below 0 the choice was not by these scores alone: DeepSeek chooses groups of experts first, or adds a correction.",
)  # fmt: skip
ABOUT_TOKENS = (
    "Tokens by how often they occur, and for each the expert that served most of its occurrences (N_x,e / N_x, vocabulary specialisation of OLMoE). With one occurrence the share "
    "is always 100 %.",
)  # fmt: skip
ABOUT_COMPARE = (
    "For the same tokens: the share of tokens whose set of k experts differs (experts), whose first choice does, and the share of all tokens × k choices that the other trace "
    "did not make. For any two traces: cosine, Pearson correlation and Jensen-Shannon "
    "divergence (nats, at most ln 2) of how often each expert was chosen.",
    "From the second layer with experts on, other experts are also chosen because the layers before gave other values.",
)  # fmt: skip


def moe_cards(n_layers: int, n_experts: int, others: list[dict[str, str]], against: str, more: list[html.Section]) -> list[Any]:
    """All cards; `others` and `against` are the options and the value of the comparison, `more` are the cards that have modules of their own."""
    rows = 100 + min(24 * n_layers, 480)
    square = 330 if n_experts <= 32 else 430
    return [
        cards(
            card("Load of the experts", graph("moe-load", height=rows), "One row a layer, one column an expert. Click a cell to choose its layer.",
                 graph_tools("moe-load", "expert-load"), list(ABOUT_LOAD), className="wide"),
            card("First expert of every token", graph("moe-map", height=rows), html.Span("", id="moe-map-said"), graph_tools("moe-map", "routing"), list(ABOUT_MAP),
                 className="wide"),
            card(html.Span("", id="moe-strip-title"), [html.Div(id="moe-strip", className="moe-strip"), html.Div(id="moe-legend", className="moe-legend")],
                 html.Span("", id="moe-strip-said"), (), list(ABOUT_MAP), className="wide"),
            card("Router probabilities", graph("moe-probs", height=140 + min(22 * n_experts, 420)), html.Span("", id="moe-probs-said"),
                 graph_tools("moe-probs", "router-probabilities"), list(ABOUT_PROBS), className="wide"),
            card("Measures of each layer", html.Div(id="moe-measures", className="table-scroll table-tall"), html.Span("", id="moe-measures-said"), (), list(ABOUT_MEASURES),
                 className="wide"),
            card("Chosen together", graph("moe-together", height=square), html.Span("", id="moe-together-said"), graph_tools("moe-together", "co-activation"),
                 list(ABOUT_TOGETHER)),
            card("From layer to layer", graph("moe-next", height=square), html.Span("", id="moe-next-said"), graph_tools("moe-next", "expert-transitions"), list(ABOUT_NEXT)),
            card("Experts kept from token to token", graph("moe-repeats", height=280), "Dashed: random choice. The chosen layer is dotted.",
                 graph_tools("moe-repeats", "repeated-experts"), list(ABOUT_REPEATS)),
            card("Margin of the choice", graph("moe-margins", height=280), html.Span("", id="moe-margins-said"), graph_tools("moe-margins", "margins"), list(ABOUT_MARGIN)),
            card("Tokens and their experts", html.Div(id="moe-tokens", className="table-scroll table-tall"), html.Span("", id="moe-tokens-said"), (), list(ABOUT_TOKENS),
                 className="wide"),
            _compare_card(others, against),
            *more,
        )
    ]  # fmt: skip


def _compare_card(others: list[dict[str, str]], against: str) -> html.Section:
    options: Any = [{"value": NONE, "label": "nothing"}, *others]
    pick = dcc.Dropdown(options, against, id="moe-against", clearable=False, className="picker-prompt moe-against")
    form = html.Div(html.Label([html.Span("With the trace"), pick]), className="controls moe-form")
    body = html.Div(
        [graph("moe-change", height=260), html.Div(id="moe-alike", className="table-scroll table-tall")], id="moe-compared", className="moe-compared", hidden=against == NONE
    )
    return card("Against another trace", [form, html.P(id="moe-sentence", className="moe-sentence"), body], "", graph_tools("moe-change", "routing-change"), list(ABOUT_COMPARE),
                className="wide")  # fmt: skip

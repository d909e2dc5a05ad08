"""MoE routing: which experts served which token, how evenly they are used, what goes together, and what another trace did instead.

The cards are in components/moe_*.py, each with its own callbacks; all of them follow the pickers `moe-layer` and `position`.
"""

from __future__ import annotations

from typing import Any

import dash
from dash import ClientsideFunction, Input, Output, State, callback, clientside_callback, dcc, html

from backend.reports.routing import routing_layers
from backend.trace import Trace
from components import moe_layers, moe_pairs, moe_scores, moe_tokens
from components.browser_theme import browser_theme
from components.card import cards
from components.follow_token import position_in
from components.moe_ablation import MEASURES, ablation_card
from components.moe_against import against_card
from components.moe_layers import load_card, measures_card, repeats_card
from components.moe_pairs import next_card, together_card
from components.moe_scores import margins_card, probs_card
from components.moe_super_experts import super_experts_card
from components.moe_tokens import map_card, strip_card, tokens_card
from components.moe_usage import VIEWS, usage_card
from components.services import services
from components.trace_view import trace_page
from components.url_state import as_choice, as_int, keep_url

dash.register_page(__name__, path="/moe", name="MoE routing", order=4.8, icon="blocks", description="Which experts served which token")

REQUIRES = ("expert_indices",)


def layout(trace: str | None = None, layer: str | None = None, **state: str):
    def build(opened: Trace) -> list[Any]:
        at = as_int(state.get("pos"), opened.n_prompt - 1, 0, opened.n_tokens - 1)
        return _cards(opened, state, {"layer": _chosen(opened, layer), "position": at, "theme": browser_theme()})

    return trace_page(__name__, trace, REQUIRES, state, build, "Which experts served which token.", lambda opened: _layer(opened, _chosen(opened, layer)))


def _cards(trace: Trace, asked: dict[str, str], view: dict[str, Any]) -> list[Any]:
    """The page's cards, in the state that its link names. What is seen without scrolling comes with them: one question less before it can be drawn."""
    load, tokens = _first(trace, view).values()
    return [
        cards(
            load_card(trace, load),
            map_card(trace, tokens),
            strip_card(tokens),
            probs_card(trace),
            measures_card(),
            together_card(trace),
            next_card(trace),
            repeats_card(),
            margins_card(),
            tokens_card(),
            against_card(trace, asked.get("against")),
            ablation_card(trace, as_choice(asked.get("effect"), list(MEASURES), "nll"), asked.get("prompts")),
            usage_card(trace, as_choice(asked.get("usage"), list(VIEWS), "category")),
            super_experts_card(trace),
        ),
        dcc.Store(id="moe-view", data=view),
        dcc.Store(id="moe-seen"),
        dcc.Store(id="moe-begun"),
    ]


def _chosen(trace: Trace, asked: str | None) -> int:
    """The layer that is asked for; the middle one with experts to begin with."""
    layers = routing_layers(trace)
    chosen = as_int(asked, layers[len(layers) // 2], 0, trace.info.n_layers - 1)
    return chosen if chosen in layers else layers[0]


def _layer(trace: Trace, chosen: int) -> html.Div:
    """The picker of the layer."""
    options: Any = [{"label": str(each), "value": each} for each in routing_layers(trace)]
    pick = dcc.Dropdown(options, chosen, id="moe-layer", clearable=False, searchable=False, className="picker-narrow")
    return html.Div(html.Label([html.Span("Layer"), pick]), className="controls")


def _first(trace: Trace, view: dict[str, Any]) -> dict[str, Any]:
    """What is seen without scrolling."""
    layer, theme = view["layer"], view["theme"]
    return {"load": moe_layers.draw_load(trace, layer, theme), "tokens": moe_tokens.draw(trace, layer, position_in(trace, view["position"]), theme)}


# Layer, token and theme, when they are not those that are shown already.
clientside_callback(
    ClientsideFunction("layerscope", "moeView"),
    Output("moe-view", "data"), Input("moe-layer", "value"), Input("position", "data"), Input("theme", "data"), State("moe-view", "data"),
)  # fmt: skip


@callback(
    output={"load": moe_layers.LOAD_OUTPUT, "tokens": moe_tokens.OUTPUTS}, inputs=(Input("moe-view", "data"), State("page-state", "data")), prevent_initial_call=True
)
def show_first(view: dict[str, Any], page: dict[str, Any]):
    """One callback for all that is seen without scrolling: each one more costs the browser more than the drawing."""
    return _first(services().library.open(page["trace"]), view)


# The cards below come when the first ones are on the screen: those that follow the view each time, those of their own pickers (`moe-begun`) once.
clientside_callback(
    ClientsideFunction("layerscope", "moeSeen"), Output("moe-seen", "data"), Output("moe-begun", "data"), Input("moe-map", "figure"), State("moe-begun", "data")
)


@callback(
    output={"layers": moe_layers.OUTPUTS, "pairs": moe_pairs.OUTPUTS, "texts": moe_tokens.TEXT_OUTPUTS, "scores": moe_scores.OUTPUTS},
    inputs=(Input("moe-seen", "data"), State("moe-layer", "value"), State("position", "data"), State("theme", "data"), State("page-state", "data")),
    prevent_initial_call=True,
)
def show_rest(_: Any, layer: int, position: int | None, theme: str, page: dict[str, Any]):
    """All other cards that the trace fills by itself."""
    trace = services().library.open(page["trace"])
    return {
        "layers": moe_layers.draw(trace, layer, theme), "pairs": moe_pairs.draw(trace, layer, theme), "texts": moe_tokens.draw_texts(trace, layer),
        "scores": moe_scores.draw(trace, layer, position_in(trace, position), theme),
    }  # fmt: skip


# A click on a map chooses layer and token; without an output of theirs, for which everything that listens to them would wait when the page opens.
clientside_callback(
    ClientsideFunction("layerscope", "moeOpen"), Output("moe-layer", "id"), Input("moe-load", "clickData"), Input("moe-map", "clickData"), prevent_initial_call=True
)

clientside_callback(
    ClientsideFunction("layerscope", "moeTip"),
    Output("page-state", "id"),  # never written
    *[Input(id, "hoverData") for id in ("moe-map", "moe-probs", "moe-together", "moe-next")],
    prevent_initial_call=True,
)

keep_url({
    "layer": ("moe-layer", "value"), "against": ("moe-against", "value"), "effect": ("moe-effect-measure", "value"), "prompts": ("moe-effect-over", "value"),
    "usage": ("moe-usage-view", "value"),
})  # fmt: skip

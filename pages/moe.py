"""MoE routing: which experts served which token, how evenly they are used, what goes together, and what another trace did instead."""

from __future__ import annotations

from typing import Any

import dash
import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.analysis import moe
from backend.errors import LayerscopeError
from backend.reports.routing import compare, routing_layers
from backend.trace import Trace
from components import moe_values as values
from components.figures import moe as figures
from components.figures.theme import no_figure
from components.follow_token import position_in
from components.moe_ablation import MEASURES, ablation_card
from components.moe_cards import moe_cards
from components.moe_super_experts import super_experts_card
from components.moe_tables import alike_table, compared_words, legend, measures_table, strip, token_table
from components.moe_usage import VIEWS, usage_card
from components.services import services
from components.token_label import token_labels
from components.trace_view import trace_page
from components.url_state import as_choice, as_int, keep_url

dash.register_page(__name__, path="/moe", name="MoE routing", order=4.8, icon="blocks", description="Which experts served which token")

REQUIRES = ("expert_indices",)

def layout(trace: str | None = None, layer: str | None = None, against: str | None = None, effect: str | None = None, usage: str | None = None, **state: str):
    def build(opened: Trace) -> list[Any]:
        others = values.others(opened)
        known = against if any(each["value"] == against for each in others) else values.NONE
        more = [ablation_card(opened, as_choice(effect, list(MEASURES), "nll")), usage_card(opened, as_choice(usage, list(VIEWS), "category"))]
        more.append(super_experts_card(opened))
        return moe_cards(len(routing_layers(opened)), opened.info.n_experts, others, str(known), more)

    def controls(opened: Trace) -> Any:
        layers = routing_layers(opened)
        asked = as_int(layer, layers[len(layers) // 2], 0, opened.info.n_layers - 1)
        options: Any = [{"label": str(each), "value": each} for each in layers]
        pick = dcc.Dropdown(options, asked if asked in layers else layers[0], id="moe-layer", clearable=False, searchable=False, className="picker-narrow")
        return html.Div(html.Label([html.Span("Layer"), pick]), className="controls")

    return trace_page(__name__, trace, REQUIRES, state, build, "Which experts served which token.", controls)


@callback(
    Output("moe-load", "figure"), Output("moe-repeats", "figure"),
    Input("moe-layer", "value"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_layers(layer: int, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    routings = values.chosen_experts(trace)
    layers = [each.layer for each in routings]
    load = figures.load_heatmap(np.stack([each.counts for each in routings]), layers, layer, theme)
    if trace.n_tokens > 1:
        kept = figures.repeat_lines([moe.repeats(each.indices, each.n_experts) for each in routings], layers, routings[0].k, layer, theme)
    else:
        kept = no_figure(theme, "A single token follows no other.")
    return load, kept


@callback(Output("moe-measures", "children"), Output("moe-measures-said", "children"), Input("moe-layer", "value"), Input("theme", "data"), State("page-state", "data"))
def show_measures(layer: int, _: str, page: dict[str, Any]):
    """On its own: it reads the router's scores of every layer, which takes longer than the pictures do.

    The theme is an input because Dash does not call, when a page opens, what depends only on outputs of callbacks that wait for a click.
    """
    trace = services().library.open(page["trace"])
    n, k = trace.info.n_experts, trace["expert_indices", layer].shape[1]
    said = f"{trace.n_tokens:,} tokens, {k} of {n} experts each. An even load has entropy ln {n} = {np.log(n):.3f}, Gini 0, CV 0, balance 1, Switch loss 1."
    return measures_table(values.measures(trace), n, layer), said


@callback(
    Output("moe-map", "figure"), Output("moe-map-said", "children"),
    Input("moe-layer", "value"), Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_map(layer: int, position: int | None, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    at = position_in(trace, position)
    start, stop = values.window(trace, at)
    figure = figures.first_choice_map(values.chosen_experts(trace), _labels(trace, start, stop), start, (layer, at), theme)
    return figure, f"One row a layer, one column a token; colour is the first expert. {_shown(trace, start, stop)}Click a cell to choose its layer and token."


@callback(
    Output("moe-strip", "children"), Output("moe-legend", "children"), Output("moe-strip-title", "children"), Output("moe-strip-said", "children"),
    Output("moe-tokens", "children"), Output("moe-tokens-said", "children"),
    Input("moe-layer", "value"), Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_strip(layer: int, position: int | None, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    at, routing = position_in(trace, position), trace.routing(layer)
    start, stop = values.window(trace, at)
    tokens = strip(routing, _labels(trace, start, stop), start, at, theme)
    labels, n, share = moe.specialisation(routing.indices, token_labels(trace.token_texts, trace.special), routing.n_experts)
    repeated = int((n > 1).sum())
    said = f"In layer {layer}: {len(labels):,} different tokens, {repeated:,} of which occur more than once."
    shown = f"{_shown(trace, start, stop)}Colour is the first expert; the hover names all {routing.k} with their weights."
    return tokens, legend(routing, theme), f"Experts of layer {layer}", shown, token_table([str(label) for label in labels], n, share), said


@callback(
    Output("moe-probs", "figure"), Output("moe-probs-said", "children"), Output("moe-margins", "figure"), Output("moe-margins-said", "children"),
    Input("moe-layer", "value"), Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_scores(layer: int, position: int | None, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    at, routing = position_in(trace, position), trace.routing(layer)
    start, stop = values.window(trace, at)
    labels = _labels(trace, start, stop)
    if routing.probs is None:
        probs, said = no_figure(theme, "This trace holds no router_probs."), f"Layer {layer}."
    else:
        probs = figures.router_heatmap(routing.probs[start:stop], labels, start, at, theme)
        said = f"Layer {layer}: one row an expert, one column a token. {_shown(trace, start, stop)}"
    scores, unit = (routing.logits, "logits") if routing.logits is not None else (routing.probs, "probability")
    if scores is None:
        return probs, said, no_figure(theme, "This trace holds neither router_logits nor router_probs."), f"Layer {layer}."
    margins = moe.margins(scores, routing.indices)
    return probs, said, figures.margin_bars(margins[start:stop], labels, start, at, unit, theme), _margin_words(layer, margins, moe.ties(scores, routing.indices))


@callback(
    Output("moe-together", "figure"), Output("moe-together-said", "children"), Output("moe-next", "figure"), Output("moe-next-said", "children"),
    Input("moe-layer", "value"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_pairs(layer: int, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    indices, n = trace["expert_indices", layer], trace.info.n_experts
    if indices.shape[1] > 1:
        counts = moe.co_activation(indices, n)
        together = figures.expert_pairs(moe.co_activation_share(indices, n), counts, "expert", "also expert", "share of the row's tokens", theme)
    else:
        together = no_figure(theme, "Each token has one expert only.")
    later = [each for each in routing_layers(trace) if each > layer]
    if not later:
        return together, f"Layer {layer}.", no_figure(theme, "No layer with experts follows."), f"From layer {layer}."
    moved = moe.transitions(indices, trace["expert_indices", later[0]], n)
    total = moved.sum(axis=1, keepdims=True)
    share = np.divide(moved, total, out=np.full(moved.shape, np.nan), where=total > 0)
    after = figures.expert_pairs(share, moved, f"layer {layer}, expert", f"layer {later[0]}, expert", "share of the row's tokens", theme)
    return together, f"Layer {layer}; a row without colour is an expert that no token chose.", after, f"First choices of layers {layer} and {later[0]}."


@callback(
    Output("moe-change", "figure"), Output("moe-alike", "children"), Output("moe-sentence", "children"), Output("moe-compared", "hidden"),
    Input("moe-against", "value"), Input("moe-layer", "value"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_comparison(against: str, layer: int, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    waiting = no_figure(theme, "The tokens of the two traces differ, so that only loads can be compared.")
    if not against or against == values.NONE:
        return waiting, "", "Choose another trace of a model with as many experts: another prompt, another quantization, or another engine.", True
    try:
        other = services().library.open(against)
        found = compare(trace, other)
    except LayerscopeError as problem:
        return waiting, "", str(problem), True
    changes = [(each.layer, each.change.share, each.change.first.mean()) for each in found if each.change is not None]
    if changes:
        waiting = figures.change_lines([at for at, _, _ in changes], np.array([share for _, share, _ in changes]), np.array([first for _, _, first in changes]), layer, theme)
    return waiting, alike_table(found, layer), compared_words(trace, other, found), False


@callback(Output("moe-layer", "value"), Output("position", "data", allow_duplicate=True), Input("moe-map", "clickData"), State("position", "data"), State("page-state", "data"),
          prevent_initial_call=True)  # fmt: skip
def open_place(click: dict[str, Any] | None, position: int | None, page: dict[str, Any]):
    if not click:
        return no_update, no_update
    trace, point = services().library.open(page["trace"]), click["points"][0]
    return routing_layers(trace)[int(point["y"])], values.window(trace, position_in(trace, position))[0] + int(point["x"])


@callback(Output("moe-layer", "value", allow_duplicate=True), Input("moe-load", "clickData"), State("page-state", "data"), prevent_initial_call=True)
def open_layer(click: dict[str, Any] | None, page: dict[str, Any]):
    return routing_layers(services().library.open(page["trace"]))[int(click["points"][0]["y"])] if click else no_update


def _labels(trace: Trace, start: int, stop: int) -> list[str]:
    return token_labels(trace.token_texts, trace.special, 12)[start:stop]


def _shown(trace: Trace, start: int, stop: int) -> str:
    return "" if stop - start == trace.n_tokens else f"Positions {start} to {stop - 1} of {trace.n_tokens:,}. "


def _margin_words(layer: int, margins: Any, ties: list[tuple[int, list[int]]]) -> str:
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


keep_url({"layer": ("moe-layer", "value"), "against": ("moe-against", "value"), "effect": ("moe-effect-measure", "value"),
          "usage": ("moe-usage-view", "value")})  # fmt: skip

"""Activations: how large each site's values are, layer by layer and token by token, and what one layer holds.

The overview reads every layer of the chosen site once and keeps the summary in the derived cache; one layer is read on demand. Distributions,
massive activations and matrix inputs are cards of their own (components.distribution_cards, components.outlier_card).
"""

from __future__ import annotations

from typing import Any

import dash
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.analysis.activations import reduce_signed, robust_range
from backend.trace import Trace
from components.card import card, cards
from components.distribution_cards import RANGES, channel_card, distribution_card
from components.figures.activations import norms_heatmap, statistics_lines, token_dimension_map
from components.graph import graph, graph_tools
from components.outlier_card import DEFAULTS, limit_asked, outlier_card
from components.over_batch_views import norms_card
from components.services import services
from components.site_summary import largest_value, site_summary, statistics_table, viewable_sites
from components.states import missing
from components.token_label import token_labels
from components.trace_view import trace_page
from components.url_state import as_choice, as_int, keep_url

dash.register_page(__name__, path="/activations", name="Activations", order=4, icon="audio-waveform", description="How large the values are, and which stand out")

MAX_ROWS, MAX_COLUMNS = 256, 512
ABOUT_NORMS = (
    "The Euclidean length of the site's vector at each layer and token, all heads together. In the residual stream it grows with depth, and the first token often "
    "carries a far larger norm than the rest (massive activations, Sun et al. 2024): use the log scale there.",
)  # fmt: skip
ABOUT_MAP = (
    "One layer's values as captured: a row for each token, a column for each dimension. Blue is negative, red positive; the colour saturates at the 99.5th "
    "percentile of |x|, the hover gives the exact value.",
    f"Beyond {MAX_ROWS} tokens or {MAX_COLUMNS} dimensions a cell shows the value with the largest magnitude among those it stands for.",
)  # fmt: skip
ABOUT_STATISTICS = (
    "Over all tokens and dimensions of one layer. Kurtosis is Pearson's (3 for a normal distribution): in the hundreds, a few values dwarf the rest. "
    "NaN and infinite values are counted and left out of the moments.",
)


def layout(trace: str | None = None, site: str | None = None, layer: str | None = None, scale: str | None = None, inputs: str | None = None, big: str | None = None,
           times: str | None = None, dim: str | None = None, **state: str):  # fmt: skip
    def chosen(opened: Trace) -> tuple[str, int]:
        names = viewable_sites(opened)
        shown = as_choice(site, names, "resid_post" if "resid_post" in names else names[0])
        layers = opened.layers(shown)
        asked = as_int(layer, layers[len(layers) // 2], 0, opened.info.n_layers - 1)
        return shown, asked if asked in layers else layers[0]

    def build(opened: Trace) -> list[Any]:
        if not viewable_sites(opened):
            return [missing("resid_post", opened.id)]
        limits = limit_asked(big, DEFAULTS.size), limit_asked(times, DEFAULTS.ratio), limit_asked(dim, DEFAULTS.dimension)
        more = [norms_card(opened, state), distribution_card(as_choice(state.get("range"), list(RANGES), "whole")), outlier_card(opened, *limits), channel_card(opened, inputs)]
        return _cards(opened, as_choice(scale, ("linear", "log"), "linear"), chosen(opened)[0], more)

    def controls(opened: Trace) -> Any:
        return _pickers(opened, *chosen(opened)) if viewable_sites(opened) else None

    return trace_page(__name__, trace, (), state, build, "How large the values are, and which stand out.", controls)


def _pickers(trace: Trace, site: str, layer: int) -> html.Div:
    layers: Any = [{"label": str(v), "value": v} for v in trace.layers(site)]
    return html.Div(
        [
            html.Label([html.Span("Site"), dcc.Dropdown(viewable_sites(trace), site, id="act-site", clearable=False, className="picker-metric")]),
            html.Label([html.Span("Layer"), dcc.Dropdown(layers, layer, id="act-layer", clearable=False, searchable=False, className="picker-narrow")]),
        ],
        className="controls",
    )


def _cards(trace: Trace, scale: str, site: str, more: list[Any]) -> list[Any]:
    scales: Any = [{"label": "Linear", "value": "linear"}, {"label": "Log", "value": "log"}]
    choose = dcc.Dropdown(scales, scale, id="norm-scale", clearable=False, searchable=False, className="picker-narrow")
    n_layers = len(trace.layers(site))
    return [
        cards(
            card(html.Span("", id="norms-title"), graph("norms", height=130 + min(26 * max(n_layers, 4), 560)), "One row a layer, one column a token. Click a cell to look inside.",
                 [choose, *graph_tools("norms")], list(ABOUT_NORMS), className="wide"),
            card(html.Span("", id="map-title"), graph("act-map", height=470), html.Span("", id="map-subtitle"), graph_tools("act-map", "activations"),
                 list(ABOUT_MAP), className="wide"),
            card("Through depth", graph("act-statistics", height=230), "The chosen layer is dotted.", graph_tools("act-statistics", "statistics"),
                 list(ABOUT_STATISTICS), className="wide"),
            card("Statistics of each layer", html.Div(id="act-table", className="table-scroll table-tall"), html.Span("", id="act-bad"), about=list(ABOUT_STATISTICS),
                 className="wide"),
            *more,
        )
    ]  # fmt: skip


@callback(Output("act-layer", "options"), Output("act-layer", "value"), Input("act-site", "value"), State("act-layer", "value"), State("page-state", "data"),
          prevent_initial_call=True)  # fmt: skip
def offer_layers(site: str, layer: int, page: dict[str, Any]):
    layers = services().library.open(page["trace"]).layers(site)
    return [{"label": str(v), "value": v} for v in layers], layer if layer in layers else layers[0]


@callback(
    Output("norms", "figure"), Output("norms-title", "children"), Output("act-statistics", "figure"), Output("act-table", "children"), Output("act-bad", "children"),
    Input("act-site", "value"), Input("act-layer", "value"), Input("norm-scale", "value"), Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_overview(site: str, layer: int, scale: str, position: int | None, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    layers = trace.layers(site)
    norms, by_name = site_summary(trace, site)
    labels = token_labels(trace.token_texts, trace.special, 12)
    heatmap = norms_heatmap(norms, layers, labels, theme, scale == "log", (layer, _inside(position, trace)))
    lines = statistics_lines(by_name, layers, chosen=layer, theme=theme)
    bad = int(by_name["n_nan"].sum() + by_name["n_inf"].sum())
    said = f"{bad:,} values are NaN or infinite." if bad else "No value is NaN or infinite."
    return heatmap, f"Norm of {site}", lines, statistics_table(by_name, layers, layer), said


@callback(
    Output("act-map", "figure"), Output("map-title", "children"), Output("map-subtitle", "children"),
    Input("act-site", "value"), Input("act-layer", "value"), Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_map(site: str, layer: int, position: int | None, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    if layer not in trace.layers(site):
        return no_update, no_update, no_update  # the site has just changed; the layers that it offers follow
    values = trace[site, layer]
    flat = values.reshape(len(values), -1)
    reduced, rows, columns = reduce_signed(flat, MAX_ROWS, MAX_COLUMNS)
    labels = token_labels(trace.token_texts, trace.special, 12)
    head_width = values.shape[2] if values.ndim == 3 else None
    figure = token_dimension_map(reduced, (rows, columns), labels, robust_range(flat), theme, _inside(position, trace), head_width)
    return figure, f"{site} at layer {layer}", largest_value(trace, flat)


@callback(Output("act-layer", "value", allow_duplicate=True), Output("position", "data", allow_duplicate=True), Input("norms", "clickData"), State("act-site", "value"),
          State("page-state", "data"), prevent_initial_call=True)  # fmt: skip
def open_clicked(click: dict[str, Any] | None, site: str, page: dict[str, Any]):
    if not click:
        return no_update, no_update
    point = click["points"][0]
    return services().library.open(page["trace"]).layers(site)[int(point["y"])], int(point["x"])


def _inside(position: int | None, trace: Trace) -> int:
    return min(max(position or 0, 0), trace.n_tokens - 1)


keep_url({"site": ("act-site", "value"), "layer": ("act-layer", "value"), "scale": ("norm-scale", "value"), "range": ("band-range", "value"),
          "inputs": ("channel-site", "value"), "big": ("outlier-size", "value"), "times": ("outlier-ratio", "value"), "dim": ("outlier-dimension", "value")})  # fmt: skip

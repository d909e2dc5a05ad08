"""How a site's values are spread through its layers, and the energy of the channels that enter matrix products.

The page that shows these cards keeps `range` and `inputs` of its address in step with band-range and channel-site.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update
from numpy.typing import NDArray

from backend.analysis.distributions import CHANNEL_STATISTICS, QUANTILE_TITLES, channel_energy, channel_statistics, quantile_bands
from backend.trace import Trace
from components.card import card
from components.figures.distributions import quantile_lines
from components.graph import graph, graph_tools
from components.services import services

# What each site is the input of; where an architecture multiplies something else there, the site does not exist.
MATRIX_INPUTS = {"ln1_out": "W_Q, W_K, W_V", "z": "W_O", "ln2_out": "W_gate, W_in or the router and experts", "mlp_post": "W_out"}
RANGES = {"whole": "min to max", "inner": "1 to 99 %"}
ABOUT_BANDS = (
    "Quantiles of all values of a layer, tokens and dimensions together: the median, the middle half (dark), the middle 98 % (light), and the extremes (dotted). Linear "
    "interpolation, as NumPy's; NaN and infinite values are left out here and counted below the statistics.",
)
ABOUT_CHANNELS = (
    "What llama.cpp's llama-imatrix --show-statistics prints, computed from this trace's tokens: for each input channel of a matrix the mean of its squared values (Act²), and of "
    "these channel energies: sum, min, max, mean, standard deviation σ, the share above 1e-5 (active), their number N, the entropy of energy / sum in bits and as a share of "
    "log2 N, ZD (the share of channels with a z-score above 1; arXiv 2406.17415), and the cosine similarity with the layer before.",
    "Source: llama.cpp tools/imatrix/imatrix.cpp. llama-imatrix skips batches of fewer than 16 tokens and reads hundreds of thousands of tokens; this is one prompt.",
)  # fmt: skip


def distribution_card(range_asked: str) -> html.Section:
    """Quantile bands of the page's site. Its callback needs act-site, act-layer and the stores of the page."""
    ranges: Any = [{"label": label, "value": name} for name, label in RANGES.items()]
    choose = dcc.Dropdown(ranges, range_asked, id="band-range", clearable=False, searchable=False, className="picker-metric")
    return card(html.Span("", id="band-title"), graph("bands", height=250), "Median, middle half, middle 98 %, and the extremes dotted. The chosen layer is dotted too.",
                [choose, *graph_tools("bands", "distribution")], list(ABOUT_BANDS), className="wide")  # fmt: skip


def matrix_inputs(trace: Trace) -> list[str]:
    """Sites of this trace that are inputs of matrix products, in the order of computation."""
    return [site for site in MATRIX_INPUTS if trace.has(site)]


def channel_card(trace: Trace, site: str | None) -> html.Section | None:
    """Channel statistics of one matrix input; None where the trace holds none."""
    sites = matrix_inputs(trace)
    if not sites:
        return None
    options: Any = [{"label": name, "value": name} for name in sites]
    choose = dcc.Dropdown(options, site if site in sites else sites[-1], id="channel-site", clearable=False, searchable=False, className="picker-metric")
    return card("Channels of a matrix's input", html.Div(id="channel-table", className="table-scroll table-tall"), html.Span("", id="channel-said"), [choose],
                list(ABOUT_CHANNELS), className="wide")  # fmt: skip


@callback(
    Output("bands", "figure"), Output("band-title", "children"),
    Input("act-site", "value"), Input("act-layer", "value"), Input("band-range", "value"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_bands(site: str, layer: int, range_asked: str, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    layers = trace.layers(site)
    key = ("quantiles", trace.id, site)
    bands = services().derived.get_array(key)
    if bands is None:
        bands = np.stack([quantile_bands(trace[site, each]) for each in layers])
        services().derived.put_array(key, bands)
    return quantile_lines(bands, QUANTILE_TITLES, layers, theme, layer if layer in layers else None, range_asked == "whole"), f"Distribution of {site} through layers"


@callback(Output("channel-table", "children"), Output("channel-said", "children"), Input("channel-site", "value"), State("page-state", "data"))
def show_channels(site: str | None, page: dict[str, Any]):
    if site not in MATRIX_INPUTS:
        return no_update, no_update
    trace = services().library.open(page["trace"])
    statistics, bad = channels_of(trace, site)
    said = f"{site} enters {MATRIX_INPUTS[site]}; the energy of each channel over {trace.n_tokens:,} tokens. "
    return _table(statistics, trace.layers(site)), said + (f"{bad:,} values are NaN or infinite and left out." if bad else "")


def channels_of(trace: Trace, site: str) -> tuple[NDArray[np.float64], int]:
    """(layer, statistic) in the order of CHANNEL_STATISTICS, and how many values were not finite; computed once a trace and site."""
    derived, keys = services().derived, (("channels", trace.id, site), ("channels_bad", trace.id, site))
    known, bad = derived.get_array(keys[0]), derived.get_json(keys[1])
    if known is not None and bad is not None:
        return known, bad
    rows, bad = [], 0
    previous: tuple[int, NDArray[np.float64]] | None = None
    for layer in trace.layers(site):
        energy, n = channel_energy(trace[site, layer])
        before = previous[1] if previous is not None and previous[0] == layer - 1 else None
        found = channel_statistics(energy, before)
        rows.append([found[name] for name in CHANNEL_STATISTICS])
        bad, previous = bad + n, (layer, energy)
    table = np.array(rows, np.float64)
    derived.put_array(keys[0], table)
    derived.put_json(keys[1], bad)
    return table, bad


def _table(statistics: NDArray[np.float64], layers: list[int]) -> html.Table:
    head = html.Tr([html.Th("Layer"), *(html.Th(title, className="num") for title in CHANNEL_STATISTICS.values())])
    rows = [html.Tr([html.Td(str(layer)), *(html.Td(_shown(name, value), className="num") for name, value in zip(CHANNEL_STATISTICS, row, strict=True))])
            for layer, row in zip(layers, statistics, strict=True)]  # fmt: skip
    return html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact")


def _shown(name: str, value: float) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:,.0f}" if name == "n" else f"{value:.2%}" if name in ("active", "entropy_norm", "zd") else f"{value:.4g}"

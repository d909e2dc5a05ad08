"""The card of massive activations and outlier dimensions: found over the residual stream, followed through its layers.

The page that shows it keeps `big`, `times` and `dim` of its address in step with the inputs outlier-size, outlier-ratio and outlier-dimension.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dash import Input, Output, State, callback, dcc, html, no_update

from backend.analysis.outliers import Limits, OutlierDimension, Outliers, Peak, find_outliers, follow
from backend.trace import Trace
from components.card import card
from components.figures.distributions import followed_lines
from components.figures.theme import no_figure
from components.graph import graph, graph_tools
from components.services import services
from components.states import missing
from components.token_label import token_label

FOLLOWED = 8
ABOUT = (
    "Massive activations (Sun et al. 2024, arXiv 2402.17762): |x| above 100 and above 1,000 times the median |x| of that layer's residual stream (resid_post). They sit at a "
    "few tokens, often the first, in a few dimensions, and act as constant biases.",
    "Outlier dimensions (Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339): dimensions with |x| of at least 6 in 25 % of the layers and at 6 % of the tokens of all layers. They "
    "are what 8-bit quantization must spare. Small models often have neither: then the largest values are drawn, and it is said.",
)  # fmt: skip
DEFAULTS = Limits()


def limit_asked(text: str | None, default: float) -> float:
    """A positive number out of a query, or the default."""
    try:
        value = float(text) if text else default
    except ValueError:
        return default
    return value if 0 < value < 1e9 and math.isfinite(value) else default


def outlier_card(trace: Trace, size: float, ratio: float, dimension: float) -> html.Section:
    """The card, with the limits to begin with; its callbacks need the stores `position`, `theme` and `page-state`."""
    if not trace.has("resid_post"):
        return card("Massive activations and outlier dimensions", missing("resid_post", trace.id), about=list(ABOUT), className="wide")
    inputs = html.Div(
        [_number("|x| above", "outlier-size", size), _number("times the median", "outlier-ratio", ratio), _number("outlier dimension |x| ≥", "outlier-dimension", dimension)],
        className="controls outlier-limits",
    )
    tables = html.Div([html.Div(id="outlier-peaks", className="table-scroll"), html.Div(id="outlier-dimensions", className="table-scroll")], className="outlier-tables")
    return card("Massive activations and outlier dimensions", [inputs, graph("outlier-lines", height=260), tables], html.Span("", id="outlier-said"),
                graph_tools("outlier-lines", "massive-activations"), list(ABOUT), className="wide")  # fmt: skip


def _number(words: str, id: str, value: float) -> html.Label:
    return html.Label([html.Span(words), dcc.Input(id=id, type="number", value=value, min=1e-6, max=1e9, step="any", debounce=True, className="text-input number-input")])


@callback(
    Output("outlier-lines", "figure"), Output("outlier-peaks", "children"), Output("outlier-dimensions", "children"), Output("outlier-said", "children"),
    Input("outlier-size", "value"), Input("outlier-ratio", "value"), Input("outlier-dimension", "value"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show(size: float | None, ratio: float | None, dimension: float | None, theme: str, page: dict[str, Any]):
    if not size or not ratio or not dimension:
        return no_update, no_update, no_update, "Each limit must be a number above 0."
    trace = services().library.open(page["trace"])
    limits = Limits(float(size), float(ratio), float(dimension))
    found = scanned(trace, limits)
    shown = [peak for peak in found.peaks if peak.massive_in] or found.peaks
    shown = shown[:FOLLOWED]
    if not shown:
        return no_figure(theme, "No finite value."), "", "", _words(found, limits, 0)
    layers = trace.layers("resid_post")
    values = follow(((layer, trace["resid_post", layer]) for layer in layers), [(peak.position, peak.dimension) for peak in shown])
    names = [f"{_token(trace, peak.position)} ({peak.position}), dimension {peak.dimension}" for peak in shown]
    figure = followed_lines(values, names, layers, [bool(peak.massive_in) for peak in shown], limits.size, theme)
    return figure, _peaks(trace, shown), _dimensions(found.dimensions), _words(found, limits, len(shown))


def scanned(trace: Trace, limits: Limits) -> Outliers:
    """The scan of all layers, computed once a trace and limits."""
    key = ("outliers", trace.id, limits.size, limits.ratio, limits.dimension)
    known = services().derived.get_json(key)
    if known is None:
        known = dataclasses.asdict(find_outliers(((layer, trace["resid_post", layer]) for layer in trace.layers("resid_post")), limits))
        services().derived.put_json(key, known)
    return Outliers([Peak(**peak) for peak in known["peaks"]], [OutlierDimension(**each) for each in known["dimensions"]], known["n_massive"], known["n_bad"])


def _words(found: Outliers, limits: Limits, shown: int) -> str:
    n = sum(bool(peak.massive_in) for peak in found.peaks)
    said = f"{found.n_massive:,} values above {limits.size:g} and {limits.ratio:,g} times the median, at {n} places; " if n else "No value meets both limits; "
    said += f"the {min(shown, n)} largest are followed." if n else f"the {shown} largest values are followed instead."
    return said + (f" {found.n_bad:,} values are NaN or infinite." if found.n_bad else "")


def _token(trace: Trace, position: int) -> str:
    return token_label(trace.token_texts[position], position in trace.special, 12)


def _peaks(trace: Trace, peaks: list[Peak]) -> html.Table:
    names = ("Token", "Dimension", "Largest in layer", "Value", "× median", "Massive in")
    head = html.Tr([html.Th(name, className="num" if i else "") for i, name in enumerate(names)])
    rows = []
    for peak in peaks:
        token = html.Td([html.Span(_token(trace, peak.position), className="chip-token"), html.Span(f" {peak.position}", className="muted small")])
        massive = f"{peak.massive_in} layers" if peak.massive_in != 1 else "1 layer"
        cells = (peak.dimension, peak.layer, f"{peak.value:.5g}", f"{peak.ratio:,.0f}", massive if peak.massive_in else "–")
        rows.append(html.Tr([token, *(html.Td(cell, className="num") for cell in cells)]))
    return html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact")


def _dimensions(dimensions: list[OutlierDimension], most: int = 8) -> Any:
    if not dimensions:
        return html.P("No outlier dimension under these limits.", className="muted small")
    names = ("Outlier dimension", "Layers", "Tokens", "Largest |x|")
    head = html.Tr([html.Th(name, className="num" if i else "") for i, name in enumerate(names)])
    rows = [
        html.Tr([html.Td(each.dimension), *(html.Td(words, className="num") for words in (f"{each.layer_share:.0%}", f"{each.token_share:.1%}", f"{each.abs_max:.4g}"))])
        for each in dimensions[:most]
    ]
    more = html.P(f"and {len(dimensions) - most:,} more", className="muted small") if len(dimensions) > most else None
    return [html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact"), more]

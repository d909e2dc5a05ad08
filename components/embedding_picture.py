"""The picture of the Embeddings page: points, their colours with a legend, and what lies over them (the chosen token, its path, what was found).

The points are drawn by assets/point_cloud.js from what the callbacks here put into stores.
"""

from __future__ import annotations

from typing import Any

from dash import ClientsideFunction, Input, Output, State, callback, clientside_callback, dcc, html, no_update

from backend.analysis.embeddings import MIN_DIST, N_COMPONENTS, N_NEIGHBOURS, PERPLEXITY
from backend.reports.projection import LIMITS, METHODS
from backend.reports.vectors import MATRICES
from components.card import card
from components.embedding_choice import drawn_view
from components.embedding_cloud import COLOURS, cloud, cloud_key, cloud_tools, colour_options, coloured, legend, overlay, points
from components.embedding_source import SHOWN, SHOWN_PLAIN, View
from components.url_state import as_choice

PATHS = {"none": "None", "chosen": "Of the chosen token", "all": "All, faintly"}

ABOUT_CLOUD = (
    f"PCA: the directions of largest variance (Pearson 1901), exact; the axes say their share. UMAP (McInnes, Healy and Melville 2018): {N_NEIGHBOURS} exact nearest neighbours, "
    f"min_dist {MIN_DIST}. t-SNE (van der Maaten 2014): perplexity {PERPLEXITY:g}. Both start from the first {N_COMPONENTS} principal components and keep neighbourhoods; the "
    "distances between far groups and the sizes of groups mean nothing there.",
    "Several layers and traces share one projection, fitted on all of them, so that their points can be compared. At length 1 every vector is divided by its "
    "length first, and distances are angles. Rows with NaN or infinite values are left out and counted.",
    f"UMAP takes at most {LIMITS['umap']:,} vectors and t-SNE {LIMITS['tsne']:,}, a seeded random sample of more. At most {SHOWN[2]:,} points are "
    f"drawn in 2-D and {SHOWN[3]:,} in 3-D.",
    "Drag to move (3-D: to turn, with Shift to move), double click for all; the wheel zooms once the picture was clicked.",
)  # fmt: skip


def picture_card(asked: dict[str, str]) -> html.Section:
    """The card of the points, empty; asked: the page's query."""
    return card(html.Span("", id="emb-title"), _picture(asked), html.Span("", id="emb-said"), cloud_tools("embeddings"), list(ABOUT_CLOUD), className="fill cloud-card")


def _picture(asked: dict[str, str]) -> list[Any]:
    colour = as_choice(asked.get("colour"), list(COLOURS), "") or None
    paths: Any = [{"label": words, "value": name} for name, words in PATHS.items()]
    every: Any = [{"label": words, "value": name} for name, words in COLOURS.items()]  # a value that is not among the options would be dropped
    search = dcc.Input(id="emb-search", value=asked.get("find", "")[:100], placeholder="find a token, or #id", debounce=0.4, maxLength=100, className="text-input cloud-search")
    row = html.Div(
        [
            search,
            html.Label([html.Span("Colour"), dcc.Dropdown(every, colour, id="emb-colour", clearable=False, searchable=False, className="picker-metric")]),
            html.Div(html.Label([html.Span("Paths"), dcc.Dropdown(paths, as_choice(asked.get("paths"), list(PATHS), "chosen"), id="emb-paths", clearable=False, searchable=False,
                                                                  className="picker-metric")]), id="emb-paths-field", hidden=True),
        ],
        className="controls",
    )  # fmt: skip
    button = html.Button("Project them", id="emb-compute", className="btn btn-primary", n_clicks=0, hidden=True)
    waiting = html.Div([html.Div(id="emb-missing"), button, html.Div(id="emb-progress", className="home-progress")], className="cloud-waiting")
    found = html.Div(id="emb-found-said", className="cloud-found", role="status")
    return [row, found, html.Div(id="emb-legend"), waiting, html.Div(cloud(), id="emb-cloud-place", className="cloud-place")]


clientside_callback(ClientsideFunction("layerscope", "hasWebgl"), Output("emb-webgl", "data"), Input("emb-page", "data"))
clientside_callback(
    ClientsideFunction("layerscope", "drawCloud"), Output("emb-drawn", "data"),
    Input("emb-points", "data"), Input("emb-colours", "data"), Input("emb-overlay", "data"),
)  # fmt: skip


_STATE = (Input("emb-ready", "data"), Input("emb-webgl", "data"), Input("emb-found", "data"), Input("emb-row", "data"))


@callback(
    Output("emb-points", "data"), Output("emb-title", "children"), Output("emb-said", "children"), Output("emb-colour", "options"), Output("emb-colour", "value"),
    Output("emb-paths-field", "hidden"),
    *_STATE, State("emb-points", "data"), State("emb-colour", "value"), State("emb-page", "data"),
)  # fmt: skip
def show_points(spec: dict[str, Any] | None, webgl: bool | None, found: Any, row: int | None, now: dict[str, Any] | None, colour: str | None, page: dict[str, Any]):
    """Places and texts, sent again only where another set of points is drawn."""
    drawn = drawn_view(page, spec, webgl, found, row)
    if drawn is None:
        return None, "Projection", "", no_update, no_update, True
    shown, numbers = drawn
    new = points(shown, numbers) if not now or now["key"] != cloud_key(shown, numbers) else None
    options = colour_options(shown)
    value = colour if colour in [option["value"] for option in options] else options[0]["value"]
    several = shown.states is not None and len(shown.states.layers) > 1
    return new or no_update, _title(shown), _said(shown, len(numbers), bool(webgl)), options, value, not several


def _title(shown: View) -> str:
    choice = shown.spec.choice
    what = MATRICES.get(choice.what, choice.what)
    where = "" if shown.states is None or len(shown.states.layers) < 2 and choice.layer is None else f", layer {choice.layer}" if choice.layer is not None else ", all layers"
    return f"{METHODS[shown.spec.method]} of {what}{where}"


def _said(shown: View, n_drawn: int, webgl: bool) -> str:
    """How many vectors there are, and every reason why fewer points are seen."""
    facts, tied = shown.projection.facts, getattr(shown.vectors, "tied", False)
    parts = [f"{facts['n']:,} vectors of {facts['d']:,} dimensions."]
    if tied:
        parts.append("This model's W_U is its W_E (tied).")
    if facts["n_left_out"]:
        parts.append(f"{facts['n_left_out']:,} with NaN or infinite values are left out.")
    if facts["n_zero"]:
        parts.append(f"{facts['n_zero']:,} are 0{' and left out' if shown.spec.scale == 'unit' else ''}.")
    if facts["n_sampled_from"]:
        parts.append(f"{METHODS[shown.spec.method]} of a random sample of {len(shown.projection.rows):,}.")
    if n_drawn < len(shown.projection.rows):
        parts.append(f"{n_drawn:,} of {len(shown.projection.rows):,} points are drawn, a random sample{'' if webgl else f': without WebGL at most {SHOWN_PLAIN:,} are'}.")
    if not webgl:
        parts.append("This browser offers no WebGL: the points are drawn without it.")
    return " ".join(parts)


@callback(Output("emb-isolated", "data"), Input("emb-only", "data"), State("emb-isolated", "data"), prevent_initial_call=True)
def isolate(request: dict[str, Any] | None, now: str | None):
    """A class of the legend alone; pressed again, all of them."""
    return no_update if not request else None if request["value"] == now else str(request["value"])


@callback(
    Output("emb-colours", "data"), Output("emb-legend", "children"),
    *_STATE, Input("emb-colour", "value"), Input("emb-isolated", "data"), Input("theme", "data"), State("emb-page", "data"),
)  # fmt: skip
def show_colours(spec: dict[str, Any] | None, webgl: bool | None, found: Any, row: int | None, by: str | None, only: str | None, theme: str, page: dict[str, Any]):
    drawn = drawn_view(page, spec, webgl, found, row)
    if drawn is None:
        return None, None
    shown, numbers = drawn
    names = [option["value"] for option in colour_options(shown)]
    data, colours = coloured(shown, numbers, by if by in names else names[0], theme, only)
    return data, legend(colours, only)


@callback(
    Output("emb-overlay", "data"),
    *_STATE, Input("emb-paths", "value"), State("emb-page", "data"),
)  # fmt: skip
def show_overlay(spec: dict[str, Any] | None, webgl: bool | None, found: dict[str, Any] | None, row: int | None, paths: str, page: dict[str, Any]):
    drawn = drawn_view(page, spec, webgl, found, row)
    if drawn is None:
        return None
    return overlay(*drawn, row, (found or {}).get("rows", ()), paths, (found or {}).get("text"))

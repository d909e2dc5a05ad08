"""Embeddings: the rows of W_E and W_U, or the states that traces hold of a site, in two or three dimensions; paths of tokens through layers; nearest vectors.

Works for a model without a trace, and for one or several traces of one model. A projection is a job (backend.experiments.embeddings) and is kept; the points
are drawn by assets/point_cloud.js from what the callbacks here put into stores.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import dash
from dash import ClientsideFunction, Input, Output, State, callback, clientside_callback, ctx, dcc, html, no_update

from backend.analysis.embeddings import MIN_DIST, N_COMPONENTS, N_NEIGHBOURS, PERPLEXITY
from backend.errors import LayerscopeError
from backend.reports.projection import LIMITS, METHODS, SCALES, ProjectionSpec
from backend.reports.vectors import MATRICES, Choice
from backend.trace import Trace
from components import states
from components.card import card, cards
from components.embedding_choice import drawn_view
from components.embedding_cloud import COLOURS, cloud, cloud_key, cloud_tools, colour_options, coloured, legend, overlay, points
from components.embedding_neighbours import neighbours_card, shown_view
from components.embedding_source import SHOWN, SHOWN_PLAIN, Place, View, missing, place, trace_options, view
from components.figures.embeddings import explained_variance, norm_histogram
from components.figures.theme import no_figure
from components.graph import graph, graph_tools
from components.jobs_tray import job_or_none, job_panel
from components.services import services
from components.states import error
from components.trace_view import trace_page
from components.url_state import as_choice, as_int, keep_url

dash.register_page(__name__, path="/embeddings", name="Embeddings", order=12, group="This model", icon="sparkles", takes_trace=True,
                   description="Tokens and hidden states as points, and which are near each other")  # fmt: skip

SUBTITLE = "Tokens and hidden states as points, and which are near each other."
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
ABOUT_NORMS = ("The Euclidean length of every vector, those that a sample leaves out as well. Tokens that training hardly touched keep a length of their own: look at both ends.",)
ABOUT_VARIANCE = (f"The first {N_COMPONENTS} principal components of the vectors that were projected; UMAP and t-SNE see these and nothing else. Few "
                  "components that hold most of the variance: a narrow cone, or outlier dimensions.",)  # fmt: skip


def layout(model: str | None = None, trace: str | None = None, traces: str | None = None, **asked: str) -> html.Div:
    usable = [entry.name for entry in services().library.models() if entry.error is None]
    more = tuple(part for part in (traces or "").split(",") if part)
    if trace:
        def build(opened: Trace) -> list[Any]:
            return _body(place(None, (opened.id, *more)), opened.id, asked)

        return trace_page(__name__, trace, (), asked, build, SUBTITLE)
    if model is None and not more and not usable:
        return _page(None, usable, [states.empty("No model found", "Put a .gguf file or a folder of safetensors into the models folder, then reload this page.")])
    try:
        found = place(model or (usable[0] if usable else None), more)
        return _page(found, usable, _body(found, None, asked))
    except LayerscopeError as problem:
        return _page(None, usable, [states.error(str(problem))])


def _page(found: Place | None, models: list[str], body: list[Any]) -> html.Div:
    picker = html.Label([html.Span("Model"), dcc.Dropdown(models, found.model if found else None, id="emb-model", clearable=False, className="picker-model")])
    title = html.Div([html.H1("Embeddings"), html.Span(SUBTITLE, className="page-subtitle"), html.Div(picker, className="controls page-controls")], className="page-title")
    return html.Div([title, dcc.Location(id="emb-go-model", refresh="callback-nav"), *body], className="page")


def _body(found: Place, trace: str | None, asked: dict[str, str]) -> list[Any]:
    sources = found.sources()
    if not sources:
        return [states.error(f"Neither the model nor the trace can be looked into: {found.why_no_model or 'the trace holds no site with one vector a position.'}")]
    first = "resid_post" if "resid_post" in sources else sources[0] if found.entry is None or not found.traces else next((s for s in sources if s not in MATRICES), sources[0])
    what = as_choice(asked.get("what"), sources, first if found.traces else sources[0])
    page = {"model": found.model, "traces": list(found.traces), "trace": trace}
    row = asked.get("row")
    held: dict[str, Any] = {"emb-page": page, "emb-spec": None, "emb-ready": None, "emb-job": None, "emb-done": None, "emb-include": None, "emb-webgl": None, "emb-only": None,
                            "emb-isolated": asked.get("only") or None, "emb-found": None, "emb-row": as_int(row, 0, 0, 1 << 31) if row else None,
                            "emb-shown-model": None if trace else found.model, "emb-others": [one for one in found.traces if one != trace]}  # fmt: skip
    return [
        *(dcc.Store(id=name, data=data) for name, data in held.items()),
        dcc.Location(id="emb-go", refresh="callback-nav"),
        _pickers(found, sources, what, trace, asked),
        html.Div(
            [
                card(html.Span("", id="emb-title"), _picture(asked), html.Span("", id="emb-said"), cloud_tools("embeddings"), list(ABOUT_CLOUD), className="fill cloud-card"),
                neighbours_card(),
            ],
            className="cards cards-wide-left",
        ),
        cards(
            card("Lengths", graph("emb-norms", height=280, className="fill"), html.Span("", id="emb-norms-said"), graph_tools("emb-norms", "embedding-lengths"), list(ABOUT_NORMS),
                 className="fill"),
            card("Variance of the principal components", graph("emb-variance", height=280, className="fill"), html.Span("", id="emb-variance-said"),
                 graph_tools("emb-variance", "explained-variance"), list(ABOUT_VARIANCE), className="fill"),
        ),
    ]  # fmt: skip


def _pickers(found: Place, sources: list[str], what: str, trace: str | None, asked: dict[str, str]) -> html.Div:
    def menu(label: str, id: str, options: Any, value: Any, className: str = "picker-metric", **more: Any) -> html.Label:
        return html.Label([html.Span(label), dcc.Dropdown(options, value, id=id, className=className, **{"clearable": False, "searchable": False, **more})])

    names: Any = [{"label": MATRICES.get(name, name), "value": name} for name in sources]
    layer = asked.get("layer", "all")
    layers = found.layers(what)
    value = int(layer) if layer.isdecimal() and int(layer) in layers else "all"
    scale = as_choice(asked.get("scale"), list(SCALES), "raw" if what in MATRICES else "unit")
    options: Any = [option for option in trace_options(found) if option["value"] != trace]
    others = [one for one in found.traces if one != trace]
    traces = menu("More traces" if trace else "Traces", "emb-traces", options, others, "picker-traces", multi=True, searchable=True, clearable=True, placeholder="none")
    methods: Any = [{"label": words, "value": name} for name, words in METHODS.items()]
    return html.Div(
        [
            menu("Show", "emb-what", names, what, "picker-site"),
            html.Div(menu("Layer", "emb-layer", _layer_options(layers), value, "picker-narrow"), id="emb-layer-field", hidden=not layers),
            menu("Method", "emb-method", methods, as_choice(asked.get("method"), list(METHODS), "pca"), "picker-narrow"),
            menu("Axes", "emb-dims", [{"label": "2-D", "value": 2}, {"label": "3-D", "value": 3}], as_int(asked.get("dims"), 2, 2, 3), "picker-narrow"),
            menu("Vectors", "emb-scale", [{"label": words, "value": name} for name, words in SCALES.items()], scale),
            traces if options or others else html.Div(dcc.Dropdown([], [], id="emb-traces", multi=True), hidden=True),
        ],
        className="controls embedding-controls",
    )  # fmt: skip


def _layer_options(layers: list[int]) -> Any:
    return [{"label": "all", "value": "all"}, *({"label": str(layer), "value": layer} for layer in layers)]


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


# -- another model, other traces ---------------------------------------------------------------------------------------------------------


@callback(Output("emb-go-model", "href"), Input("emb-model", "value"), State("emb-shown-model", "data"), prevent_initial_call=True)
def open_model(model: str | None, now: str | None):
    return f"/embeddings?{urlencode({'model': model})}" if model and model != now else no_update


@callback(Output("emb-go", "href"), Input("emb-traces", "value"), State("emb-page", "data"), State("emb-what", "value"), State("emb-method", "value"), State("emb-dims", "value"),
          prevent_initial_call=True)  # fmt: skip
def open_traces(chosen: list[str] | None, page: dict[str, Any], what: str, method: str, dims: int):
    """The page again with other traces: what they hold in common decides what can be chosen."""
    others = [one for one in page["traces"] if one != page["trace"]]
    if (chosen or []) == others:
        return no_update
    first = {"trace": page["trace"]} if page["trace"] else {"model": page["model"]}
    kept = {} if what in MATRICES and not others and not page["trace"] else {"what": what}
    return f"/embeddings?{urlencode({**first, **kept, 'method': method, 'dims': dims, 'traces': ','.join(chosen or [])})}"


# -- the projection and its job ------------------------------------------------------------------------------------------------------------


@callback(
    Output("emb-spec", "data"), Output("emb-layer", "options"), Output("emb-layer", "value"), Output("emb-layer-field", "hidden"),
    Input("emb-what", "value"), Input("emb-layer", "value"), Input("emb-method", "value"), Input("emb-dims", "value"), Input("emb-scale", "value"), Input("emb-include", "data"),
    State("emb-page", "data"),
)  # fmt: skip
def specify(what: str, layer: Any, method: str, dims: int, scale: str, include: list[int] | None, page: dict[str, Any]):
    """What the controls ask for, as one value."""
    found = place(page["model"], tuple(page["traces"]))
    layers = found.layers(what)
    layer = layer if layer in layers else "all"
    traces = () if what in MATRICES else found.traces
    choice = Choice(found.model, what, traces, None if layer == "all" else int(layer))
    spec = ProjectionSpec(choice, method, int(dims), scale, include=tuple(include or ()) if ctx.triggered_id == "emb-include" else ()).checked()
    return spec.to_json(), _layer_options(layers), layer, not layers


@callback(
    Output("emb-ready", "data"), Output("emb-missing", "children"), Output("emb-compute", "hidden"), Output("emb-cloud-place", "hidden"), Output("emb-job", "data"),
    Output("emb-progress", "children"),
    Input("emb-spec", "data"), Input("emb-done", "data"), Input("emb-compute", "n_clicks"), State("emb-page", "data"), State("emb-job", "data"),
)  # fmt: skip
def prepare(spec: dict[str, Any] | None, _: str | None, clicks: int | None, page: dict[str, Any], job_id: str | None):
    """The projection if it is there; else what it costs and its job, which begins at once where that is seconds. A job that nobody waits for any more is cancelled."""
    if spec is None:
        return (no_update,) * 6
    if ctx.triggered_id == "emb-spec" and (job := job_or_none(job_id)) is not None and job.is_active:
        services().jobs.cancel(job.id)
    wanted = ProjectionSpec.from_json(spec)
    try:
        found = place(page["model"], tuple(page["traces"]))
        if view(found, wanted) is not None:
            return spec, None, True, False, None, None
        words, at_once = missing(found, wanted)
        if not at_once and ctx.triggered_id != "emb-compute":
            return None, words, False, True, None, None
        title = f"{METHODS[wanted.method]} of {MATRICES.get(wanted.choice.what, wanted.choice.what)}, {wanted.choice.model}"
        return None, words, True, True, services().jobs.submit("embeddings", spec, title).id, None
    except LayerscopeError as problem:
        return None, error(str(problem)), True, True, None, None


@callback(
    Output("emb-progress", "children", allow_duplicate=True), Output("emb-done", "data"), Output("emb-compute", "hidden", allow_duplicate=True),
    Input("emb-job", "data"), Input("jobs-now", "data"), State("emb-done", "data"), prevent_initial_call=True,
)  # fmt: skip
def follow(job_id: str | None, _: Any, done: str | None):
    """The job's progress; when it failed, why, with the button to try again."""
    job = job_or_none(job_id)
    if job is None or job.id == done:
        return no_update, no_update, no_update
    if job.state == "done":
        return no_update, job.id, no_update
    return (job_panel(job), no_update, True) if job.is_active else (error(job.error or f"The job was {job.state.replace('_', ' ')}."), no_update, False)


# -- the picture ---------------------------------------------------------------------------------------------------------------------------

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


@callback(
    Output("emb-norms", "figure"), Output("emb-norms-said", "children"), Output("emb-variance", "figure"), Output("emb-variance-said", "children"),
    Input("emb-ready", "data"), Input("theme", "data"), State("emb-page", "data"),
)  # fmt: skip
def show_facts(spec: dict[str, Any] | None, theme: str, page: dict[str, Any]):
    shown = shown_view(page, spec)
    if shown is None:
        waiting = no_figure(theme, "Shown once the vectors are projected.")
        return waiting, "", waiting, ""
    norms, ratio = shown.projection.norms, shown.projection.ratio
    finite = norms[norms == norms]
    ends = [int(i) for i in (norms == finite.min()).nonzero()[0][:1]] + [int(i) for i in (norms == finite.max()).nonzero()[0][:1]]
    said = f"From {finite.min():.4g} ({shown.label(ends[0])}, {shown.where(ends[0])}) to {finite.max():.4g} ({shown.label(ends[-1])}, {shown.where(ends[-1])})."
    told = f"The first two hold {100 * ratio[:2].sum():.1f} %, the first {len(ratio)} together {100 * ratio.sum():.1f} %." if len(ratio) > 1 else ""
    return norm_histogram(norms, _Names(shown), theme), said, explained_variance(ratio, theme), told


class _Names:
    """What vectors are called, made when a hover needs it: of a vocabulary only a few are."""

    def __init__(self, shown: View) -> None:
        self._shown = shown

    def __getitem__(self, row: int) -> str:
        return self._shown.label(int(row)) if self._shown.states is None else f"{self._shown.label(int(row))} ({self._shown.where(int(row))})"

    def __len__(self) -> int:
        return self._shown.vectors.shape[0]


keep_url({
    "model": ("emb-shown-model", "data"), "traces": ("emb-others", "data"), "what": ("emb-what", "value"), "layer": ("emb-layer", "value"), "method": ("emb-method", "value"),
    "dims": ("emb-dims", "value"), "scale": ("emb-scale", "value"), "colour": ("emb-colour", "value"), "only": ("emb-isolated", "data"), "paths": ("emb-paths", "value"),
    "find": ("emb-search", "value"), "row": ("emb-row", "data"),
})  # fmt: skip

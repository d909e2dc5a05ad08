"""Weights: every tensor of a model, what its numbers look like, and the matrix itself. No trace is needed.

A job reads the model once and keeps the report; another looks closely at one matrix when it is chosen. What the picture of a matrix
shows is read from the file, a few rows at a time.
"""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import urlencode

import dash
import numpy as np
from dash import Input, Output, Patch, State, callback, ctx, dcc, html, no_update
from dash.exceptions import PreventUpdate

from backend.analysis.weights import NEAR_ZERO_SIGMAS, STATISTICS, by_component, joint
from backend.errors import LayerscopeError
from backend.estimate import in_bytes
from backend.reports.weight_results import WeightReport
from components import states
from components.card import card, cards, full_screen_button
from components.figures.theme import no_figure
from components.figures.weights import SCALES, statistic_heatmap
from components.graph import graph, graph_tools
from components.services import services
from components.url_state import as_choice, as_int, keep_url
from components.weight_source import Source, follow, report_missing, reported, source
from components.weight_table import candidate_list, statistics_csv, tensor_grid
from components.weight_tensor import matrix_options, tensor_cards

dash.register_page(__name__, path="/weights", name="Weights", order=10, group="This model", icon="weight", description="Every tensor, and what its numbers look like")

ABOUT_TABLE = (
    "One row a tensor of the file, dequantized as the kernels see it (ggml's to_float). The standard deviation is the population's; kurtosis is Pearson's, 3 for a normal "
    f"distribution. Near zero: |w| up to {NEAR_ZERO_SIGMAS:g} standard deviations. NaN and infinite weights are counted and left out of the rest.",
    "Canonical names follow TransformerLens. A fused tensor carries several.",
)  # fmt: skip
ABOUT_STATISTIC = (
    "One statistic of every tensor that belongs to a layer, components in the order of a forward pass. Each component by itself: from its least to its greatest value, since "
    "a norm's gains dwarf a matrix' weights. Experts that a file stores one by one are taken together.",
)
ABOUT_CANDIDATES = (
    "The largest |w| of every layer's W_out, in standard deviations of its tensor. Yu et al. 2024 (arXiv 2411.07191) found single weights there without which a model "
    "writes nonsense. They are among the largest of their matrix, but most large weights are none: what is listed here are candidates, and only removing one shows what it does.",
)
SUBTITLE = "Every tensor, and what its numbers look like."


def layout(model: str | None = None, tensor: str | None = None, stat: str | None = None, scale: str | None = None, counts: str | None = None, index: str | None = None,
           zoom: str | None = None, **_: str) -> html.Div:  # fmt: skip
    usable = [entry.name for entry in services().library.models() if entry.error is None]
    if model is None and not usable:
        return _page(None, usable, [states.empty("No model found", "Put a .gguf file or a folder of safetensors into the models folder, then reload this page.")])
    name = model or usable[0]
    asked = {
        "tensor": tensor, "stat": as_choice(stat, list(STATISTICS), "std"), "scale": as_choice(scale, SCALES, "each"),
        "counts": as_choice(counts, ("linear", "log"), "linear"), "index": as_int(index, 0, 0, 1 << 20), "zoom": zoom,
    }  # fmt: skip
    try:
        found = source(name)
        report = found.report
        shown = report_missing(found) if report is None else _cards(found, report, asked)
    except LayerscopeError as problem:
        return _page(None, usable, [states.error(str(problem))])
    state = dcc.Store(id="weights-page", data={"model": found.entry.name, "asked": asked})
    return _page(found, usable, [state, html.Div(shown, className="card-stack", **({"id": "weights-body"} if report is None else {}))])


def _page(found: Source | None, models: list[str], body: list[Any]) -> html.Div:
    name = found.entry.name if found else None
    picker = html.Label([html.Span("Model"), dcc.Dropdown(models, name, id="weights-model", clearable=False, className="picker-model")])
    info = found.entry.info if found else None
    facts = f"{info.architecture}, {info.quantization}, {info.n_params / 1e6:,.1f} M weights, {in_bytes(info.n_bytes)}" if info else SUBTITLE
    title = html.Div([html.H1("Weights"), html.Span(facts, className="page-subtitle"), html.Div(picker, className="controls page-controls")], className="page-title")
    return html.Div([title, dcc.Location(id="weights-go", refresh="callback-nav"), *body], className="page")


def _cards(found: Source, report: WeightReport, asked: dict[str, Any]) -> Any:
    """The cards; `asked` is the state of the address."""
    if not report.rows:
        return states.empty("No tensors", "This file holds no tensor.")
    chosen = _number_asked(report, asked["tensor"])
    n_layers = len({row["layer"] for row in report.rows if row["layer"] is not None})
    search = dcc.Input(id="weights-search", placeholder="search names, types", debounce=0.2, className="text-input grid-search", maxLength=100)
    save = html.Button("CSV", id="weights-save", className="tool", title="Save all statistics as CSV")
    said = f"{len(report.rows):,} tensors. Click a column to sort by it, a row to look into the tensor."
    heatmap = graph("weights-stat", height=min(max(150 + 22 * n_layers, 330), 640), className="fill")
    stores = {"weights-shown": found.entry.name, "weights-tensor": chosen, "weights-region": asked["zoom"] or "", "weights-name": None, "weights-mark": None,
              "weights-jump": None, "weights-detail-ready": None}  # fmt: skip
    return [
        *(dcc.Store(id=name, data=value) for name, value in stores.items()),
        dcc.Download(id="weights-file"),
        cards(
            card("Tensors", tensor_grid(report, chosen), said, [search, save, full_screen_button()], list(ABOUT_TABLE), className="wide"),
            card("Layers and components", [_statistic_pickers(asked), heatmap], "Layers down, components across. Click a cell to look into its tensor.",
                 graph_tools("weights-stat", "weight-statistics"), list(ABOUT_STATISTIC), className="fill"),
            card("Super-weight candidates", candidate_list(report), "The largest weights of every layer's W_out. Click a place to see it.", [], list(ABOUT_CANDIDATES)),
            *tensor_cards(report.rows[chosen], asked["counts"], asked["index"]),
        ),
        html.Div(id="weights-detail"),
    ]  # fmt: skip


def _statistic_pickers(asked: dict[str, Any]) -> html.Div:
    names: Any = [{"label": words, "value": name} for name, words in STATISTIC_TITLES.items()]
    scales: Any = [{"label": label, "value": value} for label, value in zip(("each component by itself", "linear", "log"), SCALES, strict=True)]
    choose = dcc.Dropdown(names, asked["stat"], id="weights-stat-name", clearable=False, searchable=False, className="picker-metric")
    scale = dcc.Dropdown(scales, asked["scale"], id="weights-scale", clearable=False, searchable=False, className="picker-metric")
    return html.Div([html.Label([html.Span("Statistic"), choose]), html.Label([html.Span("Colour"), scale])], className="controls")


STATISTIC_TITLES = {
    "std": "Standard deviation", "mean": "Mean", "abs_max": "Largest |w|", "kurtosis": "Kurtosis", "near_zero": "Near zero", "l2": "L2 norm", "outliers": "Beyond 6 σ",
    "min": "Min", "max": "Max", "n_nan": "NaN", "n_inf": "Infinite",
}  # fmt: skip


def _number_asked(report: WeightReport, name: str | None) -> int:
    """The tensor of the address, or one worth looking at: the first W_out, else the first matrix."""
    try:
        if name:
            return report.row(name)[0]
    except LayerscopeError:
        pass  # a link to another model's tensor shows this one's first
    worth = (lambda row: row["layer"] is not None and "W_out" in row["component"], lambda row: len(row["shape"]) > 1, lambda row: True)
    return next(i for wanted in worth for i, row in enumerate(report.rows) if wanted(row))


# -- the model, and the job that reads it ---------------------------------------------------------------------------------------------


@callback(Output("weights-go", "href"), Input("weights-model", "value"), State("weights-page", "data"), prevent_initial_call=True)
def open_model(model: str | None, page: dict[str, Any] | None):
    if not model or (page and model == page["model"]):
        return no_update
    return f"/weights?{urlencode({'model': model})}"


@callback(Output("weights-job", "data"), Input("weights-compute", "n_clicks"), State("weights-page", "data"))
def read_model(clicks: int, page: dict[str, Any]):
    """Queue the job, at once where the page was made with the button pressed."""
    return services().jobs.submit("weight_report", {"model": page["model"]}, f"Weights of {page['model']}").id if clicks else no_update


@callback(Output("weights-progress", "children"), Output("weights-ready", "data"), Input("weights-job", "data"), Input("jobs-now", "data"), prevent_initial_call=True)
def follow_reading(job_id: str | None, _: Any):
    return follow(job_id)


@callback(Output("weights-body", "children"), Input("weights-ready", "data"), State("weights-page", "data"), prevent_initial_call=True)
def show_read(job_id: str | None, page: dict[str, Any]):
    """The cards, in place of the sentence that nothing was read."""
    return _cards(*reported(page["model"]), page["asked"]) if job_id else no_update


# -- choosing a tensor ------------------------------------------------------------------------------------------------------------------


@callback(Output("weights-grid", "dashGridOptions"), Input("weights-search", "value"), prevent_initial_call=True)
def search(text: str | None):
    options = Patch()
    options["quickFilterText"] = text or ""
    return options


@callback(Output("weights-file", "data"), Input("weights-save", "n_clicks"), State("weights-page", "data"), prevent_initial_call=True)
def save(clicks: int | None, page: dict[str, Any]):
    found, report = reported(page["model"])
    return dcc.send_string(statistics_csv(report), f"weights-{found.entry.path.stem}.csv") if clicks else no_update


@callback(
    Output("weights-tensor", "data"), Output("weights-grid", "selectedRows"), Output("weights-mark", "data"), Output("weights-region", "data"), Output("weights-index", "options"),
    Output("weights-index", "value"), Output("weights-index-field", "hidden"),
    Input("weights-grid", "selectedRows"), Input("weights-stat", "clickData"), Input("weights-jump", "data"), State("weights-tensor", "data"), State("weights-page", "data"),
    prevent_initial_call=True,
)  # fmt: skip
def choose(selected: Any, click: dict[str, Any] | None, jump: dict[str, str] | None, now: int, page: dict[str, Any]):
    """A row of the table, a cell of the heatmap or a candidate chooses the tensor; a candidate also its place."""
    report = reported(page["model"])[1]
    if ctx.triggered_id == "weights-jump" and jump:
        return _opened(report, *_place_of(report, str(jump["value"])))
    chosen = now
    if ctx.triggered_id == "weights-stat" and click:
        chosen = _clicked(report, click["points"][0])
    elif ctx.triggered_id == "weights-grid" and selected:
        row = selected["ids"][0] if isinstance(selected, dict) and selected.get("ids") else selected[0]["id"] if isinstance(selected, list) else now
        chosen = min(max(int(row), 0), len(report.rows) - 1)
    if chosen == now:
        raise PreventUpdate
    return _opened(report, chosen)


def _opened(report: WeightReport, number: int, mark: dict[str, int] | None = None, region: str = "", matrix: int = 0) -> tuple[Any, ...]:
    """What `choose` writes. The picker gets its options and its value at once: a value that is not among its options would be dropped."""
    matrices = matrix_options(report.rows[number])
    return number, {"ids": [str(number)]}, mark, region, matrices, matrix, len(matrices) < 2


def _clicked(report: WeightReport, point: dict[str, Any]) -> int:
    layers, components, places = _grid_of(report)
    rows = places[components[int(point["x"])]].get(layers[int(point["y"])], [])
    return report.row(rows[0]["name"])[0] if rows else 0


def _place_of(report: WeightReport, text: str) -> tuple[int, dict[str, int], str, int]:
    """ "3, 788, 2427|blk.1.ffn_down_exps.weight": the tensor, the place to mark, a part of the matrix around it, the number of the matrix."""
    place, _, name = text.partition("|")
    number, row = report.row(name)
    at = [int(i) for i in place.split(",")]
    matrix = int(np.ravel_multi_index(at[:-2], row["shape"][:-2])) if len(at) > 2 else 0
    around = ",".join(f"{max(i - 24, 0)}-{i + 25}" for i in at[-2:])
    return number, {"row": at[-2], "column": at[-1]}, around, matrix


def _grid_of(report: WeightReport) -> tuple[list[int], list[str], dict[str, dict[int, list[dict[str, Any]]]]]:
    places = by_component(report.rows)
    return sorted({layer for component in places.values() for layer in component}), list(places), places


# -- pictures -----------------------------------------------------------------------------------------------------------------------------


@callback(
    Output("weights-stat", "figure"),
    Input("weights-stat-name", "value"), Input("weights-scale", "value"), Input("weights-tensor", "data"), Input("theme", "data"), State("weights-page", "data"),
)  # fmt: skip
def show_statistic(name: str, scale: str, chosen: int, theme: str, page: dict[str, Any]):
    report = reported(page["model"])[1]
    layers, components, places = _grid_of(report)
    if not layers:
        return no_figure(theme, "No tensor of this model belongs to a layer.")
    values = np.array([[joint(places[component][layer])[name] if layer in places[component] else math.nan for component in components] for layer in layers])
    row = report.rows[chosen]
    return statistic_heatmap(values, layers, components, STATISTICS[name], scale, (row["layer"], row["component"]), theme)


@callback(Output("weights-name", "data"), Input("weights-tensor", "data"), State("weights-page", "data"))
def name_of(chosen: int, page: dict[str, Any]):
    """The tensor's name, for the address: numbers would mean something else in another file."""
    return reported(page["model"])[1].rows[chosen]["name"]


keep_url({
    "model": ("weights-shown", "data"), "tensor": ("weights-name", "data"), "stat": ("weights-stat-name", "value"), "scale": ("weights-scale", "value"),
    "counts": ("weights-counts", "value"), "index": ("weights-index", "value"), "zoom": ("weights-region", "data"),
})  # fmt: skip

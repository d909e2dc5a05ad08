"""The cards of a model's weight report: the table of tensors, one statistic by layer and component, super-weight candidates, and those of the chosen tensor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dash import Input, Output, State, callback, dcc, html

from backend.analysis.weights import NEAR_ZERO_SIGMAS, STATISTICS, joint
from backend.errors import LayerscopeError
from backend.reports.weight_results import WeightReport
from components import states
from components.card import card, cards, full_screen_button
from components.figures.theme import no_figure
from components.figures.weights import SCALES, statistic_heatmap
from components.graph import graph, graph_tools
from components.weight_choice import grid_of
from components.weight_source import Source, reported
from components.weight_table import candidate_list, tensor_grid
from components.weight_tensor import tensor_cards

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
STATISTIC_TITLES = {
    "std": "Standard deviation", "mean": "Mean", "abs_max": "Largest |w|", "kurtosis": "Kurtosis", "near_zero": "Near zero", "l2": "L2 norm", "outliers": "Beyond 6 σ",
    "min": "Min", "max": "Max", "n_nan": "NaN", "n_inf": "Infinite",
}  # fmt: skip


def report_cards(found: Source, report: WeightReport, asked: dict[str, Any]) -> Any:
    """The cards; `asked` is the state of the address."""
    if not report.rows:
        return states.empty("No tensors", "This file holds no tensor.")
    chosen = _number_asked(report, asked["tensor"])
    n_layers = len({row["layer"] for row in report.rows if row["layer"] is not None})
    search = dcc.Input(id="weights-search", placeholder="search names, types", debounce=0.2, className="text-input grid-search", maxLength=100)
    save = html.Button("CSV", id="weights-save", className="tool", title="Save all statistics as CSV")
    said = f"{len(report.rows):,} tensors. Click a column to sort by it, a row to look into the tensor."
    heatmap = graph("weights-stat", height=min(max(150 + 22 * n_layers, 330), 640), className="fill")
    stores = {"weights-shown": found.entry.name, "weights-tensor": chosen, "weights-region": asked["zoom"] or "", "weights-name": None, "weights-mark": asked["mark"],
              "weights-jump": None, "weights-detail-ready": None}  # fmt: skip
    return [
        *(dcc.Store(id=name, data=value) for name, value in stores.items()),
        dcc.Download(id="weights-file"),
        cards(
            card("Tensors", tensor_grid(report, chosen), said, [search, save, full_screen_button()], list(ABOUT_TABLE), className="wide"),
            card("Layers and components", [_statistic_pickers(asked), heatmap], "Layers down, components across. Click a cell to look into its tensor.",
                 graph_tools("weights-stat", "weight-statistics"), list(ABOUT_STATISTIC), className="fill"),
            card("Super-weight candidates", candidate_list(report, found.entry.name), "The largest weights of every layer's W_out. Click a place to see it.", [],
                 list(ABOUT_CANDIDATES)),
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


def _number_asked(report: WeightReport, name: str | None) -> int:
    """The tensor of the address, or one worth looking at: the first W_out, else the first matrix."""
    try:
        if name:
            return report.row(name)[0]
    except LayerscopeError:
        pass  # a link to another model's tensor shows this one's first
    worth = (lambda row: row["layer"] is not None and "W_out" in row["component"], lambda row: len(row["shape"]) > 1, lambda row: True)
    return next(i for wanted in worth for i, row in enumerate(report.rows) if wanted(row))


@callback(
    Output("weights-stat", "figure"),
    Input("weights-stat-name", "value"), Input("weights-scale", "value"), Input("weights-tensor", "data"), Input("theme", "data"), State("weights-page", "data"),
)  # fmt: skip
def show_statistic(name: str, scale: str, chosen: int, theme: str, page: dict[str, Any]):
    report = reported(page["model"])[1]
    layers, components, places = grid_of(report)
    if not layers:
        return no_figure(theme, "No tensor of this model belongs to a layer.")
    values = np.array([[joint(places[component][layer])[name] if layer in places[component] else math.nan for component in components] for layer in layers])
    row = report.rows[chosen]
    return statistic_heatmap(values, layers, components, STATISTICS[name], scale, (row["layer"], row["component"]), theme)

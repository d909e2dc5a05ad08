"""Choosing a tensor on the Weights page: a row of the table, a cell of the heatmap or a candidate leads to one (store `weights-tensor`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Input, Output, Patch, State, callback, ctx, dcc, no_update
from dash.exceptions import PreventUpdate

from backend.analysis.weights import by_component
from backend.reports.weight_results import WeightReport
from components.weight_source import reported
from components.weight_table import statistics_csv
from components.weight_tensor import matrix_options


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


def _opened(report: WeightReport, number: int, mark: list[int] | None = None, region: str = "", matrix: int = 0) -> tuple[Any, ...]:
    """What `choose` writes. The picker gets its options and its value at once: a value that is not among its options would be dropped."""
    matrices = matrix_options(report.rows[number])
    return number, {"ids": [str(number)]}, mark, region, matrices, matrix, len(matrices) < 2


def _clicked(report: WeightReport, point: dict[str, Any]) -> int:
    layers, components, places = grid_of(report)
    rows = places[components[int(point["x"])]].get(layers[int(point["y"])], [])
    return report.row(rows[0]["name"])[0] if rows else 0


def _place_of(report: WeightReport, text: str) -> tuple[int, list[int], str, int]:
    """ "3, 788, 2427|blk.1.ffn_down_exps.weight": the tensor, the place to mark, a part of the matrix around it, the number of the matrix."""
    place, _, name = text.partition("|")
    number, row = report.row(name)
    at = [int(i) for i in place.split(",")]
    matrix = int(np.ravel_multi_index(at[:-2], row["shape"][:-2])) if len(at) > 2 else 0
    around = ",".join(f"{max(i - 24, 0)}-{i + 25}" for i in at[-2:])
    return number, at[-2:], around, matrix


def grid_of(report: WeightReport) -> tuple[list[int], list[str], dict[str, dict[int, list[dict[str, Any]]]]]:
    """Layers, components, and which tensors are at a component and layer: the axes of the heatmap and its cells."""
    places = by_component(report.rows)
    return sorted({layer for component in places.values() for layer in component}), list(places), places


@callback(Output("weights-name", "data"), Input("weights-tensor", "data"), State("weights-page", "data"))
def name_of(chosen: int, page: dict[str, Any]):
    """The tensor's name, for the address: numbers would mean something else in another file."""
    return reported(page["model"])[1].rows[chosen]["name"]

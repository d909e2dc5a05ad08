"""One tensor on the Weights page: its distribution beside that of the other layers, its values, norms and singular values.

Its callbacks need the page's stores: `weights-page` (the model), `weights-tensor` (the tensor's number), `weights-region` and `weights-mark`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dash import Input, Output, State, callback, ctx, dcc, html, no_update, set_props

from backend.analysis.activations import robust_range
from backend.analysis.spectrum import FULL_SIDE, N_LEADING
from backend.analysis.weights import N_BINS, bin_edges, by_component, rebinned
from backend.reports.weight_matrix import Matrix, n_matrices
from backend.reports.weight_results import WeightReport
from components.card import card, cards
from components.figures.theme import no_figure
from components.figures.weights import component_histograms, histogram, norm_lines, singular_values, vector_line, weight_map
from components.graph import graph, graph_tools
from components.services import services
from components.weight_source import Region, axis_names, clipped, detail_missing, follow, picture, read_region, reported, stored_tensor
from components.weight_table import shape_text

ABOUT_DISTRIBUTION = (
    "Counts in 512 equal bins over ±2^e, the smallest such range that holds the tensor. Dashed: 6 standard deviations from the mean.",
    "Layers are brought to one range by adding neighbouring bins, which is exact.",
)
ABOUT_MAP = (
    "The stored matrix, dequantized: rows are outputs and columns inputs, as in the file (in GPT-2's safetensors the other way round). Blue is negative, red or orange "
    "positive; the colour saturates at the 99.5th percentile of what is shown.",
    "A cell that stands for several weights shows the one with the largest |w|, so no outlier is lost. Drag to zoom in: it is read again, until each cell is one weight. "
    "Double-click goes back to the whole matrix.",
)  # fmt: skip
ABOUT_NORMS = "The L2 norm, sqrt(Σ w²), of each row and of each column of the stored matrix, dequantized; a row or column far above the rest carries an outlier."
ABOUT_SPECTRUM = (
    "Stable rank: ||W||_F² / σ₁² (Rudelson and Vershynin 2007). Effective rank: the exponential of the entropy of σ / Σσ (Roy and Vetterli 2007).",
    f"All singular values where the shorter side is at most {FULL_SIDE:,} (from the Gram matrix in float64; below about 1e-7 of the largest they are rounding). Else the "
    f"{N_LEADING} largest, by a randomized SVD (Halko, Martinsson and Tropp 2011), and the effective rank is an estimate from above: the energy that is left is taken to be "
    "spread evenly.",
)  # fmt: skip


def matrix_options(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Options of the picker `weights-index`: the matrices of a stack; one where there is nothing to choose."""
    n = max(math.prod(row["shape"][:-2]), 1) if len(row["shape"]) > 1 else 1
    return [{"label": f"matrix {i} of {n}", "value": i} for i in range(n)]


def tensor_cards(row: dict[str, Any], counts: str, index: int) -> list[Any]:
    """The cards of the chosen tensor for the page's grid; norms and singular values come under `weights-detail`."""
    matrices: Any = matrix_options(row)
    linear: Any = [{"label": "Linear", "value": "linear"}, {"label": "Log", "value": "log"}]
    choose_counts = dcc.Dropdown(linear, counts, id="weights-counts", clearable=False, searchable=False, className="picker-narrow")
    picker = dcc.Dropdown(matrices, min(index, len(matrices) - 1), id="weights-index", clearable=False, className="picker-metric")
    choose_matrix = html.Span(picker, id="weights-index-field", hidden=len(matrices) < 2)
    whole = html.Button("Whole matrix", id="weights-whole", className="tool")
    return [
        card(html.Span("", id="weights-hist-title", className="mono"), graph("weights-hist", height=310, className="fill"), html.Span("", id="weights-hist-facts"),
             [choose_counts, *graph_tools("weights-hist", "weight-histogram")], list(ABOUT_DISTRIBUTION), className="fill"),
        card(html.Span("", id="weights-layers-title"), graph("weights-layers", height=310, className="fill"), html.Span("", id="weights-layers-facts"),
             graph_tools("weights-layers", "weights-through-layers"), list(ABOUT_DISTRIBUTION), className="fill"),
        card(html.Span("", id="weights-map-title"), graph("weights-map", height=540), html.Span("", id="weights-map-facts"),
             [choose_matrix, whole, *graph_tools("weights-map", "weight-matrix")], list(ABOUT_MAP), className="wide"),
    ]  # fmt: skip


@callback(
    Output("weights-hist", "figure"), Output("weights-hist-title", "children"), Output("weights-hist-facts", "children"), Output("weights-layers", "figure"),
    Output("weights-layers-title", "children"), Output("weights-layers-facts", "children"),
    Input("weights-tensor", "data"), Input("weights-counts", "value"), Input("theme", "data"), State("weights-page", "data"),
)  # fmt: skip
def show_distribution(chosen: int, counts: str, theme: str, page: dict[str, Any]):
    report = reported(page["model"])[1]
    row, log = report.rows[chosen], counts == "log"
    names = f" ({', '.join(row['canonical'])})" if row["canonical"] and row["canonical"][0] != row["name"] else ""
    through, said = f"{row['component']} through the layers", "The same component in every layer; the chosen one is framed."
    if row["layer"] is None:
        through, said = "Tensors outside the layers", "The chosen one is framed."
    if row["note"]:
        return no_figure(theme, row["note"]), row["name"], names, no_figure(theme, row["note"]), through, ""
    figure = histogram(report.bins[chosen].astype(np.int64), bin_edges(row["exponent"]), row["mean"], row["std"], log, theme)
    bad = f", {row['n_nan']:,} NaN, {row['n_inf']:,} infinite" if row["n_nan"] or row["n_inf"] else ""
    facts = f"{shape_text(row)}, {row['dtype']}{names}. Mean {row['mean']:.3g}, σ {row['std']:.3g}, kurtosis {row['kurtosis']:.3g}, {row['outliers']:,.0f} beyond 6 σ{bad}."
    return figure, row["name"], facts, _beside(report, row, log, theme), through, said


def _beside(report: WeightReport, row: dict[str, Any], log: bool, theme: str) -> Any:
    """The histograms of the same component in every layer, or of all tensors outside the layers, brought to one range."""
    if row["layer"] is None:
        groups = {one["component"]: [one] for one in report.rows if one["layer"] is None and not one["note"]}
        chosen = row["component"]
    else:
        groups = {f"L{layer}": rows for layer, rows in sorted(by_component(report.rows)[row["component"]].items())}
        chosen = f"L{row['layer']}"
    wide = max(one["exponent"] for rows in groups.values() for one in rows)
    numbers = {one["name"]: i for i, one in enumerate(report.rows)}
    bins = np.zeros((len(groups), N_BINS), np.int64)
    for i, rows in enumerate(groups.values()):
        for one in rows:
            bins[i] += rebinned(report.bins[numbers[one["name"]]].astype(np.int64), one["exponent"], wide)
    return component_histograms(bins, bin_edges(wide), list(groups), log, list(groups).index(chosen), theme)


@callback(
    Output("weights-map", "figure"), Output("weights-map-title", "children"), Output("weights-map-facts", "children"),
    Input("weights-tensor", "data"), Input("weights-index", "value"), Input("weights-region", "data"), Input("weights-mark", "data"), Input("theme", "data"),
    Input("weights-detail-ready", "data"), State("weights-page", "data"),
)  # fmt: skip
def show_matrix(chosen: int, index: int | None, zoom: str, mark: list[int] | None, theme: str, _: Any, page: dict[str, Any]):
    found, report = reported(page["model"])
    row = report.rows[chosen]
    tensor = stored_tensor(found, row)
    title = f"Values of {row['component']}" + ("" if row["layer"] is None else f" in layer {row['layer']}")
    if row["note"]:
        return no_figure(theme, row["note"]), title, ""
    if not n_matrices(tensor):
        values = tensor[...] if tensor.size else np.zeros(0, np.float32)
        return vector_line(values, theme), title, f"A vector of {tensor.size:,}."
    matrix = Matrix(tensor, min(index or 0, n_matrices(tensor) - 1))
    region = read_region(zoom, matrix.shape)
    seen = picture(matrix, region, lambda: found.detail(row["name"], index or 0))
    if seen is None:
        return no_figure(theme, "This matrix is large; its picture comes with its norms and singular values, below."), title, ""
    cells, edges = seen
    figure = weight_map(cells, edges, robust_range(cells), axis_names(row), (mark[0], mark[1]) if mark else None, theme)
    figure.update_layout(uirevision=f"{chosen} {index} {zoom}")
    return figure, title, _map_facts(matrix, region, edges)


def _map_facts(matrix: Matrix, region: Region | None, edges: tuple[Any, Any]) -> str:
    rows, columns = matrix.shape
    part = f"All {rows:,} rows and {columns:,} columns."
    if region:
        part = f"Rows {region[0]:,} to {region[1] - 1:,}, columns {region[2]:,} to {region[3] - 1:,} of {rows:,} × {columns:,}."
    height, width = (int(np.diff(one).max()) for one in edges)
    exact = "Each cell is one weight." if height == width == 1 else f"A cell is the largest |w| of up to {height:,} × {width:,} weights; drag to zoom in."
    return f"{part} {exact}"


@callback(Output("weights-region", "data", allow_duplicate=True), Input("weights-map", "relayoutData"), Input("weights-whole", "n_clicks"), State("weights-tensor", "data"),
          State("weights-region", "data"), State("weights-page", "data"), prevent_initial_call=True)  # fmt: skip
def zoom(moved: dict[str, Any] | None, _: int | None, chosen: int, now: str, page: dict[str, Any]):
    """The part of the matrix that was dragged over; all of it after a double-click."""
    if ctx.triggered_id == "weights-whole" or (moved and moved.get("xaxis.autorange")):
        return ""
    found, report = reported(page["model"])
    tensor = stored_tensor(found, report.rows[chosen])
    if not moved or not n_matrices(tensor) or not any(key.startswith(("xaxis.range", "yaxis.range")) for key in moved):
        return no_update
    shape = Matrix(tensor).shape
    top, bottom, left, right = read_region(now, shape) or (0, shape[0], 0, shape[1])
    asked = (moved.get("yaxis.range[1]", top - 0.5) + 0.5, moved.get("yaxis.range[0]", bottom - 0.5) + 0.5,
             moved.get("xaxis.range[0]", left - 0.5) + 0.5, moved.get("xaxis.range[1]", right - 0.5) + 0.5)  # fmt: skip
    region = clipped(asked, shape)
    return "{}-{},{}-{}".format(*region) if region else ""


# -- norms and singular values ----------------------------------------------------------------------------------------------------------------


@callback(
    Output("weights-detail", "children"),
    Input("weights-tensor", "data"), Input("weights-index", "value"), Input("weights-detail-ready", "data"), Input("theme", "data"), State("weights-page", "data"),
)  # fmt: skip
def show_detail(chosen: int, index: int | None, _: Any, theme: str, page: dict[str, Any]):
    found, report = reported(page["model"])
    row = report.rows[chosen]
    tensor = stored_tensor(found, row)
    if row["note"] or not n_matrices(tensor):
        return None
    index = min(index or 0, n_matrices(tensor) - 1)
    detail = found.detail(row["name"], index)
    if detail is None:
        return detail_missing(Matrix(tensor, index).shape)
    lines = norm_lines(detail.row_norms, detail.column_norms, axis_names(row), theme)
    norms = card("Norms of rows and columns", graph("weights-norms", 400, lines, className="fill"), "The L2 norm of each row and of each column.",
                 graph_tools("weights-norms", "weight-norms"), ABOUT_NORMS, className="fill")  # fmt: skip
    spectrum = detail.spectrum
    if spectrum is None:
        words, figure = "", no_figure(theme, "A matrix with NaN or infinite weights has no singular values.")
    else:
        few = "" if spectrum.is_full else f" The {len(spectrum.values)} largest of {spectrum.n:,}."
        about = "" if spectrum.is_full else "at most about "
        words = f"Stable rank {spectrum.stable_rank:.4g}, effective rank {about}{spectrum.effective_rank:.4g} of {spectrum.n:,}.{few}"
        figure = singular_values(spectrum.values, True, theme)
    values = card("Singular values", graph("weights-spectrum", 400, figure, className="fill"), words, graph_tools("weights-spectrum", "singular-values"),
                  list(ABOUT_SPECTRUM), className="fill")  # fmt: skip
    return cards(norms, values)


@callback(Output("weights-detail-job", "data"), Input("weights-detail-compute", "n_clicks"), State("weights-tensor", "data"), State("weights-index", "value"),
          State("weights-page", "data"))  # fmt: skip
def look_closely(clicks: int, chosen: int, index: int | None, page: dict[str, Any]):
    if not clicks:
        return no_update
    name = reported(page["model"])[1].rows[chosen]["name"]
    return services().jobs.submit("weight_tensor", {"model": page["model"], "tensor": name, "index": index or 0}, f"Singular values of {name[:80]}").id


@callback(Output("weights-detail-progress", "children"), Input("weights-detail-job", "data"), Input("jobs-now", "data"), prevent_initial_call=True)
def follow_detail(job_id: str | None, _: Any):
    shown, done = follow(job_id)
    if done is not no_update:
        set_props("weights-detail-ready", {"data": done})
    return shown

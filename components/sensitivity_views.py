"""What the cards of a sensitivity run show: each callback reads the run and calls one figure function."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Input, Output, Patch, State, callback, dcc, no_update

from components.figures import sensitivity as figures
from components.figures.theme import escape, no_figure
from components.figures.weights import statistic_heatmap
from components.sensitivity_tables import super_csv, top_csv
from components.sensitivity_values import GROUPS, STATISTICS, distribution, number, opened, statistic_map, weight_link

_RUN = State("sens-run", "data")


@callback(Output("sens-scores", "figure"), Input("sens-group", "value"), Input("theme", "data"), _RUN)
def show_scores(group: str, theme: str, run_id: str):
    edges, counts, names, cuts = distribution(opened(run_id), group if group in GROUPS else "component")
    return figures.score_distribution(edges, counts, names, cuts, theme)


@callback(Output("sens-map", "figure"), Input("sens-stat", "value"), Input("theme", "data"), _RUN)
def show_map(stat: str, theme: str, run_id: str):
    name = stat if stat in STATISTICS else "p99"
    values, layers, components = statistic_map(opened(run_id), name)
    title, log = STATISTICS[name]
    if not np.isfinite(values).any():
        return no_figure(theme, "No tensor of this run belongs to a layer.")
    return statistic_heatmap(values, layers, components, title, "log" if log else "linear", None, theme)


@callback(Output("sens-search", "value"), Input("sens-map", "clickData"), _RUN, prevent_initial_call=True)
def search_tensor(click: dict[str, Any] | None, run_id: str):
    """A cell of the map narrows the table down to its tensor."""
    if not click:
        return no_update
    _, layers, components = statistic_map(opened(run_id), "mean")
    point = click["points"][0]
    return f"blocks.{layers[int(point['y'])]}.{components[int(point['x'])]}"


@callback(Output("sens-grid", "dashGridOptions"), Input("sens-search", "value"), prevent_initial_call=True)
def search(text: str | None):
    options = Patch()
    options["quickFilterText"] = text or ""
    return options


@callback(Output("sens-go", "href"), Input("sens-grid", "selectedRows"), _RUN, prevent_initial_call=True)
def open_weight(selected: Any, run_id: str):
    """A row of the table leads to its weight on the Weights page."""
    if not selected:
        return no_update
    run = opened(run_id)
    at = int(selected[0]["id"])
    return weight_link(run, run.top[at]) if 0 <= at < len(run.top) else no_update


@callback(Output("sens-file", "data"), Input("sens-save", "n_clicks"), _RUN, prevent_initial_call=True)
def save_top(clicks: int | None, run_id: str):
    return dcc.send_string(top_csv(opened(run_id)), "top_weights.csv") if clicks else no_update


@callback(Output("sens-super-file", "data"), Input("sens-super-save", "n_clicks"), _RUN, prevent_initial_call=True)
def save_super(clicks: int | None, run_id: str):
    return dcc.send_string(super_csv(opened(run_id)), "super_weights.csv") if clicks else no_update


@callback(Output("sens-effects", "figure"), Input("theme", "data"), _RUN)
def show_effects(theme: str, run_id: str):
    return figures.effect_points(opened(run_id).stats["perturbation"]["runs"], theme)


@callback(Output("sens-stability", "figure"), Input("theme", "data"), _RUN)
def show_stability(theme: str, run_id: str):
    found = opened(run_id).stats["stability"]
    return figures.overlap_lines(found["ks"], found["pairs"], theme)


@callback(Output("sens-pruning", "figure"), Output("sens-divergence", "figure"), Input("theme", "data"), _RUN)
def show_pruning(theme: str, run_id: str):
    rows = opened(run_id).stats["pruning"]["rows"]
    curve = figures.pruning_curve(rows, theme)
    if not rows or not rows[0]["divergence"]:
        return curve, no_figure(theme, "The divergence of layers was not measured.")
    values = np.array([[np.nan if v is None else v for v in row["divergence"]] for row in rows], np.float64).T  # (layer, sparsity)
    shares = [f"{row['sparsity'] or 0:.0%}" for row in rows]
    hovers = np.array([[f"layer {layer}, {share} pruned<br>relative L2 {number(v)}" for share, v in zip(shares, line, strict=True)] for layer, line in enumerate(values)], object)
    layers = [f"L{layer}" for layer in range(len(values))]
    return curve, figures.depth_cells(values, layers, shares, "relative L2 of resid_post", hovers, theme, across="sparsity asked", text=".2g")


@callback(Output("sens-flow", "figure"), Input("theme", "data"), _RUN)
def show_flow(theme: str, run_id: str):
    found = opened(run_id).stats["gradient_flow"]
    values = np.array([[np.nan if v is None else v for v in row] for row in found["norm"]], np.float64).reshape(len(found["components"]), len(found["layers"])).T
    if not np.isfinite(values).any():
        return no_figure(theme, "No gradient of this run is finite.")
    hovers = np.array([[f"layer {layer}, {escape(name)}<br>‖dL/dW‖ {number(v)}" for name, v in zip(found["components"], row, strict=True)]
                       for layer, row in zip(found["layers"], values, strict=True)], object)  # fmt: skip
    return figures.depth_cells(values, [f"L{layer}" for layer in found["layers"]], found["components"], "L2 norm of dL/dW", hovers, theme, text=".2g")

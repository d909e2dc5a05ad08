"""The card that puts runs side by side: another metric, another model, another seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from dash import Input, Output, State, callback, dcc, html
from numpy.typing import NDArray

from backend.errors import LayerscopeError
from backend.reports.sensitivity_run import SensitivityRun, manifests
from components.card import card
from components.figures.sensitivity import depth_cells, profile_lines
from components.figures.theme import escape
from components.graph import graph, graph_tools
from components.sensitivity_values import GROUPS, number, opened
from components.services import services
from components.states import error
from components.trace_view import one_line, short_date

MOST_COMPARED = 8
MOST_LISTED = 200
ABOUT = (
    "Left: which components or layers the top weights of each run lie in, as shares of its own. Right: Jaccard overlap |A ∩ B| / |A ∪ B| of the top weights of two runs, a weight "
    "being its tensor, row and column (and expert): for runs of one model, or of models of the same names and sizes.",
    "The command python -m backend sensitivity compare tests differences for significance and writes them down.",
)


def comparison_card(run_id: str, asked: Mapping[str, Any]) -> html.Section:
    """The card; its callbacks need `sens-run` and `theme`."""
    others = [each for each in manifests(services().settings.data_dir) if each["folder"] != run_id][:MOST_LISTED]
    options: Any = [{"label": f"{one_line(each['model']['name'], 40)}, {each['spec']['metric'][:30]}, {short_date(each['created'][:40])}", "value": each["folder"]}
                    for each in others]  # fmt: skip
    known = [name for name in str(asked.get("with") or "").split(",") if any(each["folder"] == name for each in others)][: MOST_COMPARED - 1]
    pick = dcc.Dropdown(options, known, id="sens-with", multi=True, placeholder="choose other runs", className="sens-with")
    panes = html.Div(
        [
            html.Div([html.Div(graph_tools("sens-profiles", "top-weight-profiles")[:-1], className="sens-pane-tools"), graph("sens-profiles", 340)]),
            html.Div([html.Div(graph_tools("sens-overlap", "overlap-of-runs"), className="sens-pane-tools"), graph("sens-overlap", 340)]),
        ],
        id="sens-panes", className="sens-panes", hidden=True,
    )  # fmt: skip
    views: Any = [{"label": words, "value": name} for name, words in GROUPS.items()]
    group = dcc.Dropdown(views, "component", id="sens-profile", clearable=False, searchable=False, className="picker-metric")
    pickers = html.Div([html.Label([html.Span("With"), pick], className="sens-with-label"), html.Label([html.Span("Top weights"), group])], className="controls")
    body = [pickers, html.Div(id="sens-compared", role="status"), panes]
    words = "Where the top weights lie, and how many of them two runs share." if others else "There is no other run to compare with yet."
    return card("Compare runs", body, words, about=list(ABOUT), className="wide")


@callback(Output("sens-profiles", "figure"), Output("sens-overlap", "figure"), Output("sens-compared", "children"), Output("sens-panes", "hidden"),
          Input("sens-with", "value"), Input("sens-profile", "value"), Input("theme", "data"), State("sens-run", "data"))  # fmt: skip
def show_comparison(chosen: Sequence[str] | None, group: str, theme: str, run_id: str):
    try:
        runs = [opened(run_id), *(opened(name) for name in (chosen or ())[: MOST_COMPARED - 1])]
    except LayerscopeError as problem:
        return {}, {}, error(str(problem)), True
    if len(runs) < 2:
        return {}, {}, None, True
    names = _names(runs)
    places, shares = profiles(runs, group)
    values = overlaps(runs)
    hovers = np.array([[f"{escape(a)}<br>{escape(b)}<br>Jaccard {number(float(v))}" for b, v in zip(names, row, strict=True)]
                       for a, row in zip(names, values, strict=True)], object)  # fmt: skip
    numbered = [str(i + 1) for i in range(len(names))]
    grid = depth_cells(values, names, numbered, "Jaccard overlap of the top weights", hovers, theme, top=1.0, text=".2f")
    cut = " The first 8 are shown." if len(chosen or ()) >= MOST_COMPARED else ""
    return profile_lines(shares, places, names, group, theme), grid, f"{len(runs)} runs.{cut}", False


def _names(runs: Sequence[SensitivityRun]) -> list[str]:
    return [f"{i + 1} {one_line(run.label, 46)}" for i, run in enumerate(runs)]


def profiles(runs: Sequence[SensitivityRun], group: str) -> tuple[list[str], NDArray[np.float64]]:
    """(places, shares (run, place)): which layers or components the top weights of each run lie in."""
    keys: list[Any] = list(dict.fromkeys(row[group] for run in runs for row in run.stats["tensors"] if row["layer"] is not None))
    places = sorted(keys) if group == "layer" else keys
    counts = np.zeros((len(runs), len(places)))
    for i, run in enumerate(runs):
        for row in run.stats["tensors"]:
            if row["layer"] is not None:
                counts[i, places.index(row[group])] += row["n_top"] or 0
    return [f"L{place}" if group == "layer" else str(place) for place in places], counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def overlaps(runs: Sequence[SensitivityRun]) -> NDArray[np.float64]:
    """(run, run) Jaccard overlap of the top weights."""
    sets = [{(row["name"], row["expert"], row["row"], row["column"]) for row in run.top} for run in runs]
    return np.array([[len(a & b) / len(a | b) if a | b else np.nan for b in sets] for a in sets])

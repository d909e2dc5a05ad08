"""The card that puts runs side by side: another metric, another model, another seed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update
from numpy.typing import NDArray

from backend.errors import LayerscopeError
from backend.reports.sensitivity_compare import compare_runs
from backend.reports.sensitivity_run import manifests
from components.card import card
from components.figures.sensitivity import depth_cells, profile_lines
from components.figures.theme import escape
from components.graph import graph, graph_tools
from components.sensitivity_tables import compared_table
from components.sensitivity_values import number, opened
from components.services import services
from components.states import error
from components.trace_view import one_line, short_date

MOST_COMPARED = 6
MOST_LISTED = 200
# group -> label, part of the comparison, its list of places, the share that is drawn, words
PROFILES = {
    "component": ("by component", "components", "share_of_top", "share of the top weights"),
    "layer": ("by layer", "layers", "share_of_score", "share of all scores"),
}
ABOUT = (
    "Left: which components the top weights of each run lie in, or how its scores are spread over the layers. Right: Jaccard overlap |A ∩ B| / |A ∪ B| of the top weights, a "
    "weight being its tensor, row and column (and expert), at the largest k that both runs kept. By chance: in both if each set were drawn at random, scope by scope.",
    "Spearman's correlation of the scores that both kept, and of the mean scores of tensors (or of components at relative depths, for models that differ). Effect: how much more "
    "the first run's top weights raise perplexity than the second's, with its interval. p*: corrected by Holm within each family of tests (Holm 1979).",
    "The command python -m backend sensitivity compare writes all of it down.",
)


def comparison_card(run_id: str, asked: Mapping[str, Any]) -> html.Section:
    """The card; its callbacks need `sens-run` and `theme`."""
    others = [each for each in manifests(services().settings.data_dir) if each["folder"] != run_id][:MOST_LISTED]
    options: Any = [{"label": f"{one_line(each['model']['name'], 40)}, {each['spec']['metric'][:30]}, {short_date(each['created'][:40])}", "value": each["folder"]}
                    for each in others]  # fmt: skip
    known = [name for name in str(asked.get("with") or "").split(",") if any(each["folder"] == name for each in others)][: MOST_COMPARED - 1]
    pick = dcc.Dropdown(options, known, id="sens-with", multi=True, placeholder="choose other runs", className="sens-with")
    views: Any = [{"label": words[0], "value": name} for name, words in PROFILES.items()]
    group = dcc.Dropdown(views, "component", id="sens-profile", clearable=False, searchable=False, className="picker-metric")
    pickers = html.Div([html.Label([html.Span("With"), pick], className="sens-with-label"), html.Label([html.Span("Profile"), group])], className="controls")
    panes = html.Div(
        [
            html.Div([html.Div(graph_tools("sens-profiles", "profiles-of-runs")[:-1], className="sens-pane-tools"), graph("sens-profiles", 340)]),
            html.Div([html.Div(graph_tools("sens-overlap", "overlap-of-runs"), className="sens-pane-tools"), graph("sens-overlap", 340)]),
        ],
        id="sens-panes", className="sens-panes", hidden=True,
    )  # fmt: skip
    words = "Where the top weights lie, how many of them two runs share, and how far their rankings agree." if others else "There is no other run to compare with yet."
    return card("Compare runs", [pickers, panes, html.Div(id="sens-compared", role="status")], words, about=list(ABOUT), className="wide")


@callback(Output("sens-profiles", "figure"), Output("sens-overlap", "figure"), Output("sens-compared", "children"), Output("sens-panes", "hidden"),
          Input("sens-with", "value"), Input("sens-profile", "value"), Input("theme", "data"), State("sens-run", "data"))  # fmt: skip
def show_comparison(chosen: Sequence[str] | None, group: str, theme: str, run_id: str):
    if not chosen:
        return no_update, no_update, None, True
    try:
        found = compared((run_id, *chosen[: MOST_COMPARED - 1]))
    except LayerscopeError as problem:
        return no_update, no_update, error(str(problem)), True
    names = [f"{run['run'] + 1} {one_line(run['label'], 46)}" for run in found["runs"]]
    group = group if group in PROFILES else "component"
    places, shares = profiles(found, group)
    values = overlaps(found)
    hovers = np.array([[f"{escape(a)}<br>{escape(b)}<br>Jaccard {number(float(v), '.3f')}" for b, v in zip(names, row, strict=True)]
                       for a, row in zip(names, values, strict=True)], object)  # fmt: skip
    grid = depth_cells(values, names, [str(run["run"] + 1) for run in found["runs"]], "Jaccard overlap of the top weights", hovers, theme, top=1.0, text=".2f")
    cut = f"The first {MOST_COMPARED} runs are compared." if len(chosen) >= MOST_COMPARED else ""
    notes = html.Ul([html.Li(note) for note in (*([cut] if cut else []), *found["notes"])], className="sens-remarks")
    return profile_lines(shares, places, names, group, PROFILES[group][3], theme), grid, [compared_table(found, names), notes], False


def compared(run_ids: tuple[str, ...]) -> dict[str, Any]:
    """`compare_runs` of these runs, kept while their folders do not change. Raises LayerscopeError."""
    stamps = tuple(opened(name).folder.stat().st_mtime_ns for name in run_ids)
    return _compared(run_ids, stamps)


@functools.lru_cache(maxsize=8)
def _compared(run_ids: tuple[str, ...], _: tuple[int, ...]) -> dict[str, Any]:
    return compare_runs([opened(name) for name in run_ids])


def profiles(found: Mapping[str, Any], group: str) -> tuple[list[str], NDArray[np.float64]]:
    """(places, shares (run, place)) of a comparison: of the top weights by component, or of all scores by layer; NaN where a run has no such place."""
    _, part, share, _ = PROFILES[group]
    if group == "layer":
        rows = [dict(zip(run["layers"], run[share], strict=True)) for run in found[part]]
    else:
        rows = [{each["component"]: each[share] for each in run["components"]} for run in found[part]]
    keys: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
    keys = sorted(keys) if group == "layer" else keys
    values = np.array([[np.nan if row.get(key) is None else row[key] for key in keys] for row in rows], np.float64)
    return [f"L{key}" if group == "layer" else str(key) for key in keys], values


def overlaps(found: Mapping[str, Any]) -> NDArray[np.float64]:
    """(run, run) Jaccard overlap of the top weights at the largest k of both; NaN where two runs cannot be compared weight by weight."""
    values = np.full((len(found["runs"]),) * 2, np.nan)
    np.fill_diagonal(values, 1.0)
    for pair in found["agreement"]:
        if pair["weights"] and pair["weights"]["overlap"] and pair["weights"]["overlap"][-1]["jaccard"] is not None:
            i, j = pair["runs"]
            values[i, j] = values[j, i] = pair["weights"]["overlap"][-1]["jaccard"]
    return values

"""The computation graph of a model on the shelf: from the derived cache, or made by a job when somebody looks.

`graph_of(entry)` gives it or None; `graph_missing(entry)` is what the page shows instead: the job that records it, started at once
for a small model, behind a button for a large one.
"""

from __future__ import annotations

from typing import Any

from dash import Input, Output, State, callback, dcc, html, no_update
from dash.exceptions import PreventUpdate

from backend.estimate import in_bytes
from backend.model_files import ModelEntry, identity
from backend.reports.model_graph import ModelGraph, graph_key
from components.jobs_tray import job_or_none, job_panel
from components.services import services
from components.states import empty, error

_AT_ONCE = 1 << 30  # bytes of weights that are loaded without asking


def graph_of(entry: ModelEntry) -> ModelGraph | None:
    """The graph of the model as its file is now, or None while nobody has recorded it."""
    found = services().derived.get_json(graph_key(identity(entry.path)))
    return None if found is None else ModelGraph.from_json(found)


def opened_graph(model: str) -> ModelGraph:
    """The graph of a model whose page shows it. The cache may have dropped it since: then the page, loaded again, makes it anew."""
    graph = graph_of(services().library.resolve_model(model))
    if graph is None:
        raise PreventUpdate
    return graph


def graph_stores() -> list[Any]:
    """What the page keeps on it for the job: `graph-ready` changes when there is a graph."""
    return [dcc.Store(id="graph-ready"), dcc.Store(id="graph-job"), html.Div(id="graph-progress")]


def graph_missing(entry: ModelEntry) -> html.Div:
    """The state of the page while there is no graph."""
    size = entry.n_bytes
    words = f"The model runs once over a few tokens and every node is written down; {in_bytes(size)} of weights are loaded for it. The graph is kept afterwards."
    button = html.Button("Record it", id="graph-record", className="btn btn-primary", n_clicks=1 if size <= _AT_ONCE else 0)
    return empty("The graph of this model is not recorded yet", words, button, "workflow")


@callback(Output("graph-job", "data"), Output("graph-record", "disabled"), Input("graph-record", "n_clicks"), State("graph-model", "value"))
def record(clicks: int, model: str):
    """Queue the job, at once where the page was made with the button pressed."""
    if not clicks:
        return no_update, no_update
    return services().jobs.submit("graph", {"model": model}, f"Computation graph of {model}").id, True


@callback(Output("graph-progress", "children"), Output("graph-ready", "data"), Input("graph-job", "data"), Input("jobs-now", "data"), prevent_initial_call=True)
def follow(job_id: str | None, _: Any):
    """The job's progress; when it is done the page draws the graph; when it failed, why."""
    job = job_or_none(job_id)
    if job is None:
        return no_update, no_update
    if job.is_active:
        return job_panel(job), no_update
    return (None, job.id) if job.state == "done" else (error(job.error or f"The job was {job.state.replace('_', ' ')}."), no_update)

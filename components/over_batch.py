"""Over a batch, on the pages of a trace: the trace beside the mean of the batch or category that it belongs to.

Shown only where the group holds at least three traces of the same model. Their statistics (backend.aggregates) are made while a batch
runs; for a category a job makes what is missing. The pages' own views of them are in components/over_batch_views.py.
"""

from __future__ import annotations

from typing import Any

from dash import Input, Output, State, callback, ctx, dcc, html, no_update

from backend.aggregates import Aggregates, Row
from backend.analysis.aggregate import Moments
from backend.trace import Trace
from components.card import card
from components.jobs_tray import job_or_none, job_panel
from components.services import services
from components.states import error
from components.url_state import as_choice, keep_url

FEWEST, MOST = 3, 2000
SHOWN = {"this": "This trace", "mean": "Mean of the group", "difference": "This trace − mean"}


def groups_of(trace: Trace) -> dict[str, str]:
    """Value -> label of the groups of at least FEWEST traces of this model that the trace belongs to: its batch, its category."""
    known = {}
    batch = next((tag for tag in trace.tags if tag.startswith("batch:")), None)
    for value, words in ((batch, "this batch"), (f"category:{trace.category}" if trace.category else None, f"category {trace.category}")):
        if value and (n := services().library.count_traces(model=trace.info.name, **_filter(value))) >= FEWEST:
            known[value] = f"{words}, {n:,} traces" + (f", the newest {MOST:,}" if n > MOST else "")
    return known


def _filter(group: str) -> dict[str, Any]:
    """The library's filter for a group: a batch is found by the tag of its traces."""
    kind, _, name = group.partition(":")
    return {"search": group} if kind == "batch" else {"category": name}


def trace_ids(trace: Trace, group: str) -> list[str]:
    """Oldest first, so that a group that grows keeps its beginning; of the same model under the same name."""
    return [found.id for found in services().library.traces(model=trace.info.name, limit=MOST, **_filter(group))][::-1]


def over_batch_card(trace: Trace, asked: dict[str, str], pickers: list[Any], body: Any, tools: list[Any], about: Any) -> html.Section | None:
    """The card with the picker of the group, and the stores of its callbacks; None where the trace belongs to no group.

    asked: the page's query; `over` is read from it. pickers: the page's own, beside that of the group. body: what the page shows of the group.
    """
    groups = groups_of(trace)
    if not groups:
        return None
    options: Any = [{"label": label, "value": value} for value, label in groups.items()]
    choose = dcc.Dropdown(options, as_choice(asked.get("over"), list(groups), next(iter(groups))), id="over-group", clearable=False, searchable=False, className="picker-traces")
    row = html.Div([html.Label([html.Span("Group"), choose]), *pickers], className="controls over-controls")
    stores = [dcc.Store(id="over-ready"), dcc.Store(id="over-job")]
    inside = [row, html.Div(id="over-state"), *stores, html.Div(body, id="over-body")]
    return card("Over a batch", inside, "This trace beside the mean of its group; the group holds this trace as well.", tools, about, className="wide")


def show_picker(asked: dict[str, str]) -> html.Label:
    """The trace, the mean, or their difference: id `over-show`."""
    options: Any = [{"label": label, "value": value} for value, label in SHOWN.items()]
    shown = as_choice(asked.get("overshow"), list(SHOWN), "difference")
    return html.Label([html.Span("Show"), dcc.Dropdown(options, shown, id="over-show", clearable=False, searchable=False, className="picker-metric")])


def trace_and_group(trace: Trace, group: str, n: int) -> tuple[Row, dict[str, Moments]]:
    """The trace's statistics and the moments of the group's first n traces: later ones may have no statistics yet. Raises LayerscopeError where a row is missing."""
    aggregates = Aggregates(services().derived)
    ids = trace_ids(trace, group)[:n]
    return aggregates.row(trace.id) or aggregates.put_row(trace), aggregates.over(ids, f"{group}:{trace.info.name}")


@callback(
    Output("over-ready", "data"), Output("over-state", "children"), Output("over-body", "hidden"),
    Input("over-group", "value"), Input("over-job", "data"), Input("jobs-now", "data"), State("over-ready", "data"), State("over-state", "children"),
    State("page-state", "data"),
)  # fmt: skip
def find_group(group: str, job_id: str | None, _: Any, before: Any, said: Any, page: dict[str, Any]):
    """Whether the statistics of all its traces are there; else the job that makes them."""
    looked = before or said  # the first call of a page may come as one of the jobs
    if ctx.triggered_id == "jobs-now" and looked and (before or not job_id):
        return (no_update,) * 3  # other jobs: nothing that is waited for here
    trace = services().library.open(page["trace"])
    if group not in groups_of(trace):
        return None, error("The group has fewer than three traces now."), True
    ids = trace_ids(trace, group)
    missing = Aggregates(services().derived).missing(ids)
    if not missing:
        data = {"group": group, "n": len(ids)}
        return (no_update,) * 3 if data == before else (data, None, False)
    job = job_or_none(job_id)
    if job is not None and job.is_active:
        return no_update, job_panel(job), True
    failed = error(job.error) if job is not None and job.error else None
    button = html.Button(f"Compute the statistics of {len(missing):,} traces", id="over-compute", className="btn btn-primary", type="button")
    return None, html.Div([failed, button], className="agg-missing"), True


@callback(Output("over-job", "data"), Input("over-compute", "n_clicks"), State("over-group", "value"), State("page-state", "data"), prevent_initial_call=True)
def compute(clicks: int | None, group: str, page: dict[str, Any]):
    if not clicks:
        return no_update
    trace = services().library.open(page["trace"])
    missing = Aggregates(services().derived).missing(trace_ids(trace, group))
    return services().jobs.submit("aggregate", {"trace_ids": missing}, f"Statistics of {len(missing):,} traces").id


keep_url({"over": ("over-group", "value")})

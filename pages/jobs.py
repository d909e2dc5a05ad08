"""Jobs: what runs, what waits, how each one ended and why."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import dash
from dash import Input, Output, callback, dcc, html

from components.card import card
from components.controls import set_button
from components.jobs_tray import duration, progress_words, result_page, state_badge
from components.services import services
from components.states import empty
from components.trace_view import one_line, short_date

dash.register_page(__name__, path="/jobs", name="Jobs", order=2, group="Run", icon="activity", description="What runs, what waits, how each job ended")

SHOWN = 100


def layout(**_: str) -> html.Div:
    title = html.Div([html.H1("Jobs"), html.Span(id="jobs-count", className="page-subtitle")], className="page-title")
    about = "One worker process runs one job at a time and keeps the last model loaded. A job that crashes is not tried again by itself; the next one runs in a new worker."
    return html.Div([title, card("Jobs", html.Div(id="jobs-list"), "Newest first.", about=about)], className="page")


@callback(Output("jobs-list", "children"), Output("jobs-count", "children"), Input("jobs-now", "data"))
def show(_: Any) -> tuple[Any, str]:
    jobs = services().jobs.list(limit=SHOWN)
    counts = services().jobs.counts()
    said = ", ".join(f"{n} {state.replace('_', ' ')}" for state, n in counts.items() if n)
    return (_table(jobs) if jobs else empty("No jobs yet", "A run started on Home appears here.")), said


def _table(jobs: list[Any]) -> html.Div:
    head = [html.Th("State"), html.Th("Job"), html.Th("Stage or end"), html.Th("Started"), html.Th("Took", className="num"), html.Th("")]
    return html.Div(html.Table([html.Thead(html.Tr(head)), html.Tbody([_row(job) for job in jobs])], className="ls-table"), className="table-scroll")


def _row(job: Any) -> html.Tr:
    if job.is_active:
        left = f", about {duration(job.eta_s)} left" if job.eta_s is not None else ""
        stage: Any = f"{progress_words(job)}{left}"
        action: Any = set_button("Cancelling" if job.cancel_at else "Cancel", "cancel-job", job.id, disabled=bool(job.cancel_at))
    else:
        stage = html.Span(job.error, className="bad") if job.error else f"after {job.stage}" if job.state == "cancelled" and job.stage else ""
        href = result_page(job)
        action = dcc.Link("Open", href=href, className="btn btn-outline-secondary") if href else None
    started = short_date(datetime.fromtimestamp(job.started_at or job.created_at, UTC).isoformat())
    cells = [state_badge(job.state), html.Div([html.Div(one_line(job.title, 110)), html.Div(job.kind.replace("_", " "), className="muted small")]), stage]
    times = [html.Td(started, className="nowrap"), html.Td(duration(job.elapsed_s), className="num nowrap")]
    return html.Tr([*(html.Td(cell) for cell in cells), *times, html.Td(action, className="num")])

"""Jobs on screen: the tray in the corner of every page, and the panel of one job, with progress, time left and cancel."""

from __future__ import annotations

import time
from typing import Any

from dash import Input, Output, State, callback, dcc, html, no_update

from backend.errors import LayerscopeError
from components.controls import set_button
from components.icons import icon
from components.services import services

# A job that has just ended stays in the tray this long, with the way to its trace.
SHOWN_AFTER_END_S = 12.0
FAST_MS, SLOW_MS = 500, 2500
# Pages that show their jobs themselves, and the page that a run ends on.
OWN_PANEL = ("/", "/jobs", "/trace", "/quantization", "/generate", "/batch", "/sensitivity")

BADGES = {"queued": "plain", "running": "accent", "done": "ok", "failed": "bad", "cancelled": "warn", "timed_out": "bad", "crashed": "bad"}


def jobs_tray() -> html.Div:
    """The tray and its stores: `counts` is what the rail shows, `jobs-now` changes whenever a job does, `cancel-job` takes an id."""
    return html.Div(
        [
            dcc.Interval(id="jobs-poll", interval=SLOW_MS),
            dcc.Store(id="counts", data={}),
            dcc.Store(id="jobs-now", data={}),
            dcc.Store(id="cancel-job"),
            html.Div(id="jobs-tray", className="tray", role="status", **{"aria-label": "Running jobs"}),
        ]
    )


def job_panel(job: Any, leads_on: bool = True) -> html.Div:
    """One job: title, state, a bar, stage with n of m, elapsed and remaining time, cancel or, if it `leads_on`, the way to its result."""
    head: list[Any] = [html.Span(job.title, className="job-title", title=job.title), state_badge(job.state)]
    if job.is_active:
        label = "Cancelling" if job.cancel_at else "Cancel"
        head.append(set_button(label, "cancel-job", job.id, disabled=bool(job.cancel_at)))
    elif leads_on and job.state == "done" and (href := result_page(job)):
        head.append(dcc.Link(["Open", icon("arrow-right")], href=href, className="btn btn-outline-secondary"))
    return html.Div([html.Div(head, className="job-head"), _progress(job) if job.is_active else None, _ending(job)], className="job")


def result_page(job: Any) -> str:
    """Where the result of a job is shown; "" if it has no page of its own."""
    pages = {"trace_id": "/trace?trace=", "batch_id": "/batch?batch="}
    return next((f"{address}{job.result[key]}" for key, address in pages.items() if job.result.get(key)), "")


def state_badge(state: str) -> html.Span:
    return html.Span(state.replace("_", " "), className=f"badge badge-{BADGES.get(state, 'plain')}")


def progress_words(job: Any) -> str:
    """ "running, 3 of 4" or "waiting for the worker"."""
    if job.state == "queued":
        return "waiting for the worker"
    steps = f", {job.done} of {job.total}" if job.total > 1 else ""
    return f"{job.stage or 'starting'}{steps}"


def duration(seconds: float | None) -> str:
    """ "0.4 s", "12 s", "3 min 20 s"."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _progress(job: Any) -> html.Div:
    share = 100 * job.done / job.total if job.total else 0
    left = f", about {duration(job.eta_s)} left" if job.eta_s is not None else ""
    bar = html.Div(
        html.I(style={"width": f"{share:.0f}%"}),
        className="progress-line",
        role="progressbar",
        **{"aria-valuenow": f"{share:.0f}", "aria-valuemin": "0", "aria-valuemax": "100", "aria-label": job.title},
    )
    words = html.Div([html.Span(progress_words(job)), html.Span(f"{duration(job.elapsed_s)}{left}")], className="job-facts")
    return html.Div([bar, words], className="job-progress")


def _ending(job: Any) -> Any:
    if job.is_active:
        return None
    if job.error:
        return html.Div(job.error, className="small bad")
    return html.Div(f"took {duration(job.elapsed_s)}" if job.elapsed_s is not None else "", className="job-facts")


@callback(
    Output("jobs-tray", "children"),
    Output("jobs-now", "data"),
    Output("counts", "data"),
    Output("jobs-poll", "interval"),
    Input("jobs-poll", "n_intervals"),
    Input("cancel-job", "data"),
    State("jobs-now", "data"),
    State("counts", "data"),
    State("url", "pathname"),
)
def follow_jobs(_: int | None, __: Any, before: dict[str, Any], counts_before: dict[str, int], path: str) -> tuple[Any, Any, Any, Any]:
    """Look at the job records. While nothing runs and nothing changed, nothing is sent."""
    recent = services().jobs.list(limit=20)
    shown = [job for job in recent if job.is_active or (job.finished_at or 0) > time.time() - SHOWN_AFTER_END_S]
    active = sum(job.is_active for job in shown)
    counts = {"traces": services().library.count_traces(), "active": active}
    now = {"shown": [job.id for job in shown], "states": {job.id: job.state for job in recent}, "tick": time.time() if active else 0, "tray": path not in OWN_PANEL}
    new_counts = no_update if counts == counts_before else counts
    if now == before:
        return no_update, no_update, new_counts, no_update
    return [job_panel(job) for job in shown[:3]] if now["tray"] else [], now, new_counts, FAST_MS if shown else SLOW_MS


@callback(Input("cancel-job", "data"), prevent_initial_call=True)
def cancel_job(request: dict[str, Any] | None) -> None:
    """Cancel the job whose button was pressed."""
    if request:
        services().jobs.cancel(str(request["value"]))


def job_or_none(job_id: str | None) -> Any:
    """The job of that id, or None if there is none (any more)."""
    try:
        return services().jobs.get(job_id) if job_id else None
    except LayerscopeError:
        return None

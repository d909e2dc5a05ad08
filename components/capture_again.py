"""Capture again: the run of a trace once more with other sites in it, by one press, and the page then shows the new trace."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlencode

from dash import MATCH, Input, Output, State, callback, dcc, html, no_update

from backend.sites import SITES
from backend.trace import Trace
from components.jobs_tray import job_or_none, job_panel
from components.services import services

_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")


def can_capture_again(trace: Trace) -> bool:
    """Whether a job can say what this run was: it cannot where edits were made, or where bare token ids were given."""
    return bool(trace.metadata.get("command"))


def capture_again(trace: Trace, sites: tuple[str, ...]) -> html.Div:
    """The button that adds `sites`, of all layers, and what becomes of it."""
    key = "-".join(sites)
    return html.Div(
        [
            html.Button(f"Capture {', '.join(sites)}", id={"type": "capture-again", "sites": key}, className="btn btn-primary", type="button"),
            dcc.Store(id={"type": "capture-again-spec", "sites": key}, data={"trace": trace.id, "sites": sites}),
            dcc.Store(id={"type": "capture-again-job", "sites": key}),
            dcc.Location(id={"type": "capture-again-go", "sites": key}, refresh="callback-nav"),
            html.Div(id={"type": "capture-again-progress", "sites": key}, className="home-progress"),
        ]
    )


def capture_params(trace: Trace, sites: tuple[str, ...]) -> dict[str, Any]:
    """The parameters of the capture job that made a trace, with `sites` among its sites and every layer of them."""
    wanted = [name for name in dict.fromkeys((*trace.stored, *sites)) if name in SITES]
    sampling = {name: value for name, value in trace.metadata["generation"].items() if name in _SAMPLING}
    kept = {name: value for name, value in trace.metadata["capture"].items() if name in ("heads", "rows", "precision")}
    natives = [site for site in trace.metadata["capture"]["sites"] if site not in SITES]
    return {"model": trace.info.name, "prompt": trace.prompt, "sites": [*wanted, *natives], "category": trace.category, "tags": trace.tags, **sampling, **kept}


@callback(
    Output({"type": "capture-again-job", "sites": MATCH}, "data"), Output({"type": "capture-again", "sites": MATCH}, "disabled"),
    Input({"type": "capture-again", "sites": MATCH}, "n_clicks"), State({"type": "capture-again-spec", "sites": MATCH}, "data"), prevent_initial_call=True,
)  # fmt: skip
def queue(clicks: int | None, spec: dict[str, Any]):
    if not clicks:
        return no_update, no_update
    trace = services().library.open(spec["trace"])
    return services().jobs.submit("capture", capture_params(trace, tuple(spec["sites"])), f"{trace.info.name}: once more, with {', '.join(spec['sites'])}").id, True


@callback(
    Output({"type": "capture-again-progress", "sites": MATCH}, "children"), Output({"type": "capture-again", "sites": MATCH}, "disabled", allow_duplicate=True),
    Output({"type": "capture-again-go", "sites": MATCH}, "href"),
    Input({"type": "capture-again-job", "sites": MATCH}, "data"), Input("jobs-now", "data"),
    State("url", "pathname"), State("url", "search"), prevent_initial_call=True,
)  # fmt: skip
def follow(job_id: str | None, _: Any, path: str, search: str):
    """The job's progress; the same page with the new trace when it is done, else why not."""
    job = job_or_none(job_id)
    if job is None:
        return no_update, no_update, no_update
    if job.state != "done":
        return job_panel(job), job.is_active, no_update
    query = {**parse_qs((search or "").removeprefix("?")), "trace": [job.result["trace_id"]]}
    return no_update, True, f"{path}?{urlencode(query, doseq=True)}"

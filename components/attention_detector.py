"""The head detector's card on the Attention page: runs it on the trace's model as a job, and shows which heads do what; a row opens its head."""

from __future__ import annotations

from typing import Any

from dash import Input, Output, State, callback, dcc, html, no_update

from backend.errors import LayerscopeError
from backend.reports.head_scores import TITLES, HeadScores
from backend.trace import Trace
from components.card import card
from components.drawn import drawing, draws, elements
from components.job_follow import taken_up
from components.jobs_tray import job_or_none, job_panel
from components.services import services
from components.states import error
from components.weight_source import source

LISTED = 6

ABOUT = (
    "Random tokens said twice, which nothing but looking back can continue: a BOS, a random block of 32 tokens, the block again, 8 times with other tokens. "
    "They say what a head does in general, while the metrics above say what it did in this prompt.",
    "Induction: in the second copy, mean attention to the token that came right after the present one the first time, A[i, i - 31]. Duplicate token: to the "
    "present one's first copy, A[i, i - 32]. Previous token: A[i, i - 1] (Olsson et al. 2022; TransformerLens' main demo). "
    "python -m backend heads runs it with other sizes.",
)


def detector_card(trace: Trace) -> html.Section:
    stores = [dcc.Store(id="detector-job"), dcc.Store(id="detector-ready", data={"model": trace.info.name})]
    run = html.Button("Run", id="detector-run", className="btn btn-outline-secondary")
    body = [*stores, html.Div(id="detector-progress", className="home-progress"), html.Div(id="detector-lists", className="detector-lists"), drawing("detector-lists")]
    return card("This model's heads", body, html.Span("", id="detector-subtitle"), [run], list(ABOUT), className="wide")


@callback(Output("detector-job", "data"), Input("detector-run", "n_clicks"), State("detector-ready", "data"), prevent_initial_call=True)
def run_detector(clicks: int | None, ready: dict[str, Any]):
    if not clicks:
        return no_update
    model = ready["model"]
    source(model)  # a model that is not on the shelf is said at once
    return services().jobs.submit("head_detector", {"model": model}, f"Heads of {model}").id


@callback(
    Output("detector-progress", "children"), Output("detector-ready", "data"), Output("detector-run", "disabled"),
    Input("detector-job", "data"), Input("jobs-now", "data"), State("detector-ready", "data"), prevent_initial_call=True,
)  # fmt: skip
def follow(job_id: str | None, _: Any, ready: dict[str, Any]):
    """The job's progress; when it is done the lists are drawn; when it failed, why."""
    job = job_or_none(job_id)
    if job is None or taken_up(job, ready.get("job")):
        return no_update, no_update, no_update
    if job.state == "done":
        return "", {**ready, "job": job.id}, False
    if job.is_active:
        return job_panel(job), no_update, True
    return error(job.error or f"The job was {job.state.replace('_', ' ')}."), no_update, False


@callback(Output("detector-lists-drawing", "data"), Output("detector-subtitle", "children"), Output("detector-run", "children"), Input("detector-ready", "data"))
def show_lists(ready: dict[str, Any]):
    try:
        identity = source(ready["model"]).identity
    except LayerscopeError as problem:
        return [], f"The detector runs the model itself: {problem}", "Run"
    found = HeadScores.load(services().derived, identity) if identity else None
    if found is None:
        return [], f"Which heads of {ready['model']} do induction, look at the previous token or at copies: found on repeated random tokens in a few seconds.", "Run"
    asked = found.prompts
    what = f"{asked['prompts']} prompts of {asked['length']} random tokens said {asked['repeats']} times"
    said = f"{what}; the model repeats {found.accuracy:.0%} of them. A row opens its head in this trace."
    return elements([_ranked(found, name) for name in TITLES]), said, "Run again"


draws("detector-lists")


def _ranked(found: HeadScores, name: str) -> html.Table:
    head = html.Thead(html.Tr([html.Th(TITLES[name]), html.Th("Score", className="num"), html.Th("")]))
    rows = []
    for layer, number, score in found.ranked(name, LISTED):
        here: Any = {"data-layer": layer, "data-head": number}
        bar = html.Td(html.Span(className="bar", style={"width": f"{100 * min(max(score, 0), 1):.0f}%"}), className="bar-cell")
        rows.append(html.Tr([html.Td(f"{layer}.{number}"), html.Td(f"{score:.3f}", className="num"), bar], **here))
    return html.Table([head, html.Tbody(rows)], className="ls-table compact")

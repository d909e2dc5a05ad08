"""Attribution: what every head, MLP and embedding adds to the logit of a token, or to the difference of two.

Activations come from the trace and W_O and W_U from the model's file; of a large model a job reads them, of a small one the server.
"""

from __future__ import annotations

from typing import Any

import dash
from dash import ALL, Input, Output, State, callback, ctx, html, no_update

from backend.trace import Trace
from components import attribution_values as values
from components.attribution_parts import SORTS, attribution_cards, parts_table, pictures, sums
from components.figures.theme import no_figure
from components.follow_token import position_in
from components.job_follow import taken_up
from components.jobs_tray import job_or_none, job_panel
from components.services import services
from components.states import error, missing
from components.token_choice import AUTO, NONE, parse_token, suggestions, text_of, token_picker, vocabulary
from components.token_label import token_label
from components.trace_view import trace_page
from components.url_state import as_choice, keep_url

dash.register_page(__name__, path="/attribution", name="Attribution", order=4.5, icon="scale", description="Which heads and MLPs made a prediction")

REQUIRES = ("embed", "attn_out", "mlp_out", "resid_post")

def layout(trace: str | None = None, token: str | None = None, against: str | None = None, sort: str | None = None, **state: str):
    def build(opened: Trace) -> list[Any]:
        values.model_of(opened)
        lacking = values.in_part(opened)
        if lacking:
            return [missing(lacking, opened.id)]
        return attribution_cards(opened.info.n_layers, as_choice(sort, list(SORTS), "size"))

    def controls(opened: Trace) -> Any:
        if values.in_part(opened):
            return None
        n = opened.info.d_vocab
        return html.Div(
            [
                html.Label([html.Span("Token"), token_picker("attr-token", parse_token(token, n, AUTO))]),
                html.Label([html.Span("less"), token_picker("attr-against", parse_token(against, n, AUTO, NONE))]),
            ],
            className="controls",
        )

    return trace_page(__name__, trace, REQUIRES, state, build, "Which parts made a prediction.", controls)


@callback(
    Output("attr-token", "options"), Output("attr-against", "options"),
    Input("attr-token", "search_value"), Input("attr-against", "search_value"), Input("position", "data"), Input("attr-vocabulary-job", "data"),
    State("attr-token", "value"), State("attr-against", "value"), State("page-state", "data"), Input("attr-done", "data"),
)  # fmt: skip
def offer_tokens(search: str | None, search_against: str | None, position: int | None, _: Any, token: str | None, against: str | None, page: dict[str, Any], __: Any):
    trace = services().library.open(page["trace"])
    identity, at = values.model_of(trace).identity, position_in(trace, position)
    best, second = (token_label(trace.token_text(i), max_length=16) for i in trace.top_ids[at, :2])
    autos = [{"label": f"most probable: {best}", "value": AUTO}], [{"label": f"second: {second}", "value": AUTO}, {"label": "nothing", "value": NONE}]
    return (
        suggestions(trace, identity, at, search or "", token or AUTO, autos[0]),
        suggestions(trace, identity, at, search_against or "", against or AUTO, autos[1]),
    )


@callback(
    Output("attr-heads", "figure"), Output("attr-layers", "figure"), Output("attr-depth", "figure"), Output("attr-table", "children"), Output("attr-sums", "children"),
    Output("attr-notes", "children"), Output("attr-state", "children"), Output("attr-cards", "hidden"),
    Input("attr-token", "value"), Input("attr-against", "value"), Input("position", "data"), Input("theme", "data"), Input("attr-sort", "data"), Input("attr-done", "data"),
    State("page-state", "data"),
)  # fmt: skip
def show(token: str | None, against: str | None, position: int | None, theme: str, sort: str, _: Any, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    model, at = values.model_of(trace), position_in(trace, position)
    ids = values.chosen_ids(trace, at, token, against)
    found = values.attribution(trace, model, at, *ids)
    words = " − ".join(token_label(text_of(trace, model.identity, i), max_length=24) for i in ids if i is not None)
    of = f"Logit of {words} after {token_label(trace.token_texts[at], at in trace.special, 16)} (position {at})"
    if found is None:
        waiting = no_figure(theme, "")
        return waiting, waiting, waiting, "", of, "", values.offer(trace), True
    heads, layers, depth = pictures(found, trace.info.n_layers, trace.info.n_heads, theme)
    return heads, layers, depth, parts_table(found, sort, trace.id), sums(found, of), [html.Div(note) for note in found.notes], None, False


@callback(Output("attr-job", "data"), Input("attr-compute", "n_clicks"), State("attr-token", "value"), State("attr-against", "value"), State("position", "data"),
          State("page-state", "data"), prevent_initial_call=True)  # fmt: skip
def compute(clicks: int | None, token: str | None, against: str | None, position: int | None, page: dict[str, Any]):
    if not clicks:
        return no_update
    trace = services().library.open(page["trace"])
    at = position_in(trace, position)
    return values.submit(trace, at, *values.chosen_ids(trace, at, token, against))


@callback(Output("attr-vocabulary-job", "data"), Input("attr-list", "n_clicks"), State("page-state", "data"), prevent_initial_call=True)
def list_vocabulary(clicks: int | None, page: dict[str, Any]):
    if not clicks:
        return no_update
    trace = services().library.open(page["trace"])
    return services().jobs.submit("vocabulary", {"model": trace.info.name}, f"Vocabulary of {trace.info.name}").id


@callback(Output("attr-vocabulary", "children"), Output("attr-done", "data"), Output("attr-state", "children", allow_duplicate=True), Input("jobs-now", "data"),
          Input("attr-vocabulary-job", "data"), Input("attr-job", "data"), State("attr-done", "data"), State("page-state", "data"),
          prevent_initial_call="initial_duplicate")  # fmt: skip
def follow(_: Any, listing: str | None, computing: str | None, done: list[str] | None, page: dict[str, Any]):
    """What can be searched for, and the jobs' progress; a job that is done makes the page draw again."""
    trace = services().library.open(page["trace"])
    jobs = [job_or_none(job_id) for job_id in (listing, computing)]
    ended = [job.id for job in jobs if job is not None and job.state == "done"]
    n, known = trace.info.d_vocab, vocabulary(values.model_of(trace).identity)
    button = html.Button(f"Search all {n:,}", id="attr-list", className="chip", disabled=jobs[0] is not None and jobs[0].is_active, n_clicks=0)
    foot = [] if known else [f"The lists search the {len(trace.vocabulary):,} tokens that occur in this trace.", button, _state_of(jobs[0])]
    news = ended != (done or []) or any(not taken_up(job, job.id) for job in jobs if job is not None and job.state == "done")
    return foot, ended if news else no_update, _state_of(jobs[1]) or no_update


def _state_of(job: Any) -> Any:
    if job is None or job.state == "done":
        return None
    return job_panel(job) if job.is_active else error(job.error or f"The job was {job.state.replace('_', ' ')}.")


@callback(Output("attr-sort", "data"), Input({"type": "sort-parts", "by": ALL}, "n_clicks"), prevent_initial_call=True)
def sort_by(clicks: list[int | None]):
    return ctx.triggered_id["by"] if any(clicks) else no_update


@callback(Output("attr-go", "href"), Input("attr-heads", "clickData"), State("position", "data"), State("page-state", "data"), prevent_initial_call=True)
def open_clicked(click: dict[str, Any] | None, position: int | None, page: dict[str, Any]):
    point = click["points"][0] if click else None
    return no_update if point is None else f"/attention?trace={page['trace']}&layer={int(point['y'])}&head={int(point['x'])}&pos={position or 0}"


keep_url({"token": ("attr-token", "value"), "against": ("attr-against", "value"), "sort": ("attr-sort", "data")})

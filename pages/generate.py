"""Generate: the model writes on, token by token, and every step is shown as it is taken; afterwards the whole trace with a slider over its steps.

The page holds the job and its record; the form is in components/generation_form.py, what is shown while the model writes in
components/generation_live.py, the finished generation in components/generation_result.py.
"""

from __future__ import annotations

from typing import Any

import dash
from dash import Input, Output, State, callback, ctx, dcc, html, no_update

from backend.errors import LayerscopeError
from backend.trace import Trace
from components.card import cards
from components.generation_form import FIELDS, NUMBERS, form_card
from components.generation_live import text_card
from components.generation_result import result
from components.jobs_tray import job_or_none, job_panel
from components.run_form import MAX_NEW_TOKENS, RunRequest, cost
from components.services import services
from components.states import error
from components.url_state import as_int, keep_url

dash.register_page(__name__, path="/generate", name="Generate", order=0.3, group="Run", icon="sparkles", description="Watch the model write, step by step")

POLL_MS = 400
_FORM = [State(f"gen-{name}", "value") for name in FIELDS]


def layout(model: str | None = None, prompt: str | None = None, job: str | None = None, trace: str | None = None, step: str | None = None,
           layer: str | None = None, head: str | None = None, **numbers: str) -> html.Div:  # fmt: skip
    stores = [
        dcc.Store(id="gen-job", data=job),
        dcc.Store(id="gen-trace", data=trace),
        dcc.Store(id="gen-record", data={}),
        dcc.Store(id="gen-at"),
        dcc.Store(id="gen-asked", data={"trace": trace, "step": step, "layer": layer, "head": head}),
        dcc.Interval(id="gen-poll", interval=POLL_MS, disabled=job is None or trace is not None),
    ]
    title = html.Div([html.H1("Generate"), html.Span("Watch the model write, and look into every step.", className="page-subtitle")], className="page-title")
    top = cards(form_card(model, prompt, numbers), text_card())
    return html.Div([*stores, title, top, html.Div(id="gen-live", className="gen-part"), html.Div(id="gen-result", className="gen-part")], className="page")


@callback(
    Output("gen-job", "data"), Output("gen-trace", "data", allow_duplicate=True), Output("gen-asked", "data"), Output("gen-refused", "children"),
    Input("gen-run", "n_clicks"), *_FORM, prevent_initial_call=True,
)  # fmt: skip
def run(_: int, *values: Any) -> tuple[Any, ...]:
    """Queue the generation, or say in one sentence why not."""
    try:
        form = dict(zip(FIELDS, values, strict=True))
        request = RunRequest.read(form)
        if request.max_new_tokens < 1:
            raise LayerscopeError(f"New tokens must be a number from 1 to {MAX_NEW_TOKENS}.")
        found = cost(request)
        if not found.fits:
            raise LayerscopeError(found.sentence)
        return services().jobs.submit("generate", request.params(), f"Generate: {request.title()}").id, None, {}, None
    except LayerscopeError as problem:
        return no_update, no_update, no_update, error(str(problem))


@callback(Output("gen-stop", "disabled"), Input("gen-stop", "n_clicks"), State("gen-job", "data"), prevent_initial_call=True)
def stop(_: int, job_id: str | None) -> bool:
    """Enough: the job goes on with the tokens that there are."""
    if job_id:
        services().live.stop(job_id)
    return True


@callback(
    Output("gen-record", "data"), Output("gen-poll", "disabled"), Output("gen-progress", "children"), Output("gen-run", "disabled"),
    Output("gen-stop", "hidden"), Output("gen-stop", "disabled", allow_duplicate=True), Output("gen-trace", "data"),
    Input("gen-poll", "n_intervals"), Input("gen-job", "data"), State("gen-record", "data"), State("gen-trace", "data"),
    prevent_initial_call="initial_duplicate",
)  # fmt: skip
def follow(_: int | None, job_id: str | None, before: dict[str, Any], trace_id: str | None) -> tuple[Any, ...]:
    """What the job has written since the last look; its end is the way to its trace."""
    job = job_or_none(job_id)
    if job is None or (trace_id and ctx.triggered_id != "gen-job"):
        return before, True, None, no_update, True, True, trace_id  # not no_update: Dash would leave out what waits for these as the page opens
    record = {"job": job.id, "size": services().live.size(job.id), "active": job.is_active}
    arrived = job.result.get("trace_id") if job.state == "done" else None
    waiting = job.is_active and job.stage in ("", "loading model", "generating")
    return record if record != before else no_update, not job.is_active, job_panel(job), job.is_active, not waiting, services().live.stopped(job.id), arrived or no_update


@callback(Output("gen-result", "children"), Input("gen-trace", "data"), State("gen-asked", "data"))
def show_result(trace_id: str | None, asked: dict[str, str | None]) -> Any:
    """The finished trace with its slider: where the address says, if it is that trace."""
    if not trace_id:
        return None
    try:
        trace = services().library.open(trace_id)
    except LayerscopeError:
        return None  # the text says what is wrong
    here = asked if asked.get("trace") == trace_id else {}
    n = trace.n_tokens - trace.n_prompt
    return result(trace, as_int(here.get("step"), 1, 1, max(n, 1)), *_head(trace, here))


def _head(trace: Trace, asked: dict[str, str | None]) -> tuple[int, int]:
    layers = trace.layers("attn_pattern") or [0]
    layer = as_int(asked.get("layer"), layers[-1], 0, trace.info.n_layers - 1)
    return layer if layer in layers else layers[-1], as_int(asked.get("head"), 0, 0, trace.info.n_heads - 1)


keep_url({"model": ("gen-model", "value"), "prompt": ("gen-prompt", "value"), **{name: (f"gen-{name}", "value") for name in NUMBERS},
          "job": ("gen-job", "data"), "trace": ("gen-trace", "data")})  # fmt: skip

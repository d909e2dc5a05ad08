"""Generate: the model writes on, token by token, and every step is shown as it is taken; afterwards the whole trace with a slider over its steps."""

from __future__ import annotations

from typing import Any

import dash
from dash import Input, Output, State, callback, ctx, dcc, html, no_update

from backend.errors import LayerscopeError
from backend.trace import Trace
from components.card import card, cards
from components.controls import field, set_button
from components.figures.generation import MOST_COLUMNS, step_curves, step_norms
from components.figures.theme import no_figure
from components.generation_result import result
from components.generation_steps import Steps, steps_facts, steps_text
from components.graph import graph, graph_tools
from components.icons import icon
from components.jobs_tray import job_or_none, job_panel
from components.run_form import MAX_NEW_TOKENS, MAX_PROMPT_CHARACTERS, RunRequest, cost
from components.services import services
from components.states import empty, error
from components.url_state import as_int, keep_url

dash.register_page(__name__, path="/generate", name="Generate", order=0.3, group="Run", icon="sparkles", description="Watch the model write, step by step")

POLL_MS = 400
FIELDS = ("model", "prompt", "new", "temperature", "top_k", "top_p", "min_p", "seed")
NUMBERS = {"new": 40, "temperature": 0.8, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0}
_FORM = [State(f"gen-{name}", "value") for name in FIELDS]

ABOUT_FORM = (
    "Three cuts see the model's own probabilities: top-k keeps the k most probable tokens (0: all), top-p (Holtzman et al. 2020) the fewest that together hold p, min-p "
    "(Nguyen et al. 2024) those at least that share as probable as the best. One of the rest is drawn with probability proportional to exp(logit / temperature); the same "
    "seed draws the same again.",
)
ABOUT_TEXT = (
    "The prompt in grey, then what the model wrote. The colour is the surprise of each token, -ln p in nats under the model's own distribution (softmax over the whole "
    "vocabulary, before temperature and cuts); it is full at 8 nats, a probability of 1 in 3,000.",
    "Hover a token, or use the arrow keys on the text, for what it could have been. Stop keeps the tokens so far and makes their trace; Cancel throws them away.",
)
ABOUT_CURVES = (
    "Probability: of the written token under the model. The sampler's own probability, after top-k, top-p, min-p and temperature, is dotted where it differs. "
    "Entropy: -sum p ln p of the model's distribution at that step, in nats: near 0 there was no choice.",
    f"Beyond {MOST_COLUMNS} steps the newest are drawn.",
)
ABOUT_NORMS = (
    "The Euclidean length of the residual stream after each layer (resid_post) at the position that the token was chosen at. While the model writes only these "
    "lengths are taken; the trace, made afterwards in one pass, holds the vectors, and the lengths agree within rounding.",
)


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
    live = html.Div(id="live-text", className="live-text", tabIndex=0, role="listbox", **{"aria-label": "Written tokens; the arrow keys choose a step"})
    key = html.Div([html.Span("p = 1"), html.I(), html.Span("p = 1/3,000 and less")], className="live-key")
    text = card("Text", [live, key, html.Div(id="live-facts", className="live-facts")], html.Span("", id="gen-words"), about=list(ABOUT_TEXT), className="fill")
    top = cards(card("What to write on", _form(model, prompt, numbers), "Sampling draws from the model's distribution; temperature 0 takes the best token.",
                     about=list(ABOUT_FORM)), text)
    return html.Div([*stores, title, top, html.Div(id="gen-live", className="gen-part"), html.Div(id="gen-result", className="gen-part")], className="page")


def _form(model: str | None, prompt: str | None, numbers: dict[str, str]) -> html.Div:
    usable = [entry for entry in services().library.models() if entry.error is None]
    first = next((entry for entry in usable if entry.name == model), usable[0] if usable else None)
    start = prompt if prompt is not None else first.prompts[0].text if first and first.prompts else ""
    names: Any = [{"label": entry.name, "value": entry.name} for entry in usable]

    def number(name: str, label: str, low: float, high: float, step: float, hint: str = "") -> html.Div:
        box = dcc.Input(id=f"gen-{name}", type="number", min=low, max=high, step=step, value=_number(numbers.get(name), NUMBERS[name]), className="text-input")
        return field(label, box, hint, id=f"gen-{name}")

    prompt_box = dcc.Textarea(id="gen-prompt", value=start, className="text-input", maxLength=MAX_PROMPT_CHARACTERS, spellCheck=False)
    buttons = [
        html.Button([icon("play"), "Run"], id="gen-run", className="btn btn-primary", type="button", disabled=not usable),
        html.Button("Stop and keep", id="gen-stop", className="btn btn-outline-secondary", type="button", hidden=True),
        html.Div(id="gen-refused"),
    ]
    return html.Div(
        [
            field("Model", dcc.Dropdown(names, first.name if first else None, id="gen-model", clearable=False, placeholder="no model found"), id="gen-model"),
            html.Div([html.Label("Prompt", htmlFor="gen-prompt", className="field-label"), prompt_box, html.Div(id="gen-examples", className="chips")], className="field"),
            html.Div(
                [
                    number("new", "New tokens", 1, MAX_NEW_TOKENS, 1, "at most"),
                    number("temperature", "Temperature", 0, 10, 0.1, "0 is greedy"),
                    number("top_k", "Top-k", 0, 1_000_000, 1, "0 is off"),
                    number("top_p", "Top-p", 0, 1, 0.01, "1 is off"),
                    number("min_p", "Min-p", 0, 1, 0.01, "0 is off"),
                    number("seed", "Seed", 0, 2**31 - 1, 1, "the same repeats"),
                ],
                className="fields fields-three",
            ),
            html.Div(buttons, className="form-foot"),
            html.Div(id="gen-progress"),
        ],
        className="form",
    )


def _number(text: str | None, default: float) -> float:
    try:
        return type(default)(text) if text is not None else default
    except ValueError:
        return default


@callback(Output("gen-examples", "children"), Input("gen-model", "value"))
def offer_examples(model: str | None) -> list[Any]:
    """The example prompts of the chosen model."""
    entry = next((entry for entry in services().library.models() if entry.name == model), None)
    return [set_button(prompt.label, "gen-prompt", prompt.text, "chip", **{"data-property": "value"}) for prompt in entry.prompts] if entry else []


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


def _steps(record: dict[str, Any], trace_id: str | None) -> Steps | None:
    """Those of the trace where there is one, else of the live record."""
    if trace_id:
        return Steps.of_trace(services().library.open(trace_id))
    return Steps.of_record(services().live.read(record["job"])) if record.get("job") else None


@callback(
    Output("live-text", "children"), Output("gen-words", "children"), Output("live-facts", "children"),
    Input("gen-record", "data"), Input("gen-trace", "data"),
)  # fmt: skip
def show_text(record: dict[str, Any], trace_id: str | None) -> tuple[Any, str, Any]:
    try:
        steps = _steps(record, trace_id)
    except LayerscopeError as problem:
        return error(str(problem)), "", None
    if steps is None or not (steps.prompt or steps.labels):
        waiting = bool(record.get("active"))
        words = "The worker loads the model and reads the prompt." if waiting else "Press Run: the text appears here as the model writes it."
        return empty("Waiting for the first token" if waiting else "Nothing written yet", words, symbol="sparkles"), "", None
    caret = [html.Span(className="live-caret")] if record.get("active") and not trace_id else []
    return [*steps_text(steps), *caret], f"{len(steps.labels)} tokens written. Colour: surprise. Hover for the alternatives.", steps_facts(steps)


@callback(Output("gen-live", "children"), Input("gen-record", "data"), Input("gen-trace", "data"), State("gen-live", "children"))
def show_live_cards(record: dict[str, Any], trace_id: str | None, present: Any) -> Any:
    """The pictures, once there is something to draw."""
    if present or not (record.get("job") or trace_id):
        return no_update
    curves = card("Probability and entropy", graph("gen-curves", height=330), "One point a step, under it the token that was written.",
                  graph_tools("gen-curves", "generation-steps"), list(ABOUT_CURVES))  # fmt: skip
    norms = card("Residual norms", graph("gen-norms", height=330, className="fill"), "One row a layer, one column a step. Click a cell to choose the step.",
                 graph_tools("gen-norms", "generation-norms"), list(ABOUT_NORMS), className="fill")  # fmt: skip
    return cards(curves, norms)


@callback(
    Output("gen-curves", "figure"), Output("gen-norms", "figure"),
    Input("gen-record", "data"), Input("gen-trace", "data"), Input("gen-at", "data"), Input("theme", "data"),
)  # fmt: skip
def draw(record: dict[str, Any], trace_id: str | None, at: int | None, theme: str) -> tuple[Any, Any]:
    steps = _steps(record, trace_id)
    if steps is None or not steps.labels:
        nothing = no_figure(theme, "No step yet.")
        return nothing, nothing
    chosen = at - 1 if at and trace_id and at <= len(steps.labels) else None
    labels = [label if len(label) <= 12 else f"{label[:11]}…" for label in steps.labels]
    curves = step_curves(steps.probability, steps.entropy, labels, steps.sampler, chosen, theme)
    return curves, no_figure(theme, "resid_post was not captured.") if steps.norms is None else step_norms(steps.norms, labels, chosen, theme)


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


@callback(Output("gen-step", "value"), Input("gen-curves", "clickData"), Input("gen-norms", "clickData"), prevent_initial_call=True)
def choose_clicked(curves: dict[str, Any] | None, norms: dict[str, Any] | None) -> Any:
    click = norms if ctx.triggered_id == "gen-norms" else curves
    return int(click["points"][0]["x"]) if click else no_update


keep_url({"model": ("gen-model", "value"), "prompt": ("gen-prompt", "value"), **{name: (f"gen-{name}", "value") for name in NUMBERS},
          "job": ("gen-job", "data"), "trace": ("gen-trace", "data")})  # fmt: skip

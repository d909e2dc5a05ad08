"""Home: the models that were found, the run form with its price, the run in progress, recent traces."""

from __future__ import annotations

from typing import Any

import dash
from dash import Input, Output, State, callback, ctx, dcc, html, no_update

from backend.errors import LayerscopeError
from backend.estimate import in_bytes
from backend.model_files import ModelEntry
from components.card import card, cards
from components.controls import set_button
from components.jobs_tray import job_or_none, job_panel
from components.run_form import DEFAULT_NEW_TOKENS, MAX_NEW_TOKENS, RunRequest, cost, run_form
from components.services import services
from components.states import empty, error
from components.trace_list import trace_table
from components.url_state import as_int, keep_url

dash.register_page(__name__, path="/", name="Home", order=0, group="Run", icon="house", description="Run a prompt and capture what happens inside")

FIELDS = ("model", "prompt", "new", "preset", "sites", "native", "layers", "heads", "rows", "precision", "category", "temperature", "seed")
_FORM = [State(f"run-{name}", "value") for name in FIELDS]
RECENT = 8

ABOUT_RUN = (
    "The model runs over the prompt and writes its answer; then prompt and answer are run together once, and the values at the chosen sites are stored in one trace file. "
    "The price is worked out beforehand from the model's shape and the number of tokens.",
)
ABOUT_MODELS = "Everything that can be run here. Layers, d_model and size are read from each file's metadata; no weights are loaded for this list."
ABOUT_TRACES = "The newest traces. A trace is one run: tokens, predictions, stored sites, and the identities that were checked on it."


def layout(model: str | None = None, prompt: str | None = None, sites: str | None = None, new: str | None = None, **_: str) -> html.Div:
    models = services().library.models()
    usable = [entry for entry in models if entry.error is None]
    start = prompt if prompt is not None else (usable[0].prompts[0].text if usable and usable[0].prompts else "")
    names = [name for name in (sites or "").split(",") if name] or None
    form = run_form(models, model, start, names, as_int(new, DEFAULT_NEW_TOKENS, 0, MAX_NEW_TOKENS))
    run = [form, dcc.Store(id="home-job"), html.Div(id="home-progress", className="home-progress"), dcc.Location(id="home-go", refresh="callback-nav")]
    title = html.Div([html.H1("Home"), html.Span("Run a prompt and look inside the model.", className="page-subtitle")], className="page-title")
    recent = services().library.traces(limit=RECENT)
    traces = trace_table(recent, deletable=False) if recent else empty("No traces yet", "Every run is kept here as one trace. Press Run to make the first.")
    found = card("Models", _model_table(models), "Click one to choose it. Presets, the models folder and the Hugging Face cache; nothing is downloaded.", about=ABOUT_MODELS)
    return html.Div([title, cards(card("Run a prompt", run, "One forward pass over the prompt and its answer, with every chosen site written down.", about=list(ABOUT_RUN)), found,
                     card("Recent traces", traces, about=ABOUT_TRACES, className="wide"))], className="page")  # fmt: skip


def _model_table(models: list[ModelEntry]) -> html.Div:
    if not models:
        return html.Div(empty("No models found", "Put a .gguf file or a Hugging Face model folder into the models folder, then reload this page."))
    head = [html.Th("Model"), html.Th("Architecture"), html.Th("Weights"), *(html.Th(name, className="num") for name in ("Layers", "d_model", "Size"))]
    return html.Div(html.Table([html.Thead(html.Tr(head)), html.Tbody([_model_row(entry) for entry in models])], className="ls-table"), className="table-scroll")


def _model_row(entry: ModelEntry) -> html.Tr:
    info = entry.info
    name = html.Td([html.Div(entry.name, className="model-name"), html.Div(entry.origin, className="muted small")], title=entry.description)
    if entry.error or info is None:
        return html.Tr([name, html.Td(entry.error or "cannot be read", colSpan=5, className="bad small")])
    moe = f", {info.n_experts} experts" if info.is_moe else ""
    size = "on first use" if entry.made_on_first_use else in_bytes(entry.n_bytes or info.n_bytes)
    cells = [html.Td(f"{info.architecture}{moe}"), html.Td(info.quantization), *(html.Td(text, className="num") for text in (f"{info.n_layers}", f"{info.d_model:,}", size))]
    return html.Tr([name, *cells], tabIndex=0, **{"data-set": "run-model", "data-property": "value", "data-value": entry.name})


@callback(Output("run-examples", "children"), Input("run-model", "value"))
def offer_examples(model: str | None) -> list[Any]:
    """The example prompts of the chosen model."""
    entry = next((entry for entry in services().library.models() if entry.name == model), None)
    return [set_button(prompt.label, "run-prompt", prompt.text, "chip", **{"data-property": "value"}) for prompt in entry.prompts] if entry else []


@callback(Output("run-sites-field", "hidden"), Input("run-preset", "value"))
def show_sites(preset: str) -> bool:
    return preset != "choose"


@callback(Output("run-estimate", "children"), Output("run-estimate", "className"), *[Input(f"run-{name}", "value") for name in FIELDS])
def show_cost(*values: Any) -> tuple[str, str]:
    """What the run will take, before it runs."""
    try:
        found = cost(RunRequest.read(dict(zip(FIELDS, values, strict=True))))
    except LayerscopeError as problem:
        return str(problem), "estimate refused"
    return f"About {found.n_tokens:,} tokens. {found.sentence}", "estimate" if found.fits else "estimate refused"


@callback(Output("home-job", "data"), Output("run-refused", "children"), Input("run-button", "n_clicks"), *_FORM, prevent_initial_call=True)
def run(_: int, *values: Any) -> tuple[Any, Any]:
    """Queue the capture, or say in one sentence why not."""
    try:
        request = RunRequest.read(dict(zip(FIELDS, values, strict=True)))
        found = cost(request)
        if not found.fits:
            raise LayerscopeError(found.sentence)
        return services().jobs.submit("capture", request.params(), request.title()).id, None
    except LayerscopeError as problem:
        return no_update, error(str(problem))


@callback(
    Output("home-progress", "children"), Output("run-button", "disabled"), Output("home-go", "href"),
    Input("home-job", "data"), Input("jobs-now", "data"),
    prevent_initial_call=True,
)  # fmt: skip
def follow(job_id: str | None, _: Any) -> tuple[Any, Any, Any]:
    """The run in progress, under its button; the way to its trace when it is done and Home is still shown."""
    job = job_or_none(job_id)
    if job is None:
        return no_update, no_update, no_update
    arrived = job.state == "done" and job.result.get("trace_id") and ctx.triggered_id == "jobs-now"
    return job_panel(job), job.is_active, f"/trace?trace={job.result['trace_id']}" if arrived else no_update


keep_url({"model": ("run-model", "value"), "prompt": ("run-prompt", "value"), "new": ("run-new", "value")})

"""Batch: many prompts through one model, one trace each; what came of every prompt, and the statistics of all of them."""

from __future__ import annotations

from typing import Any

import dash
from dash import Input, Output, State, callback, ctx, dcc, html, no_update

from backend.batches import Batch
from backend.errors import LayerscopeError
from backend.estimate import in_bytes
from components.batch_aggregates import aggregate_cards
from components.batch_form import FIELDS, BatchRequest, batch_form, preview_or_error
from components.batch_results import PAGE_SIZE, batch_list, batch_words, page_buttons, results_table
from components.card import card, cards
from components.jobs_tray import job_or_none, job_panel
from components.services import services
from components.states import empty, error
from components.url_state import as_int, keep_url

dash.register_page(__name__, path="/batch", name="Batch", order=0.6, group="Run", icon="blocks", description="Run many prompts and compare them")

_FORM = [State(f"batch-{name}", "value") for name in FIELDS]
ABOUT_READ = "The prompts as they will be run, read by the server from the text or the file: their categories, the first of them, and columns that are ignored."
ABOUT_NEW = "The prompts run as one job, one at a time: each becomes a trace of its own, so memory is that of the longest prompt. A batch that was stopped can go on."
ABOUT_RESULTS = (
    "Log-prob: the mean log-probability, in nats, that the model gives to the prompt's own tokens, each from those before it; perplexity is exp of its negative. Entropy: "
    "the mean entropy of the predictions at the same positions, in nats. Generated tokens do not count.",
    "A prompt that fails is named and the rest goes on. Cancel keeps what is done; going on runs only what has no trace yet.",
)


def layout(batch: str | None = None, model: str | None = None, page: str | None = None, **asked: str) -> html.Div:
    if not batch:
        return _new(model)
    try:
        found = services().batches.get(batch)
    except LayerscopeError as problem:
        back = dcc.Link("New batch", href="/batch", className="btn btn-primary")
        return html.Div([_title("Run many prompts and compare them."), error(str(problem)), html.Div(back, className="state-actions")], className="page")
    return _one(found, page, asked)


def _title(words: str, controls: Any = None) -> html.Div:
    return html.Div([html.H1("Batch"), html.Span(words, className="page-subtitle"), html.Div(controls, className="page-controls")], className="page-title")


def _new(model: str | None) -> html.Div:
    known = services().batches.list()
    shown = batch_list(known) if known else empty("No batches yet", "A batch that was run appears here, with its results and statistics.", symbol="blocks")
    form = [batch_form(model), dcc.Location(id="batch-go", refresh="callback-nav")]
    read = card("What was read", html.Div(id="batch-preview"), html.Span("", id="batch-preview-words"), about=ABOUT_READ)
    new = card("New batch", form, "One trace a prompt, one after another; the model is loaded once.", about=ABOUT_NEW)
    return html.Div([_title("Run many prompts and compare them."), cards(new, read, card("Batches", shown, "Newest first.", about=ABOUT_NEW, className="wide"))], className="page")


def _one(batch: Batch, page: str | None, asked: dict[str, str]) -> html.Div:
    last = max(batch.n - 1, 0) // PAGE_SIZE
    stores = [dcc.Store(id="batch-id", data=batch.id), dcc.Store(id="batch-stand"), dcc.Store(id="batch-page", data={"value": str(as_int(page, 0, 0, last))})]
    resume = html.Button("Go on with the rest", id="batch-resume", className="btn btn-primary", type="button", hidden=True)
    progress = [html.Div(id="batch-progress"), html.Div(resume, className="form-foot batch-foot")]
    results = [html.Div(id="batch-results"), html.Div(id="batch-pages", className="form-foot batch-foot")]
    prompts = card("Prompts", results, html.Span("", id="batch-words"), about=list(ABOUT_RESULTS))
    name = batch.name or f"batch {batch.id}"
    links = [
        dcc.Link("In the library", href=f"/library?search={batch.tag}", className="btn btn-outline-secondary"),
        dcc.Link("New batch", href="/batch", className="btn btn-outline-secondary"),
    ]
    settings = f"{batch.model}; {', '.join(batch.settings.get('sites') or ())}; tag {batch.tag}"
    return html.Div(
        [
            *stores,
            _title(name, links),
            html.Div([card("Progress", progress, settings, about=ABOUT_NEW), prompts], className="card-stack"),
            aggregate_cards(batch, dict(asked)),
        ],
        className="page",
    )


def _formats() -> html.Div:
    """What a file may look like."""
    examples = {
        "prompts.csv": 'prompt,category,tags\n"The capital of France is",capital,geo;easy\n"7 plus 5 equals",sum,',
        "prompts.jsonl": '{"prompt": "The capital of France is", "category": "capital", "tags": ["geo"]}\n{"prompt": "def add(a, b):\\n    return a", "category": "code"}',
    }
    return html.Div([html.Div([html.Div(name, className="field-label"), html.Pre(text)]) for name, text in examples.items()], className="formats")


@callback(
    Output("batch-preview", "children"), Output("batch-preview-words", "children"), Output("batch-file-name", "children"), Output("batch-remove", "hidden"),
    Input("batch-text", "value"), Input("batch-upload", "contents"), State("batch-upload", "filename"),
)  # fmt: skip
def show_preview(text: str | None, upload: str | None, filename: str | None) -> tuple[Any, str, Any, bool]:
    said = (filename or "")[-80:] if upload else "Drop a .csv, .jsonl or .txt file here, or click to choose one"
    if not upload and not (text or "").strip():
        return [empty("No prompts yet", "Paste them, one a line, or choose a file; what was read appears here.", symbol="blocks"), _formats()], "", said, True
    shown, words = preview_or_error(text, upload, filename)
    return shown, words, said, not upload


@callback(Output("batch-upload", "contents"), Input("batch-remove", "n_clicks"), prevent_initial_call=True)
def remove_file(_: int) -> None:
    """Back to what was pasted."""
    return None


@callback(
    Output("batch-go", "href"), Output("batch-refused", "children"),
    Input("batch-run", "n_clicks"), State("batch-upload", "contents"), State("batch-upload", "filename"), *_FORM,
    prevent_initial_call=True,
)  # fmt: skip
def run(_: int, upload: str | None, filename: str | None, *values: Any) -> tuple[Any, Any]:
    """Record the batch, queue its job, and go to its page; or say in one sentence why not."""
    try:
        request = BatchRequest.read(dict(zip(FIELDS, values, strict=True)), upload, filename)
        batch = services().batches.create(request.name, request.model, request.settings, request.prompts.prompts)
        _submit(batch)
    except LayerscopeError as problem:
        return no_update, error(str(problem))
    return f"/batch?batch={batch.id}", f"About {in_bytes(request.trace_bytes)} of traces."


def _submit(batch: Batch) -> None:
    job = services().jobs.submit("batch", {"batch_id": batch.id}, f"Batch {batch.name or batch.id}: {batch.n:,} prompts, {batch.model}")
    services().batches.assigned(batch.id, job.id)


@callback(
    Output("batch-progress", "children"), Output("batch-resume", "hidden"), Output("batch-resume", "children"), Output("batch-stand", "data"), Output("batch-words", "children"),
    Input("jobs-now", "data"), Input("batch-resume", "n_clicks"), State("batch-id", "data"), State("batch-stand", "data"),
)  # fmt: skip
def follow(_: Any, clicks: int | None, batch_id: str, before: dict[str, int] | None) -> tuple[Any, ...]:
    """How the batch stands; `batch-stand` changes when a prompt has ended."""
    batch = services().batches.get(batch_id)
    job = job_or_none(batch.job_id)
    if ctx.triggered_id == "batch-resume" and clicks and (job is None or not job.is_active):
        try:
            _submit(batch)
        except LayerscopeError as problem:
            return error(str(problem)), no_update, no_update, no_update, no_update
        batch = services().batches.get(batch_id)
        job = job_or_none(batch.job_id)
    active = job is not None and job.is_active
    rest = batch.n_waiting + batch.n_failed
    stand = {"done": batch.n_done, "failed": batch.n_failed, "active": active}
    panel = job_panel(job, leads_on=False) if job is not None else html.Div(batch_words(batch), className="muted")
    label = f"Go on with the remaining {rest:,}" if batch.n_waiting else "Try the failed prompts again"
    return panel, active or not rest, label, no_update if stand == before else stand, batch_words(batch)


@callback(
    Output("batch-results", "children"), Output("batch-pages", "children"),
    Input("batch-stand", "data"), Input("batch-page", "data"), State("batch-id", "data"),
)  # fmt: skip
def show_results(_: Any, page: dict[str, Any], batch_id: str) -> tuple[Any, Any]:
    batch = services().batches.get(batch_id)
    at = as_int(str(page.get("value")), 0, 0, max(batch.n - 1, 0) // PAGE_SIZE)
    return results_table(services().batches.items(batch_id, at * PAGE_SIZE, PAGE_SIZE)), page_buttons(at, batch.n)


keep_url({"batch": ("batch-id", "data"), "page": ("batch-page", "data", "value")})

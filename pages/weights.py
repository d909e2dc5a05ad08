"""Weights: every tensor of a model, what its numbers look like, and the matrix itself. No trace is needed.

A job reads the model once and keeps the report; another looks closely at one matrix when it is chosen. What the picture of a matrix
shows is read from the file, a few rows at a time. The page finds the model and its report; the cards are in components/weight_overview.py,
choosing a tensor in components/weight_choice.py, the chosen tensor in components/weight_tensor.py.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import dash
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.analysis.weights import STATISTICS
from backend.errors import LayerscopeError
from backend.estimate import in_bytes
from components import states
from components.figures.weights import SCALES
from components.services import services
from components.url_state import as_choice, as_int, keep_url
from components.weight_overview import report_cards
from components.weight_source import Source, follow, read_place, report_missing, reported, source

dash.register_page(__name__, path="/weights", name="Weights", order=10, group="This model", icon="weight", description="Every tensor, and what its numbers look like")

SUBTITLE = "Every tensor, and what its numbers look like."


def layout(model: str | None = None, tensor: str | None = None, stat: str | None = None, scale: str | None = None, counts: str | None = None, index: str | None = None,
           zoom: str | None = None, mark: str | None = None, **_: str) -> html.Div:  # fmt: skip
    usable = [entry.name for entry in services().library.models() if entry.error is None]
    if model is None and not usable:
        return _page(None, usable, [states.empty("No model found", "Put a .gguf file or a folder of safetensors into the models folder, then reload this page.")])
    name = model or usable[0]
    asked = {
        "tensor": tensor, "stat": as_choice(stat, list(STATISTICS), "std"), "scale": as_choice(scale, SCALES, "each"),
        "counts": as_choice(counts, ("linear", "log"), "linear"), "index": as_int(index, 0, 0, 1 << 20), "zoom": zoom,
        "mark": read_place(mark),
    }  # fmt: skip
    try:
        found = source(name)
        report = found.report
        shown = report_missing(found) if report is None else report_cards(found, report, asked)
    except LayerscopeError as problem:
        return _page(None, usable, [states.error(str(problem))])
    state = dcc.Store(id="weights-page", data={"model": found.entry.name, "asked": asked})
    return _page(found, usable, [state, html.Div(shown, className="card-stack", **({"id": "weights-body"} if report is None else {}))])


def _page(found: Source | None, models: list[str], body: list[Any]) -> html.Div:
    name = found.entry.name if found else None
    picker = html.Label([html.Span("Model"), dcc.Dropdown(models, name, id="weights-model", clearable=False, className="picker-model")])
    info = found.entry.info if found else None
    facts = f"{info.architecture}, {info.quantization}, {info.n_params / 1e6:,.1f} M weights, {in_bytes(info.n_bytes)}" if info else SUBTITLE
    title = html.Div([html.H1("Weights"), html.Span(facts, className="page-subtitle"), html.Div(picker, className="controls page-controls")], className="page-title")
    return html.Div([title, dcc.Location(id="weights-go", refresh="callback-nav"), *body], className="page")


@callback(Output("weights-go", "href"), Input("weights-model", "value"), State("weights-page", "data"), prevent_initial_call=True)
def open_model(model: str | None, page: dict[str, Any] | None):
    if not model or (page and model == page["model"]):
        return no_update
    return f"/weights?{urlencode({'model': model})}"


@callback(Output("weights-job", "data"), Input("weights-compute", "n_clicks"), State("weights-page", "data"))
def read_model(clicks: int, page: dict[str, Any]):
    """Queue the job, at once where the page was made with the button pressed."""
    return services().jobs.submit("weight_report", {"model": page["model"]}, f"Weights of {page['model']}").id if clicks else no_update


@callback(Output("weights-progress", "children"), Output("weights-ready", "data"), Input("weights-job", "data"), Input("jobs-now", "data"), prevent_initial_call=True)
def follow_reading(job_id: str | None, _: Any):
    return follow(job_id)


@callback(Output("weights-body", "children"), Input("weights-ready", "data"), State("weights-page", "data"), prevent_initial_call=True)
def show_read(job_id: str | None, page: dict[str, Any]):
    """The cards, in place of the sentence that nothing was read."""
    return report_cards(*reported(page["model"]), page["asked"]) if job_id else no_update


keep_url({
    "model": ("weights-shown", "data"), "tensor": ("weights-name", "data"), "stat": ("weights-stat-name", "value"), "scale": ("weights-scale", "value"),
    "counts": ("weights-counts", "value"), "index": ("weights-index", "value"), "zoom": ("weights-region", "data"),
    "mark": ("weights-mark", "data"),
})  # fmt: skip

"""Quantization: what it did to a model in one place, to its weights, to its activations layer by layer, and to its predictions.

The comparison is a job that runs both models, one after the other; its report is kept in the derived cache and found again by
model, reference and prompts, which the address holds. The cards of a report are in components/quantization_cards.py.
"""

from __future__ import annotations

from typing import Any

import dash
from dash import Input, Output, State, callback, dcc, html, no_update
from dash.exceptions import PreventUpdate

from backend.errors import LayerscopeError
from components.card import card, cards
from components.controls import set_button
from components.figures.quantization import ACTIVATION_METRICS, WEIGHT_METRICS
from components.jobs_tray import job_or_none, job_panel
from components.quantization_cards import ABOUT_PREDICTIONS
from components.quantization_form import job_params, kept_report, quantization_form, references_for
from components.services import services
from components.states import error
from components.url_state import as_choice, as_int, keep_url

dash.register_page(__name__, path="/quantization", name="Quantization", order=11, group="This model", icon="scale",
                   description="What quantization did to weights, activations and predictions")  # fmt: skip


def layout(model: str | None = None, reference: str | None = None, prompt: str | None = None, wmetric: str | None = None, ametric: str | None = None,
           site: str | None = None, at: str | None = None, **_: str) -> html.Div:  # fmt: skip
    form = quantization_form(services().library.models(), model, reference, prompt[:100_000] if prompt else prompt)
    chosen = {"wmetric": as_choice(wmetric, list(WEIGHT_METRICS), "relative_rmse"), "ametric": as_choice(ametric, list(ACTIVATION_METRICS), "relative_l2"),
              "site": site or "resid_post", "at": as_int(at, 0, 0, 255)}  # fmt: skip
    stores = [dcc.Store(id="quant-job"), dcc.Store(id="quant-key", data=kept_report(model, reference, prompt)), dcc.Store(id="quant-chosen", data=chosen)]
    title = html.Div([html.H1("Quantization"), html.Span("What it did to weights, activations and predictions.", className="page-subtitle")], className="page-title")
    body = html.Div([form, html.Div(id="quant-progress", className="home-progress")])
    run = card("Compare with a reference", body, "Both models run over the same tokens, one after the other. The reference is the same model unquantized.",
               about=list(ABOUT_PREDICTIONS), className="wide")
    return html.Div([title, cards(run), html.Div(id="quant-body", className="card-stack"), *stores], className="page")


@callback(Output("quant-reference", "options"), Output("quant-reference", "value"), Output("quant-examples", "children"), Input("quant-model", "value"),
          State("quant-reference", "value"))  # fmt: skip
def offer(model: str | None, reference: str | None):
    """The references that fit the model, and its example prompts."""
    models = services().library.models()
    names = references_for(model, models)
    entry = next((entry for entry in models if entry.name == model), None)
    chips = [set_button(prompt.label, "quant-prompt", prompt.text, "chip", **{"data-property": "value"}) for prompt in entry.prompts] if entry else []
    if entry and len(entry.prompts) > 1:
        everything = "\n---\n".join(prompt.text for prompt in entry.prompts)
        chips.append(set_button("All of them", "quant-prompt", everything, "chip", **{"data-property": "value"}))
    return names, reference if reference in names else next(iter(names), None), chips


@callback(Output("quant-job", "data"), Output("quant-refused", "children"), Input("quant-run", "n_clicks"), State("quant-model", "value"), State("quant-reference", "value"),
          State("quant-prompt", "value"), prevent_initial_call=True)  # fmt: skip
def run(clicks: int, model: str | None, reference: str | None, prompt: str | None):
    """Queue the comparison, or say in one sentence why not."""
    if not clicks:
        raise PreventUpdate
    try:
        params = job_params(model, reference, prompt)
        return services().jobs.submit("quantization", params, f"Quantization of {model} against {reference}").id, None
    except LayerscopeError as problem:
        return no_update, error(str(problem))


@callback(Output("quant-progress", "children"), Output("quant-key", "data"), Output("quant-run", "disabled"), Input("quant-job", "data"), Input("jobs-now", "data"),
          State("quant-key", "data"), prevent_initial_call=True)  # fmt: skip
def follow(job_id: str | None, _: Any, key: str | None):
    """The job's progress; its report when it is done; why, when it failed."""
    job = job_or_none(job_id)
    if job is None:
        return no_update, no_update, no_update
    if job.state == "done":
        return None, no_update if job.result.get("key") == key else job.result.get("key"), False
    if job.is_active:
        return job_panel(job), no_update, True
    return error(job.error or f"The job was {job.state.replace('_', ' ')}."), no_update, False


keep_url({"model": ("quant-model", "value"), "reference": ("quant-reference", "value"), "prompt": ("quant-prompt", "value")})

"""The card that starts a sensitivity run: the form's callbacks, the job, its progress; the page then shows the run."""

from __future__ import annotations

from typing import Any

from dash import Input, Output, State, callback, dcc, html, no_update
from dash.exceptions import PreventUpdate

from backend.errors import LayerscopeError
from backend.model_files import ModelEntry
from backend.reports.sensitivity_run import manifests
from backend.sensitivity_spec import GRADIENT_METRICS, METRICS, PERTURBATIONS
from components.card import card
from components.job_follow import follow_job
from components.sensitivity_form import sensitivity_form
from components.sensitivity_known import known_line
from components.sensitivity_request import EXTRAS, FIELDS, cost_words, form_values, metric_options, presets, read_spec
from components.services import services
from components.states import error

_STATES = [State(id, "value") for id in FIELDS.values()]
ABOUT = (
    html.Div([html.P("A run ranks every weight, changes the best of them in memory and measures perplexity on a text, against as many random and as many bottom weights of the "
                     "same tensors. The file on disk is never changed. Metrics, of a weight w and the loss L:"),
              html.Ul([html.Li([html.Code(name), f": {formula}"]) for name, formula in METRICS.items()])]),
    html.Div([html.P("Sources: grad × weight as in Molchanov et al. 2019; the diagonal of the empirical Fisher matrix; Hutchinson 1990; wanda: Sun et al. 2023; obs: SparseGPT, "
                     "Frantar and Alistarh 2023. Perturbations:"),
              html.Ul([html.Li([html.Code(name), f": {formula}"]) for name, formula in PERTURBATIONS.items()])]),
    "Text: what comes with Layerscope, or a file in the folder texts of the data folder, cut into windows. Super weights: Yu et al. 2024 (arXiv 2411.07191).",
)  # fmt: skip


def start_card(model: str | None) -> html.Section:
    """The card; its callbacks need `jobs-now` and write `sens-run`, the run that the page shows."""
    body = [sensitivity_form(services().library.models(), model), html.Div(id="sens-progress", className="home-progress", role="status")]
    running = next((job.id for job in services().jobs.list(limit=20) if job.kind == "sensitivity" and job.is_active), None)  # of whoever comes back to the page
    stores = [dcc.Store(id="sens-preset"), dcc.Store(id="sens-job", data=running), dcc.Store(id="sens-ready"), dcc.Store(id="sens-taken")]
    return card("New run", [*stores, *body], "A preset fills the form; every field may be changed.", about=list(ABOUT), className="wide")


@callback(*[Output(id, "value") for id in FIELDS.values()], Input("sens-preset", "data"), State("sens-model", "value"), prevent_initial_call=True)
def fill(preset: dict[str, Any] | None, model: str | None):
    """A preset of the protocol into the fields; the text stays the chosen one."""
    entry = _entry(model)
    spec = presets(entry is not None and entry.kind == "gguf").get(str((preset or {}).get("value")))
    if spec is None:
        raise PreventUpdate
    return [no_update if name == "text" else value for name, value in zip(FIELDS, (form_values(spec)[name] for name in FIELDS), strict=True)]


@callback(Output(FIELDS["metric"], "options"), Output(FIELDS["metric"], "value", allow_duplicate=True), Output(FIELDS["extras"], "options"),
          Output("sens-known", "children"), Input("sens-model", "value"),
          State(FIELDS["metric"], "value"), prevent_initial_call="initial_duplicate")  # fmt: skip
def offer(model: str | None, metric: str):
    """What the engine of the model can give; the rest is disabled and says why."""
    entry = _entry(model)
    kind = entry.kind if entry else "hf"
    extras = [{"label": words, "value": name, "disabled": kind == "gguf" and name == "gradient_flow"} for name, words in EXTRAS.items()]
    return metric_options(kind), "wanda" if kind == "gguf" and metric in GRADIENT_METRICS else no_update, extras, known_line(entry)


@callback(Output(FIELDS["scale"], "disabled"), Output(FIELDS["bit"], "disabled"), Output(FIELDS["probes"], "disabled"), Output("sens-formula", "children"),
          Input(FIELDS["perturb"], "value"), Input(FIELDS["metric"], "value"))  # fmt: skip
def enable(perturb: str, metric: str):
    """Fields that mean nothing for what is chosen are disabled; the metric's formula is said."""
    return perturb not in ("scale", "gaussian"), perturb != "bit_flip", metric != "hutchinson", METRICS.get(metric, "")


@callback(Output("sens-cost", "children"), Output("sens-cost", "className"), Input("sens-model", "value"), *[Input(id, "value") for id in FIELDS.values()])
def show_cost(model: str | None, *values: Any):
    """What the run reads and evaluates, or what is wrong with the fields."""
    try:
        spec = read_spec(_entry(model), dict(zip(FIELDS, values, strict=True)))
    except LayerscopeError as problem:
        return str(problem), "estimate sens-cost refused"
    past = [each for each in manifests(services().settings.data_dir) if each["model"]["name"] == model]
    return cost_words(spec, past), "estimate sens-cost"


@callback(Output("sens-job", "data"), Output("sens-refused", "children"), Input("sens-start", "n_clicks"), State("sens-model", "value"), *_STATES, prevent_initial_call=True)
def start(clicks: int | None, model: str | None, *values: Any):
    """Queue the run, or say in one sentence why not."""
    if not clicks:
        raise PreventUpdate
    try:
        spec = read_spec(_entry(model), dict(zip(FIELDS, values, strict=True)))
        return services().jobs.submit("sensitivity", spec.to_json(), f"Sensitivity of {model} by {spec.metric}").id, None
    except LayerscopeError as problem:
        return no_update, error(str(problem))


@callback(Output("sens-progress", "children"), Output("sens-ready", "data"), Input("sens-job", "data"), Input("jobs-now", "data"), State("sens-ready", "data"),
          prevent_initial_call=True)  # fmt: skip
def follow(job_id: str | None, _: Any, told: str | None):
    return follow_job(job_id, told)


@callback(Output("sens-run", "data", allow_duplicate=True), Output("sens-taken", "data"), Input("sens-ready", "data"), State("sens-taken", "data"), prevent_initial_call=True)
def show_result(job_id: str | None, taken: str | None):
    """The run that a job has written, once: that it is done is said again for a while, and meanwhile another run may have been chosen."""
    if not job_id or job_id == taken:
        raise PreventUpdate
    return services().jobs.get(job_id).result["run"], job_id


def _entry(model: str | None) -> ModelEntry | None:
    return next((entry for entry in services().library.models() if entry.name == model), None)

"""The card of tuned lenses: how much each row's translator brought on held-out text, and the form that trains one as a job."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.trace import Trace
from backend.tuned_lens import check_name
from components.card import card
from components.controls import field
from components.figures.lens import held_out_bars
from components.figures.theme import no_figure
from components.graph import graph, graph_tools
from components.jobs_tray import job_or_none, job_panel
from components.lens_controls import lenses_of
from components.services import services
from components.states import error

TEXTS = "texts"  # the folder of the data folder whose files can be trained on
MAX_STEPS = 20_000

ABOUT_TUNED = (
    "A tuned lens learns, for each row, an affine translator h + A h + b that makes the stream say through the final norm and W_U what the model says, by lowering "
    "KL(model || lens) on text (Belrose et al. 2023, arXiv:2303.08112). It begins at the identity, the logit lens. The last layer needs none, so there the lens is the model.",
    "The bars are the mean KL over held-out text, every tenth chunk, before training (the logit lens) and after. What a translator brings on other text, only that text can say.",
    f"Text for training lies in the folder {TEXTS} of the data folder, as .txt or .md files. The command line takes text from anywhere: python -m backend tuned-lens train --help.",
)  # fmt: skip


def tuned_lens_card(trace: Trace) -> Any:
    """The card; its callbacks need the stores `page-state`, `jobs-now` and the dropdown `lens-kind`."""
    folder = services().settings.data_dir / TEXTS
    texts = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    options: Any = [{"label": name, "value": name} for name in texts]
    pick = dcc.Dropdown(options, texts[0] if texts else None, id="tuned-text", clearable=False, searchable=False, placeholder=f"no file in {TEXTS} of the data folder")
    form = html.Div(
        [
            field("Text", pick, id="tuned-text"),
            field("Name", dcc.Input(id="tuned-name", value="tuned", maxLength=64, className="text-input"), id="tuned-name"),
            field("Steps", dcc.Input(id="tuned-steps", type="number", value=250, min=1, max=MAX_STEPS, step=1, className="text-input"), id="tuned-steps"),
            html.Button("Train", id="tuned-train", className="btn btn-outline-secondary", disabled=not texts),
        ],
        className="tuned-form",
    )
    state = [dcc.Store(id="tuned-job"), html.Div(id="tuned-state", className="target-state", role="status")]
    body = [html.Div(graph("tuned-kl", height=230), id="tuned-picture", hidden=not lenses_of(trace)), form, *state]
    return card("Tuned lens", body, html.Span("", id="tuned-subtitle"), graph_tools("tuned-kl", "tuned-lens-kl"), list(ABOUT_TUNED), className="wide")


@callback(
    Output("tuned-kl", "figure"), Output("tuned-subtitle", "children"), Output("tuned-picture", "hidden"),
    Input("lens-kind", "value"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_training(kind: str, theme: str, page: dict[str, Any]):
    """The held-out KL of the chosen lens, or of the first there is."""
    trace = services().library.open(page["trace"])
    lenses = lenses_of(trace)
    if not lenses:
        return no_figure(theme, ""), "None has been trained for this model yet. Training runs as a job.", True
    lens = next((lens for lens in lenses if lens.tag == kind), lenses[0])
    kl = {row: values for row, values in lens.made["held_out_kl"].items() if row in lens.made["rows"]}
    figure = held_out_bars(np.array(list(kl.values()), np.float32), list(kl), theme)
    chosen = "" if lens.tag == kind else " Choose it under Lens above."
    return figure, f"{lens.name}: {lens.made['steps']:,} steps on {lens.made['n_tokens']:,} tokens, {lens.made['n_tokens_held_out']:,} held out.{chosen}", False


@callback(
    Output("tuned-job", "data"), Output("tuned-state", "children"),
    Input("tuned-train", "n_clicks"), State("tuned-text", "value"), State("tuned-name", "value"), State("tuned-steps", "value"), State("page-state", "data"),
    prevent_initial_call=True,
)  # fmt: skip
def start_training(clicks: int | None, text: str | None, name: str | None, steps: int | None, page: dict[str, Any]):
    if not clicks or not text:
        return no_update, no_update
    if not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        return no_update, error(f"The number of steps must be a whole number from 1 to {MAX_STEPS:,}.")
    trace = services().library.open(page["trace"])
    params = {"model": trace.info.name, "text": text, "name": check_name(name or ""), "steps": steps}
    return services().jobs.submit("tuned_lens", params, f"Tuned lens {name} of {trace.info.name}").id, "Waiting for the worker."


@callback(
    Output("tuned-state", "children", allow_duplicate=True), Output("lens-kind", "options"), Output("lens-kind", "value"),
    Input("tuned-job", "data"), Input("jobs-now", "data"), State("lens-kind", "options"), prevent_initial_call=True,
)  # fmt: skip
def follow_training(job_id: str | None, _: Any, options: list[dict[str, str]]):
    """Progress; a finished lens is chosen."""
    job = job_or_none(job_id)
    if job is None:
        return no_update, no_update, no_update
    if job.is_active:
        return job_panel(job), no_update, no_update
    if job.state != "done":
        return error(job.error or f"The job was {job.state.replace('_', ' ')}."), no_update, no_update
    tag = job.result["tag"]
    if tag in [option["value"] for option in options]:
        return no_update, no_update, no_update
    return "Trained.", [*options, {"label": f"tuned: {tag.partition(':')[0]}", "value": tag}], tag

"""Sensitivity: which weights a model hangs on. A run ranks weights, perturbs the best of them against controls, and checks how stable that is.

A run is a job; what it found lies in a folder of `<data>/sensitivity`, in the format of docs/sensitivity.md, and is shown from there. The form is in
components/sensitivity_start.py, the list of runs in components/sensitivity_runs.py, the cards of a run in components/sensitivity_cards.py.
"""

from __future__ import annotations

import dash
from dash import dcc, html

from components import sensitivity_views as sensitivity_views  # its callbacks
from components.card import cards
from components.sensitivity_cards import run_body
from components.sensitivity_runs import runs_card
from components.sensitivity_start import start_card
from components.url_state import keep_url

dash.register_page(__name__, path="/sensitivity", name="Sensitivity", order=13, group="This model", icon="crosshair", description="Which weights the model hangs on")


def layout(run: str | None = None, model: str | None = None, runs: str | None = None, group: str | None = None, stat: str | None = None, **more: str) -> html.Div:
    """run: the run that is shown; model: of the form; runs: the model that the list is narrowed down to; group, stat, with: what the cards begin with."""
    asked = {"group": group, "stat": stat, "with": more.get("with")}
    run = run[:65] if run else None
    stores = [dcc.Store(id="sens-run", data=run), dcc.Store(id="sens-asked", data=asked), dcc.Store(id="sens-gone")]
    title = html.Div([html.H1("Sensitivity"), html.Span("Which weights the model hangs on.", className="page-subtitle")], className="page-title")
    top = cards(start_card(model), runs_card(runs[:200] if runs else None))
    body = html.Div(run_body(run, asked), id="sens-body", className="card-stack")
    return html.Div([title, *stores, dcc.Location(id="sens-go", refresh="callback-nav"), top, body], className="page")


keep_url({"run": ("sens-run", "data"), "model": ("sens-model", "value"), "runs": ("sens-filter", "value")})

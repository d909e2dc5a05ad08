"""The card of the runs that there are: choose one, narrow them down to a model, delete one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dash import Input, Output, State, callback, dcc, html, no_update
from dash.exceptions import PreventUpdate

from backend.reports.sensitivity_run import delete_run, manifests
from components.card import card
from components.controls import set_button
from components.icons import icon
from components.services import services
from components.states import empty
from components.trace_view import one_line, short_date

MOST_LISTED = 200
ABOUT = (
    "The runs in the folder sensitivity of the data folder, newest first: manifest.json, sensitivity_stats.json and top_weights.csv of each. A run that the command line wrote is "
    "shown here when its folder lies there; docs/sensitivity.md describes the files.",
)


def runs_card(filter: str | None) -> html.Section:
    """The card; its callbacks need `sens-run`, the run that is shown."""
    names = sorted({each["model"]["name"] for each in _all()} | ({filter} if filter else set()))
    pick = dcc.Dropdown(names, filter, id="sens-filter", placeholder="all models", className="picker-model", searchable=False)
    stores = [dcc.Store(id="sens-open"), dcc.Store(id="sens-delete")]
    body = html.Div(run_table(_of_model(filter), None), id="sens-list", className="sens-list")
    return card("Runs", [*stores, body], "Newest first. Click one to look at it.", [html.Label(pick, **{"aria-label": "Model"})], list(ABOUT), className="wide")


def _all() -> list[dict[str, Any]]:
    return manifests(services().settings.data_dir)


def _of_model(name: str | None) -> list[dict[str, Any]]:
    return [each for each in _all() if not name or each["model"]["name"] == name]


def run_table(found: Sequence[Mapping[str, Any]], chosen: str | None) -> Any:
    """One row a manifest."""
    if not found:
        return empty("No run yet", "Choose a model and press Run: a quick look at a small model takes seconds.", symbol="crosshair")
    head = html.Tr([html.Th("Model"), html.Th("Metric"), html.Th("Ranked"), html.Th("Top-k", className="num"), html.Th("Perturbation"), html.Th("Text"), html.Th("Date"),
                    html.Th("")])  # fmt: skip
    return html.Div(html.Table([html.Thead(head), html.Tbody([_row(each, chosen) for each in found[:MOST_LISTED]])], className="ls-table compact"), className="table-scroll")


def _row(manifest: Mapping[str, Any], chosen: str | None) -> html.Tr:
    spec, key, name = manifest["spec"], manifest["folder"], one_line(manifest["model"]["name"], 60)
    question = f"Delete the run of {name} by {spec['metric'][:40]}? Its folder is removed."
    delete = set_button(icon("trash-2"), "sens-delete", key, "tool", question, title="Delete", **{"aria-label": "Delete"})
    cells = [
        html.Td(set_button(name, "sens-open", key, "th-button sens-name")), html.Td(spec["metric"][:40], className="nowrap"),
        html.Td(spec["mode"].replace("_", " ")[:20], className="nowrap"),
        html.Td(f"{spec['topk']:,}" if isinstance(spec.get("topk"), int) else "–", className="num"), html.Td(str(spec.get("perturb") or "–").replace("_", " ")[:20]),
        html.Td(_text_words(manifest.get("text"))), html.Td(short_date(manifest["created"][:40]), className="nowrap"),
        html.Td(delete, className="num"),
    ]  # fmt: skip
    return html.Tr(cells, className="chosen" if key == chosen else "")


def _text_words(text: Any) -> str:
    """ "bundled, 50 × 128 tokens", of a manifest that nobody has checked."""
    if not isinstance(text, dict) or not all(isinstance(text.get(name), int) for name in ("n_windows", "window")):
        return "–"
    return f"{one_line(str(text.get('name')), 40)}, {text['n_windows']:,} × {text['window']:,} tokens"


@callback(Output("sens-list", "children"), Output("sens-filter", "options"), Input("sens-run", "data"), Input("sens-filter", "value"), Input("sens-gone", "data"))
def show_list(run_id: str | None, filter: str | None, _: Any):
    names = sorted({each["model"]["name"] for each in _all()} | ({filter} if filter else set()))
    return run_table(_of_model(filter), run_id), names


@callback(Output("sens-run", "data"), Input("sens-open", "data"), prevent_initial_call=True)
def open_run(request: dict[str, Any] | None):
    if not request:
        raise PreventUpdate
    return str(request["value"])


@callback(Output("sens-run", "data", allow_duplicate=True), Output("sens-gone", "data"), Input("sens-delete", "data"), State("sens-run", "data"), prevent_initial_call=True)
def delete(request: dict[str, Any] | None, shown: str | None):
    """Delete what was confirmed; the page shows it no longer."""
    if not request:
        raise PreventUpdate
    delete_run(services().settings.data_dir, str(request["value"]))
    return None if request["value"] == shown else no_update, request

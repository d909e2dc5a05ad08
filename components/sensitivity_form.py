"""The form of a new sensitivity run: presets of the protocol, and a field for everything that a `Spec` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dash import dcc, html

from backend.model_files import ModelEntry
from backend.sensitivity_spec import CONTROLS, MAX_TOPK, MODES, PERTURBATIONS
from components.controls import field, set_button
from components.icons import icon
from components.sensitivity_request import BUNDLED, COMPONENTS, EXTRAS, FIELDS, MAX_LENGTH, MAX_PROBES, MAX_SAMPLES, MIN_LENGTH, form_values, metric_options, presets, texts

_FIXED: dict[str, Any] = {"clearable": False, "searchable": False}
START = "Quick look"


def sensitivity_form(models: Sequence[ModelEntry], chosen: str | None) -> html.Div:
    """The form, filled with the first preset; its callbacks are those of components/sensitivity_start.py."""
    usable = [entry for entry in models if entry.info is not None]
    entry = next((entry for entry in usable if entry.name == chosen), usable[0] if usable else None)
    kind = entry.kind if entry else "hf"
    start = form_values(presets(kind == "gguf")[START])
    extras: Any = [{"label": words, "value": name} for name, words in EXTRAS.items()]
    names = [entry.name for entry in usable]
    pick_model = dcc.Dropdown(names, entry.name if entry else None, id="sens-model", clearable=False, placeholder="no model found")
    pick_metric = html.Div([_pick("metric", metric_options(kind), start), html.Div("", id="sens-formula", className="field-hint")])
    grid = [
        html.Div(field("Model", pick_model, id="sens-model"), className="sens-double"),
        html.Div(field("Metric", pick_metric, id=FIELDS["metric"]), className="sens-double"),
        *_ranking_fields(start), *_text_fields(start),
    ]  # fmt: skip
    run = html.Button([icon("play"), "Run"], id="sens-start", className="btn btn-primary", type="button", n_clicks=0, disabled=not usable)
    checks = dcc.Checklist(extras, start["extras"], id=FIELDS["extras"], className="checks", inline=True)
    also = html.Div([html.Span("Also", className="field-label"), checks], className="sens-also")
    return html.Div(
        [
            html.Div([set_button(name, "sens-preset", name, "chip") for name in presets(False)], className="chips", role="group", **{"aria-label": "Presets of the protocol"}),
            html.Div(grid, className="sens-fields"),
            html.Div(id="sens-known"),
            html.Div([run, also, html.Div(id="sens-cost", className="estimate sens-cost", role="status")], className="form-foot"),
            html.Div(id="sens-refused"),
        ],
        className="form",
    )  # fmt: skip


def _ranking_fields(start: Mapping[str, Any]) -> list[html.Div]:
    controls: Any = _spaced(CONTROLS)
    return [
        field("Ranked", _pick("mode", _spaced(MODES), start), id=FIELDS["mode"]),
        _number("Top-k", "topk", start, 1, MAX_TOPK, 1),
        field("Perturbation", _pick("perturb", _spaced(PERTURBATIONS), start), id=FIELDS["perturb"]),
        _number("Scale", "scale", start, -1e6, 1e6, "any"),
        _number("Bit", "bit", start, 0, 63, 1, "highest"),
        field("Controls", dcc.Dropdown(controls, start["controls"], id=FIELDS["controls"], multi=True, placeholder="none"), id=FIELDS["controls"]),
        _words("Seeds", "seeds", start, "0, 1, 2"),
        _number("Hutchinson probes", "probes", start, 1, MAX_PROBES, 1),
    ]


def _text_fields(start: Mapping[str, Any]) -> list[html.Div]:
    offered = [{"label": "bundled", "value": BUNDLED}, *({"label": name, "value": name} for name in texts())]
    return [
        field("Text", _pick("text", offered, start), id=FIELDS["text"]),
        _number("Windows", "samples", start, 1, MAX_SAMPLES, 1),
        _number("Tokens each", "length", start, MIN_LENGTH, MAX_LENGTH, 1),
        _words("Layers", "layers", start, "all, or 0-2, 5"),
        field("Components", dcc.Dropdown(list(COMPONENTS), start["components"], id=FIELDS["components"], multi=True, placeholder="all"), id=FIELDS["components"]),
        _words("Prune at", "prune", start, "none, or 0.1, 0.5"),
    ]


def _spaced(names: Any) -> list[dict[str, str]]:
    return [{"label": name.replace("_", " "), "value": name} for name in names]


def _pick(name: str, options: Any, start: Mapping[str, Any]) -> dcc.Dropdown:
    return dcc.Dropdown(options, start[name], id=FIELDS[name], **_FIXED)


def _number(label: str, name: str, start: Mapping[str, Any], low: float, high: float, step: Any, placeholder: str = "") -> html.Div:
    box = dcc.Input(id=FIELDS[name], type="number", value=start[name], min=low, max=high, step=step, className="text-input", placeholder=placeholder)
    return field(label, box, id=FIELDS[name])


def _words(label: str, name: str, start: Mapping[str, Any], hint: str) -> html.Div:
    return field(label, dcc.Input(id=FIELDS[name], value=start[name], maxLength=200, placeholder=hint, className="text-input"), id=FIELDS[name])

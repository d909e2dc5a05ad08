"""The form of the Quantization page: the quantized model, its reference, the prompts; and the report that belongs to them.

A reference is offered when it is unquantized and has the sizes of the model; the worker checks the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dash import dcc, html

from backend.errors import LayerscopeError
from backend.model_files import ModelEntry, fingerprint
from backend.reports.quantization_report import QuantizationReport, report_key
from components.controls import field
from components.icons import icon
from components.services import services

MAX_CHARACTERS = 100_000
MAX_PROMPTS = 64
SEPARATOR = "---"  # a line of its own between two prompts
_UNQUANTIZED = ("F32", "F16", "BF16")
_SIZES = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_experts")


def is_unquantized(entry: ModelEntry) -> bool:
    return entry.info is not None and entry.info.quantization.upper() in _UNQUANTIZED


def references_for(name: str | None, models: Sequence[ModelEntry]) -> list[str]:
    """Names of the unquantized models of the same sizes, GGUF files first: they differ from the model in nothing but the weights."""
    own = next((entry for entry in models if entry.name == name), None)
    if own is None or own.info is None:
        return []
    sizes = [getattr(own.info, size) for size in _SIZES]
    fit = [entry for entry in models if entry.info and entry.name != name and is_unquantized(entry) and [getattr(entry.info, size) for size in _SIZES] == sizes]
    return [entry.name for entry in sorted(fit, key=lambda entry: entry.kind != "gguf")]


def split_prompts(text: str) -> list[str]:
    """The prompts of the form, apart where a line holds nothing but ---. Raises LayerscopeError, naming the value and the limit."""
    if len(text) > MAX_CHARACTERS:
        raise LayerscopeError(f"The prompts have {len(text):,} characters, and the limit is {MAX_CHARACTERS:,}.")
    parts: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip() == SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(line)
    prompts = [prompt for prompt in ("\n".join(lines) for lines in parts) if prompt.strip()]
    if not prompts:
        raise LayerscopeError("The prompt is empty; it needs at least one character.")
    if len(prompts) > MAX_PROMPTS:
        raise LayerscopeError(f"There are {len(prompts)} prompts, and the limit of the page is {MAX_PROMPTS}; the command line takes more.")
    return prompts


def quantization_form(models: Sequence[ModelEntry], model: str | None, reference: str | None, prompt: str | None) -> html.Div:
    """The form; what the address does not name is chosen so that it can be run at once."""
    usable = [entry for entry in models if entry.info is not None]
    names = [entry.name for entry in usable]
    if model not in names:
        model = next((entry.name for entry in usable if not is_unquantized(entry) and references_for(entry.name, models)), names[0] if names else None)
    offered = references_for(model, models)
    chosen = next((entry for entry in usable if entry.name == model), None)
    text = prompt if prompt is not None else chosen.prompts[0].text if chosen and chosen.prompts else ""
    return html.Div(
        [
            html.Div(
                [
                    field("Quantized model", dcc.Dropdown(names, model, id="quant-model", clearable=False, placeholder="no model found"), id="quant-model"),
                    field("Reference", dcc.Dropdown(offered, reference if reference in offered else next(iter(offered), None), id="quant-reference", clearable=False,
                          placeholder="no unquantized model of these sizes"), id="quant-reference"),
                ],
                className="fields",
            ),
            html.Div(
                [
                    html.Label("Prompts", htmlFor="quant-prompt", className="field-label"),
                    dcc.Textarea(id="quant-prompt", value=text, className="text-input", maxLength=MAX_CHARACTERS, spellCheck=False),
                    html.Div(id="quant-examples", className="chips"),
                    html.Div(f"Several prompts: a line {SEPARATOR} between them. More text makes steadier numbers.", className="field-hint"),
                ],
                className="field",
            ),
            html.Div(
                [html.Button([icon("play"), "Compare"], id="quant-run", className="btn btn-primary", type="button", n_clicks=0), html.Div(id="quant-refused")],
                className="form-foot",
            ),
        ],
        className="form",
    )  # fmt: skip


def kept_report(model: str | None, reference: str | None, prompt: str | None) -> str | None:
    """The key of the report that was made of these, as long as neither file has changed since; None if there is none."""
    if not (model and reference and prompt):
        return None
    try:
        stamps = [fingerprint(services().library.resolve_model(name).path) for name in (model, reference)]
        key = report_key(model, reference, split_prompts(prompt), stamps)
        return key if QuantizationReport.load(services().derived, key) else None
    except LayerscopeError:
        return None  # the form says what is wrong with them when they are run


def report_of(key: str | None) -> QuantizationReport | None:
    return QuantizationReport.load(services().derived, key) if key else None


def job_params(model: Any, reference: Any, prompt: Any) -> dict[str, Any]:
    """The parameters of the job. Raises LayerscopeError in one sentence."""
    if not model or not isinstance(model, str):
        raise LayerscopeError("No model is chosen.")
    if not reference or not isinstance(reference, str):
        raise LayerscopeError(f"There is no reference for {model}: an F16 or F32 GGUF file, or the folder, of the same model must be on the shelf.")
    return {"model": model, "reference": reference, "prompts": split_prompts(prompt or "")}

"""The run form of Home: model, prompt, what to capture; what it will cost; the job it becomes.

The form's values are read into a `RunRequest`, which says in one sentence what is wrong with them; the estimate and the job are
made from that, so that both rest on the same reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dash import dcc, html

from backend.errors import LayerscopeError
from backend.estimate import Estimate, estimate, rough_tokens
from backend.prompt_text import check_label, prompt_bytes
from backend.sites import ALL_SITES, NATIVE, SITES, STANDARD_SITES, parse_heads, parse_layers, parse_rows, resolve_sites, split_native
from components.controls import field
from components.icons import icon
from components.services import services
from components.trace_view import one_line

STORED_SITES = tuple(name for name, site in SITES.items() if not site.derived)
PRESETS = {"standard": "Standard", "everything": "Everything", "choose": "Choose"}
MAX_NEW_TOKENS = 512
MAX_PROMPT_CHARACTERS = 100_000
DEFAULT_NEW_TOKENS = 4


@dataclass(frozen=True)
class RunRequest:
    """What the form asks for. sites None: the standard set; layers, heads, rows None: all of them."""

    model: str
    prompt: str
    max_new_tokens: int
    sites: tuple[str, ...] | None
    layers: tuple[int, ...] | None
    heads: tuple[tuple[int, int], ...] | None
    rows: tuple[int, int] | None
    precision: str
    category: str
    temperature: float
    seed: int
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> RunRequest:
        """From the values of the form's fields. Raises LayerscopeError naming the value and the limit."""
        prompt = values.get("prompt") or ""
        if not values.get("model"):
            raise LayerscopeError("No model is chosen.")
        if not prompt:
            raise LayerscopeError("The prompt is empty; it needs at least one character.")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise LayerscopeError(f"The prompt has {len(prompt):,} characters, and the limit is {MAX_PROMPT_CHARACTERS:,}.")
        prompt_bytes(prompt)
        category = (values.get("category") or "").strip()[:80]
        check_label(category, "The category")
        return cls(
            model=values["model"],
            prompt=prompt,
            max_new_tokens=int(_number(values.get("new"), "New tokens", 0, MAX_NEW_TOKENS)),
            sites=_sites(values.get("preset"), values.get("sites") or (), values.get("native") or ""),
            layers=parse_layers(values.get("layers")),
            heads=parse_heads(values.get("heads")),
            rows=parse_rows(values.get("rows")),
            precision="float32" if values.get("precision") == "float32" else "float16",
            category=category,
            temperature=_number(values.get("temperature"), "Temperature", 0, 10),
            seed=int(_number(values.get("seed"), "Seed", 0, 2**31 - 1)),
            top_k=int(_number(values.get("top_k", 0), "Top-k", 0, 2**31 - 1)),
            top_p=_number(values.get("top_p", 1), "Top-p", 0, 1),
            min_p=_number(values.get("min_p", 0), "Min-p", 0, 1),
        )

    def params(self) -> dict[str, Any]:
        """The parameters of a capture job."""
        sites = list(self.sites) if self.sites else None
        layers = list(self.layers) if self.layers is not None else None
        sampling = {"temperature": self.temperature, "seed": self.seed, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        chosen = {**sampling, "precision": self.precision, "category": self.category}
        kept = {"sites": sites, "layers": layers, "heads": self.heads, "rows": self.rows}
        return {"model": self.model, "prompt": self.prompt, "max_new_tokens": self.max_new_tokens, **kept, **chosen}

    def title(self) -> str:
        return f"{self.model}: {one_line(self.prompt, 60)}"


def cost(request: RunRequest) -> Estimate:
    """The estimate of a request. Raises LayerscopeError if its model cannot be read, or lacks a layer that is asked for."""
    entry = services().library.resolve_model(request.model)
    if entry.info is None:
        raise LayerscopeError(entry.error or f"{request.model} cannot be read.")
    if request.layers and request.layers[-1] >= entry.info.n_layers:
        raise LayerscopeError(f"Layer {request.layers[-1]} does not exist: {request.model} has layers 0-{entry.info.n_layers - 1}.")
    for layer, head in request.heads or ():
        if layer >= entry.info.n_layers or head >= entry.info.n_heads:
            raise LayerscopeError(f"Head {layer}.{head} does not exist: {request.model} has layers 0-{entry.info.n_layers - 1} and heads 0-{entry.info.n_heads - 1}.")
    n_tokens = rough_tokens(request.prompt) + request.max_new_tokens
    if n_tokens > 2 * entry.info.n_ctx:  # the estimate is rough; the worker counts the tokens
        raise LayerscopeError(f"The prompt is about {n_tokens:,} tokens, and the context of {request.model} is {entry.info.n_ctx:,}.")
    past = services().library.past_runs(entry.info.name)
    sites = tuple(name for name in STORED_SITES if name != "logits") if request.sites == (ALL_SITES,) else request.sites
    return estimate(entry.info, n_tokens, sites, request.layers, request.precision, kv_cache=services().settings.kv_cache, past=past, heads=request.heads, rows=request.rows)


def _number(value: Any, name: str, low: float, high: float) -> float:
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise LayerscopeError(f"{name} must be a number from {low:g} to {high:g}.")
    return float(value)


def _sites(preset: str | None, chosen: Sequence[str], native: str) -> tuple[str, ...] | None:
    """`native`: names of native tensors between commas, with or without their prefix."""
    if preset == "everything":
        return (ALL_SITES,)
    if preset != "choose":
        return None
    names, natives = split_native([*chosen, *(NATIVE + name.strip().removeprefix(NATIVE) for name in native.split(",") if name.strip())])
    if not names and not natives:
        raise LayerscopeError("No site is chosen to capture.")
    return (*resolve_sites(names), *(NATIVE + name for name in natives))


def run_form(models: Sequence[Any], model: str | None, prompt: str, sites: Sequence[str] | None, new_tokens: int) -> html.Div:
    """The form. `sites` None: the standard preset."""
    known, native = split_native(sites or STANDARD_SITES)
    usable = [entry for entry in models if entry.error is None]
    options: Any = [{"label": entry.name, "value": entry.name} for entry in usable]
    first = model if any(entry.name == model for entry in usable) else (usable[0].name if usable else None)
    return html.Div(
        [
            field("Model", dcc.Dropdown(options, first, id="run-model", clearable=False, placeholder="no model found"), id="run-model"),
            html.Div(
                [
                    html.Label("Prompt", htmlFor="run-prompt", className="field-label"),
                    dcc.Textarea(id="run-prompt", value=prompt, className="text-input", maxLength=MAX_PROMPT_CHARACTERS, spellCheck=False),
                    html.Div(id="run-examples", className="chips"),
                ],
                className="field",
            ),
            html.Div(
                [
                    field("New tokens", dcc.Input(id="run-new", type="number", min=0, max=MAX_NEW_TOKENS, step=1, value=new_tokens, className="text-input"), id="run-new"),
                    field("Sites", dcc.Dropdown(PRESETS, "choose" if sites else "standard", id="run-preset", clearable=False, searchable=False), id="run-preset"),
                    field("Layers", dcc.Input(id="run-layers", value="all", placeholder="all, or 0-2, 5", className="text-input"), id="run-layers"),
                ],
                className="fields",
            ),
            html.Div(
                [
                    field("Sites to capture", dcc.Dropdown(list(STORED_SITES), list(known), id="run-sites", multi=True), id="run-sites"),
                    field("Native tensors", dcc.Input(id="run-native", value=", ".join(native), maxLength=4000, placeholder="none, or names between commas: Qcur-0/ROPE",
                                                      className="text-input"), "list them with: python -m backend nodes", id="run-native"),
                ],
                id="run-sites-field",
                className="field-stack",
                hidden=not sites,
            ),
            html.Details([html.Summary("More"), _more()], className="more"),
            html.Div("", id="run-estimate", className="estimate", role="status"),
            html.Div(
                [html.Button([icon("play"), "Run"], id="run-button", className="btn btn-primary", type="button", disabled=not usable), html.Div(id="run-refused")],
                className="form-foot",
            ),
        ],
        className="form",
    )


def _more() -> html.Div:
    precision: Any = [{"label": "float16", "value": "float16"}, {"label": "float32 (as computed)", "value": "float32"}]
    return html.Div(
        [
            field("Attention heads", dcc.Input(id="run-heads", value="all", placeholder="all, or 3.1, 2.0", className="text-input"), "layer.head", id="run-heads"),
            field("Attention rows", dcc.Input(id="run-rows", value="all", placeholder="all, or 100-163", className="text-input"), "positions that look", id="run-rows"),
            field("Precision", dcc.Dropdown(precision, "float16", id="run-precision", clearable=False, searchable=False), id="run-precision"),
            field("Category", dcc.Input(id="run-category", value="", maxLength=80, placeholder="none", className="text-input"), id="run-category"),
            field("Temperature", dcc.Input(id="run-temperature", type="number", min=0, max=10, step=0.1, value=0, className="text-input"), "0 is greedy", id="run-temperature"),
            field("Seed", dcc.Input(id="run-seed", type="number", min=0, step=1, value=0, className="text-input"), id="run-seed"),
        ],
        className="fields",
    )

"""Architecture: the model drawn from its own metadata, the size of every part, and all that its file says about itself.

Only headers are read, through the bounded readers; no weight is touched and no engine is needed.
"""

from __future__ import annotations

import functools
from typing import Any
from urllib.parse import urlencode

import dash
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.errors import LayerscopeError
from backend.estimate import in_bytes
from backend.model_files import ModelEntry, identity
from backend.model_info import ModelInfo
from backend.reports.model_metadata import MetadataRow, read_metadata
from backend.reports.model_parts import Anatomy, layer_ranges, take_apart
from backend.weights import open_weights
from components.architecture_view import count, diagram, differences, part_keys, size_table, tensor_table
from components.card import card, full_screen_button
from components.controls import facts
from components.metadata_table import metadata_table
from components.model_facts import Facts
from components.services import services
from components.states import empty, error
from components.url_state import keep_url

dash.register_page(__name__, path="/architecture", name="Architecture", order=30, group="This model", icon="blocks", description="The parts of a model and what its file says")

ABOUT_PARTS = (
    "Drawn from the names and shapes of the tensors and from the metadata of the file: blocks with the same tensors of the same shapes are one block, drawn once. "
    "A plus is where a part's output is added to the residual stream.",
    "Parameters are the values that are stored, bytes what they take in the file with their quantization: a Q4_K value takes 4.5 bits. Tied means that embedding and unembedding "
    "are one stored matrix, counted once.",
)  # fmt: skip
ABOUT_SIZES = "The stored bytes of each kind of part, all blocks added up; the share is of the whole file's tensors. A tied matrix counts once."
ABOUT_TENSORS = "The chosen part's tensors in one block, under the names of the file: shape, type and bytes as stored. A name opens the tensor's statistics."
ABOUT_MODEL = "Counted from the tensors of the file and read from its metadata (GGUF header or config.json); nothing is run."
ABOUT_METADATA = (
    "GGUF: every key of the header with the format's own type. Hugging Face: config.json, nested keys joined with dots. Lists are folded to their count and first items; "
    "long texts, such as a chat template, unfold. A template is shown as text and never run.",
)


def layout(model: str | None = None, part: str | None = None, search: str | None = None, **_: str) -> html.Div:
    title = html.H1("Architecture")
    names = [entry.name for entry in services().library.models() if entry.error is None]
    if not names:
        nothing = empty("No models found", "Put a .gguf file or a Hugging Face model folder into the models folder.")
        return html.Div([html.Div(title, className="page-title"), nothing], className="page")
    chosen = model if model in names else None if model else names[0]
    problem = error(f"There is no model {model[:200]!r} on the shelf that can be opened.") if model and not chosen else None
    picker = dcc.Dropdown(names, chosen, id="arch-model", clearable=False, placeholder="choose a model", className="picker-model")
    head = html.Div([title, html.Span("What the model is made of.", className="page-subtitle"), html.Div(html.Div(picker), className="page-controls")], className="page-title")
    stores = [dcc.Store(id="arch-part", data={"value": (part or "")[:80]}), dcc.Store(id="arch-asked", data={"search": (search or "")[:200]})]
    return html.Div([head, *stores, problem, html.Div(id="arch-body")], className="page")


@functools.lru_cache(maxsize=4)
def _read(path: Any, _identity: str) -> tuple[Anatomy, dict[str, Any], list[MetadataRow]]:
    """Read again only when the file changed."""
    values, rows = read_metadata(path)
    return take_apart(open_weights(path)), values, rows


def _model(name: str) -> tuple[ModelEntry, Anatomy, Facts, list[MetadataRow]]:
    entry = services().library.resolve_model(name)
    if not entry.path.exists() or entry.info is None:
        raise LayerscopeError(f"{name} has no file yet: it is made from its source when it is first used.")
    anatomy, values, rows = _read(entry.path, identity(entry.path))
    return entry, anatomy, Facts(entry.info, values, anatomy), rows


@callback(Output("arch-body", "children"), Input("arch-model", "value"), State("arch-part", "data"), State("arch-asked", "data"))
def show_model(name: str | None, part: dict[str, str], asked: dict[str, str]):
    """Everything about the model that is not about one part."""
    if not name:
        return empty("No model chosen", "Choose one above.", symbol="blocks")
    try:
        entry = services().library.resolve_model(name)
        if entry.made_on_first_use:
            return _not_made(entry)
        entry, anatomy, _, _ = _model(name)
    except LayerscopeError as problem:
        return error(str(problem))
    assert entry.info is not None, "_model gives no entry without info"
    picture = card("Parts", html.Div(id="arch-picture"), "Click a part to see its weights.", [full_screen_button()], list(ABOUT_PARTS), className="fill")
    sizes = card("Where the bytes are", html.Div(size_table(anatomy), className="table-scroll"), "All blocks together.", about=ABOUT_SIZES)
    weights = [html.Div(id="arch-layer-field"), html.Div(id="arch-tensors", className="table-scroll table-tall")]
    tensors = card(html.Span("", id="arch-title"), weights, html.Span("", id="arch-words"), about=ABOUT_TENSORS, className="fill")
    search = dcc.Input(id="arch-search", value=asked["search"], placeholder="word in a key or value", debounce=0.25, maxLength=200, className="text-input")
    table = html.Div(id="arch-metadata", className="table-scroll table-metadata")
    metadata = card("Metadata", table, html.Span("", id="arch-keys"), [html.Div(search, className="metadata-search")], list(ABOUT_METADATA), className="wide")
    right = html.Div([card("Model", facts(_facts(entry.info, anatomy)), about=ABOUT_MODEL), sizes, tensors], className="card-stack")
    return html.Div([picture, right, metadata], className="cards")


def _not_made(entry: ModelEntry) -> html.Div:
    """A variant whose file does not exist yet: opening its graph makes it."""
    link = dcc.Link("Make it and record its graph", href=f"/graph?{urlencode({'model': entry.name})}", className="btn btn-primary")
    return empty("This variant has no file yet", f"{entry.name} is made from its source when it is first used; then its parts can be read.", link, "blocks")


def _facts(info: ModelInfo, anatomy: Anatomy) -> dict[str, str]:
    return {
        "Architecture": info.architecture,
        "Engine": {"gguf": "llama.cpp (GGUF)", "hf": "PyTorch (safetensors)"}[info.engine],
        "Parameters": f"{count(info.n_params)}, {in_bytes(info.n_bytes)}",
        "Weights": f"{info.quantization}: " + ", ".join(f"{n} tensors {kind}" for kind, n in sorted(info.weight_types.items(), key=lambda item: -item[1])),
        "Layers": f"{info.n_layers}" + ("" if len(anatomy.groups) == 1 else " of " + " and ".join(f"{len(group.layers)}" for group in anatomy.groups) + " kinds"),
        "d_model": f"{info.d_model:,}",
        "Context": f"{info.n_ctx:,} tokens",
        "Vocabulary": f"{info.d_vocab:,} tokens",
    }


@callback(
    Output("arch-picture", "children"), Output("arch-title", "children"), Output("arch-words", "children"), Output("arch-layer-field", "children"),
    Input("arch-part", "data"), Input("arch-body", "children"), State("arch-model", "value"), prevent_initial_call=True,
)  # fmt: skip
def show_part(chosen: dict[str, str], _: Any, name: str):
    """The picture with the chosen part marked, and the head of its card. A part that this model lacks: its attention, else its first."""
    try:
        _, anatomy, about, _ = _model(name)
    except LayerscopeError:
        return no_update, no_update, no_update, no_update  # the page says so already
    keys = part_keys(anatomy)
    key = chosen["value"] if chosen["value"] in keys else "block0.attention" if "block0.attention" in keys else next(iter(keys))
    group, part = keys[key]
    layers: Any = [{"label": f"Layer {layer}", "value": layer} for layer in group.layers] if group else []
    field = dcc.Dropdown(layers, layers[0]["value"] if layers else None, id="arch-layer", clearable=False, className="picker-metric")
    where = f" of layers {layer_ranges(group.layers)}" if group and len(group.layers) > 1 else ""
    words = ". ".join([*about.of(part.key, group), *differences([part])])
    return diagram(anatomy, about, key), f"Weights of {part.title}{where}", words, html.Div([field, dcc.Store(id="arch-key", data=key)], className="arch-layer", hidden=not layers)


@callback(Output("arch-tensors", "children"), Input("arch-layer", "value"), Input("arch-key", "data"), State("arch-model", "value"))
def show_tensors(layer: int | None, key: str, name: str):
    _, anatomy, _, _ = _model(name)
    found = part_keys(anatomy).get(key)
    return tensor_table(name, found[1].of_layer(layer)) if found else no_update


@callback(Output("arch-metadata", "children"), Output("arch-keys", "children"), Input("arch-search", "value"), State("arch-model", "value"))
def show_metadata(search: str | None, name: str):
    return metadata_table(_model(name)[3], search or "")


keep_url({"model": ("arch-model", "value"), "part": ("arch-part", "data", "value")})
keep_url({"search": ("arch-search", "value")})

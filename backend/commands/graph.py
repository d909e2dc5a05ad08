"""python -m backend graph: the computation graph of a model, as text, JSON or DOT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from backend.errors import LayerscopeError

_FORMATS = ("text", "json", "dot")
_MODEL_HELP = "A preset (see `models`), a .gguf file, a folder of safetensors, or a cached hub id."


def graph(
    model: Annotated[str, typer.Option("--model", "-m", help=_MODEL_HELP)],
    form: Annotated[str, typer.Option("--format", "-f", help="text, json (one object), or dot for Graphviz.")] = "text",
    layer: Annotated[int | None, typer.Option("--layer", "-l", help="One layer, with what it takes from outside. Default: the whole graph.")] = None,
    n_tokens: Annotated[int, typer.Option("--tokens", help="Tokens to run over.")] = 8,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write into this file instead of stdout.")] = None,
    device: Annotated[str, typer.Option(help="HF: auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Run the model once and print every node that was really executed: op, name, shape, type, sources, where it ran.

    The JSON object: model, architecture, engine, version, n_layers, n_tokens, edges (how they were found), nodes in the order of
    execution (id, kind, name, op, detail, shape, type, sources, after, layer, backend, view, sites, module), and for PyTorch modules
    (path, class_name, n_params, calls, inputs, outputs). Sources are ids, smaller than the node's own; `after` are nodes that wrote into memory
    which the node reads.

    Example: python -m backend graph --model demo-dense-q8_0 --layer 0 --format dot --output layer0.dot
    """
    from backend import open_model
    from backend.reports.graph_formats import as_dot, as_text, of_layer

    if form not in _FORMATS:
        raise LayerscopeError(f"The format {form!r} is not one of {', '.join(_FORMATS)}.")
    with open_model(model, device=device) as opened:
        found = opened.graph(n_tokens)
    if layer is not None:
        found = of_layer(found, layer)
    written = as_text(found) if form == "text" else as_dot(found) if form == "dot" else json.dumps(found.to_json(), ensure_ascii=False)
    if output is None:
        typer.echo(written)
        return
    try:
        Path(output).write_text(f"{written}\n", encoding="utf-8")
    except OSError as error:
        raise LayerscopeError(f"{output} cannot be written: {error.strerror}.") from None

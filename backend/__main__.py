"""The command line: python -m backend COMMAND. Every command takes --help.

Results go to stdout (one JSON object with --json), progress to stderr. A mistake that the user can mend is one sentence on
stderr and exit code 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from tqdm import tqdm

from backend.commands import batch, embeddings, generate, moe, quantization, sensitivity, tuned_lens, weights
from backend.commands import heads as heads_command
from backend.commands.attribution import attribute
from backend.commands.graph import graph
from backend.errors import LayerscopeError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)

app.command()(graph)
app.command()(attribute)

_SITES_HELP = "Sites to store: names, TransformerLens hooks, ggml nodes; native:NAME for any tensor (see `nodes`); repeat or separate by commas; or all. Default: the standard set."
Sites = Annotated[list[str] | None, typer.Option("--sites", "-s", help=_SITES_HELP)]
Layers = Annotated[str | None, typer.Option("--layers", "-l", help='Layers, for example "0,3-5". Default: all.')]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.command()
def trace(
    model: Annotated[str, typer.Option("--model", "-m", help="A preset (see `models`), a .gguf file, a folder of safetensors, or a cached hub id.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to run.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to generate before the capture.")] = 0,
    sites: Sites = None,
    layers: Layers = None,
    heads: Annotated[str | None, typer.Option(help='Attention maps of these heads only, as layer.head: "3.1,2.0". Default: all.')] = None,
    rows: Annotated[str | None, typer.Option(help='Attention maps of these query positions only: "100-163". Default: all.')] = None,
    category: Annotated[str, typer.Option(help="A label to group traces by.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="A tag; repeat for more.")] = None,
    precision: Annotated[str, typer.Option(help="float16, or float32 to store every value as computed.")] = "float16",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k most probable tokens; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the tokens that hold this share of probability; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens below this share of the best one's probability; 0 is off.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampler: the same seed gives the same tokens.")] = 0,
    device: Annotated[str, typer.Option(help="HF: auto, cpu, cuda, ...")] = "auto",
    gpu_layers: Annotated[str, typer.Option(help="GGUF: layers on the GPU, a number or auto.")] = "auto",
    quantize: Annotated[str, typer.Option(help="HF: none, or int8 or nf4 to store the weights in fewer bits (bitsandbytes, on a CUDA device).")] = "none",
    device_map: Annotated[str, typer.Option(help="HF: none, or auto to spread the model over the devices there are (accelerate).")] = "none",
    kv_cache: Annotated[str, typer.Option(help="GGUF: f16, or f32 for exact comparisons.")] = "f16",
    n_ctx: Annotated[int | None, typer.Option(help="Context length. Default: the model's, at most 8192.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the trace. Default: the traces folder of the settings.")] = None,
    as_json: Json = False,
) -> None:
    """Run a prompt with instruments attached and write one trace.

    Example: python -m backend trace --model demo-dense --prompt "The capital of France is" --max-new-tokens 4
    """
    from backend import Sampling, open_model
    from backend.sites import parse_heads, parse_layers, parse_rows

    chosen = {
        "kv_cache": _one_of("kv cache", kv_cache, ("f16", "f32")),
        "quantize": _one_of("quantization", quantize, ("none", "int8", "nf4")),
        "device_map": _one_of("device map", device_map, ("none", "auto")),
    }
    with open_model(model, device=device, n_gpu_layers=_auto_or_int(gpu_layers), n_ctx=n_ctx, **chosen) as opened, _Bar() as bar:
        result = opened.trace(
            prompt,
            sites=_split(sites),
            layers=parse_layers(layers),
            heads=parse_heads(heads),
            rows=parse_rows(rows),
            max_new_tokens=max_new_tokens,
            category=category,
            tags=tag or (),
            precision=_one_of("precision", precision, ("float16", "float32")),
            sampling=Sampling(temperature, top_k, top_p, min_p, seed),
            out=out,
            progress=bar,
        )
    if out is None:
        _register(result.path)
    typer.echo(json.dumps(summary(result), ensure_ascii=False) if as_json else describe(result))


@app.command()
def show(
    trace: Annotated[str, typer.Argument(help="A trace file, or an id in the traces folder.")],
    as_json: Json = False,
) -> None:
    """Print what a trace holds: tokens, predictions, sites and its integrity report."""
    from backend import open_trace

    with open_trace(trace) as opened:
        typer.echo(json.dumps(summary(opened), ensure_ascii=False) if as_json else describe(opened))


@app.command()
def models(as_json: Json = False) -> None:
    """List the models that can be named: presets, the models folders and the Hugging Face cache."""
    from backend.model_files import Shelf
    from config import load_settings

    entries = Shelf.from_settings(load_settings()).entries()
    if as_json:
        typer.echo(json.dumps({"models": [entry.to_json() for entry in entries]}, ensure_ascii=False))
        return
    for entry in entries:
        info = entry.info
        facts = f"{info.architecture}, {info.n_layers} layers, {info.quantization}, {info.n_params / 1e6:,.1f} M parameters" if info else entry.error or ""
        typer.echo(f"{entry.name:<24} {entry.kind:<5} {entry.origin:<20} {facts}")


@app.command()
def nodes(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `trace`.")],
    as_json: Json = False,
) -> None:
    """List every tensor that --sites native:NAME can name: graph nodes with op, shape and type (GGUF), or module paths (HF).

    Shapes (NumPy's axis order) are those of a pass over 3 tokens.
    """
    from backend import open_model

    with open_model(model) as opened:
        found = opened.nodes()
    if as_json:
        typer.echo(json.dumps({"nodes": [{"name": node.name, "made_by": node.made_by, "shape": list(node.shape), "type": node.type} for node in found]}, ensure_ascii=False))
        return
    for node in found:
        typer.echo(f"{node.name:<40} {node.made_by:<16} {' x '.join(map(str, node.shape)):<24} {node.type}".rstrip())


@app.command()
def worker() -> None:
    """Run the process that takes jobs from the queue (the dashboard starts one by itself)."""
    from backend.worker import main as run_worker
    from config import load_settings

    run_worker(load_settings())


# -- what the commands print ------------------------------------------------------------------------------------------------


def summary(trace: Any) -> dict[str, Any]:
    """The JSON form of a trace: the contract of --json."""
    import numpy as np

    probabilities = np.exp(trace.top_logprobs)
    top = [[{"token": trace.token_text(i), "prob": round(float(p), 6)} for i, p in zip(ids, row, strict=True)] for ids, row in zip(trace.top_ids, probabilities, strict=True)]
    return {
        "trace_id": trace.id,
        "path": str(trace.path),
        "model": trace.info.name,
        "engine": trace.engine,
        "prompt": trace.prompt,
        "response": trace.response,
        "n_tokens": trace.n_tokens,
        "n_prompt": trace.n_prompt,
        "tokens": trace.token_texts,
        "token_ids": trace.token_ids,
        "sites": {site: layers for site, layers in trace.stored.items()},
        "native": trace.native,
        "top_tokens": top,
        "integrity": {name: {"ok": item["ok"], "max_error": item["max_error"], "note": item.get("note", "")} for name, item in trace.integrity.items()},
        "notes": trace.metadata.get("notes", []),
        "timings": trace.metadata.get("timings", {}),
    }


def describe(trace: Any) -> str:
    """A trace as a person reads it in a terminal."""
    data = summary(trace)
    lines = [f"trace {data['trace_id']}  {data['model']} ({trace.engine_version})", f"file  {data['path']}", ""]
    lines += [f"{'pos':>4} {'token':<16} {'next token, by probability'}"]
    for pos, (token, best) in enumerate(zip(data["tokens"], data["top_tokens"], strict=True)):
        shown = "  ".join(f"{item['token']!r} {item['prob']:.3f}" for item in best[:3])
        lines.append(f"{pos:>4} {token!r:<16.16} {shown}{'' if pos < trace.n_prompt else '   (generated)'}")
    lines += ["", f"response  {data['response']!r}" if data["response"] else "response  none asked for", ""]
    lines += [f"{site:<16} {'layers ' + ', '.join(map(str, layers)) if layers else 'no layers'}" for site, layers in data["sites"].items()]
    lines += [f"native {name}" for name in data["native"]]
    lines += ["", "integrity"]
    for name, item in data["integrity"].items():
        error = "" if item["max_error"] is None else f"{item['max_error']:.2e}"
        lines.append(f"  {'ok ' if item['ok'] else 'NO ' if item['ok'] is False else '-  '} {name:<28} {error:>9}  {item['note']}".rstrip())
    lines += ["", *data["notes"]] if data["notes"] else []
    return "\n".join(lines)


class _Bar:
    """A progress callback that draws a tqdm bar on stderr."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage or self._bar is None:
            self.close()
            self._stage, self._bar = stage, tqdm(total=total, desc=stage, file=sys.stderr, leave=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- parsing ------------------------------------------------------------------------------------------------------------------


def _split(values: list[str] | None) -> list[str] | None:
    return [name.strip() for value in values for name in value.split(",") if name.strip()] if values else None


def _auto_or_int(text: str) -> Any:
    if text == "auto" or text.lstrip("-").isdigit():
        return text if text == "auto" else int(text)
    raise LayerscopeError(f"GPU layers {text!r} is neither a number nor auto.")


def _one_of(what: str, value: str, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise LayerscopeError(f"The {what} {value!r} is not one of {', '.join(choices)}.")
    return value


def _settings() -> Any:
    from config import load_settings

    return load_settings()


def _register(path: Any) -> None:
    from backend.library import Library

    Library.from_settings(_settings()).add(path)


generate.register(app, _Bar, _register)
batch.register(app, _Bar, _settings)
weights.register(app, _Bar)
moe.register(app, _Bar, _settings, _register)
quantization.register(app, _Bar)
embeddings.register(app, _Bar)
tuned_lens.register(app, _Bar, lambda: _settings().data_dir)
heads_command.register(app, _Bar)
sensitivity.register(app, _Bar)


def main(run: Callable[[], Any] = app) -> None:
    try:
        run()
    except LayerscopeError as error:
        typer.echo(str(error), err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

"""python -m backend batch: run the prompts of a file through one model, one trace each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from backend.errors import LayerscopeError


def register(app: typer.Typer, bar: Callable[[], Any], settings: Callable[[], Any]) -> None:
    """Add the command to the application. bar: makes a progress callback that is a context manager; settings: reads the configuration."""

    @app.command()
    def batch(
        model: Annotated[str, typer.Option("--model", "-m", help="A preset (see `models`), a .gguf file, a folder of safetensors, or a cached hub id.")] = "",
        prompts: Annotated[Path | None, typer.Option("--file", "-f", help="A .csv or .jsonl file with prompt, category, tags; or .txt, one prompt a line.")] = None,
        name: Annotated[str, typer.Option(help="A name; its traces carry it as the tag batch:NAME.")] = "",
        sites: Annotated[list[str] | None, typer.Option("--sites", "-s", help="Sites to store, as for `trace`. Default: resid_post and attn_pattern.")] = None,
        max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to generate after each prompt, greedily.")] = 0,
        resume: Annotated[str, typer.Option(help="Go on with the batch of this id: what has a trace is not run again, what failed is.")] = "",
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    ) -> None:
        """Run many prompts, one after another, and keep one trace each. One that fails is named, and the rest goes on.

        Example: python -m backend batch --model demo-dense --file prompts.csv
        """
        from backend.batches import Batches
        from backend.experiments.batch import DEFAULT_SITES

        found = settings()
        batches = Batches(found.data_dir)
        if resume:
            started = batches.get(resume)
        else:
            if not model or prompts is None:
                raise LayerscopeError("Name a model with --model and a file of prompts with --file, or a batch to go on with by --resume.")
            names = [part.strip() for value in sites or () for part in value.split(",") if part.strip()]
            chosen = {"sites": names or list(DEFAULT_SITES), "max_new_tokens": max_new_tokens}
            started = batches.create(_label(name), model, chosen, _read(prompts).prompts)
        with bar() as progress:
            _run(found, batches, started, progress)
        echo(batches, started.id, as_json)


def _read(path: Path) -> Any:
    from backend.prompt_lists import MAX_BYTES, parse_file

    try:
        if path.stat().st_size > MAX_BYTES:
            raise LayerscopeError(f"{path.name} has {path.stat().st_size:,} bytes, and the limit is {MAX_BYTES:,}.")
        return parse_file(path.name, path.read_bytes())
    except OSError as error:
        raise LayerscopeError(f"The prompts file {path} cannot be read: {error.strerror}.") from None


def _label(name: str) -> str:
    from backend.prompt_lists import MAX_LABEL
    from backend.prompt_text import check_label

    if len(name) > MAX_LABEL:
        raise LayerscopeError(f"The name has {len(name)} characters, and the limit is {MAX_LABEL}.")
    check_label(name, "The name")
    return name


def _run(settings: Any, batches: Any, started: Any, progress: Any) -> None:
    """The job of the worker, in this process."""
    from backend import open_model
    from backend.derived import Derived
    from backend.experiments import Context
    from backend.experiments.batch import batch_job
    from backend.library import Library

    library = Library.from_settings(settings)
    derived = Derived(settings.data_dir / "cache", settings.derived_cache_mb << 20)
    with open_model(started.model) as opened:
        context = Context(engine=lambda *_: opened.engine, traces_dir=library.traces_dir, library=library, derived=derived, batches=batches, progress=progress)
        batch_job(context, {"batch_id": started.id})


def echo(batches: Any, batch_id: str, as_json: bool) -> None:
    """Every prompt with what became of it."""
    batch, items = batches.get(batch_id), batches.items(batch_id)
    if as_json:
        rows = [
            {"prompt": item.prompt.text, "category": item.prompt.category, "trace_id": item.trace_id or None, "error": item.error or None, "n_tokens": item.n_tokens,
             "logprob": item.logprob, "entropy": item.entropy}
            for item in items
        ]  # fmt: skip
        head = {"batch_id": batch.id, "name": batch.name, "model": batch.model, "done": batch.n_done, "failed": batch.n_failed}
        typer.echo(json.dumps({**head, "prompts": rows}, ensure_ascii=False))
        return
    typer.echo(f"batch {batch.id}  {batch.n_done} of {batch.n} done, {batch.n_failed} failed\n")
    typer.echo(f"{'perplexity':>10} {'entropy':>8} {'tokens':>6}  {'trace':<24} prompt")
    for item in items:
        numbers = f"{_shown(item.logprob, lambda v: math.exp(-v), '.2f'):>10} {_shown(item.entropy, float, '.3f'):>8} {item.n_tokens or '':>6}"
        typer.echo(f"{numbers}  {item.trace_id or 'failed':<24} {item.prompt.text[:60]!r}{'  ' + item.error if item.error else ''}")


def _shown(value: float | None, change: Callable[[float], float], form: str) -> str:
    return "-" if value is None else format(change(value), form)

"""python -m backend generate: write on from a prompt, token by token, and keep the trace."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer


def register(app: typer.Typer, bar: Callable[[], Any], keep: Callable[[Path], None]) -> None:
    """Add the command to the application. bar: makes a progress callback that is a context manager; keep: puts a trace into the library."""

    @app.command()
    def generate(
        model: Annotated[str, typer.Option("--model", "-m", help="A preset (see `models`), a .gguf file, a folder of safetensors, or a cached hub id.")],
        prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to go on from.")],
        max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="The most tokens to write; an end-of-sequence token ends earlier.")] = 64,
        temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
        top_k: Annotated[int, typer.Option(help="Sample among the k most probable tokens; 0 is off.")] = 0,
        top_p: Annotated[float, typer.Option(help="Sample among the tokens that hold this share of probability; 1 is off.")] = 1.0,
        min_p: Annotated[float, typer.Option(help="Leave out tokens below this share of the best one's probability; 0 is off.")] = 0.0,
        seed: Annotated[int, typer.Option(help="Seed of the sampler: the same seed gives the same tokens.")] = 0,
        stream: Annotated[bool, typer.Option("--stream", help="Print the text as it is written; with --json, one JSON object a step.")] = False,
        sites: Annotated[list[str] | None, typer.Option("--sites", "-s", help="Sites of the trace, as for `trace`. Default: the standard set.")] = None,
        category: Annotated[str, typer.Option(help="A label to group traces by.")] = "",
        tag: Annotated[list[str] | None, typer.Option(help="A tag; repeat for more.")] = None,
        device: Annotated[str, typer.Option(help="HF: auto, cpu, cuda, ...")] = "auto",
        n_ctx: Annotated[int | None, typer.Option(help="Context length. Default: the model's, at most 8192.")] = None,
        out: Annotated[str | None, typer.Option(help="Folder for the trace. Default: the traces folder of the settings.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON: every step, and the trace's id.")] = False,
    ) -> None:
        """Write on from a prompt and keep the trace of prompt and answer. Ctrl-C ends the writing and keeps what there is.

        Example: python -m backend generate --model demo-dense --prompt "The capital of France is" --stream
        """
        from backend import Sampling, open_model
        from backend.errors import LayerscopeError

        if max_new_tokens < 1:
            raise LayerscopeError(f"The number of new tokens is {max_new_tokens}; it must be 1 or more.")
        names = [name.strip() for value in sites or () for name in value.split(",") if name.strip()]
        with open_model(model, device=device, n_ctx=n_ctx) as opened, bar() as progress:
            listener = _Printer(opened.engine, stream, as_json)
            with listener:
                trace = opened.trace(prompt, sites=names or None, max_new_tokens=max_new_tokens, category=category, tags=tag or (), out=out,
                                     sampling=Sampling(temperature, top_k, top_p, min_p, seed), progress=None if stream else progress, listener=listener)  # fmt: skip
        if out is None:
            keep(trace.path)
        found = {"trace_id": trace.id, "path": str(trace.path), "prompt": trace.prompt, "response": trace.response, "stopped": listener.enough()}
        if as_json:
            typer.echo(json.dumps(found if stream else {**found, "steps": [step_json(step) for step in listener.steps]}, ensure_ascii=False))
        else:
            if not stream:
                typer.echo(f"{trace.prompt}{trace.response}")
            typer.echo(f"trace {trace.id}  {trace.path}", err=True)


def step_json(step: Any) -> dict[str, Any]:
    """A step as --json gives it, the contract of the command; a norm that is no number is null."""
    alternatives = [{"token": i, "text": text, "probability": p} for i, text, p in step.alternatives]
    return {**asdict(step), "alternatives": alternatives, "resid_norms": [norm if math.isfinite(norm) else None for norm in step.resid_norms]}


class _Printer:
    """The listener of the command line: prints as asked, keeps the steps, and takes Ctrl-C for enough while it is entered."""

    def __init__(self, engine: Any, stream: bool, as_json: bool) -> None:
        from backend.experiments.generation import TextStream

        self._stream, self._as_json, self._text = stream, as_json, TextStream(engine)
        self.steps: list[Any] = []
        self._enough = False

    def begin(self, prompt: Sequence[str], special: Sequence[int]) -> None:
        """The prompt is known to who typed it."""

    def written(self, step: Any) -> None:
        self.steps.append(step)
        if self._stream:
            typer.echo(json.dumps(step_json(step), ensure_ascii=False) if self._as_json else self._text.add(step.token), nl=self._as_json)

    def enough(self) -> bool:
        return self._enough

    def _interrupted(self, _: int, __: FrameType | None) -> None:
        self._enough = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends the program

    def __enter__(self) -> _Printer:
        self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)
        if self._stream and not self._as_json:
            typer.echo(self._text.rest())

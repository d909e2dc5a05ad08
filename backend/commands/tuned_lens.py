"""python -m backend tuned-lens: train a tuned lens on text; list those there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from backend.errors import LayerscopeError


def register(app: typer.Typer, bar: Callable[[], Any], data_dir: Callable[[], Path]) -> None:
    """Add the commands to the application. bar: makes a progress callback that is a context manager; data_dir: the dashboard's data folder."""
    group = typer.Typer(no_args_is_help=True, help="Tuned lenses: affine translators that bring each layer's stream nearer to the model's own prediction.", rich_markup_mode=None)
    app.add_typer(group, name="tuned-lens")

    @group.command()
    def train(
        model: Annotated[str, typer.Option("--model", "-m", help="A preset (see `models`), a .gguf file, a folder of safetensors, or a cached hub id.")],
        text: Annotated[str, typer.Option("--text", "-t", help="A text file, or a folder of .txt and .md files, in UTF-8.")],
        out: Annotated[str | None, typer.Option("--out", "-o", help="The new folder. Default: one named after the model among the dashboard's tuned lenses.")] = None,
        steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 250,
        tokens_per_step: Annotated[int, typer.Option(help="Tokens that each step sees.")] = 2048,
        chunk: Annotated[int, typer.Option(help="Tokens that the model sees together.")] = 256,
        learning_rate: Annotated[float, typer.Option(help="Of Adam, at its highest.")] = 1e-3,
        seed: Annotated[int, typer.Option(help="Of the order of the text.")] = 0,
        device: Annotated[str, typer.Option(help="HF: auto, cpu, cuda, ...")] = "auto",
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    ) -> None:
        """Train a tuned lens (Belrose et al. 2023): for each layer h + A h + b, so that it says through the final norm and W_U what the model says.

        Every tenth chunk of the text is held out; the KL there, in nats, is said for each layer before (the logit lens) and after.

        Example: python -m backend tuned-lens train --model demo-dense --text texts/ --steps 250
        """
        from backend import open_model
        from backend.experiments.tuned_lens import TrainSpec
        from backend.experiments.tuned_lens import train as run
        from backend.model_files import identity
        from backend.tuned_lens import FOLDER

        with open_model(model, device=device) as opened, bar() as progress:
            target = Path(out) if out is not None else data_dir() / FOLDER / opened.info.name.replace("/", "_")
            spec = TrainSpec(steps, tokens_per_step, chunk, learning_rate, seed=seed)
            lens = run(opened.engine, Path(text), target, spec, progress=progress, model_identity=identity(Path(opened.info.source)))
        typer.echo(json.dumps({"path": str(lens.folder), "tag": lens.tag, **lens.made}, ensure_ascii=False) if as_json else describe(lens))

    @group.command("list")
    def show() -> None:
        """List the tuned lenses of the dashboard."""
        from backend.tuned_lens import FOLDER, read_tuned_lens

        for folder in sorted(path for path in (data_dir() / FOLDER).glob("*") if path.is_dir() and not path.name.startswith(".")):
            try:
                lens = read_tuned_lens(folder)
                typer.echo(f"{lens.name:<24} {lens.made['model']:<24} {lens.made['n_layers']} layers, d_model {lens.made['d_model']:,}")
            except LayerscopeError as error:
                typer.echo(f"{folder.name:<24} {error}")


def describe(lens: Any) -> str:
    """What was trained as a person reads it in a terminal."""
    made = lens.made
    lines = [f"{lens.folder}  {made['model']}, {made['steps']:,} steps, {made['n_tokens']:,} tokens, {made['n_tokens_held_out']:,} held out", ""]
    lines += [f"{'layer':<8} {'KL, logit lens':>16} {'KL, tuned lens':>16}   nats on the held-out text"]
    lines += [f"{row:<8} {before:>16.4f} {after:>16.4f}" for row, (before, after) in made["held_out_kl"].items()]
    return "\n".join(lines)

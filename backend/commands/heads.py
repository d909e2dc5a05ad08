"""python -m backend heads: which heads of a model do induction, look at the previous token, or at copies of the present one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

_LISTED = 8


def register(app: typer.Typer, bar: Callable[[], Any]) -> None:
    """Add the command to the application. bar: makes a progress callback that is a context manager."""

    @app.command()
    def heads(
        model: Annotated[str, typer.Option("--model", "-m", help="A preset (see `models`), a .gguf file, a folder of safetensors, or a cached hub id.")],
        length: Annotated[int, typer.Option(help="Random tokens of a block.")] = 32,
        repeats: Annotated[int, typer.Option(help="How often the block is said.")] = 2,
        prompts: Annotated[int, typer.Option(help="Prompts, each with a block of its own.")] = 8,
        seed: Annotated[int, typer.Option(help="Seed of the random tokens.")] = 0,
        device: Annotated[str, typer.Option(help="HF: auto, cpu, cuda, ...")] = "auto",
        as_json: Annotated[bool, typer.Option("--json", help="Print the scores of every head as one JSON object on stdout.")] = False,
    ) -> None:
        """Rank a model's heads on repeated random tokens: induction, previous token, duplicate token (Olsson et al. 2022).

        Example: python -m backend heads --model demo-dense-q4_k_m
        """
        from backend import open_model
        from backend.experiments.head_detector import RepeatedTokens, detect_heads

        with open_model(model, device=device) as opened, bar() as progress:
            found = detect_heads(opened.engine, RepeatedTokens(length, repeats, prompts, seed), progress=progress)
            about = {"model": opened.info.name, "architecture": opened.info.architecture}
        typer.echo(json.dumps(about | found.to_json(), ensure_ascii=False) if as_json else describe(found))


def describe(found: Any) -> str:
    """The ranked lists as a person reads them in a terminal."""
    from backend.reports.head_scores import TITLES

    asked = found.prompts
    what = f"{asked['prompts']} prompts of {'BOS and ' if found.has_bos else ''}{asked['length']} random tokens said {asked['repeats']} times"
    lines = [f"{what}; the model repeats {found.accuracy:.1%} of them", "", "   ".join(f"{title:<22}" for title in TITLES.values()).rstrip()]
    ranked = [found.ranked(name, _LISTED) for name in TITLES]
    for row in range(max(map(len, ranked), default=0)):
        cells = [f"{f'{column[row][0]}.{column[row][1]}':<8}{column[row][2]:>6.3f}" if row < len(column) else "" for column in ranked]
        lines.append("   ".join(f"{cell:<22}" for cell in cells).rstrip())
    return "\n".join(lines)

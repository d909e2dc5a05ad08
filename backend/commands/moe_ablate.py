"""python -m backend moe ablate: what a model does without some of its experts, or without each of them in turn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Annotated, Any

import typer

from backend.errors import LayerscopeError

SHOWN = 15


def register(group: typer.Typer, bar: Callable[[], Any], opened: Callable[[str], Any], schema: str) -> None:
    """Add the command to the group. bar: makes a progress callback that is a context manager; opened: from a preset's name to a context
    manager of (preset, model)."""

    @group.command()
    def ablate(
        preset: Annotated[str, typer.Option("--preset", "-p", help="A run preset (see `moe presets`), or a model's name (see `models`).")],
        prompt: Annotated[list[str], typer.Option("--prompt", help="The text to run; again for each further prompt of a sweep.")],
        more: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Further prompts of a sweep.", show_default=False)] = None,
        layer: Annotated[int | None, typer.Option("--layer", "-l", help="The layer whose experts are taken out. Default: every expert of every layer in turn.")] = None,
        experts: Annotated[str | None, typer.Option("--experts", "-e", help='The experts of that layer, together: "2,5".')] = None,
        max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", "-n", help="Tokens to generate with and without. Default: the preset's.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    ) -> None:
        """Take experts out of a router's choice: effect on loss, predictions and text; or rank all experts by it.

        Examples: python -m backend moe ablate --preset demo-moe --prompt "The capital of France is" --layer 0 --experts 4
                  python -m backend moe ablate --preset demo-moe --prompt "The capital of France is" "7 plus 5 equals"
        """
        if (layer is None) != (experts is None):
            raise LayerscopeError("Name both --layer and --experts, or neither to take out every expert in turn.")
        asked = [*prompt, *(more or ())]
        if layer is not None and len(asked) > 1:
            raise LayerscopeError(f"Named experts are taken out of one prompt, and {len(asked)} are given; without --layer all experts are taken out of all of them.")
        with opened(preset) as (chosen, model), bar() as progress:
            every = [model.engine.tokenize(text) for text in asked]
            if layer is None or experts is None:
                found = {"prompts": asked, **_sweep(model.engine, every, progress)}
            else:
                n = chosen.max_new_tokens if max_new_tokens is None else max_new_tokens
                found = {"prompt": asked[0], **_without(model.engine, every[0], layer, _numbers(experts), n, chosen.sampling)}
            data = {"schema": schema, "preset": preset, "model": model.info.name, "n_tokens": sum(map(len, every)), **found}
        typer.echo(json.dumps(data, ensure_ascii=False) if as_json else _ranking(data) if "ranking" in data else _difference(data))


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= 5 for part in parts):
        raise LayerscopeError(f'Experts {text[:60]!r} are not numbers separated by commas, such as "2,5".')
    return tuple(sorted({int(part) for part in parts}))


def _sweep(engine: Any, prompts: list[list[int]], progress: Any) -> dict[str, Any]:
    from backend.experiments.experts import MEASURES, sweep_over

    layers, found = sweep_over(engine, prompts, progress)
    rows = [{"layer": layer, "expert": expert, **{name: float(found[m, i, expert]) for m, name in enumerate(MEASURES)}}
            for i, layer in enumerate(layers) for expert in range(found.shape[2])]  # fmt: skip
    return {"ranking": sorted(rows, key=lambda row: -row["kl"])}


def _without(engine: Any, ids: list[int], layer: int, experts: tuple[int, ...], n_new: int, sampling: Any) -> dict[str, Any]:
    from backend.experiments.experts import MEASURES, effect, logits_of
    from backend.intervention import ablate_experts

    edit = ablate_experts(engine.places, layer, experts)
    edit.check(engine.info, len(ids) + n_new)
    measured = effect(logits_of(engine, ids), logits_of(engine, ids, (edit,)), ids)
    texts = [engine.detokenize(engine.generate(ids, n_new, sampling, edits=edits)) if n_new else "" for edits in ((), (edit,))]
    return {"layer": layer, "experts": list(experts), **dict(zip(MEASURES, measured, strict=True)), "response": texts[0], "response_without": texts[1]}


def _ranking(data: dict[str, Any]) -> str:
    of = f" of {len(data['prompts'])} prompts" if len(data["prompts"]) > 1 else ""
    lines = [f"{data['model']}, {data['n_tokens']} tokens{of}; every expert taken out in turn, the largest effects first", "",
             f"{'expert':>8} {'KL, nats':>9} {'loss, nats':>11} {'perplexity x':>13} {'other top token':>16}"]  # fmt: skip
    for row in data["ranking"][:SHOWN]:
        name = f"{row['layer']}.{row['expert']}"
        lines.append(f"{name:>8} {row['kl']:>9.4f} {row['nll']:>+11.4f} {math.exp(row['nll']):>13.3f} {row['changed']:>16.1%}")
    rest = len(data["ranking"]) - SHOWN
    return "\n".join(lines + ([f"and {rest} more (--json has all)"] if rest > 0 else []))


def _difference(data: dict[str, Any]) -> str:
    names = ", ".join(map(str, data["experts"]))
    lines = [f"{data['model']} without expert {names} of layer {data['layer']}, {data['n_tokens']} tokens", "",
             f"loss        {data['nll']:+.4f} nats per token (perplexity x {math.exp(data['nll']):.3f})", f"KL          {data['kl']:.4f} nats",
             f"other top   {data['changed']:.1%} of positions"]  # fmt: skip
    if data["response"] or data["response_without"]:
        lines += ["", f"with        {data['response']!r}", f"without     {data['response_without']!r}"]
    return "\n".join(lines)

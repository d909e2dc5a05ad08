"""python -m backend moe compare: the same prompts through two or more variants of a model, and what that changed in the routing."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from typing import Annotated, Any

import numpy as np
import typer

from backend.errors import LayerscopeError


def register(group: typer.Typer, bar: Callable[[], Any], opened: Callable[[str], Any], traced: Callable[..., Any], schema: str) -> None:
    """Add the command to the group. bar: makes a progress callback that is a context manager; opened: from a preset's name to a context manager of
    (preset, model); traced: runs a prompt on them and gives the trace, which is kept."""

    @group.command()
    def compare(
        presets: Annotated[list[str], typer.Option("--preset", "-p", help="A run preset or a model's name; repeat for each, the reference first.")],
        prompts: Annotated[list[str], typer.Option("--prompts", help="The prompts: --prompts A B C, or the option again for each.")],
        more: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Further prompts.", show_default=False)] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    ) -> None:
        """Run the same prompts through variants of a model and compare their routing, layer by layer and token by token.

        Example: python -m backend moe compare --preset demo-moe --preset demo-moe-q8_0 --prompts "The capital of France is" "7 plus 5 equals"
        """
        asked = [*prompts, *(more or ())]
        if len(presets) < 2:
            raise LayerscopeError("A comparison needs two presets at least: --preset A --preset B.")
        traces = []
        with bar() as progress:
            for name in presets:
                with opened(name) as (chosen, model):
                    traces.append([traced(model, chosen, prompt, 0, progress) for prompt in asked])
        data = {"schema": schema, "presets": presets, "prompts": asked, "comparisons": [_pair(traces, i, j) for i, j in combinations(range(len(presets)), 2)]}
        typer.echo(json.dumps(data, ensure_ascii=False) if as_json else describe(data))


def _pair(traces: list[list[Any]], i: int, j: int) -> dict[str, Any]:
    """Two variants: a report for each prompt, and over all of them the means, prompts weighted by their tokens."""
    from backend.reports.routing import comparison_report

    reports = [{**comparison_report(a, b), "prompt": number} for number, (a, b) in enumerate(zip(traces[i], traces[j], strict=True))]
    weights = np.array([trace.n_tokens for trace in traces[i]], np.float64)
    whole: dict[str, float | None] = {}
    for name in reports[0]["overall"]:
        values = [report["overall"][name] for report in reports]
        whole[name] = None if None in values else float(np.average(np.array(values, np.float64), weights=weights))
    return {"presets": [i, j], "n_tokens": int(weights.sum()), "overall": whole, "reports": reports}


def describe(data: dict[str, Any]) -> str:
    """What a person reads in a terminal."""
    lines = []
    for pair in data["comparisons"]:
        names, whole = [data["presets"][i] for i in pair["presets"]], pair["overall"]
        lines += [f"{names[0]} and {names[1]}, {pair['n_tokens']:,} tokens of {len(data['prompts'])} prompt{'s' if len(data['prompts']) > 1 else ''}"]
        if whole["changed"] is not None:
            lines += [f"other experts     {whole['changed']:.1%} of tokens (mean over the layers), {whole['changed_in_some_layer']:.1%} in some layer"]
        lines += [f"{title:<17} {'-' if whole[name] is None else format(whole[name], '.4f')}" for title, name in
                  (("cosine", "cosine"), ("Pearson", "pearson"), ("Jensen-Shannon", "jensen_shannon"))]  # fmt: skip
        lines += [f"  {data['prompts'][report['prompt']][:40]!r}: {report['says']}" for report in pair["reports"]] + [""]
    return "\n".join(lines).rstrip()

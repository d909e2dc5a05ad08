"""How time and memory grow: with the length of the prompt, the number of layers, and the number of sites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from backend.sites import STANDARD_SITES
from bench.measure import ROUNDS, Case, Runs, in_turn
from bench.models import SMALL, Sizes, describe, gguf_file, hf_folder, random_ids
from bench.report import RESIDUAL_AND_ATTENTION, Goal, Section, megabytes, table

LENGTHS, LAYERS, N_TOKENS = (64, 256, 1024, 2048, 4096), (4, 8, 16, 32), 256
GROWTH_ROUNDS = min(ROUNDS, 5)
# A power of the captured values: 1 is linear. Memory of four times the layers, against memory of one time.
MOST_GROWTH, MOST_MEMORY = 1.15, 1.25
_DENSE = [site for site in STANDARD_SITES if "router" not in site and "expert" not in site]


def section() -> Section:
    texts, goals = [], []
    for engine, model in (("llama.cpp, Q8_0", gguf_file), ("PyTorch, float32", hf_folder)):
        for curve, points in _curves(model).items():
            runs = in_turn({point: Case("run_capture", **arguments, lens=False) for point, arguments in points.items()}, GROWTH_ROUNDS)
            texts.append(f"**{engine}, by {curve}**\n\n{_table(curve, runs)}\n\n{_fit(runs)}")
            goals += _goals(f"{engine}, by {curve}", curve, runs)
    text = f"""
{describe(SMALL)}. By *prompt*, in tokens: {", ".join(RESIDUAL_AND_ATTENTION)} of a model with {LAYERS[0]} layers; by *layers*: as many as the row says,
all standard sites at {N_TOKENS} tokens; by *sites*: the first so many of the standard sites, in the order of the table of sites, at {N_TOKENS} tokens.
*values* are all values of the captured sites, what the causal mask hides included. The time includes the model's own, and what every trace
costs whatever is in it; the logit lens is left out. *growth* is the exponent from the row above: time ~ values^growth, 1 is linear, less is better than linear.

{(chr(10) * 2).join(texts)}
"""
    return Section("How time and memory grow", text, goals, GROWTH_ROUNDS)


def _curves(model: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """Curve -> point -> arguments of a case. `model` makes a model of some sizes."""
    small, shallow = str(model(SMALL)), str(model(_deep(LAYERS[0])))
    counts = (1, 2, 4, 8, len(_DENSE))
    return {
        "prompt": {str(n): {"path": shallow, "ids": random_ids(n, SMALL), "sites": RESIDUAL_AND_ATTENTION} for n in LENGTHS},
        "layers": {str(n): {"path": str(model(_deep(n))), "ids": random_ids(N_TOKENS, SMALL)} for n in LAYERS},
        "sites": {str(n): {"path": small, "ids": random_ids(N_TOKENS, SMALL), "sites": _DENSE[:n]} for n in counts},
    }


def _deep(n_layers: int) -> Sizes:
    return replace(SMALL, num_hidden_layers=n_layers)


def _table(curve: str, runs: Mapping[str, Runs]) -> str:
    rows, before = [], None
    for point, case in runs.items():
        seconds = f"{case.median:.3f} ({min(case.seconds):.3f} - {max(case.seconds):.3f})"
        growth = f"{_exponent(before, case):.2f}" if before else ""
        rows.append([point, f"{case.last['n_values'] / 1e6:,.2f} M", seconds, growth, megabytes(case.last["file_bytes"]), megabytes(case.extra_bytes)])
        before = case
    return table([curve, "values", "seconds", "growth", "on disk", "extra peak memory"], rows)


def _exponent(before: Runs, after: Runs) -> float:
    """Of medians; the values grow from point to point."""
    return math.log(after.median / before.median) / math.log(after.last["n_values"] / before.last["n_values"])


def _fit(runs: Mapping[str, Runs]) -> str:
    """seconds = a + b x values by least squares, and how well it holds."""
    values, seconds = np.array([case.last["n_values"] for case in runs.values()], float), np.array([case.median for case in runs.values()])
    slope, start = np.polyfit(values, seconds, 1)
    residual = seconds - (start + slope * values)
    r2 = 1 - (residual**2).sum() / ((seconds - seconds.mean()) ** 2).sum()
    return f"Line through the points: {start:.3f} s + {1e9 * slope:.1f} ns a value, R² {r2:.3f}."


def _goals(what: str, curve: str, runs: Mapping[str, Runs]) -> list[Goal]:
    *_, before, last = runs.values()
    exponent = _exponent(before, last)
    goals = [Goal(f"{what}: time no more than linear in the values captured (growth at most {MOST_GROWTH:.2f} at the end)", f"{exponent:.2f}", exponent <= MOST_GROWTH)]
    if curve == "layers":
        ratio = runs["32"].extra_bytes / runs["8"].extra_bytes
        goals.append(Goal(f"{what}: peak memory flat (32 layers at most {MOST_MEMORY:.2f} x 8 layers)", f"{ratio:.2f}", ratio <= MOST_MEMORY))
    return goals

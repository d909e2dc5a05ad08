"""A capture where the engine leaves one core: what is done with the values is done beside it, while it computes the next layer."""

from __future__ import annotations

from typing import Any

from backend.sites import STANDARD_SITES
from bench.hf import LENS, N_TOKENS, OURS, OURS_PART, hooks
from bench.measure import PEERS_PYTHON, Case, in_turn, n_threads
from bench.models import BASE, describe, gguf_file, hf_folder, random_ids
from bench.report import RESIDUAL_AND_ATTENTION, Goal, Section, at_most, time_table

PLAIN, PART, STANDARD, EAGER = "plain llama.cpp", "residual stream + attention", "all standard sites", "plain forward, eager attention"


def section() -> Section:
    if n_threads() < 2:
        raise SystemExit("This part needs two cores: one for the engine, one to spare.")
    if not PEERS_PYTHON.is_file():
        raise SystemExit(f"The peers are not installed: {PEERS_PYTHON.parent.parent.name} is missing. Run make peers-env first.")
    n = n_threads() - 1
    both: dict[str, Any] = {"ids": random_ids(N_TOKENS), "n_threads": n}
    gguf, hf = {"path": str(gguf_file()), **both}, {"path": str(hf_folder()), **both}
    runs = in_turn({
        PLAIN: Case("run_llama", **gguf),
        PART: Case("run_capture", **gguf, sites=RESIDUAL_AND_ATTENTION),
        STANDARD: Case("run_capture", **gguf),
    })  # fmt: skip
    torch_runs = in_turn({
        EAGER: Case("run_transformers", **hf, attention="eager"),
        OURS_PART: Case("run_capture", **hf, sites=RESIDUAL_AND_ATTENTION),
        OURS: Case("run_capture", **hf),
        LENS: Case("run_transformer_lens", **hf, python=PEERS_PYTHON, hooks=hooks(STANDARD_SITES, BASE.num_hidden_layers)),
    })  # fmt: skip
    text = f"""
The same models and cases as above ({describe(BASE)}, {N_TOKENS} tokens), every case with {n} of the machine's {n_threads()} cores to compute with
(`n_threads`). The plain cases and TransformerLens have no use for the other one. A capture has: checks, summaries, encoding and writing go on beside
the engine there, at most three layers behind it. Where the engine fills few cores they are done between its steps instead, which is what the parts above measure.

llama.cpp, Q8_0:

{time_table(runs, PLAIN)}

PyTorch, float32:

{time_table(torch_runs, EAGER)}
"""
    goals = [
        at_most(1.10, PART, PLAIN, runs),
        at_most(1.25, STANDARD, PLAIN, runs),
        at_most(1.10, OURS_PART, EAGER, torch_runs),
        at_most(1.00, OURS, LENS, torch_runs),
    ]
    return Section("A capture with a core to spare", text, [Goal(f"one core to spare: {goal.goal}", goal.measured, goal.met) for goal in goals])

"""Sensitivity: the weights of a model ranked by grad_x_weight, beside the forward and backward passes that it needs."""

from __future__ import annotations

import os

from bench.measure import Case, in_turn
from bench.models import BASE, Sizes, describe, hf_folder, random_ids
from bench.report import Goal, Section, at_most, megabytes, time_table

WINDOW, N_WINDOWS, K = 512, int(os.environ.get("BENCH_WINDOWS", "8")), 100_000
MOST_TIME, MOST_MEMORY = 1.5, 200e6
ROUNDS = 2  # each takes minutes
OURS, THEIRS = "ranking", "passes alone"


def section(sizes: Sizes = BASE, rounds: int = ROUNDS) -> Section:
    ids = random_ids(WINDOW * N_WINDOWS, sizes)
    arguments = {"path": str(hf_folder(sizes)), "windows": [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)], "k": K}
    runs = in_turn({OURS: Case("run_sensitivity_ranking", **arguments), THEIRS: Case("run_sensitivity_ranking", **arguments, plain=True)}, rounds)
    beyond = runs[OURS].extra_bytes - runs[THEIRS].extra_bytes
    text = f"""
{describe(sizes)}, float32 on the CPU. *{OURS}*: the {K:,} weights with the largest |w dL/dw| of the {runs[OURS].last["n_weights"] / 1e6:,.0f} M in matrices of attention and MLPs,
as many of the smallest, and the statistics and histogram of every matrix, over {N_WINDOWS} windows of {WINDOW} tokens. *{THEIRS}*: forward and backward of
transformers' own model over the same windows, gradients of the same matrices, nothing looked at.

{time_table(runs, THEIRS)}
"""
    goals = [
        at_most(MOST_TIME, OURS, THEIRS, runs),
        Goal(f"global top-k adds at most {megabytes(int(MOST_MEMORY))} to what the passes need", megabytes(beyond), beyond <= MOST_MEMORY),
    ]
    return Section("Sensitivity: ranking a model's weights", text, goals, rounds)

"""Sensitivity: what changing weights in place and putting them back costs beside evaluating the model, 512 tokens, Q8_0."""

from __future__ import annotations

from bench.measure import Case, in_turn
from bench.models import BASE, describe, gguf_file, random_ids
from bench.report import Section, at_most, time_table

N_TOKENS, N_CHANGED, N_MANY = 512, 100, 10_000


def section() -> Section:
    path, ids = str(gguf_file()), random_ids(N_TOKENS)
    cycle = f"{N_CHANGED} weights changed, evaluated, restored"
    runs = in_turn({
        "evaluated": Case("run_sensitivity_edits", path=path, ids=ids),
        cycle: Case("run_sensitivity_edits", path=path, ids=ids, n_changed=N_CHANGED),
        f"{N_MANY:,} of them": Case("run_sensitivity_edits", path=path, ids=ids, n_changed=N_MANY),
    })  # fmt: skip
    restored = all(case.last["restored"] for case in runs.values())
    text = f"""
{describe(BASE)}, Q8_0, CPU, loaded without mmap (`editable_weights`). *evaluated* runs {N_TOKENS} tokens and hands out the logits of every position. The others
flip the sign of weights drawn from all matrices inside their quantized blocks, evaluate, and put the blocks back. After the last round the logits were
{"equal to the bit to those before the first" if restored else "**not** those from before the first"}.

{time_table(runs, "evaluated")}
"""
    return Section("Sensitivity: weights changed in place", text, [at_most(1.10, cycle, "evaluated", runs)])

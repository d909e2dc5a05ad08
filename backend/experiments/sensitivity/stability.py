"""How far a ranking depends on chance: on the metric's seed or on which text it saw, and on the metric itself.

What a seed draws depends on the metric (docs/sensitivity.md): the probes of hutchinson, and for the others that read the text another
random half of its windows. Magnitude reads none and has neither, so it is only compared with other metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from backend.errors import LayerscopeError
from backend.experiments.sensitivity import Spec
from backend.experiments.sensitivity.contracts import Ranking
from backend.experiments.sensitivity.ranking import agreement

CHEAP = ("magnitude", "wanda", "grad_x_weight", "grad_squared")  # one pass over the text at most
SEEDED = ("hutchinson",)
TEXTLESS = ("magnitude",)
_KS = (0.1, 0.25, 0.5, 1.0)  # of k

Windows = Sequence[list[int]]
Rank = Callable[[str, Windows, int], Ranking]  # metric, windows, seed of the metric


def stability(ranking: Ranking, spec: Spec, windows: Windows, available: Sequence[str], rank: Rank) -> tuple[dict[str, Any], list[str]]:
    """`stability` of sensitivity_stats.json, and sentences for the notes. available: the metrics that the engine can give; rank: ranks by one."""
    ks, notes = sorted({max(1, round(share * spec.topk)) for share in _KS}), list[str]()
    pairs: list[dict[str, Any]] = []
    if spec.metric in TEXTLESS:
        notes.append(f"{spec.metric.capitalize()} reads no text and has no seed: stability compares it with other metrics alone.")
    else:
        seeds = [(str(seed), rank(spec.metric, *_drawn(spec.metric, windows, seed))) for seed in spec.seeds] if len(spec.seeds) > 1 else []
        pairs += [_pair("seed", a, b, ks) for a, b in combinations(seeds, 2)]
        if len(windows) > 1:
            halves = [(f"half {i + 1}", rank(spec.metric, windows[i::2], spec.seeds[0])) for i in range(2)]
            pairs.append(_pair("sample", halves[0], halves[1], ks))
        else:
            notes.append("The text is one window, which has no halves: stability across samples is not measured.")
    for metric in CHEAP:
        if metric != spec.metric and metric in available:
            try:
                other = rank(metric, windows, spec.seeds[0])
            except LayerscopeError as error:  # what one metric cannot do to this model says nothing against the run's own
                notes.append(f"Stability leaves out {metric}: {error}")
                continue
            pairs.append(_pair("metric", (spec.metric, ranking), (metric, other), ks))
    return {"ks": ks, "pairs": pairs}, notes


def _drawn(metric: str, windows: Windows, seed: int) -> tuple[Windows, int]:
    """The windows and the metric's own seed that stand for `seed`."""
    if metric in SEEDED or len(windows) < 2:
        return windows, seed
    chosen = np.random.default_rng(seed).choice(len(windows), max(1, len(windows) // 2), replace=False)
    return [windows[i] for i in sorted(chosen)], seed


def _pair(kind: str, a: tuple[str, Ranking], b: tuple[str, Ranking], ks: Sequence[int]) -> dict[str, Any]:
    return {"kind": kind, "a": a[0], "b": b[0], **agreement(a[1], b[1], ks)}

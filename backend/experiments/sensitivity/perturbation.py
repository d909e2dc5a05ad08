"""Weights changed in place, and what that does to perplexity: the best of a ranking against random ones and the least, of the same tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.engines import Engine, ShouldStop, never_stop
from backend.engines.weight_edits import WeightChange, Written
from backend.experiments import Progress, no_progress
from backend.experiments.sensitivity import Spec
from backend.experiments.sensitivity.checks import flippable
from backend.experiments.sensitivity.contracts import Chosen, Losses, Ranking
from backend.experiments.sensitivity.perplexity import compared, described, evaluate, finite
from backend.experiments.sensitivity.ranking import random_like

NOT_REPRESENTED = 0.1  # of the change that was asked for: a stored value that misses by more was not represented
_BLOCK = 1 << 20  # values whose double-precision copy is made at a time

Floats = NDArray[np.float32]


def perturb(engine: Engine, ranking: Ranking, spec: Spec, windows: Sequence[Sequence[int]], baseline: Losses, *, progress: Progress = no_progress,
            should_stop: ShouldStop = never_stop) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """`perturbation` of sensitivity_stats.json, and sentences for the notes. The model is as it was afterwards, to the bit.

    Gaussian noise of the top and the bottom weights is drawn with the first seed; that of random ones with the seed that chose them.
    """
    selections: list[tuple[str, int | None]] = [("top_k", None)]
    selections += [("random_k", seed) for seed in spec.seeds if "random_k" in spec.controls]
    selections += [("bottom_k", None)] if "bottom_k" in spec.controls else []
    runs, notes, deviations = list[dict[str, Any]](), list[str](), _Deviations(engine)
    for selection, seed in selections:
        chosen = {"top_k": ranking.top, "bottom_k": ranking.bottom}.get(selection) or random_like(ranking, seed or 0, engine.weight)
        noise = seed if seed is not None else spec.seeds[0]
        stage = f"perturbing {selection}" + (f", seed {seed}" if seed is not None else "")
        with engine.perturbed(changes(engine, chosen, spec, noise, deviations)) as written:
            found = evaluate(engine, windows, stage=stage, progress=progress, should_stop=should_stop)
        shown = seed if spec.perturb != "gaussian" else noise
        runs.append({"selection": selection, "seed": shown, "n": len(chosen.at), **compared(found, baseline), **outcome(written)})
        if runs[-1]["nll"] is None:
            notes.append(f"The loss is not finite after {spec.perturb} of {selection}{'' if seed is None else f', seed {seed}'}: the model is broken, and there is no ratio.")
    return {"op": spec.perturb, "scale": spec.perturb_scale, "bit": spec.bit, "baseline": described(baseline), "runs": runs}, notes


def changes(engine: Engine, chosen: Chosen, spec: Spec, seed: int, deviations: _Deviations | None = None) -> list[WeightChange]:
    """What the operation of `spec` makes of the chosen weights, one change a tensor. Raises LayerscopeError for a bit that a tensor's storage lacks."""
    deviations, rng, made = deviations or _Deviations(engine), np.random.default_rng(seed), list[WeightChange]()
    for number in np.unique(chosen.tensor):
        name, mine = chosen.names[number], np.flatnonzero(chosen.tensor == number)
        order = mine[np.argsort(chosen.at[mine])]  # so that the noise of a weight does not depend on its rank
        at, value = chosen.at[order], chosen.value[order]
        if spec.perturb == "bit_flip":
            made.append(WeightChange(name, at, bit=flippable(engine, name, spec.bit)))
            continue
        with np.errstate(over="ignore"):
            made.append(WeightChange(name, at, _values(spec, value, lambda name=name: deviations.of(name), rng)))  # type: ignore[misc]
    return made


def _values(spec: Spec, value: Floats, deviation: Any, rng: np.random.Generator) -> Floats:
    """The new values of some weights of one tensor."""
    scale = np.float32(spec.perturb_scale)
    if spec.perturb == "sign_flip":
        return -value
    if spec.perturb == "zero":
        return np.zeros_like(value)
    if spec.perturb == "scale":
        return scale * value
    return (value + scale * np.float32(deviation()) * rng.standard_normal(len(value), np.float32)).astype(np.float32)


class _Deviations:
    """The standard deviation of tensors, each looked at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._known = engine, dict[str, float]()

    def of(self, name: str) -> float:
        if name not in self._known:
            flat = self._engine.weight(name).reshape(-1)
            sums = np.array([(block.sum(), np.square(block).sum()) for start in range(0, flat.size, _BLOCK) for block in [flat[start : start + _BLOCK].astype(np.float64)]])
            mean, square = sums.sum(axis=0) / flat.size
            self._known[name] = float(np.sqrt(max(0.0, square - mean**2)))
        return self._known[name]


def outcome(written: Sequence[Written]) -> dict[str, Any]:
    """What storage made of the changes: how many entries changed, how many missed what was asked for by more than NOT_REPRESENTED of the change,
    the largest miss, and how many weights beside them changed, and by how much at most."""
    changed = missed = 0
    worst = 0.0
    for each in written:
        with np.errstate(invalid="ignore", over="ignore"):  # a flipped bit may leave no finite number
            miss, asked = np.abs(each.after - each.wanted), np.abs(each.wanted - each.before)
        changed += int(np.count_nonzero(each.after != each.before))
        missed += int(np.count_nonzero(miss > NOT_REPRESENTED * asked))
        worst = max(worst, float(miss.max(initial=0.0)))
    others = max((each.worst_other for each in written), default=0.0)
    return {"changed": changed, "not_representable": missed, "worst_representation": finite(worst), "n_others": sum(each.n_others for each in written),
            "worst_other": finite(others)}  # fmt: skip

"""Whether a sensitivity run holds what docs/sensitivity.md says it does: its files may come from anywhere, and a reader that trusts them would stumble far inside.

A rule is a function of (value, where it stands) that raises LayerscopeError; those of an object are a dict of rules, key by key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from backend.errors import LayerscopeError
from backend.reports.sensitivity_run import SensitivityRun

Rule = Callable[[Any, str], None]
MOST_LAYERS = 10_000
_MOST = 100_000  # items of a list


def _wrong(where: str, value: Any, wanted: str) -> LayerscopeError:
    return LayerscopeError(f"The run is damaged: {where} is {str(value)[:40]!r}, not {wanted}.")


def _number(value: Any, where: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)):
        raise _wrong(where, value, "a finite number or null")


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str) or len(value) > 10_000:
        raise _wrong(where, value, "a text of at most 10,000 characters")


def _whole(most: int) -> Rule:
    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < most:
            raise _wrong(where, value, f"a whole number from 0 to {most - 1:,}")

    return check


def _maybe(rule: Rule) -> Rule:
    return lambda value, where: None if value is None else rule(value, where)


def _list(rule: Rule) -> Rule:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) > _MOST:
            raise _wrong(where, value, f"a list of at most {_MOST:,}")
        for i, item in enumerate(value):
            rule(item, f"{where}[{i}]")

    return check


def _object(rules: Mapping[str, Rule]) -> Rule:
    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        for key, rule in rules.items():
            if key not in value:
                raise LayerscopeError(f"The run is damaged: {where}.{key} is missing.")
            rule(value[key], f"{where}.{key}")

    return check


def _one_of(*choices: str) -> Rule:
    def check(value: Any, where: str) -> None:
        if value not in choices:
            raise _wrong(where, value, f"one of {', '.join(choices)}")

    return check


def _named(rule: Rule) -> Rule:
    """An object of any names."""

    def check(value: Any, where: str) -> None:
        _object({})(value, where)
        for key, item in value.items():
            rule(item, f"{where}.{key[:40]}")

    return check


def _ci(value: Any, where: str) -> None:
    _list(_number)(value, where)
    if len(value) != 2:
        raise _wrong(where, value, "[low, high]")


def _histogram(value: Any, where: str) -> None:
    _object({"log10_edges": _list(_number), "counts": _list(_number)})(value, where)
    edges, counts = value["log10_edges"], value["counts"]
    if None in edges or None in counts or (counts and (len(edges) != len(counts) + 1 or any(b <= a for a, b in zip(edges, edges[1:], strict=False)))):
        raise LayerscopeError(f"The run is damaged: {where} has {len(edges):,} edges and {len(counts):,} counts; edges rise, and there is one more of them.")


_LAYER, _COUNT = _whole(MOST_LAYERS), _whole(1 << 50)
_INDEX = _whole(1 << 40)
_MEASURED: dict[str, Rule] = {"nll": _number, "perplexity": _number}
_BASELINE = _object({**_MEASURED, "ci": _maybe(_ci)})
_CHANGED: dict[str, Rule] = {**_MEASURED, "ratio": _number, "ci": _maybe(_ci)}

MANIFEST_RULES = _object({
    "id": _text, "created": _text, "command": _list(_text), "spec": _object({"metric": _text, "mode": _text, "topk": _COUNT}), "notes": _list(_text),
    "model": _object({"name": _text, "architecture": _text, "n_layers": _LAYER, "n_params": _COUNT, "quantization": _text, "engine": _text}),
    "text": _object({"name": _text, "n_windows": _COUNT, "n_tokens": _COUNT, "window": _COUNT}),
})  # fmt: skip
STATS_RULES = _object({
    "metric": _text, "mode": _text,
    "tensors": _list(_object({"name": _text, "layer": _maybe(_LAYER), "component": _text, "n": _COUNT, "histogram": _histogram, "n_top": _number,
                              **dict.fromkeys(("mean", "std", "max", "p50", "p90", "p99", "p999", "zeros"), _number)})),
    "perturbation": _maybe(_object({"op": _text, "scale": _number, "bit": _maybe(_COUNT), "baseline": _BASELINE, "runs": _list(_object({
        "selection": _one_of("top_k", "random_k", "bottom_k"), "seed": _maybe(_COUNT), "n": _COUNT, **_CHANGED, "changed": _number, "not_representable": _number,
        "worst_representation": _number, "n_others": _number, "worst_other": _number}))})),
    "stability": _maybe(_object({"ks": _list(_COUNT), "pairs": _list(_object({"kind": _one_of("seed", "sample", "metric"), "a": _text, "b": _text, "jaccard": _named(_number),
                                                                             "spearman": _number}))})),
    "pruning": _maybe(_object({"metric": _text, "within": _text, "baseline": _BASELINE, "rows": _list(_object({"sparsity": _number, "zeros": _number, **_CHANGED,
                                                                                                             "divergence": _list(_number)}))})),
    "gradient_flow": _maybe(_object({"layers": _list(_LAYER), "components": _list(_text), "norm": _list(_list(_number))})),
    "super_weights": _maybe(_object({
        "threshold": _number, "published": _list(_object({"layer": _LAYER, "row": _INDEX, "column": _INDEX, "ratio": _number, "source": _text})),
        "candidates": _list(_object({"layer": _LAYER, "name": _text, "expert": _maybe(_INDEX), "row": _INDEX, "column": _INDEX, "value": _number, "magnitude_rank": _number,
                                     "input_spike": _number, "output_spike": _number, "persistence": _number, "ratio": _number, "ci": _maybe(_ci),
                                     "status": _one_of("published", "found", "confirmed")})),
        "random": _maybe(_object({"n": _COUNT, "worst_ratio": _number}))})),
})  # fmt: skip


def checked(run: SensitivityRun) -> SensitivityRun:
    """The run, if it has the form that docs/sensitivity.md gives it. Raises LayerscopeError naming what has not."""
    MANIFEST_RULES(run.manifest, "manifest")
    STATS_RULES(run.stats, "stats")
    flow, pruning = run.stats.get("gradient_flow"), run.stats.get("pruning")
    if flow and (len(flow["norm"]) != len(flow["components"]) or any(len(row) != len(flow["layers"]) for row in flow["norm"])):
        raise LayerscopeError("The run is damaged: gradient_flow.norm is not one row a component with one number a layer.")
    if pruning and len({len(row["divergence"]) for row in pruning["rows"]}) > 1:
        raise LayerscopeError("The run is damaged: the rows of pruning have different numbers of layers.")
    if any(row["layer"] is not None and not 0 <= row["layer"] < MOST_LAYERS for row in run.top):
        raise LayerscopeError(f"The run is damaged: a top weight has a layer that is not one of 0 to {MOST_LAYERS - 1:,}.")
    return run

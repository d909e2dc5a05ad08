"""The one gate between a run's folder, which is a stranger's, and what draws, compares and prints it: types, lengths and sizes as docs/sensitivity.md has them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from backend.analysis.sensitivity_profiles import Profile, profile
from backend.errors import LayerscopeError
from backend.reports.sensitivity_run import SensitivityRun

MAX_LAYERS, MAX_TENSORS, MAX_ROWS, MAX_BINS = 10_000, 100_000, 10_000, 10_000
_NUMBER, _COUNT, _PLACE, _TEXT = "a finite number or null", "a whole number from 0", "a whole number from 0 or null", "text"
_CI = "[low, high] or null, low at most high"


class _Maybe:
    """A part that may be null or missing."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


_BASELINE = {"nll": _NUMBER, "perplexity": _NUMBER, "ci": _CI}
_LOSS = {"nll": _NUMBER, "perplexity": _NUMBER, "ratio": _NUMBER, "ci": _CI}
_TENSOR = {
    "name": _TEXT, "layer": _PLACE, "component": _TEXT, "n": _COUNT, "mean": _NUMBER, "max": _NUMBER, "n_top": _COUNT,
    "histogram": {"log10_edges": [_NUMBER], "counts": [_COUNT]}, **dict.fromkeys(("std", "p50", "p90", "p99", "p999", "zeros"), _NUMBER),
}  # fmt: skip
_STATS = {
    "metric": _TEXT, "mode": _TEXT, "tensors": [_TENSOR],
    "perturbation": _Maybe({"op": _TEXT, "scale": _NUMBER, "bit": _PLACE, "baseline": _BASELINE, "runs": [
        {"selection": _TEXT, "seed": _PLACE, "n": _COUNT, "changed": _COUNT, "not_representable": _COUNT, "n_others": _COUNT, **_LOSS}]}),
    "stability": _Maybe({"ks": [_COUNT], "pairs": [{"kind": _TEXT, "a": _TEXT, "b": _TEXT, "jaccard": {}, "spearman": _NUMBER}]}),
    "pruning": _Maybe({"metric": _TEXT, "within": _TEXT, "baseline": _BASELINE, "rows": [{"sparsity": _NUMBER, "zeros": _NUMBER, "divergence": [_NUMBER], **_LOSS}]}),
    "gradient_flow": _Maybe({"layers": [_COUNT], "components": [_TEXT], "norm": [[_NUMBER]], "n_windows": _COUNT}),
    "super_weights": _Maybe({"threshold": _NUMBER, "random": _Maybe({"n": _COUNT, "worst_ratio": _NUMBER}), "candidates": [
        {"layer": _COUNT, "name": _TEXT, "expert": _PLACE, "row": _COUNT, "column": _COUNT, "value": _NUMBER, "magnitude_rank": _PLACE, "input_spike": _NUMBER,
         "output_spike": _NUMBER, "persistence": _NUMBER, "ratio": _NUMBER, "ci": _CI, "status": _TEXT}], "published": [
            {"layer": _COUNT, "row": _COUNT, "column": _COUNT, "ratio": _NUMBER, "source": _TEXT}]}),
}  # fmt: skip
_MANIFEST = {
    "id": _TEXT, "created": _TEXT, "command": [_TEXT], "spec": {"metric": _TEXT, "mode": _TEXT, "topk": _COUNT}, "notes": [_TEXT],
    "model": {"name": _TEXT, "architecture": _TEXT, "n_layers": _COUNT, "n_params": _PLACE, "quantization": _TEXT, "engine": _TEXT},
    "text": {"name": _TEXT, "sha256": _TEXT, "n_windows": _COUNT, "n_tokens": _COUNT, "window": _COUNT},
}  # fmt: skip
# (part, its list, field of a row) -> what the field may be
_CHOICES = {("perturbation", "runs", "selection"): ("top_k", "random_k", "bottom_k"), ("stability", "pairs", "kind"): ("seed", "sample", "metric"),
            ("super_weights", "candidates", "status"): ("published", "found", "confirmed")}  # fmt: skip
_LIMITS = {"tensors": MAX_TENSORS, "layers": MAX_LAYERS, "divergence": MAX_LAYERS, "counts": MAX_BINS, "log10_edges": MAX_BINS}


def checked(run: SensitivityRun) -> SensitivityRun:
    """The same run. Raises LayerscopeError with the place that is not as docs/sensitivity.md says."""
    wrong = _wrong(run.manifest, _MANIFEST, "manifest") or _wrong(run.stats, _STATS, "statistics") or _choices(run.stats) or _lengths(run.stats) or _top(run)
    if wrong:
        raise LayerscopeError(f"The run in {run.folder} is damaged: {wrong}.")
    return run


def ranked(run: SensitivityRun) -> Profile:
    """The tensors of a checked run that lie in a layer, by component and layer."""
    rows = [row for row in run.stats["tensors"] if row["layer"] is not None]
    columns = {key: [row[key] for row in rows] for key in ("component", "layer", "n", "n_top")}
    mean, best = (np.array([row[key] for row in rows], dtype=float) for key in ("mean", "max"))
    return profile(columns["component"], columns["layer"], columns["n"], mean, best, columns["n_top"])


def _wrong(value: Any, shape: Any, where: str) -> str:
    """What is not as `shape` says, or nothing."""
    if isinstance(shape, _Maybe):
        return "" if value is None else _wrong(value, shape.shape, where)
    if isinstance(shape, list):
        limit = _LIMITS.get(where.rpartition(".")[2], MAX_ROWS)
        if not isinstance(value, list) or len(value) > limit:
            return f"{where} is no list of at most {limit:,}"
        return next((found for i, each in enumerate(value) if (found := _wrong(each, shape[0], f"{where}[{i}]"))), "")
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return f"{where} is no object"
        absent = next((key for key, inner in shape.items() if key not in value and not isinstance(inner, _Maybe)), None)
        if absent is not None:
            return f"{where} has no {absent!r}"
        return next((found for key, inner in shape.items() if (found := _wrong(value.get(key), inner, f"{where}.{key}"))), "")
    return "" if _is(value, shape) else f"{where} is not {shape}"


def _is(value: Any, kind: str) -> bool:
    if kind == _TEXT:
        return isinstance(value, str)
    if kind == _CI:
        return value is None or (isinstance(value, list) and len(value) == 2 and all(_is(each, _NUMBER) for each in value) and (None in value or value[0] <= value[1]))
    if value is None:
        return kind in (_NUMBER, _PLACE)
    if kind == _NUMBER:
        return (isinstance(value, float) and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)
    return type(value) is int and 0 <= value < 2**63


def _choices(stats: dict[str, Any]) -> str:
    for (part, rows, field), choices in _CHOICES.items():
        for i, row in enumerate((stats.get(part) or {rows: []})[rows]):
            if row[field] not in choices:
                return f"statistics.{part}.{rows}[{i}].{field} is {row[field][:40]!r}, not one of {', '.join(choices)}"
    return ""


def _lengths(stats: dict[str, Any]) -> str:
    """Lists that must fit one another."""
    for tensor in stats["tensors"]:
        edges, counts = tensor["histogram"]["log10_edges"], tensor["histogram"]["counts"]
        if len(edges) != (len(counts) + 1 if counts else len(edges)) or None in edges or any(high < low for low, high in zip(edges, edges[1:], strict=False)):
            return f"the histogram of {tensor['name'][:60]!r} has {len(counts)} counts and {len(edges)} edges, which must rise"
        if tensor["layer"] is not None and tensor["layer"] >= MAX_LAYERS:
            return f"{tensor['name'][:60]!r} is of layer {tensor['layer']}, and {MAX_LAYERS:,} layers are the limit"
    flow = stats.get("gradient_flow")
    if flow and [len(row) for row in flow["norm"]] != [len(flow["layers"])] * len(flow["components"]):
        return f"the gradient norms are not {len(flow['components'])} components x {len(flow['layers'])} layers"
    if len({len(row["divergence"]) for row in (stats.get("pruning") or {"rows": []})["rows"]}) > 1:
        return "the divergences of the pruning study are not of as many layers each"
    for pair in (stats.get("stability") or {"pairs": []})["pairs"]:
        if not all(key.isdigit() and _is(value, _NUMBER) for key, value in pair["jaccard"].items()):
            return "a Jaccard overlap of the stability check is no number at a whole k"
    return ""


def _top(run: SensitivityRun) -> str:
    """The top weights are of tensors that were ranked, and no more of one than it has."""
    sizes = {row["name"]: row["n"] for row in run.stats["tensors"]}
    layers = {row["name"]: row["layer"] for row in run.stats["tensors"]}
    if len(sizes) < len(run.stats["tensors"]):
        return "a tensor comes twice"
    kept = Counter(row["name"] for row in run.top)
    for row in run.top:
        if layers.get(row["name"], -1) != row["layer"] or row["rank"] is None or row["row"] is None or row["column"] is None:
            return f"a top weight of {row['name'][:60]!r} lacks its place, or is of no tensor that was ranked"
        if not all(row[key] is None or math.isfinite(row[key]) for key in ("value", "score", "percentile")):
            return f"a top weight of {row['name'][:60]!r} has a number that is not finite"
    if name := next((name for name, n in kept.items() if n > sizes[name]), None):
        return f"{kept[name]:,} top weights are of {name[:60]!r}, which has {sizes[name]:,}"
    return ""

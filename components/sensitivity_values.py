"""What the Sensitivity page shows comes from here: a run by its id, read once and checked, and what its pictures are drawn from."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from dash.exceptions import PreventUpdate
from numpy.typing import NDArray

from backend.analysis.sensitivity_profiles import pooled
from backend.errors import LayerscopeError
from backend.reports.sensitivity_check import checked
from backend.reports.sensitivity_run import MANIFEST, STATS, TOP, SensitivityRun, open_run, run_folder
from backend.weight_places import place_in_file
from components.services import services
from components.weight_source import source

# statistic -> title; whether its colour is on a log scale
STATISTICS: Mapping[str, tuple[str, bool]] = {
    "mean": ("Mean score", True), "p50": ("Median score", True), "p90": ("90th percentile", True), "p99": ("99th percentile", True), "p999": ("99.9th percentile", True),
    "max": ("Largest score", True), "std": ("Standard deviation", True), "n_top": ("Among the top weights", False), "zeros": ("Share of scores that are 0", False),
}  # fmt: skip
GROUPS = {"component": "by component", "layer": "by layer"}
N_BINS = 72
DONE = {"sign_flip": "Flipping the sign of", "zero": "Zeroing", "scale": "Scaling", "gaussian": "Adding noise to", "bit_flip": "Flipping a bit of"}
_AROUND = 24  # rows and columns of the matrix to each side of a weight


def opened(run_id: str | None) -> SensitivityRun:
    """A run by the name of its folder. Raises LayerscopeError where it is gone or damaged, PreventUpdate where none is chosen."""
    if not run_id:
        raise PreventUpdate
    folder = run_folder(services().settings.data_dir, run_id)
    try:
        stamps = tuple((folder / name).stat().st_mtime_ns for name in (MANIFEST, STATS, TOP))
    except OSError as problem:
        raise LayerscopeError(f"The run {run_id!r} is not whole: {Path(str(problem.filename)).name} is missing.") from None
    return _read(folder, stamps)


@functools.lru_cache(maxsize=6)
def _read(folder: Path, _: tuple[int, ...]) -> SensitivityRun:
    return checked(open_run(folder))


def number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def layers_of(run: SensitivityRun) -> list[int]:
    return sorted({row["layer"] for row in run.stats["tensors"] if row["layer"] is not None})


def components_of(run: SensitivityRun) -> list[str]:
    """In the order of the file, which is that of a forward pass."""
    return list(dict.fromkeys(row["component"] for row in run.stats["tensors"]))


def distribution(run: SensitivityRun, group: str) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str], list[float | None]]:
    """(edges, counts (group, bin), names, log10 of the least score among the top weights: one for all or one each) of `figures.score_distribution`."""
    rows = run.stats["tensors"]
    held = [row["histogram"]["log10_edges"] for row in rows if row["histogram"]["counts"]]
    low, high = (min(each[0] for each in held), max(each[-1] for each in held)) if held else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, N_BINS + 1)
    keys: list[Any] = [*layers_of(run)] if group == "layer" else [*components_of(run)]
    keys += [None] if group == "layer" and any(row["layer"] is None for row in rows) else []
    grouped = [[row["histogram"] for row in rows if row[group] == key] for key in keys]
    total = np.stack([pooled([each["log10_edges"] for each in part], [each["counts"] for each in part], edges) for part in grouped])
    names = [("no layer" if key is None else f"L{key}") if group == "layer" else str(key) for key in keys]
    if run.stats["mode"] == "global":
        return edges, total, names, [_least(run.top)]
    return edges, total, names, [_least([row for row in run.top if row["layer"] == key]) for key in keys] if group == "layer" else []


def _least(rows: Sequence[Mapping[str, Any]]) -> float | None:
    scores = [row["score"] for row in rows if row["score"] is not None and row["score"] > 0]
    return math.log10(min(scores)) if scores else None


def statistic_map(run: SensitivityRun, name: str) -> tuple[NDArray[np.float64], list[int], list[str]]:
    """(values (layer, component), layers, components) of one statistic of the scores; NaN where there is no such tensor."""
    layers, components = layers_of(run), list(dict.fromkeys(row["component"] for row in run.stats["tensors"] if row["layer"] is not None))
    values = np.full((len(layers), len(components)), np.nan)
    for row in run.stats["tensors"]:
        if row["layer"] is not None and row[name] is not None:
            values[layers.index(row["layer"]), components.index(row["component"])] = row[name]
    return values, layers, components


def weight_link(run: SensitivityRun, row: Mapping[str, Any]) -> str:
    """The address of a weight of the run's model, of a row with name, row, column and expert."""
    return place_link(run.manifest["model"]["name"], row["name"], row["row"], row["column"], row["expert"])


def place_link(model: str, name: str, row: int, column: int, expert: int | None = None) -> str:
    """The address of the Weights page with a weight in sight: the stored tensor, the region around it, the place itself.

    Where the model is no longer on the shelf, or has no such weight, the page is opened at the model and says so.
    """
    query: dict[str, Any] = {"model": model}
    try:
        place = place_in_file(source(model).weights, name, row, column, expert)
        around = ",".join(f"{max(at - _AROUND, 0)}-{at + _AROUND + 1}" for at in (place.row, place.column))
        query |= {"tensor": place.tensor, "zoom": around, "mark": f"{place.row},{place.column}"} | ({"index": place.matrix} if place.matrix else {})
    except (LayerscopeError, OSError):
        query |= {"tensor": name}
    return f"/weights?{urlencode(query)}"


def sentence(run: SensitivityRun) -> str:
    """What came out, in one sentence: how much the top weights matter, against their controls."""
    found, model = run.stats.get("perturbation"), run.manifest["model"]["name"]
    top = next((each for each in found["runs"] if each["selection"] == "top_k"), None) if found else None
    if not found or top is None:
        return f"{len(run.top):,} weights of {model} ranked by {run.stats['metric']}."
    words = f"{DONE.get(found['op'], found['op'])} the {top['n']:,} top weights of {model} by {run.stats['metric']}: perplexity × {number(top['ratio'])}"
    words += "" if top["ratio"] is not None else " (not finite)"
    others = {name: [each["ratio"] for each in found["runs"] if each["selection"] == name and each["ratio"] is not None] for name in ("random_k", "bottom_k")}
    said = [f"{'at random' if name == 'random_k' else 'at the bottom'} × {number(float(np.mean(ratios)))}" for name, ratios in others.items() if ratios]
    return f"{words}; as many {', '.join(said)}." if said else f"{words}."


def not_measured(run: SensitivityRun) -> list[str]:
    """What the run was not asked for, or could not give."""
    names = {"perturbation": "perturbation", "stability": "stability", "pruning": "pruning", "gradient_flow": "gradient flow", "super_weights": "super weights"}
    return [words for name, words in names.items() if not run.stats.get(name)]

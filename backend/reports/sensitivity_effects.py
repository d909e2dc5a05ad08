"""Printed figures of what was done to a model: perturbation beside its controls, stability of the ranking, pruning, gradient flow, super weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from backend.reports.plot_style import DOUBLE, INK, LINES, QUIET, SEQUENTIAL, SINGLE, figure, grid, label, line
from backend.reports.sensitivity_run import SensitivityRun

SELECTIONS = {"top_k": ("top k", LINES[1]), "random_k": ("random k", LINES[0]), "bottom_k": ("bottom k", LINES[2])}
KINDS = {"seed": ("seeds", LINES[0]), "sample": ("samples", LINES[2]), "metric": ("metrics", LINES[1])}
_STATUS = {"confirmed": (LINES[1], "D"), "published": (LINES[3], "s"), "found": (LINES[0], "o")}
_DECADE = 5.0  # largest / smallest from which a ratio's axis is logarithmic
_CANDIDATES = 12  # super weights that have a row of their own


def perturbation(run: SensitivityRun) -> Figure:
    """Perplexity over the baseline's, top k beside its controls: one point a run, with its interval over windows."""
    part = run.stats["perturbation"]
    rows = [row for row in part["runs"] if row["ratio"] is not None]
    selections = list(dict.fromkeys(row["selection"] for row in rows))
    made = figure(SINGLE, 0.85 + sum(max(0.3, min(0.11 * sum(row["selection"] == each for row in rows), 0.9)) for each in selections))
    axes = made.subplots()
    names = []
    for place, selection in enumerate(selections):
        mine = [row for row in rows if row["selection"] == selection]
        name, colour = SELECTIONS.get(selection, (label(selection, 20), QUIET))
        offsets = np.linspace(-0.28, 0.28, len(mine)) if len(mine) > 1 else [0.0]
        _points(axes, place + np.array(offsets), mine, colour)
        axes.annotate(_range(mine), (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=6.5, color=INK)
        names.append(f"{name}\n{len(mine)} seeds" if len(mine) > 1 else name)
    base = part["baseline"]
    axes.axvline(1, color=INK, linewidth=0.7, linestyle="--")
    axes.set_yticks(range(len(selections)), names)
    axes.set(ylim=(len(selections) - 0.5, -0.5), xlabel=f"perplexity / baseline ({number(base['perplexity'])})")
    sizes = sorted({row["n"] for row in rows})
    axes.set_title(f"{operation(part)}, k = {sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else ""))
    _ratio_axis(axes, "x", rows, 1.0)
    axes.tick_params(axis="y", length=0)
    grid(axes, "x")
    return made


def stability(run: SensitivityRun) -> Figure:
    """Overlap of top-k sets against k, one line a pair; and Spearman's correlation of the same pairs."""
    pairs = run.stats["stability"]["pairs"]
    groups = _pair_groups(pairs, run.stats["metric"])
    made = figure(DOUBLE, max(2.3, 0.9 + 0.2 * len(groups)))
    left, right = made.subplots(1, 2, width_ratios=(1.15, 1))
    seen: set[str] = set()
    for pair in pairs:
        known = sorted((int(k), value) for k, value in pair["jaccard"].items() if value is not None)
        name, colour = KINDS.get(pair["kind"], (label(pair["kind"], 20), QUIET))
        ks, values = [k for k, _ in known], [value for _, value in known]
        left.plot(ks, values, color=colour, marker="o", linewidth=0.9, alpha=0.9 if len(pairs) <= 12 else 0.5, label=None if name in seen else name)
        seen.add(name)
    every = sorted({int(k) for pair in pairs for k in pair["jaccard"]})
    left.set(xscale="log", xlabel="k (largest scores of each scope)", ylabel="Jaccard overlap", ylim=(-0.03, 1.03), title="Overlap of the top k")
    if every:
        shown = every if len(every) <= 8 else every[:: math.ceil(len(every) / 8)]
        left.set_xticks(shown, [f"{k:,}" for k in shown])
        left.xaxis.set_minor_formatter(NullFormatter())
        left.minorticks_off()
    left.legend(loc="best", title="between", title_fontsize=6.5)
    for place, (_, kind, values) in enumerate(groups):
        offsets = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(1)
        right.plot(values, place + offsets[: len(values)], "o", color=KINDS.get(kind, ("", QUIET))[1], clip_on=False)
    right.set_yticks(range(len(groups)), [name for name, _, _ in groups])
    low = min((value for _, _, values in groups for value in values), default=0.0)
    right.set(ylim=(len(groups) - 0.5, -0.5), xlim=(min(0.0, low) - 0.02, 1.02), xlabel="Spearman's \u03c1 of kept weights", title="Rank correlation")
    right.tick_params(axis="y", length=0)
    for axes in (left, right):
        grid(axes, "y" if axes is left else "both")
    return made


def pruning(run: SensitivityRun) -> Figure:
    """Perplexity over the baseline's against sparsity, and how far each layer's residual stream moved."""
    part = run.stats["pruning"]
    rows = sorted((row for row in part["rows"] if row["sparsity"] is not None), key=lambda row: row["sparsity"])
    known = [row for row in rows if row["ratio"] is not None]
    made = figure(DOUBLE, 2.4)
    left, right = made.subplots(1, 2)
    x = [100 * row["sparsity"] for row in known]
    left.errorbar(x, [row["ratio"] for row in known], yerr=_errors(known), color=LINES[1], marker="o", elinewidth=0.8, capsize=1.5)
    left.axhline(1, color=INK, linewidth=0.7, linestyle="--")
    left.set(xlabel=f"sparsity asked, % of each {label(part['within'], 20)}", ylabel="perplexity / baseline", title=f"Pruned by {label(part['metric'], 30)}")
    _ratio_axis(left, "y", known, 1.0)
    for i, row in enumerate(rows):
        values = np.array(row["divergence"], dtype=float)
        colour = SEQUENTIAL(0.25 + 0.75 * i / max(len(rows) - 1, 1))
        right.plot(range(len(values)), values, color=colour, marker="o" if len(values) <= 32 else None, label=f"{100 * row['sparsity']:g} %")
    right.set(xlabel="layer", ylabel="relative L2 of resid_post", title="Divergence of activations", ylim=(0, None))
    right.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="sparsity", title_fontsize=6.5)
    for axes in (left, right):
        grid(axes)
    return made


def gradient_flow(run: SensitivityRun) -> Figure:
    """The norm of the gradient of every matrix, by layer, one line a component."""
    part = run.stats["gradient_flow"]
    made = figure(DOUBLE, 2.6)
    axes = made.subplots()
    marker = "o" if len(part["layers"]) <= 32 else None
    for i, (component, norms) in enumerate(zip(part["components"], part["norm"], strict=True)):
        values = np.array(norms, dtype=float)
        axes.plot(part["layers"], np.where(np.nan_to_num(values) > 0, values, np.nan), marker=marker, linewidth=1.1 if marker else 0.8, label=label(component, 24), **line(i))
    axes.set(yscale="log", xlabel="layer", ylabel="\u2016\u2202L/\u2202W\u2016\u2082 (nats)", title=f"Gradient flow over {part['n_windows']:,} windows")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=1 if len(part["components"]) <= 14 else 2)
    grid(axes)
    return made


def super_weights(run: SensitivityRun) -> Figure:
    """Candidates by the spikes at the input and output of their matrix; and what setting each to 0 does, beside the worst random weight."""
    part = run.stats["super_weights"]
    candidates = part["candidates"]
    made = figure(DOUBLE, max(2.3, 0.95 + 0.17 * min(len(candidates), _CANDIDATES)))
    left, right = made.subplots(1, 2)
    spiking = [each for each in candidates if each["input_spike"] and each["output_spike"]]
    for status, (colour, marker) in _STATUS.items():
        mine = [each for each in spiking if each["status"] == status]
        if mine:
            x, y = ([abs(each[end]) for each in mine] for end in ("input_spike", "output_spike"))
            left.plot(x, y, marker, color=colour, label=f"{status} ({len(mine)})", markersize=4)
    for axis, end in (("x", "input_spike"), ("y", "output_spike")):
        sizes = [abs(each[end]) for each in spiking]
        if sizes and max(sizes) / min(sizes) >= _DECADE:
            left.set(**{f"{axis}scale": "log"})
    left.set(xlabel="spike at the input of W_out, |x|", ylabel="spike at its output, |y|", title=f"Candidates (n = {len(candidates)})")
    left.margins(0.12)
    left.legend(loc="upper left")
    shown = sorted((each for each in candidates if each["ratio"] is not None and each["ratio"] > 0), key=lambda each: -each["ratio"])[:_CANDIDATES]
    for place, each in enumerate(shown):
        _points(right, np.array([float(place)]), [each], _STATUS.get(each["status"], (QUIET, "o"))[0])
    right.set_yticks(range(len(shown)), [_place(each) for each in shown])
    right.axvline(1, color=INK, linewidth=0.7, linestyle="--")
    worst = (part.get("random") or {}).get("worst_ratio")
    if worst:
        right.axvline(worst, color=QUIET, linewidth=0.8, linestyle=":", label=f"worst of {part['random']['n']:,} random weights")
        right.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0))  # beside the title, where no point can be
    right.set(ylim=(len(shown) - 0.5, -0.5), xlabel="perplexity / baseline", title="Each set to 0")
    _ratio_axis(right, "x", shown, worst or 1.0)
    right.tick_params(axis="y", length=0)
    for axes in (left, right):
        grid(axes, "both" if axes is left else "x")
    return made


def operation(part: dict[str, Any]) -> str:
    """A perturbation in words: "sign flip", "scale by 2", "flip of bit 7"."""
    op, scale = part["op"], part["scale"]
    if op in ("scale", "gaussian") and scale is not None:
        return f"{op} x {scale:g}"
    return label(op.replace("_", " "), 30) + (f" (bit {part['bit']})" if isinstance(part.get("bit"), int) else "")


def _points(axes: Axes, at: Any, rows: Sequence[dict[str, Any]], colour: str) -> None:
    axes.errorbar([row["ratio"] for row in rows], at, xerr=_errors(rows), fmt="o", color=colour, elinewidth=0.9, capsize=1.5, markersize=3.5)


def _errors(rows: Sequence[dict[str, Any]]) -> Any:
    """(2, row) distances to the ends of the intervals; a percentile interval need not hold its point, and a missing one has no length."""
    ends = [(row["ci"] or [None, None]) for row in rows]
    low = [max(row["ratio"] - (end[0] if end[0] is not None else row["ratio"]), 0.0) for row, end in zip(rows, ends, strict=True)]
    high = [max((end[1] if end[1] is not None else row["ratio"]) - row["ratio"], 0.0) for row, end in zip(rows, ends, strict=True)]
    return np.array([low, high])


def _ratio_axis(axes: Axes, which: str, rows: Iterable[dict[str, Any]], also: float) -> None:
    """Logarithmic where the ratios span decades, with numbers instead of powers."""
    values = [value for row in rows for value in (row["ratio"], *(row["ci"] or ())) if value is not None and value > 0] + [1.0, also]
    axis = axes.xaxis if which == "x" else axes.yaxis
    if max(values) / min(values) < _DECADE:
        axis.set_major_locator(MaxNLocator(nbins=5))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.7g}"))
        return
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    wide = max(values) / min(values) > 100
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e6 else f"{value:.0e}"))
    axis.set_minor_formatter(NullFormatter())


def _range(rows: Sequence[dict[str, Any]]) -> str:
    """The numbers of a selection: its ratio and interval, or the range over seeds."""
    ratios = [row["ratio"] for row in rows]
    if len(rows) > 1:
        return f"\u00d7{number(min(ratios))} to {number(max(ratios))}"
    ci = rows[0]["ci"]
    return f"\u00d7{number(ratios[0])}" + (f"\n[{number(ci[0])}, {number(ci[1])}]" if ci else "")


def _pair_groups(pairs: Sequence[dict[str, Any]], metric: str) -> list[tuple[str, str, list[float]]]:
    """(name, kind, correlations): all pairs of seeds are one row, all of samples another, every other metric its own."""
    groups: dict[tuple[str, str], list[float]] = {}
    for pair in pairs:
        if pair["spearman"] is not None:
            others = [each for each in (pair["a"], pair["b"]) if each != metric] or [metric]
            name = "with " + label(" and ".join(others), 24) if pair["kind"] == "metric" else KINDS.get(pair["kind"], (label(pair["kind"], 20), ""))[0]
            groups.setdefault((name, pair["kind"]), []).append(pair["spearman"])
    return [(f"{name}\nn = {len(values)} pairs" if len(values) > 1 else name, kind, values) for (name, kind), values in groups.items()]


def _place(each: dict[str, Any]) -> str:
    expert = f", expert {each['expert']}" if each["expert"] is not None else ""
    return f"layer {each['layer']}{expert} [{each['row']}, {each['column']}]"


def number(value: float | None) -> str:
    """A ratio or perplexity as figures and tables write it: a ratio near 1 with two digits of what it differs by, 6 places at most."""
    if value is None:
        return "none"
    size = abs(value)
    if 0.5 < size < 2 and value != 1:
        return f"{value:.{min(max(3, 1 - math.floor(math.log10(abs(value - 1)))), 6)}f}"
    if 0.01 <= size < 1e6:
        return f"{value:,.{3 if size < 2 else 2 if size < 100 else 0}f}"
    return f"{value:.2e}"

"""Printed figures of a ranking: how scores are distributed, how layers compare, and layer x component."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from backend.analysis.sensitivity_profiles import Profile, pooled
from backend.reports.plot_style import DOUBLE, INK, LINES, SEQUENTIAL, figure, grid, label, line
from backend.reports.sensitivity_check import ranked
from backend.reports.sensitivity_run import SensitivityRun

# What a metric's score is, as an axis says it. L is in nats, so is everything that is made of it.
SCORES = {
    "magnitude": "|w|",
    "grad_x_weight": "|w \u2202L/\u2202w| (nats)",
    "grad_squared": "(\u2202L/\u2202w)\u00b2 (nats\u00b2)",
    "hutchinson": "\u2202\u00b2L/\u2202w\u00b2 (nats)",
    "wanda": "|w| \u00b7 \u2016x\u2016\u2082",
    "obs": "w\u00b2 / [H\u207b\u00b9]\u2c7c\u2c7c",
}
_BINS = 60  # of the pooled histogram
_FEW_LAYERS = 10  # lines of a legend; more are told by a colour bar
_WRITTEN = 8  # layers up to which the cells of a heatmap have room for their number


def score_label(run: SensitivityRun) -> str:
    metric = run.stats["metric"]
    return f"score, {SCORES[metric]}" if metric in SCORES else f"score of {label(metric, 30)}"


def distribution(run: SensitivityRun) -> Figure:
    """Left: the density of log scores of each component. Right: the share of a layer's weights that score above a value, with the share that was kept."""
    rows = [row for row in run.stats["tensors"] if row["histogram"]["counts"]]
    edges = _common_edges(rows)
    made = figure(DOUBLE, 2.75)
    left, right = made.subplots(1, 2)
    components = list(dict.fromkeys(row["component"] for row in run.stats["tensors"]))
    for i, component in enumerate(components):  # one without scores keeps its colour for the other figures
        mine = [row for row in rows if row["component"] == component]
        if not mine:
            continue
        share = _share(mine, edges)
        left.stairs(share / np.diff(edges), 10**edges, label=label(component, 24), linewidth=1.0, **line(i))
    left.set(xscale="log", xlabel=score_label(run), ylabel="share of weights per decade", title="By component, all layers", ylim=(0, None))
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    for i, layer in enumerate(layers):
        share = _share([row for row in rows if row["layer"] == layer], edges)
        above = np.cumsum(share[::-1])[::-1]
        right.plot(10 ** edges[:-1], np.where(above > 0, above, np.nan), color=_depth(i, len(layers)), linewidth=0.8, label=f"layer {layer}")
    n, kept = sum(row["n"] for row in run.stats["tensors"]), len(run.top)
    right.set(xscale="log", yscale="log", xlabel=score_label(run), ylabel="share of weights above", title="Upper tail, by layer", ylim=(0.5 / max(row["n"] for row in rows), 1.5))
    if kept:
        right.axhline(kept / n, color=LINES[1], linewidth=0.8, linestyle="--")
        right.annotate(f"kept: {kept:,} of {_short(n)}", (0.03, kept / n), xycoords=("axes fraction", "data"), xytext=(0, -2.5), textcoords="offset points", va="top",
                       fontsize=6.5, color=LINES[1])  # fmt: skip
    for axes in (left, right):
        axes.set_xlim(*_wide(rows, edges))
        grid(axes)
    made.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(components), 7))
    _layer_key(made, right, layers)
    return made


def layer_comparison(run: SensitivityRun) -> Figure:
    """Mean and largest score by layer, the mean of each component by layer, and where the top weights lie."""
    table = ranked(run)
    x = np.array(table.layers)
    made = figure(DOUBLE, 2.7)
    first, second, third = made.subplots(1, 3)
    marker = "o" if len(x) <= 32 else None
    best = np.fmax.reduce(table.maximum, axis=0)
    for values, name, colour in ((best, "largest", LINES[1]), (table.layer_mean, "mean", LINES[0])):
        first.plot(x, _positive(values), color=colour, marker=marker, label=name)
    first.set(yscale="log", xlabel="layer", ylabel=score_label(run), title="All weights of a layer")
    first.legend(loc="best")
    for i, component in enumerate(table.components):
        second.plot(x, _positive(table.mean[i]), marker=marker, markersize=2, label=label(component, 24), **line(i))
    second.set(yscale="log", xlabel="layer", ylabel=f"mean {score_label(run)}", title="By component")
    foot = np.zeros(len(x))
    for i, component in enumerate(table.components):
        third.bar(x, table.top[i], bottom=foot, width=0.85 if len(x) <= 32 else 1.0, color=line(i)["color"], hatch="////" if i >= len(LINES) else None, edgecolor="white",
                  linewidth=0, label=label(component, 24))  # fmt: skip
        foot += table.top[i]
    third.set(xlabel="layer", ylabel="top weights (count)", title=f"{int(foot.sum()):,} top weights")
    third.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for axes in (first, second, third):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        grid(axes, "y")
    made.legend(*third.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(table.components), 7))
    return made


def heatmap(run: SensitivityRun) -> Figure:
    """Layer x component: the mean score, and the number of top weights. Hatched: there is no such tensor, or it has no mean."""
    table = ranked(run)
    n_components, n_layers = table.mean.shape
    narrow = n_layers <= _WRITTEN
    height = max(0.13 * n_components, 0.5)
    made = figure(DOUBLE, 0.9 + 1.3 * height if narrow else 1.5 + 2 * height)
    one, two = made.subplots(*((1, 2) if narrow else (2, 1)), sharey=narrow, sharex=not narrow)
    means = _positive(table.mean)
    norm = LogNorm(*_log_limits(means))
    _cells(one, means, table, norm=norm)
    _cells(two, table.top, table, vmin=0, vmax=max(float(table.top.max()), 1))
    for axes, values, title in ((one, means, f"mean {score_label(run)}"), (two, table.top, "top weights (count)")):
        bar = made.colorbar(axes.images[0], ax=axes, pad=0.015, aspect=18, shrink=0.95)
        bar.outline.set_visible(False)
        axes.set_title(title)
        if narrow:
            _write_numbers(axes, np.where(table.n > 0, values, np.nan))
    for axes in (one, two) if narrow else (two,):
        axes.set_xlabel("layer")
    return made


def _cells(axes: Axes, values: NDArray[np.float64], table: Profile, **scale: Any) -> None:
    axes.set_facecolor("#f1f3f6")
    shown = np.where(table.n > 0, values, np.nan)
    axes.imshow(shown, aspect="auto", cmap=SEQUENTIAL, interpolation="nearest", **scale)
    for row, column in np.argwhere(~np.isfinite(shown)):
        axes.add_patch(_hatched(column, row))
    size = 6.5 if len(table.components) <= 16 else 5
    axes.set_yticks(range(len(table.components)), [label(each, 22) for each in table.components], fontsize=size)
    step = max(1, math.ceil(len(table.layers) / 20))
    axes.set_xticks(range(0, len(table.layers), step), [str(each) for each in table.layers[::step]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _hatched(column: int, row: int) -> Rectangle:
    return Rectangle((column - 0.5, row - 0.5), 1, 1, hatch="/////", facecolor="none", edgecolor="#cbd2dc", linewidth=0)


def _write_numbers(axes: Axes, values: NDArray[np.float64]) -> None:
    shade: Any = np.ma.asarray(axes.images[0].norm(np.ma.masked_invalid(values)))
    for row, column in np.argwhere(np.isfinite(values)):
        dark = shade[row, column] > 0.5
        value = float(values[row, column])
        text = f"{value:.0f}" if value == round(value) else f"{value:.2g}" if 0.01 <= abs(value) < 100 else f"{value:.1e}"
        axes.text(column, row, text, ha="center", va="center", fontsize=5.5, color="white" if dark else INK)


def _common_edges(rows: list[dict[str, Any]]) -> NDArray[np.float64]:
    low, high = min(row["histogram"]["log10_edges"][0] for row in rows), max(row["histogram"]["log10_edges"][-1] for row in rows)
    low, high = max(low, -300.0), min(high, 300.0)
    return np.linspace(low, high if high > low else low + 1, _BINS + 1)


def _share(rows: list[dict[str, Any]], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """(bin,) share of all weights of these tensors, those that score 0 included."""
    counts = pooled([row["histogram"]["log10_edges"] for row in rows], [row["histogram"]["counts"] for row in rows], edges)
    return counts / max(sum(row["n"] for row in rows), 1)


def _wide(rows: list[dict[str, Any]], edges: NDArray[np.float64]) -> tuple[float, float]:
    """The axis leaves out the lowest scores, one weight in a thousand: they are many decades of nothing."""
    reached = np.cumsum(_share(rows, edges))
    low = edges[int(np.searchsorted(reached, 1e-3 * reached[-1]))]
    return float(10**low), float(10 ** (edges[-1] + 0.05 * (edges[-1] - low)))


def _layer_key(made: Figure, axes: Axes, layers: list[int]) -> None:
    if len(layers) <= _FEW_LAYERS:
        axes.legend(loc="upper right")
        return
    shades = LinearSegmentedColormap.from_list("depth", SEQUENTIAL(np.linspace(0.1, 1, 64)))
    bar = made.colorbar(ScalarMappable(Normalize(layers[0], layers[-1]), shades), ax=axes, pad=0.02, aspect=22)
    bar.set_label("layer")
    bar.outline.set_visible(False)


def _depth(i: int, n: int) -> Any:
    return LINES[i] if n <= 4 else SEQUENTIAL(0.1 + 0.9 * i / (n - 1))


def _positive(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a logarithm can show."""
    return np.where(np.nan_to_num(values) > 0, values, np.nan)


def _log_limits(values: NDArray[np.float64]) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (1.0, 10.0)
    return (low, high) if high > low else (low / 2, high * 2)


def _short(n: int) -> str:
    return f"{n / 1e9:.1f} B" if n >= 1e9 else f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n:,}"



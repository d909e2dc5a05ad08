"""Colours for clouds of points, the lengths of vectors, and the variance of their principal components.

The cloud itself is drawn by assets/point_cloud.js: a palette number for every point goes there, not a Plotly trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from components.figures.theme import LINES, colours, compact, escape, figure, no_figure, number

# Classes side by side (Tableau 10 of Stone 2006, darkened or lightened for the ground); what has no place gets the last, a grey.
_CLASSES = {
    "light": ("#3b5bdb", "#e8590c", "#2b8a3e", "#c2255c", "#7048a8", "#0b8a9e", "#a0722a", "#e377c2", "#8a9a00", "#1b2a78", "#98a2b3"),
    "dark": ("#8ea6ff", "#ffa657", "#6fd38a", "#ff7da6", "#c29bff", "#4fd0e0", "#d9a866", "#ffa8dc", "#c6d63c", "#e8edf4", "#6b7a8f"),
}
# Viridis (van der Walt and Smith 2015) at equal steps; the end that would vanish into the ground is left out.
_VIRIDIS = ("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725")
_ENDS = {"light": (0, 9), "dark": (2, 11)}
LEVELS = 64
BINS = 60


@dataclass(frozen=True)
class PointColours:
    """values: (point,) uint8 palette numbers; palette: colours; legend: {"kind": "items", "items": [...]} or {"kind": "scale", "title", "low", "high", "n"}."""

    values: NDArray[np.uint8]
    palette: list[str]
    legend: dict[str, Any]


def by_class(values: NDArray[np.integer], names: Sequence[str], theme: str = "light", only: str | None = None) -> PointColours:
    """A colour for each name, most frequent first; beyond ten they share a grey. values: (point,) numbers into names. only: the others are dimmed."""
    counts = np.bincount(values, minlength=len(names))
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    inks = _CLASSES["dark" if theme == "dark" else "light"]
    last = len(inks) - 1
    place = np.full(len(names), last, np.uint8)
    place[order[:last]] = np.arange(min(len(order), last))
    palette = [ink if only is None or any(names[i] == only and place[i] == at for i in order) else colours(theme)["line"] for at, ink in enumerate(inks)]
    shown = [{"name": names[i], "words": f"{names[i]} {counts[i]:,}", "colour": inks[at]} for at, i in enumerate(order[:last])]
    rest = int(sum(counts[i] for i in order[last:]))
    if rest:
        shown.append({"name": "", "words": f"{len(order) - last} others {rest:,}", "colour": inks[last]})
    return PointColours(place[values], palette, {"kind": "items", "items": shown})


def by_value(values: NDArray[np.floating], title: str, theme: str = "light", whole: bool = False) -> PointColours:
    """A scale from the least to the greatest value; without `whole` from the 1st to the 99th percentile, so that few do not darken all others. values: (point,)."""
    finite = values[np.isfinite(values)]
    low, high = (0.0, 1.0) if not len(finite) else (float(finite.min()), float(finite.max())) if whole else tuple(float(v) for v in np.percentile(finite, (1, 99)))
    share = np.clip((np.nan_to_num(values, nan=low) - low) / (high - low if high > low else 1.0), 0, 1)
    legend = {"kind": "scale", "title": title, "low": number(low), "high": number(high), "n": LEVELS}
    return PointColours(np.round(share * (LEVELS - 1)).astype(np.uint8), ramp(LEVELS, theme), legend)


def ramp(n: int, theme: str = "light") -> list[str]:
    """n colours of the sequential scale for points, visible on the card's ground from end to end."""
    first, last = _ENDS["dark" if theme == "dark" else "light"]
    anchors = np.array([[int(ink[i : i + 2], 16) for i in (1, 3, 5)] for ink in _VIRIDIS[first:last]], np.float64)
    at = np.linspace(0, len(anchors) - 1, n)
    mixed = np.stack([np.interp(at, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)], axis=1)
    return ["#" + "".join(f"{round(v):02x}" for v in row) for row in mixed]


def point_size(n: int) -> float:
    """Pixels: few points are large, a hundred thousand leave room between them."""
    return 8.0 if n <= 400 else 5.5 if n <= 4000 else 3.6 if n <= 40_000 else 2.4


def norm_histogram(norms: NDArray[np.floating], names: Sequence[str], theme: str = "light") -> go.Figure:
    """How long the vectors are. norms: (row,), NaN left out; names: (row,) what a hover calls the first few of a bin."""
    at = np.flatnonzero(np.isfinite(norms))
    if not len(at):
        return no_figure(theme, "No vector has a finite length.")
    values = norms[at].astype(np.float64)
    counts, edges = np.histogram(values, BINS if values.max() > values.min() else 1)
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(counts) - 1)
    order = np.argsort(bins, kind="stable")
    starts = np.searchsorted(bins[order], np.arange(len(counts)))
    hovers = []
    for i, n in enumerate(counts):
        some = ", ".join(escape(names[at[order[starts[i] + j]]]) for j in range(min(int(n), 4)))
        hovers.append(f"{edges[i]:.4g} to {edges[i + 1]:.4g}<br>{n:,} vectors" + (f"<br>{some}{', …' if n > 4 else ''}" if n else ""))
    bars = go.Bar(x=compact((edges[:-1] + edges[1:]) / 2), y=compact(counts), width=compact(np.diff(edges)), marker={"color": colours(theme)["accent"], "line": {"width": 0}},
                  customdata=np.array(hovers, dtype=object), hovertemplate="%{customdata}<extra></extra>")  # fmt: skip
    found = figure(theme, bars, bargap=0.04)
    found.update_xaxes(title="length (L2 norm) of a vector", zeroline=False)
    found.update_yaxes(title="vectors in a bin", rangemode="tozero", tickformat="~s", nticks=6)
    return found


def explained_variance(ratio: NDArray[np.floating], theme: str = "light") -> go.Figure:
    """The share of the variance of each principal component, and of all up to it. ratio: (k,)."""
    if not len(ratio) or not np.isfinite(ratio).all() or not ratio.sum():
        return no_figure(theme, "All vectors are the same.")
    line = LINES["dark" if theme == "dark" else "light"]
    at, total = np.arange(1, len(ratio) + 1, dtype=np.int32), np.cumsum(ratio)
    bars = go.Bar(x=at, y=compact(100 * ratio), marker={"color": line[0], "line": {"width": 0}}, name="one component", customdata=compact(100 * total),
                  hovertemplate="component %{x}<br>%{y:.2f} %, %{customdata:.1f} % up to it<extra></extra>")  # fmt: skip
    sums = go.Scatter(x=at, y=compact(100 * total), mode="lines", line={"color": line[1], "width": 1.8}, name="all up to it",
                      hovertemplate="components 1 to %{x}<br>%{y:.1f} %<extra></extra>")  # fmt: skip
    found = figure(theme, bars, sums, bargap=0.2, showlegend=True, legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"})
    found.update_layout(margin={"t": 24})
    found.update_xaxes(title="principal component", zeroline=False)
    found.update_yaxes(title="share of the variance, %", rangemode="tozero", nticks=6)
    return found

"""Weights as pictures: a statistic over layers x components, histograms, one matrix, norms, singular values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from components.figures.theme import LINES, MONO, colours, compact, diverging, escape, figure, no_figure, number, scale_bar, sequential, template, with_scale

Edges = NDArray[np.int64]
SCALES = ("each", "linear", "log")
LONGEST_LINE = 2048  # points of a line: more would be finer than the pixels of a card


def statistic_heatmap(values: NDArray[np.floating], layers: Sequence[int], components: Sequence[str], title: str, scale: str = "each", chosen: tuple[int, str] | None = None,
                      theme: str = "light") -> go.Figure:  # fmt: skip
    """One statistic of every component in every layer. values: (layer, component), NaN where a layer lacks one; hovers keep the value itself.

    scale: "each" colours every component by its own range, since a norm's gains dwarf a matrix; "linear" and "log" (of |value|) compare all of them.
    """
    shown, bar, unit = _statistic_scale(np.asarray(values, np.float64), scale, title)
    hovers = np.array([[f"layer {layer}, {escape(name)}<br>{escape(title)} {number(float(v))}" for name, v in zip(components, row, strict=True)]
                       for layer, row in zip(layers, values, strict=True)], dtype=object)  # fmt: skip
    finite = shown[np.isfinite(shown)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if scale == "linear" and low < 0:
        reach = max(-low, high)
        limits: dict[str, object] = {"zmin": -reach, "zmax": reach, "colorscale": diverging(theme)}
    else:
        limits = {"zmin": 0.0 if scale == "linear" else low, "zmax": high if high > low else low + 1, "colorscale": sequential(theme)}
    cells = go.Heatmap(z=compact(shown), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", hoverongaps=False, xgap=1, ygap=1, colorbar=bar, **limits)
    found = figure(theme, cells, plot_bgcolor=colours(theme)["surface-2"])
    if chosen is not None and chosen[0] in layers and chosen[1] in components:
        row, column = list(layers).index(chosen[0]), list(components).index(chosen[1])
        found.add_shape(type="rect", x0=column - 0.5, x1=column + 0.5, y0=row - 0.5, y1=row + 0.5, line={"color": colours(theme)["accent"], "width": 2})
    step = max(1, len(layers) // 24)
    found.update_layout(margin={"r": 16 + 5 * len(components[-1]) if len(components) else 8})  # room for the last slanted name
    found.update_xaxes(side="top", tickangle=-40, showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(len(components))),
                       ticktext=[escape(name) for name in components], tickfont={"family": MONO, "size": 11})  # fmt: skip
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(layers), step)),
                       ticktext=[f"L{layer}" for layer in list(layers)[::step]])  # fmt: skip
    return with_scale(found, unit, theme)


def _statistic_scale(values: NDArray[np.float64], scale: str, title: str) -> tuple[NDArray[np.float64], dict[str, object], str]:
    if scale == "log":
        with np.errstate(divide="ignore", invalid="ignore"):
            shown = np.log10(np.abs(values))
        shown[~np.isfinite(shown)] = np.nan
        return shown, scale_bar(nticks=5, tickprefix="10<sup>", ticksuffix="</sup>"), f"|{title}|, log scale"
    if scale == "linear":
        return values, scale_bar(nticks=4), title
    with np.errstate(invalid="ignore"):
        low, high = (bound.reduce(np.where(np.isfinite(values), values, np.nan), axis=0) for bound in (np.fmin, np.fmax))
        shown = (values - low) / np.where(high > low, high - low, 1.0)
    return shown, scale_bar(tickvals=[0, 1], ticktext=["least", "most"]), f"{title}, each component by itself"


def histogram(counts: NDArray[np.integer], edges: NDArray[np.float64], mean: float, std: float, log: bool = False, theme: str = "light") -> go.Figure:
    """Counts of one tensor's values. counts: (bin,), edges: (bin + 1,); the mean and 6 standard deviations to both sides are marked."""
    occupied = np.flatnonzero(counts)
    if not len(occupied):
        return no_figure(theme, "No value of this tensor is finite.")
    shown = slice(max(int(occupied[0]) - 1, 0), int(occupied[-1]) + 2)
    left, right, height = edges[:-1][shown], edges[1:][shown], np.asarray(counts[shown], np.float64)
    hovers = np.array([f"{a:.4g} to {b:.4g}<br>{int(c):,} weights" for a, b, c in zip(left, right, height, strict=True)], dtype=object)
    c = colours(theme)
    bars = go.Bar(
        x=compact((left + right) / 2), y=compact(np.where(height > 0, height, np.nan) if log else height), width=compact(right - left),
        marker={"color": c["accent"], "line": {"width": 0}}, customdata=hovers, hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    found = figure(theme, bars, bargap=0)
    found.add_vline(x=mean, line={"color": c["ink-2"], "width": 1, "dash": "dot"})
    for sign in (-1, 1):
        at = mean + sign * 6 * std
        if std and left[0] <= at <= right[-1]:
            note = {"text": f"{'−' if sign < 0 else '+'}6 σ", "font": {"size": 11, "color": c["ink-3"]}}
            found.add_vline(x=at, line={"color": c["line-strong"], "width": 1, "dash": "dash"}, annotation=note)
    found.update_xaxes(title="weight", zeroline=False)
    found.update_yaxes(title="weights in a bin" + (", log scale" if log else ""), rangemode="tozero", tickformat="~s", **({"type": "log", "dtick": 1} if log else {"nticks": 6}))
    return found


def component_histograms(counts: NDArray[np.integer], edges: NDArray[np.float64], names: Sequence[str], log: bool = False, chosen: int | None = None,
                         theme: str = "light") -> go.Figure:  # fmt: skip
    """One component's distribution through the layers: a row a layer, a column a bin, colour the share of the layer's weights in it.

    counts: (row, bin), all of one range; names: the rows'; chosen: the number of a row to frame. log: colour by log10 of the share, which shows the tails.
    """
    total = counts.sum(axis=1, keepdims=True)
    occupied = np.flatnonzero(counts.sum(axis=0))
    if not len(occupied):
        return no_figure(theme, "No value of this component is finite.")
    shown = slice(int(occupied[0]), int(occupied[-1]) + 1)
    share = np.asarray(counts[:, shown], np.float64) / np.where(total, total, 1)
    with np.errstate(divide="ignore"):
        z = np.where(share > 0, np.log10(share), np.nan) if log else share
    middle = (edges[:-1] + edges[1:])[shown] / 2
    finite = z[np.isfinite(z)]
    low, high = (float(finite.min()) if log else 0.0), float(finite.max())
    bar = scale_bar(nticks=5, tickprefix="10<sup>", ticksuffix="</sup>") if log else scale_bar(nticks=4)
    cells = go.Heatmap(
        z=compact(z), x=compact(middle), y=list(range(len(names))), customdata=compact(share), hoverongaps=False, zmin=low, zmax=high if high > low else low + 1,
        colorscale=sequential(theme), colorbar=bar, hovertemplate="weights near %{x:.4g}<br>share of the tensor %{customdata:.3g}<extra></extra>",
    )  # fmt: skip
    found = figure(theme, cells)
    if chosen is not None:
        found.add_shape(type="rect", xref="paper", x0=0, x1=1, y0=chosen - 0.5, y1=chosen + 0.5, line={"color": colours(theme)["accent"], "width": 1.5})
    step = max(1, len(names) // 16)
    found.update_xaxes(title="weight", side="top", zeroline=False, showgrid=False)
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(names), step)),
                       ticktext=[escape(name) for name in list(names)[::step]])  # fmt: skip
    return with_scale(found, "share of the tensor's weights in a bin" + (", log scale" if log else ""), theme)


def weight_map(cells: NDArray[np.floating], edges: tuple[Edges, Edges], limit: float, axes: tuple[str, str], mark: tuple[int, int] | None = None,
               theme: str = "light") -> go.Figure:  # fmt: skip
    """A matrix or a part of it: rows down, columns across, blue below 0, red above, colour saturated at +-limit.

    cells: (row, column) with the edges of `activations.reduce_signed` in the matrix' own indices: a cell is one weight, or the one with the
    largest |w| among those it stands for. axes: what rows and columns are. mark: (row, column) of a weight to frame.
    """
    rows, columns = edges
    height, width = int(np.diff(rows).max()), int(np.diff(columns).max())
    exact = height == width == 1
    said = "row %{y}, column %{x}" if exact else f"near row %{{y:,.0f}}, column %{{x:,.0f}}<br>the largest |w| of up to {height:,} × {width:,}:"
    shown = go.Heatmap(
        z=compact(cells), x=_middle(columns), y=_middle(rows), zmid=0, zmin=-limit, zmax=limit, colorscale=diverging(theme), hoverongaps=False,
        hovertemplate=f"{said}<br>%{{z:.6g}}<extra></extra>", colorbar=scale_bar(tickvals=[-limit, 0, limit], tickformat=".3~g"),
        **({"xgap": 1, "ygap": 1} if exact and cells.shape[1] <= 64 else {}),
    )  # fmt: skip
    found = figure(theme, shown)
    if mark is not None and rows[0] <= mark[0] < rows[-1] and columns[0] <= mark[1] < columns[-1]:
        ring = {"symbol": "circle-open", "size": 18, "color": colours(theme)["ink"], "line": {"width": 2}}  # a frame of one cell may be a pixel wide
        found.add_trace(go.Scatter(x=[mark[1]], y=[mark[0]], mode="markers", marker=ring, hoverinfo="skip"))
    found.update_xaxes(title=axes[1], side="top", showgrid=False, zeroline=False, range=[columns[0] - 0.5, columns[-1] - 0.5], tickformat=",d", nticks=12)
    found.update_yaxes(title=axes[0], showgrid=False, zeroline=False, range=[rows[-1] - 0.5, rows[0] - 0.5], tickformat=",d", nticks=10)
    return with_scale(found, f"weight; the colour saturates at ±{number(limit)}", theme)


def vector_line(values: NDArray[np.floating], theme: str = "light") -> go.Figure:
    """A vector: a bias, or the gains of a norm. values: (dimension,)."""
    at, shown = _thinned(values)
    line = go.Scatter(x=at, y=compact(shown), mode="lines" if len(shown) > 64 else "lines+markers", line={"color": colours(theme)["accent"], "width": 1.2},
                      hovertemplate="dimension %{x}<br>%{y:.6g}<extra></extra>")  # fmt: skip
    found = figure(theme, line)
    found.update_xaxes(title="dimension", zeroline=False)
    found.update_yaxes(title="weight")
    return found


def norm_lines(row_norms: NDArray[np.floating], column_norms: NDArray[np.floating], axes: tuple[str, str], theme: str = "light") -> go.Figure:
    """L2 norms of rows and of columns, one under the other. A long line keeps the largest of neighbours."""
    found = make_subplots(rows=2, cols=1, vertical_spacing=0.22)
    for n, (norms, axis, what) in enumerate(((row_norms, axes[0], "row"), (column_norms, axes[1], "column")), start=1):
        at, shown = _thinned(norms)
        line = go.Scatter(x=at, y=compact(shown), mode="lines", line={"color": LINES["dark" if theme == "dark" else "light"][n - 1], "width": 1.2}, name=f"{what} norm",
                          hovertemplate=f"{what} %{{x}}<br>norm %{{y:.5g}}<extra></extra>")  # fmt: skip
        found.add_trace(line, row=n, col=1)
        found.update_xaxes(title=axis, zeroline=False, row=n, col=1)
        found.update_yaxes(title=f"norm of a {what}", rangemode="tozero", nticks=5, row=n, col=1)
    found.update_layout(template=template(theme), margin={"l": 8, "r": 8, "t": 8, "b": 8})
    return found


def singular_values(values: NDArray[np.floating], log: bool = True, theme: str = "light") -> go.Figure:
    """Singular values by rank, largest first. values: (k,)."""
    shown = np.where(values > 0, values, np.nan) if log else values
    line = go.Scatter(x=np.arange(1, len(values) + 1, dtype=np.int32), y=compact(shown), mode="lines+markers" if len(values) <= 64 else "lines",
                      line={"color": colours(theme)["accent"], "width": 1.5}, marker={"size": 4}, hovertemplate="number %{x}<br>σ %{y:.5g}<extra></extra>")  # fmt: skip
    found = figure(theme, line)
    found.update_xaxes(title="singular value, by size", zeroline=False)
    found.update_yaxes(title="σ, log scale" if log else "σ", type="log" if log else "linear", exponentformat="power", **({} if log else {"rangemode": "tozero"}))
    return found


def _middle(edges: Edges) -> NDArray[np.float32]:
    """The index that stands for each run: the index itself where it is one."""
    return compact((edges[:-1] + edges[1:] - 1) / 2)


def _thinned(values: NDArray[np.floating]) -> tuple[NDArray[np.int32], NDArray[np.floating]]:
    """At most LONGEST_LINE points, the farthest from zero of each run of neighbours, at its own place."""
    n = len(values)
    if n <= LONGEST_LINE:
        return np.arange(n, dtype=np.int32), values
    starts = np.arange(LONGEST_LINE) * n // LONGEST_LINE
    at = np.array([start + int(np.argmax(np.abs(values[start:stop]))) for start, stop in zip(starts, [*starts[1:], n], strict=True)], np.int32)
    return at, values[at]

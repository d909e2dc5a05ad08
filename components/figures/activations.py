"""Activations as pictures: norms over layers x tokens, one layer's tokens x dimensions, statistics through depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from components.figures.theme import LINES, MONO, colours, compact, diverging, escape, figure, number, scale_bar, sequential, span, template, token_ticks, with_names, with_scale

STATISTIC_TITLES = {
    "mean": "mean", "std": "standard deviation", "min": "min", "max": "max", "abs_max": "largest |x|", "sparsity": "share below 1e-5", "kurtosis": "kurtosis",
    "n_nan": "NaN", "n_inf": "infinite",
}  # fmt: skip


def norms_heatmap(norms: NDArray[np.floating], layers: Sequence[int | str], labels: Sequence[str], theme: str = "light", log: bool = False,
                  chosen: tuple[int | str, int] | None = None) -> go.Figure:  # fmt: skip
    """L2 norm of one site at every layer and token.

    norms: (layer, pos); layers: the rows' names; log: colour by log10, for streams where one token dwarfs the rest (its zero
    has no colour); chosen: (layer, pos) to frame. A norm that is NaN or infinite has no colour and says so in the hover.
    """
    shown, bar = _norm_scale(norms, log)
    hovers = np.array([[f"layer {layer}, {escape(label)} (position {p})<br>norm {number(float(norms[r, p]))}" for p, label in enumerate(labels)]
                       for r, layer in enumerate(layers)], dtype=object)  # fmt: skip
    finite = shown[np.isfinite(shown)]
    low = float(finite.min()) if log and len(finite) else 0.0
    high = float(finite.max()) if len(finite) else 1.0
    cells = go.Heatmap(z=compact(np.where(np.isfinite(shown), shown, np.nan)), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", hoverongaps=True,
                       name="log10 of the L2 norm" if log else "L2 norm", zmin=low, zmax=high if high > low else low + 1, colorscale=sequential(theme),
                       colorbar=bar, **_gaps(shown))  # fmt: skip
    found = figure(theme, cells, **({"plot_bgcolor": colours(theme)["line"]} if _gaps(shown) else {}))
    if chosen is not None and chosen[0] in layers:
        row = list(layers).index(chosen[0])
        found.add_shape(type="rect", x0=chosen[1] - 0.5, x1=chosen[1] + 0.5, y0=row - 0.5, y1=row + 0.5, line={"color": colours(theme)["accent"], "width": 2})
    step = max(1, len(layers) // 24)
    found.update_xaxes(side="top", tickangle=-45, showgrid=False, zeroline=False, **token_ticks(labels))
    found.update_yaxes(showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(layers), step)),
                       ticktext=[f"L{layer}" if isinstance(layer, int) else layer for layer in list(layers)[::step]])  # fmt: skip
    with_names(found, labels, [f"L{layer}" if isinstance(layer, int) else layer for layer in layers])
    return with_scale(found, "L2 norm, log scale" if log else "L2 norm", theme)


def token_dimension_map(values: NDArray[np.floating], edges: tuple[NDArray[np.int64], NDArray[np.int64]], labels: Sequence[str], limit: float,
                        theme: str = "light", position: int | None = None, head_width: int | None = None) -> go.Figure:  # fmt: skip
    """One layer's values, tokens down and dimensions across; blue below 0, red above, colour saturates at +-limit.

    values: (row, column) from `analysis.activations.reduce_signed` with its edges; limit: `robust_range` of the full array;
    head_width: d_head of a site that has heads, to mark where each head's dimensions begin.
    """
    rows, columns = edges
    row_names = [_row_name(labels, *span(rows, i)) for i in range(len(rows) - 1)]
    width = int(columns[1] - columns[0])
    said = "dimension %{x}" if width == 1 else f"{width} dimensions from %{{x}}, the largest |x|:"
    cells = go.Heatmap(
        z=compact(values), x=columns[:-1].astype(np.int32), y=row_names, zmid=0, zmin=-limit, zmax=limit, colorscale=diverging(theme),
        hovertemplate=f"%{{y}}<br>{said}<br>%{{z:.5g}}<extra></extra>",
        colorbar=scale_bar(tickvals=[-limit, 0, limit], tickformat=".3~g"),
    )  # fmt: skip
    found = figure(theme, cells)
    shown = max(1, -(-len(row_names) // 28))
    found.update_yaxes(type="category", autorange="reversed", showgrid=False, tickmode="array", tickvals=row_names[::shown], ticktext=row_names[::shown],
                       tickfont={"family": MONO, "size": 11})  # fmt: skip
    found.update_xaxes(showgrid=False, zeroline=False, title="dimension", side="top")
    with_names(found, [_dimension(*span(columns, i), head_width) for i in range(len(columns) - 1)], [_span_name(labels, *span(rows, i)) for i in range(len(rows) - 1)])
    if head_width:
        starts = list(range(0, int(columns[-1]), head_width))
        every = max(1, len(starts) // 16)
        found.update_xaxes(title="head", tickmode="array", tickvals=starts[::every], ticktext=[str(s // head_width) for s in starts[::every]])
    if position is not None and 0 <= position < rows[-1]:
        row = int(np.searchsorted(rows, position, side="right")) - 1
        found.add_shape(type="rect", xref="paper", x0=0, x1=1, y0=row - 0.5, y1=row + 0.5, line={"color": colours(theme)["accent"], "width": 1.5})
    return with_scale(found, f"activation; the colour saturates at ±{number(limit)}", theme)


def statistics_lines(statistics: Mapping[str, NDArray[np.floating]], layers: Sequence[int], names: Sequence[str] = ("std", "abs_max", "kurtosis", "sparsity"),
                     chosen: int | None = None, theme: str = "light") -> go.Figure:  # fmt: skip
    """Small multiples: one statistic each, over the layers. statistics: name -> (layer,); each has its own axis, since their units differ."""
    found = make_subplots(rows=1, cols=len(names), horizontal_spacing=0.05, subplot_titles=[STATISTIC_TITLES[name] for name in names])
    line = LINES["dark" if theme == "dark" else "light"][0]
    for i, name in enumerate(names):
        found.add_trace(
            go.Scatter(x=list(layers), y=compact(statistics[name]), mode="lines+markers", line={"color": line, "width": 1.5}, marker={"size": 5}, name=STATISTIC_TITLES[name],
                       hovertemplate=f"layer %{{x}}<br>{STATISTIC_TITLES[name]} %{{y:.5g}}<extra></extra>"),
            row=1, col=i + 1,
        )  # fmt: skip
    if chosen is not None:
        found.add_vline(x=chosen, line={"color": colours(theme)["line-strong"], "width": 1, "dash": "dot"})
    found.update_layout(template=template(theme), margin={"l": 8, "r": 8, "t": 28, "b": 8})
    found.update_annotations(font={"size": 12, "color": colours(theme)["ink-2"]})
    found.update_xaxes(dtick=max(1, len(layers) // 8), title="layer", zeroline=False)
    found.update_yaxes(rangemode="tozero", nticks=5, exponentformat="e")
    return found


def _norm_scale(norms: NDArray[np.floating], log: bool) -> tuple[NDArray[np.floating], dict[str, object]]:
    if not log:
        return norms, scale_bar(nticks=5)
    with np.errstate(divide="ignore"):
        shown = np.log10(norms)
    finite = shown[np.isfinite(shown)]
    marks = [m * 10.0**p for p in range(-8, 9) for m in (1, 2, 5)] if len(finite) else []
    inside = [mark for mark in marks if finite.min() <= np.log10(mark) <= finite.max()]
    inside = inside if len(inside) <= 5 else [mark for mark in inside if f"{mark:e}"[0] == "1"]
    return shown, scale_bar(tickvals=[np.log10(mark) for mark in inside], ticktext=[f"{mark:g}" for mark in inside])


def _dimension(first: int, last: int, head_width: int | None) -> str:
    """A column's dimensions; of a site that has heads as head.dimension."""
    one, other = (str(at) if head_width is None else f"{at // head_width}.{at % head_width}" for at in (first, last))
    return one if first == last else f"{one} to {other}"


def _row_name(labels: Sequence[str], first: int, last: int) -> str:
    """A unique name for a row, so that equal tokens stay apart on a category axis."""
    return escape(_span_name(labels, first, last))


def _span_name(labels: Sequence[str], first: int, last: int) -> str:
    return f"{first} {labels[first]}" if first == last else f"{first}-{last} {labels[first]}"


def _gaps(values: NDArray[np.floating]) -> dict[str, int]:
    return {"xgap": 1, "ygap": 1} if values.shape[1] <= 64 else {}

"""Routing of many traces as pictures: the load of categories, tokens and traces, and how alike the loads of categories are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from components.figures.theme import LINES, colours, compact, diverging, escape, figure, scale_bar, sequential, with_names, with_scale


def usage_heatmap(counts: NDArray[np.integer], names: Sequence[str], theme: str = "light") -> go.Figure:
    """Share of one layer's choices that went to each expert, a row for each category or trace. counts: (row, expert); a row of zeros is a gap."""
    total = counts.sum(axis=1, keepdims=True)
    values = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    n_experts = counts.shape[1]
    hovers = [[f"{escape(name)}<br>expert {e}: {counts[i, e]:,} of {total[i, 0]:,} choices" + (f", {values[i, e]:.1%}" if total[i, 0] else "") for e in range(n_experts)]
              for i, name in enumerate(names)]  # fmt: skip
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    cells = go.Heatmap(z=compact(values), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", hoverongaps=True, zmin=0, zmax=top, xgap=1,
                       ygap=1 if len(names) <= 48 else 0, name="share of choices", colorscale=sequential(theme), colorbar=scale_bar(nticks=4, tickformat=".0%"))  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"])
    found.update_xaxes(title="expert", side="top", showgrid=False, zeroline=False, dtick=max(1, n_experts // 32))
    step = max(1, -(-len(names) // 24))
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(names), step)),
                       ticktext=[escape(name) for name in list(names)[::step]])  # fmt: skip
    with_names(found, [f"expert {e}" for e in range(n_experts)], names)
    return with_scale(found, f"share of choices; even: {1 / n_experts:.1%}", theme)


def alike_heatmap(values: NDArray[np.floating], mean: NDArray[np.floating], names: Sequence[str], measure: str, theme: str = "light") -> go.Figure:
    """How alike the loads of categories are, each against each. Both: (category, category), of one layer and the mean over all; NaN is a gap."""
    signed = measure.startswith("Pearson")
    hovers = [[f"{escape(a)}, {escape(b)}<br>{values[i, j]:.4f} in this layer<br>{mean[i, j]:.4f} mean over all layers" for j, b in enumerate(names)]
              for i, a in enumerate(names)]  # fmt: skip
    top = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    few = len(names) <= 12
    cells = go.Heatmap(z=compact(values), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", hoverongaps=True, zmin=-1 if signed else 0,
                       zmax=1 if signed else top or 1.0, xgap=1, ygap=1, name=measure, texttemplate="%{z:.3f}" if few else None,
                       colorscale=diverging(theme) if signed else sequential(theme), colorbar=scale_bar(nticks=4))  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"])
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [escape(name) for name in names], "showgrid": False, "zeroline": False}
    found.update_xaxes(side="top", **ticks)
    found.update_yaxes(autorange="reversed", **ticks)
    with_names(found, names, names)
    return with_scale(found, measure, theme)


def load_bars(a: NDArray[np.floating], b: NDArray[np.floating], names: tuple[str, str], theme: str = "light") -> go.Figure:
    """Two loads side by side. a, b: (expert,) shares of one layer's choices."""
    bars = [go.Bar(x=list(range(len(values))), y=compact(values), name=escape(name), marker={"color": LINES["dark" if theme == "dark" else "light"][i]},
                   customdata=[escape(name)] * len(values), hovertemplate="expert %{x}<br>%{customdata}: %{y:.1%} of choices<extra></extra>")
            for i, (name, values) in enumerate(zip(names, (a, b), strict=True))]  # fmt: skip
    found = figure(theme, *bars, barmode="group", bargap=0.25, showlegend=True, legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 11}})
    found.update_xaxes(title="expert", dtick=max(1, len(a) // 16), showgrid=False, zeroline=False)
    found.update_yaxes(title="share of choices", tickformat=".0%", rangemode="tozero", nticks=6)
    return with_names(found, [f"expert {e}" for e in range(len(a))])

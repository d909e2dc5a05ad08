"""The largest output of every expert as a picture, on a logarithmic scale: super experts are orders of magnitude above the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from components.figures.theme import colours, compact, figure, scale_bar, sequential, with_names, with_scale


def plain(size: float, digits: int = 4) -> str:
    """A size in few digits, without an exponent unless it is very small: outputs span many orders of magnitude.

    >>> plain(63204.1), plain(7.8134), plain(6.5321, 2)
    ('63,204', '7.813', '6.5')
    """
    return f"{size:,.0f}" if size >= 100 and size >= 10 ** (digits - 1) else f"{size:.{digits}g}"


def largest_heatmap(sizes: NDArray[np.floating], layers: Sequence[int], marked: Collection[tuple[int, int]], theme: str = "light") -> go.Figure:
    """sizes: (layer, expert), 0 where no token chose the expert: a gap. marked: (layer, expert) to frame. A click gives x = expert, y = row."""
    used = sizes > 0
    logs = np.log10(sizes, out=np.full(sizes.shape, np.nan, np.float32), where=used)
    n_experts = sizes.shape[1]
    hovers = [[f"layer {layer}, expert {e}<br>" + (f"largest |output| {plain(float(sizes[i, e]))}" if used[i, e] else "chosen by no token") for e in range(n_experts)]
              for i, layer in enumerate(layers)]  # fmt: skip
    low, high = (float(np.nanmin(logs)), float(np.nanmax(logs))) if used.any() else (0.0, 1.0)
    high = high if high > low else low + 1.0
    marks = np.linspace(low, high, 4)
    cells = go.Heatmap(z=compact(logs), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", hoverongaps=True, zmin=low, zmax=high,
                       xgap=1 if n_experts <= 128 else 0, ygap=1, name="log10 of the largest |output|", colorscale=sequential(theme),
                       colorbar=scale_bar(tickvals=[float(mark) for mark in marks], ticktext=[plain(10**mark, 2) for mark in marks]))  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"])
    for layer, expert in marked:
        if layer in layers:
            row = list(layers).index(layer)
            found.add_shape(type="rect", x0=expert - 0.5, x1=expert + 0.5, y0=row - 0.5, y1=row + 0.5, line={"color": colours(theme)["pos"], "width": 2})
    step = max(1, len(layers) // 24)
    found.update_xaxes(title="expert", side="top", showgrid=False, zeroline=False, dtick=max(1, n_experts // 32))
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(layers), step)),
                       ticktext=[f"L{layer}" for layer in list(layers)[::step]])  # fmt: skip
    with_names(found, [f"expert {e}" for e in range(n_experts)], [f"L{layer}" for layer in layers])
    return with_scale(found, "largest |output|, logarithmic; grey: chosen by no token" if not used.all() else "largest |output|, logarithmic", theme)

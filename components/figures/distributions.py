"""Distributions through layers as bands, and single values followed through layers as lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from components.figures.theme import LINES, colours, compact, escape, figure, with_names

_DASHES = ("solid", "dot", "dash", "dashdot")


def quantile_lines(bands: NDArray[np.floating], titles: Sequence[str], layers: Sequence[int], theme: str = "light", chosen: int | None = None,
                   whole: bool = True) -> go.Figure:  # fmt: skip
    """Quantiles of a site over its layers: the middle half dark, the middle 98 % light, the extremes dotted.

    bands: (layer, 7) from `analysis.distributions.quantile_bands`; whole: the axis reaches to the extremes, else to the 1 and 99 % lines.
    """
    line, ink = LINES["dark" if theme == "dark" else "light"][0], colours(theme)["ink-3"]
    shade = {2: "2a", 4: "66", 5: "2a"}  # opacity of the area up to the line drawn before
    traces = []
    for i in (1, 2, 4, 5, 3, 0, 6):
        extreme, median = i in (0, 6), i == 3
        fill = {"fill": "tonexty", "fillcolor": f"{line}{shade[i]}"} if i in shade else {}
        look = {"color": ink if extreme else line, "width": 2 if median else 1, "dash": "dot" if extreme else "solid"}
        traces.append(go.Scatter(x=list(layers), y=compact(bands[:, i]), name=titles[i], mode="lines+markers" if median or len(layers) == 1 else "lines", line=look,
                                 marker={"size": 5}, hovertemplate=f"layer %{{x}}<br>{titles[i]} %{{y:.5g}}<extra></extra>", **fill))  # fmt: skip
    found = figure(theme, *traces, showlegend=False)
    if chosen is not None:
        found.add_vline(x=chosen, line={"color": colours(theme)["line-strong"], "width": 1, "dash": "dot"})
    inner = bands[:, 1:6][np.isfinite(bands[:, 1:6])]
    if not whole and len(inner):
        pad = 0.06 * float(np.ptp(inner)) or 1.0
        found.update_yaxes(range=[float(inner.min()) - pad, float(inner.max()) + pad])
    found.update_xaxes(title="layer", dtick=max(1, len(layers) // 16), zeroline=False)
    found.update_yaxes(title="value", nticks=7, zeroline=True)
    return with_names(found, [f"L{layer}" for layer in layers])


def followed_lines(values: NDArray[np.floating], names: Sequence[str], layers: Sequence[int], massive: Sequence[bool], size: float, theme: str = "light") -> go.Figure:
    """|x| of some (token, dimension) pairs through the layers, on a log axis; massive ones solid, the others thin. values: (pair, layer); size: the limit, dotted."""
    palette = LINES["dark" if theme == "dark" else "light"]
    lines = [
        go.Scatter(x=list(layers), y=compact(np.where(row == 0, np.nan, np.abs(row))), name=escape(name), mode="lines+markers", customdata=[f"{v:.5g}" for v in row],
                   line={"color": palette[i % len(palette)], "width": 2 if is_massive else 1.2, "dash": _DASHES[i // len(palette) % len(_DASHES)]}, marker={"size": 5},
                   hovertemplate="layer %{x}<br>value %{customdata}<extra>%{fullData.name}</extra>")
        for i, (row, name, is_massive) in enumerate(zip(values, names, massive, strict=True))
    ]  # fmt: skip
    limit = go.Scatter(x=[layers[0], layers[-1]], y=[size, size], name=f"limit {size:g}", mode="lines", line={"color": colours(theme)["ink-3"], "width": 1, "dash": "dot"},
                       hovertemplate=f"limit {size:g}<extra></extra>")  # fmt: skip
    found = figure(theme, *lines, limit, showlegend=True, legend={"orientation": "v", "x": 1.01, "y": 1, "font": {"size": 11}})
    found.update_xaxes(title="layer", dtick=max(1, len(layers) // 16), zeroline=False)
    found.update_yaxes(title="|x|, log scale", type="log", exponentformat="power", nticks=6, minor={"showgrid": False})
    return found

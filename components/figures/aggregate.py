"""Aggregates over prompts as pictures: a metric of every head, and quantities through depth with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from components.figures.theme import LINES, colours, compact, diverging, escape, figure, scale_bar, sequential, with_scale


@dataclass(frozen=True)
class Group:
    """One group's values: mean, spread (standard deviation, or the standard error of a difference) and number of prompts in each cell."""

    name: str
    mean: NDArray[np.floating]
    spread: NDArray[np.floating]
    count: NDArray[np.integer]


def head_aggregate(group: Group, title: str, limit: float | None = None, signed: bool = False, theme: str = "light",
                   spread_is: str = "") -> go.Figure:  # fmt: skip
    """One metric of every head over a group of prompts. group: (layer, head); limit: top of the colour scale (None: the largest); signed: a difference.

    spread_is: what the hover calls the spread; without it the standard deviation, of a difference the standard error.
    """
    shown = compact(group.mean)
    finite = np.abs(shown[np.isfinite(shown)])
    top = float(finite.max()) if len(finite) and (signed or limit is None) else limit or 1.0
    word = spread_is or ("standard error" if signed else "standard deviation")
    sign = "+" if signed else ""
    hovers = np.array([[f"head {layer}.{head}<br>{escape(title)} {shown[layer, head]:{sign}.4f}<br>{word} {group.spread[layer, head]:.4f}<br>{group.count[layer, head]:,} prompts"
                        for head in range(shown.shape[1])] for layer in range(shown.shape[0])], dtype=object)  # fmt: skip
    bar = scale_bar(tickvals=[-top, 0, top], tickformat=".2~g") if signed else scale_bar(nticks=4)
    cells = go.Heatmap(z=shown, customdata=hovers, hovertemplate="%{customdata}<extra></extra>", zmin=-top if signed else 0, zmax=top or 1.0, xgap=1, ygap=1,
                       colorscale=diverging(theme) if signed else sequential(theme), colorbar=bar, hoverongaps=False)  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"])
    step = max(1, shown.shape[0] // 24)
    found.update_xaxes(title="head", side="top", showgrid=False, zeroline=False, dtick=max(1, shown.shape[1] // 24))
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, shown.shape[0], step)),
                       ticktext=[f"L{layer}" for layer in range(0, shown.shape[0], step)])  # fmt: skip
    return with_scale(found, f"{title}, {group.name}", theme)


def depth_bands(groups: Sequence[Group], unit: str, theme: str = "light") -> go.Figure:
    """A quantity of each layer: a line for each group's mean, a band of one standard deviation over its prompts. groups: (layer,) each."""
    palette = LINES["dark" if theme == "dark" else "light"]
    found = figure(theme, showlegend=True, legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
                   margin={"l": 8, "r": 12, "t": 30, "b": 8})  # fmt: skip
    for i, group in enumerate(groups):
        colour, layers = palette[i % len(palette)], np.arange(len(group.mean), dtype=np.int32)
        spread = np.nan_to_num(group.spread, nan=0.0)
        known = np.isfinite(group.mean)
        edges = compact(np.concatenate([(group.mean + spread)[known], (group.mean - spread)[known][::-1]]))
        found.add_trace(go.Scatter(x=np.concatenate([layers[known], layers[known][::-1]]), y=edges, fill="toself", mode="lines", line={"width": 0},
                                   fillcolor=_faint(colour), hoverinfo="skip", showlegend=False))  # fmt: skip
        words = [f"± {s:.4g}, {n:,} prompts" for s, n in zip(group.spread, group.count, strict=True)]
        found.add_trace(go.Scatter(x=layers, y=compact(group.mean), name=escape(group.name), mode="lines+markers", line={"color": colour, "width": 2}, marker={"size": 6},
                                   customdata=words, hovertemplate=f"{escape(group.name)}, layer %{{x}}<br>%{{y:.5g}} %{{customdata}}<extra></extra>"))  # fmt: skip
    n_layers = max((len(group.mean) for group in groups), default=1)
    found.update_xaxes(title="layer", dtick=max(1, n_layers // 12), zeroline=False)
    found.update_yaxes(title=unit, nticks=6)
    return found


def with_trace(found: go.Figure, values: NDArray[np.floating], name: str, theme: str = "light") -> go.Figure:
    """One trace's values, (layer,), as a line over the bands of `depth_bands`."""
    colour = colours(theme)["ink"]
    found.add_trace(go.Scatter(x=np.arange(len(values), dtype=np.int32), y=compact(values), name=escape(name), mode="lines+markers", line={"color": colour, "width": 2},
                               marker={"size": 6, "symbol": "diamond"}, hovertemplate=f"{escape(name)}, layer %{{x}}<br>%{{y:.5g}}<extra></extra>"))  # fmt: skip
    return found


def _faint(colour: str) -> str:
    """The colour of a line as the ground of its band."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"

"""Routing as pictures: load of experts, who serves which token, router probabilities, pairs of experts, repeats, margins, change."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from backend.analysis.moe import Repeats, Routing
from components.figures.theme import LINES, colours, compact, diverging, escape, figure, number, scale_bar, sequential, token_ticks, with_names, with_scale

_FEW = 8  # so many experts get hues that are evenly apart; more also alternate in lightness


def expert_colours(n_experts: int, theme: str = "light") -> list[str]:
    """One colour an expert. With many of them neighbours in number stay apart: the hover and the table name what the eye cannot."""
    dark = theme == "dark"
    found = []
    for expert in range(n_experts):
        hue = expert / n_experts if n_experts <= _FEW else (expert * 0.618034) % 1
        light = (0.62 if dark else 0.56) if n_experts <= _FEW else (0.52, 0.70, 0.40)[expert % 3] + (0.06 if dark else 0)
        red, green, blue = colorsys.hls_to_rgb((hue + 0.61) % 1, light, 0.52 if dark else 0.58)
        found.append(f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}")
    return found


def load_heatmap(counts: NDArray[np.integer], layers: Sequence[int], chosen: int, theme: str = "light") -> go.Figure:
    """How often each expert was chosen, as a share of the layer's choices. counts: (layer, expert); chosen: the layer to frame."""
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    values = counts / total
    n_experts = counts.shape[1]
    hovers = [[f"layer {layer}, expert {e}<br>{counts[i, e]:,} of {total[i, 0]:,} choices, {values[i, e]:.1%}<br>{values[i, e] * n_experts:.2f} × an even share"
               for e in range(n_experts)] for i, layer in enumerate(layers)]  # fmt: skip
    cells = go.Heatmap(z=compact(values), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", zmin=0, zmax=float(values.max()) or 1.0, xgap=1, ygap=1,
                       name="share of choices", colorscale=sequential(theme), colorbar=scale_bar(nticks=4, tickformat=".0%"))  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"])
    if chosen in layers:
        row = list(layers).index(chosen)
        _frame(found, (-0.5, n_experts - 0.5, row - 0.5, row + 0.5), theme)
    found.update_xaxes(title="expert", side="top", showgrid=False, zeroline=False, dtick=max(1, n_experts // 32))
    _layer_axis(found, layers)
    with_names(found, [f"expert {e}" for e in range(n_experts)], [f"L{layer}" for layer in layers])
    return with_scale(found, f"share of the layer's choices; even: {1 / n_experts:.1%}", theme)


def first_choice_map(routings: Sequence[Routing], labels: Sequence[str], start: int, chosen: tuple[int, int], theme: str = "light") -> go.Figure:
    """The first expert of every token in every layer. labels: of the tokens that are shown, the first of which is position `start`;
    chosen: (layer, position) to frame. A click gives x = token - start, y = row.

    Where there are names in `meta`, the browser puts them before what a cell says (assets/moe.js): written into every cell they would be most of the figure.
    """
    n, layers = len(labels), [each.layer for each in routings]
    first = np.stack([each.indices[start : start + n, 0] for each in routings])
    chosen_by = [[choices(each, at) for at in range(start, start + n)] for each in routings]
    n_experts = routings[0].n_experts
    steps = [[edge, colour] for e, colour in enumerate(expert_colours(n_experts, theme)) for edge in (e / n_experts, (e + 1) / n_experts)]
    cells = go.Heatmap(z=compact(first), customdata=chosen_by, hoverinfo="none", zmin=-0.5, zmax=n_experts - 0.5, name="first expert",
                       xgap=1 if n <= 128 else 0, ygap=1, colorscale=steps, showscale=False)  # fmt: skip
    found = figure(theme, cells)
    if chosen[0] in layers and start <= chosen[1] < start + n:
        row, at = layers.index(chosen[0]), chosen[1] - start
        _frame(found, (at - 0.5, at + 0.5, row - 0.5, row + 0.5), theme, "ink")
    found.update_xaxes(side="top", tickangle=-45, showgrid=False, zeroline=False, **token_ticks(labels))
    _layer_axis(found, layers)
    return with_names(found, [f"{start + i} {label}" for i, label in enumerate(labels)], [f"L{layer}" for layer in layers])


def choices(routing: Routing, position: int) -> str:
    """All k experts of a token with their weights: "expert 3 (0.62), 5 (0.38)"."""
    experts = routing.indices[position].tolist()
    if routing.weights is None:
        return "expert " + ", ".join(map(str, experts))
    return "expert " + ", ".join([f"{e} ({w:.2f})" for e, w in zip(experts, routing.weights[position].tolist(), strict=True)])


def router_heatmap(probs: NDArray[np.floating], labels: Sequence[str], start: int, position: int, theme: str = "light") -> go.Figure:
    """The router's probability of every expert at every token. probs: (token, expert) of the tokens that are shown."""
    values = np.asarray(probs, dtype=np.float32).T
    top = float(values.max()) if values.size else 1.0
    cells = go.Heatmap(z=compact(values), hoverinfo="none", zmin=0, zmax=top or 1.0, name="router probability",
                       ygap=1 if len(values) <= 32 else 0, colorscale=sequential(theme), colorbar=scale_bar(nticks=4))  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"])
    if start <= position < start + len(labels):
        _frame(found, (position - start - 0.5, position - start + 0.5, -0.5, len(values) - 0.5), theme)
    found.update_xaxes(side="top", tickangle=-45, showgrid=False, zeroline=False, **token_ticks(labels))
    found.update_yaxes(title="expert", autorange="reversed", showgrid=False, zeroline=False, dtick=max(1, len(values) // 16))
    with_names(found, [f"{start + i} {label}" for i, label in enumerate(labels)], [f"expert {e}" for e in range(len(values))])
    return with_scale(found, "router probability", theme)


def expert_pairs(values: NDArray[np.floating], counts: NDArray[np.integer], down: str, across: str, unit: str, theme: str = "light") -> go.Figure:
    """A matrix of experts against experts. values: (expert, expert) shares, NaN where there are none; counts: the tokens behind them."""
    finite = values[np.isfinite(values)]
    cells = go.Heatmap(z=compact(values), customdata=np.ascontiguousarray(counts, np.int32), hoverinfo="none", zmin=0, zmax=(float(finite.max()) if len(finite) else 0) or 1.0,
                       name=unit, xgap=1 if len(values) <= 32 else 0, ygap=1 if len(values) <= 32 else 0, colorscale=sequential(theme), hoverongaps=True,
                       colorbar=scale_bar(nticks=4, tickformat=".0%"))  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"])
    tick = max(1, len(values) // 16)
    found.update_xaxes(title=across, side="top", showgrid=False, zeroline=False, dtick=tick, constrain="domain")
    found.update_yaxes(title=down, autorange="reversed", showgrid=False, zeroline=False, dtick=tick)
    with_names(found, [f"{across} {e}" for e in range(len(values))], [f"{down} {e}" for e in range(len(values))])
    return with_scale(found, unit, theme)


def repeat_lines(found_in: Sequence[Repeats], layers: Sequence[int], k: int, chosen: int, theme: str = "light") -> go.Figure:
    """Share of consecutive tokens that keep an expert, through the layers, each with its random baseline as a dashed line."""
    palette = LINES["dark" if theme == "dark" else "light"]
    either = "first or second" if k == 2 else f"any of {k}"
    parts = (("first choice", [each.first for each in found_in], found_in[0].first_random, palette[0]),
             (either, [each.any for each in found_in], found_in[0].any_random, palette[1]))  # fmt: skip
    lines = []
    for name, values, random, colour in parts[: 1 if k == 1 else 2]:
        lines.append(go.Scatter(x=list(layers), y=compact(values), mode="lines+markers", name=name, line={"color": colour, "width": 2}, marker={"size": 5},
                                hovertemplate=f"layer %{{x}}<br>{name} kept: %{{y:.1%}}, random {random:.1%}<extra></extra>"))  # fmt: skip
        lines.append(go.Scatter(x=[layers[0], layers[-1]], y=[random, random], mode="lines", name=f"{name}, random", line={"color": colour, "width": 1, "dash": "dash"},
                                hovertemplate=f"{name}, random: {random:.1%}<extra></extra>"))  # fmt: skip
    found = figure(theme, *lines, showlegend=True, legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 11}})
    found.add_vline(x=chosen, line={"color": colours(theme)["line-strong"], "width": 1, "dash": "dot"})
    found.update_xaxes(title="layer", dtick=max(1, len(layers) // 8), zeroline=False)
    found.update_yaxes(title="share of consecutive tokens", tickformat=".0%", rangemode="tozero", nticks=6)
    return found


def margin_bars(margins: NDArray[np.floating], labels: Sequence[str], start: int, position: int, unit: str, theme: str = "light") -> go.Figure:
    """How far the k-th expert was ahead of the next at every token that is shown. margins: (token,)."""
    c = colours(theme)
    hovers = [f"{escape(label)} (position {start + i})<br>margin {number(float(m))}{' (a tie)' if m == 0 else ''}"
              for i, (label, m) in enumerate(zip(labels, margins, strict=True))]  # fmt: skip
    bars = go.Bar(x=list(range(len(margins))), y=compact(margins), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", name="margin",
                  marker={"color": [c["pos"] if m <= 0 else c["accent"] for m in np.nan_to_num(margins, nan=1.0)],
                          "line": {"color": c["ink"], "width": [2 if start + i == position else 0 for i in range(len(margins))]}})  # fmt: skip
    found = figure(theme, bars, bargap=0.15)
    found.update_xaxes(tickangle=-45, showgrid=False, zeroline=False, **token_ticks(labels, 28))
    found.update_yaxes(title=f"margin, {unit}", nticks=6, zeroline=True)
    return with_names(found, [f"{start + i} {label}" for i, label in enumerate(labels)])


def effect_heatmap(values: NDArray[np.floating], layers: Sequence[int], unit: str, theme: str = "light") -> go.Figure:
    """What taking out each expert did: red where it made things worse, blue where better. values: (layer, expert)."""
    limit = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    hovers = [[f"layer {layer}, expert {e}<br>{number(float(values[i, e]))} {escape(unit)}" for e in range(values.shape[1])] for i, layer in enumerate(layers)]
    cells = go.Heatmap(z=compact(values), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", zmid=0, zmin=-(limit or 1.0), zmax=limit or 1.0, xgap=1, ygap=1,
                       name=unit, colorscale=diverging(theme), colorbar=scale_bar(nticks=4, tickformat=".2~g"))  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"])
    found.update_xaxes(title="expert taken out", side="top", showgrid=False, zeroline=False, dtick=max(1, values.shape[1] // 32))
    _layer_axis(found, layers)
    with_names(found, [f"expert {e}" for e in range(values.shape[1])], [f"L{layer}" for layer in layers])
    return with_scale(found, unit, theme)


def change_lines(layers: Sequence[int], changed: NDArray[np.floating], first: NDArray[np.floating], chosen: int, theme: str = "light") -> go.Figure:
    """Share of tokens whose experts differ between two runs, through the layers: the set of k, and the first choice. Both: (layer,)."""
    palette = LINES["dark" if theme == "dark" else "light"]
    lines = [go.Scatter(x=list(layers), y=compact(values), mode="lines+markers", name=name, line={"color": palette[i], "width": 2}, marker={"size": 5},
                        hovertemplate=f"layer %{{x}}<br>{name}: %{{y:.1%}} of tokens<extra></extra>")
             for i, (name, values) in enumerate((("other experts", changed), ("other first choice", first)))]  # fmt: skip
    found = figure(theme, *lines, showlegend=True, legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 11}})
    found.add_vline(x=chosen, line={"color": colours(theme)["line-strong"], "width": 1, "dash": "dot"})
    found.update_xaxes(title="layer", dtick=max(1, len(layers) // 8), zeroline=False)
    most = float(np.nanmax([changed, first]))
    found.update_yaxes(title="share of tokens", tickformat=".0%" if most > 0.1 else ".1%", range=[0, max(1.08 * most, 0.01)], nticks=6)
    return found


def _frame(found: go.Figure, box: tuple[float, float, float, float], theme: str, colour: str = "accent") -> None:
    found.add_shape(type="rect", x0=box[0], x1=box[1], y0=box[2], y1=box[3], line={"color": colours(theme)[colour], "width": 2})


def _layer_axis(found: go.Figure, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 24)
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(layers), step)),
                       ticktext=[f"L{layer}" for layer in list(layers)[::step]])  # fmt: skip

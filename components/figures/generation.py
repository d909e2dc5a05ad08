"""A generation as pictures: probability and entropy of each step, residual norms over layers and steps, one step's attention and norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from components.figures.theme import LINES, MONO, colours, compact, escape, figure, scale_bar, sequential, template, with_scale

MOST_COLUMNS = 512  # steps drawn: as many as a card has pixels; the newest of more
_MOST_NAMED = 36


def step_curves(probability: NDArray[np.floating], entropy: NDArray[np.floating], labels: Sequence[str], sampler: NDArray[np.floating] | None = None,
                chosen: int | None = None, theme: str = "light") -> go.Figure:  # fmt: skip
    """Probability of each written token, and the entropy of the distribution it was chosen from, over the steps.

    probability, entropy, sampler: (step,); sampler: the probability after the sampler's cuts and temperature, drawn where it differs from
    the model's; labels: display text of the tokens; chosen: a step to mark, from 0.
    """
    first = max(0, len(labels) - MOST_COLUMNS)
    steps = np.arange(first + 1, len(labels) + 1, dtype=np.int32)
    names = [escape(label) for label in labels[first:]]
    palette, hover = LINES["dark" if theme == "dark" else "light"], "step %{x}: %{customdata}<br>"
    found = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.1, subplot_titles=["probability of the token", "entropy, nats"])
    marks = {"mode": "lines+markers", "marker": {"size": 5}, "customdata": names}
    found.add_trace(go.Scatter(x=steps, y=compact(probability[first:]), name="model", line={"color": palette[0], "width": 1.5},
                               hovertemplate=f"{hover}probability %{{y:.4f}} of the model<extra></extra>", **marks), row=1, col=1)  # fmt: skip
    differs = sampler is not None and not np.allclose(sampler, probability, atol=1e-4)
    if differs and sampler is not None:
        found.add_trace(go.Scatter(x=steps, y=compact(sampler[first:]), name="sampler", line={"color": palette[1], "width": 1, "dash": "dot"},
                                   hovertemplate=f"{hover}probability %{{y:.4f}} of the sampler<extra></extra>", **marks), row=1, col=1)  # fmt: skip
    found.add_trace(go.Scatter(x=steps, y=compact(entropy[first:]), name="entropy", line={"color": palette[2], "width": 1.5}, showlegend=False,
                               hovertemplate=f"{hover}entropy %{{y:.4f}} nats<extra></extra>", **marks), row=2, col=1)  # fmt: skip
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom", "font": {"size": 12}}
    found.update_layout(template=template(theme), margin={"l": 8, "r": 12, "t": 26, "b": 8}, showlegend=differs, legend=legend, uirevision="steps")
    found.update_annotations(font={"size": 12, "color": colours(theme)["ink-2"]})
    found.update_yaxes(range=[-0.03, 1.03], nticks=4, row=1, col=1)
    found.update_yaxes(rangemode="tozero", nticks=4, row=2, col=1)
    found.update_xaxes(zeroline=False, range=[first + 0.5, len(labels) + 0.5])
    found.update_xaxes(**_named_steps(first, labels), row=2, col=1)
    if chosen is not None:
        found.add_vline(x=chosen + 1, line={"color": colours(theme)["accent"], "width": 1.5, "dash": "dot"})
    return found


def step_norms(norms: NDArray[np.floating], labels: Sequence[str], chosen: int | None = None, theme: str = "light") -> go.Figure:
    """L2 norm of resid_post at the position that each token was chosen at. norms: (layer, step); NaN and infinity have no colour and say so in the hover."""
    first = max(0, len(labels) - MOST_COLUMNS)
    shown = compact(norms[:, first:])
    finite = shown[np.isfinite(shown)]
    steps = np.arange(first + 1, len(labels) + 1, dtype=np.int32)
    names = [f"{s}: {escape(label)}" for s, label in zip(steps, labels[first:], strict=True)]
    cells = go.Heatmap(
        z=np.where(np.isfinite(shown), shown, np.nan), x=steps, text=[names] * len(shown), zmin=0, zmax=float(finite.max()) if len(finite) else 1.0,
        hovertemplate="step %{text}<br>layer %{y}<br>norm %{z:.4g}<extra></extra>", colorscale=sequential(theme), colorbar=scale_bar(nticks=4), hoverongaps=True,
        **({"xgap": 1, "ygap": 1} if shown.shape[1] <= 64 else {}),
    )  # fmt: skip
    found = figure(theme, cells, uirevision="steps", plot_bgcolor=colours(theme)["line"] if shown.shape[1] <= 64 else "rgba(0,0,0,0)")
    every = max(1, len(shown) // 12)
    found.update_xaxes(side="top", showgrid=False, zeroline=False, range=[first + 0.5, len(labels) + 0.5], **_named_steps(first, labels))
    found.update_yaxes(title="layer", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(shown), every)))
    if chosen is not None:
        found.add_shape(type="rect", x0=chosen + 0.5, x1=chosen + 1.5, y0=-0.5, y1=len(shown) - 0.5, line={"color": colours(theme)["accent"], "width": 2})
    return with_scale(found, "L2 norm of resid_post", theme)


def attention_row(row: NDArray[np.floating], edges: NDArray[np.int64], labels: Sequence[str], n_prompt: int, theme: str = "light") -> go.Figure:
    """Where one head looks from one position: a bar for each token before it. row: (key,), each the largest of those between its edges; n_prompt: where the answer begins."""
    at = edges[:-1]
    names = [f"{escape(labels[int(a)])} (position {a})" if b - a == 1 else f"positions {a}-{b - 1}, the largest" for a, b in zip(at, edges[1:], strict=True)]
    palette = LINES["dark" if theme == "dark" else "light"]
    colour = [palette[0] if a < n_prompt else palette[1] for a in at]
    bars = go.Bar(x=np.arange(len(row), dtype=np.int32), y=compact(row), marker={"color": colour, "line": {"width": 0}}, customdata=names,
                  hovertemplate="looks at %{customdata}<br>%{y:.5f}<extra></extra>")  # fmt: skip
    found = figure(theme, bars, bargap=0.2 if len(row) <= 128 else 0)
    step = 1 if len(row) <= _MOST_NAMED else -(-len(row) // _MOST_NAMED)
    found.update_xaxes(tickmode="array", tickvals=list(range(0, len(row), step)), ticktext=[escape(labels[int(a)]) for a in at[::step]], tickangle=-45,
                       tickfont={"family": MONO, "size": 11}, showgrid=False, zeroline=False)  # fmt: skip
    found.update_yaxes(title="attention", rangemode="tozero", nticks=5)
    return found


def depth_norms(norms: Mapping[str, NDArray[np.floating]], layers: Sequence[int], theme: str = "light") -> go.Figure:
    """L2 norm through depth of several sites at one position. norms: site -> (layer,)."""
    palette = LINES["dark" if theme == "dark" else "light"]
    lines = [
        go.Scatter(x=list(layers), y=compact(values), name=site, mode="lines+markers", line={"color": palette[i % len(palette)], "width": 2}, marker={"size": 6},
                   hovertemplate=f"{site}, layer %{{x}}<br>norm %{{y:.5g}}<extra></extra>")
        for i, (site, values) in enumerate(norms.items())
    ]  # fmt: skip
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 12}}
    found = figure(theme, *lines, showlegend=True, legend=legend, margin={"l": 8, "r": 12, "t": 30, "b": 8})
    found.update_xaxes(title="layer", dtick=max(1, len(layers) // 12), zeroline=False)
    found.update_yaxes(title="L2 norm", rangemode="tozero", nticks=6)
    return found


def _named_steps(first: int, labels: Sequence[str]) -> dict[str, Any]:
    """Ticks that write the tokens under their steps, thinned where they are many."""
    n = len(labels) - first
    every = 1 if n <= _MOST_NAMED else -(-n // _MOST_NAMED)
    at = range(first, len(labels), every)
    return {"tickmode": "array", "tickvals": [i + 1 for i in at], "ticktext": [escape(labels[i]) for i in at], "tickangle": -45, "tickfont": {"family": MONO, "size": 11}}

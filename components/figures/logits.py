"""Predictions as pictures: surprise, entropy and perplexity over the positions of a run, and the best next tokens of one position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from components.figures.theme import LINES, MONO, colours, compact, escape, figure, number, span, template, token_ticks


@dataclass(frozen=True)
class PositionCurves:
    """What the lines show, (cell,) each; a cell stands for the positions edges[cell] to edges[cell + 1] - 1 of the run."""

    surprise: NDArray[np.floating]
    entropy: NDArray[np.floating]
    perplexity: NDArray[np.floating]
    edges: NDArray[np.int64]


def prediction_lines(curves: PositionCurves, labels: Sequence[str], n_prompt: int, unit: str, position: int | None = None, theme: str = "light") -> go.Figure:
    """Surprise and entropy above, perplexity so far below, over the positions that predict; a NaN is marked, not left out.

    labels: display text of every token; n_prompt: tokens of the prompt, after which the ground is tinted; unit: "nats" or "bits".
    """
    found = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.66, 0.34], vertical_spacing=0.08)
    palette, c = LINES["dark" if theme == "dark" else "light"], colours(theme)
    x = curves.edges[:-1].astype(np.int32)
    hovers = np.array([_hover(curves, i, labels, unit) for i in range(len(x))], dtype=object)
    few = len(x) <= 160
    lines = (("surprise of the token that follows", curves.surprise, palette[1], 1), ("entropy of the prediction", curves.entropy, palette[0], 1),
             ("perplexity so far", curves.perplexity, palette[2], 2))  # fmt: skip
    for name, values, colour, row in lines:
        line = go.Scatter(x=x, y=compact(values), name=name, mode="lines+markers" if few else "lines", line={"color": colour, "width": 1.6}, marker={"size": 5},
                          customdata=hovers, hovertemplate="%{customdata}<extra></extra>")  # fmt: skip
        found.add_trace(line, row=row, col=1)
    broken = np.isnan(curves.entropy)
    if broken.any():
        marks = go.Scatter(x=x[broken], y=np.zeros(int(broken.sum()), np.float32), name="NaN", mode="markers", marker={"symbol": "x", "size": 9, "color": c["pos"]},
                           customdata=hovers[broken], hovertemplate="%{customdata}<extra></extra>")  # fmt: skip
        found.add_trace(marks, row=1, col=1)
    found.update_layout(template=template(theme), margin={"l": 8, "r": 12, "t": 30, "b": 8}, showlegend=True, hovermode="closest",
                        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"size": 12}})  # fmt: skip
    found.update_yaxes(rangemode="tozero", nticks=5, title=unit, row=1, col=1)
    found.update_yaxes(title="perplexity", row=2, col=1, **_log_axis(curves.perplexity))
    found.update_xaxes(zeroline=False, showgrid=False, tickangle=-45, range=[-0.7, len(labels) - 0.3], **token_ticks(labels, most=48))
    found.update_xaxes(showticklabels=False, row=1, col=1)
    _ground(found, len(labels), n_prompt, position, theme)
    return found


def _log_axis(values: NDArray[np.floating]) -> dict[str, Any]:
    """A log axis over the finite values, marked at 1, 2 and 5 of each power of ten, or at the powers where there are many."""
    finite = values[np.isfinite(values) & (values > 0)]
    low, high = (float(np.log10(finite.min())), float(np.log10(finite.max()))) if len(finite) else (0.0, 1.0)
    room = 0.06 * (high - low) + 0.02
    marks = [m * 10.0**p for p in range(int(np.floor(low)), int(np.ceil(high)) + 1) for m in ((1, 2, 5) if high - low < 1.5 else (1,))]
    return {"type": "log", "range": [low - room, high + room], "tickmode": "array", "tickvals": marks, "ticktext": [f"{m:,.12g}" for m in marks]}


def _ground(found: go.Figure, n_tokens: int, n_prompt: int, position: int | None, theme: str) -> None:
    """Tints what predicts generated tokens, which the last position of the prompt is the first to do; a line at the chosen position."""
    c = colours(theme)
    if n_prompt < n_tokens:
        place = {"xref": "x", "yref": "paper"}
        found.add_shape(type="rect", x0=n_prompt - 1.5, x1=n_tokens - 0.5, y0=0, y1=1, fillcolor=c["accent"], opacity=0.07, line={"width": 0}, layer="below", **place)
        found.add_annotation(text="generated", x=n_tokens - 0.5, y=1, xanchor="right", yanchor="top", showarrow=False, font={"size": 11, "color": c["ink-3"]}, **place)
    if position is not None and 0 <= position < n_tokens:
        found.add_shape(type="line", xref="x", yref="paper", x0=position, x1=position, y0=0, y1=1, line={"color": c["accent"], "width": 1.5, "dash": "dot"})


def _hover(curves: PositionCurves, cell: int, labels: Sequence[str], unit: str) -> str:
    first, last = span(curves.edges, cell)
    if first == last:
        where = f"after {escape(labels[first])} (position {first})"
        follows = f"{escape(labels[first + 1])} follows: surprise {number(float(curves.surprise[cell]))} {unit}" if first + 1 < len(labels) else "nothing follows"
    else:
        where = f"positions {first}-{last}, from {escape(labels[first])}: the largest of each"
        follows = f"surprise {number(float(curves.surprise[cell]))} {unit}"
    return f"{where}<br>{follows}<br>entropy {number(float(curves.entropy[cell]))} {unit}<br>perplexity so far {number(float(curves.perplexity[cell]))}"


def top_bars(probabilities: NDArray[np.floating], labels: Sequence[str], ids: Sequence[int], follows: int | None, theme: str = "light") -> go.Figure:
    """The best next tokens of one position, best at the top, the token that really follows in its own colour, the rest of the vocabulary below.

    probabilities: (k,); labels: their display texts; ids: their token ids; follows: the id of the token that follows, None: nothing does.
    """
    c, palette = colours(theme), LINES["dark" if theme == "dark" else "light"]
    rest = max(0.0, 1.0 - float(np.sum(probabilities))) if np.isfinite(probabilities).all() else np.nan
    shown = np.append(probabilities, rest)
    names = [*(escape(label) for label in labels), "all others"]
    paint = [palette[1] if token == follows else palette[0] for token in ids] + [c["line-strong"]]
    said = [f"{name} (id {token:,})<br>probability {number(float(p))}" for name, token, p in zip(names, ids, probabilities, strict=False)]
    said.append(f"all other tokens<br>probability {number(float(rest))}")
    bars = go.Bar(x=compact(shown), y=np.arange(len(shown), dtype=np.int32), orientation="h", marker={"color": paint}, text=[_share(float(p)) for p in shown],
                  textposition="outside", cliponaxis=False, textfont={"size": 11}, customdata=np.array(said, dtype=object),
                  hovertemplate="%{customdata}<extra></extra>")  # fmt: skip
    found = figure(theme, bars, bargap=0.28, margin={"l": 8, "r": 48, "t": 8, "b": 8})
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(len(names))), ticktext=names,
                       tickfont={"family": MONO, "size": 12})  # fmt: skip
    found.update_xaxes(range=[0, 1], title="probability", zeroline=False, nticks=6)
    return found


def _share(p: float) -> str:
    return "NaN" if np.isnan(p) else f"{p:.3f}" if p >= 0.0005 else f"{p:.0e}"

"""The logit lens as pictures: layers x positions with the top tokens written in, and curves through depth at one position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from components.figures.theme import LINES, MONO, colours, compact, escape, figure, number, scale_bar, sequential, template, token_ticks, with_names, with_scale

MODES = {
    "probability": "probability of the top token",
    "entropy": "entropy, nats",
    "kl": "KL(model || row), nats",
    "rank": "rank of the token that follows",
    "chosen": "probability of the token that follows",
}


def lens_table(values: NDArray[np.floating], top_texts: Sequence[Sequence[Sequence[str]]], top_logprobs: NDArray[np.floating], rows: Sequence[str],
               labels: Sequence[str], first: int = 0, mode: str = "probability", position: int | None = None, theme: str = "light",
               following: Sequence[str] = (), token: str = "", n_prompt: int | None = None) -> go.Figure:  # fmt: skip
    """Each layer's best guess at each position, written in the cell; the colour is `mode`.

    values:       (row, pos) what the colour shows: probability of the top token, entropy or KL in nats, rank (0 = best, -1: none) or probability of a token
    top_texts:    [row][pos][k] display text of the best tokens, best first; top_logprobs: (row, pos, k)
    rows:         "embed", "0", "1", ... from the input up, drawn bottom to top
    labels:       display text of the positions shown, the first of which is position `first` of the prompt
    following:    display text of the token that really follows each position, for the hover
    token:        display text of the one token that rank and probability are of, where it is not the one that follows
    n_prompt:     tokens of the prompt; a line stands where the generated ones begin
    """
    shown, limits, bar = _colour(values, mode)
    written = [[_cell_text(top_texts[r][p][0], values[r, p], mode) for p in range(len(labels))] for r in range(len(rows))]
    hovers = np.array([[_hover(rows[r], first + p, labels[p], top_texts[r][p], top_logprobs[r, p], values[r, p], mode, token or (following[p] if following else None))
                        for p in range(len(labels))] for r in range(len(rows))], dtype=object)  # fmt: skip
    cells = go.Heatmap(
        z=compact(shown), x=np.arange(first, first + len(labels), dtype=np.int32), text=written, texttemplate="%{text}", textfont={"family": MONO, "size": 11},
        customdata=hovers, hovertemplate="%{customdata}<extra></extra>", zmin=limits[0], zmax=limits[1], colorscale=sequential(theme), xgap=1, ygap=1,
        colorbar=bar, name="-log10 of the rank" if mode == "rank" else MODES[mode],
    )  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"])
    ticks = token_ticks(labels, most=len(labels))
    ticks["tickvals"] = [first + at for at in ticks["tickvals"]]
    found.update_xaxes(side="top", tickangle=0 if len(labels) <= 24 else -45, showgrid=False, zeroline=False, **ticks)
    found.update_yaxes(showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(len(rows))), ticktext=[row_label(r) for r in rows])
    if position is not None and first <= position < first + len(labels):
        found.add_shape(type="rect", x0=position - 0.5, x1=position + 0.5, y0=-0.5, y1=len(rows) - 0.5, line={"color": colours(theme)["accent"], "width": 2})
    if n_prompt is not None and first < n_prompt < first + len(labels):
        found.add_shape(type="line", x0=n_prompt - 0.5, x1=n_prompt - 0.5, y0=-0.5, y1=len(rows) - 0.5, line={"color": colours(theme)["ink-3"], "width": 2, "dash": "dot"})
    with_names(found, [f"{first + at} {label}" for at, label in enumerate(labels)], [row_label(r) for r in rows])
    said = MODES[mode].replace("the token that follows", token) if token else MODES[mode]
    return with_scale(found, f"{said}, log scale" if mode == "rank" else said, theme)


def depth_curves(curves: Mapping[str, NDArray[np.floating]], rows: Sequence[str], theme: str = "light", ranks: Sequence[str] = (),
                 side_by_side: bool = False) -> go.Figure:  # fmt: skip
    """Quantities at one position through depth, a small plot each, since their units differ.

    curves: title -> (row,). Titles in `ranks` are ranks from 1, drawn on a log axis with the best at the top.
    """
    n = len(curves)
    found = make_subplots(rows=1 if side_by_side else n, cols=n if side_by_side else 1, shared_xaxes=not side_by_side, vertical_spacing=0.14,
                          horizontal_spacing=0.08, subplot_titles=[escape(title) for title in curves])  # fmt: skip
    palette = LINES["dark" if theme == "dark" else "light"]
    at, names = list(range(len(rows))), [row_label(r) for r in rows]
    mode = "markers" if any("." in row for row in rows) else "lines+markers"  # heads of a layer do not follow each other
    for i, (title, values) in enumerate(curves.items()):
        place = {"row": 1, "col": i + 1} if side_by_side else {"row": i + 1, "col": 1}
        line = go.Scatter(x=at, y=compact(values), mode=mode, line={"color": palette[i % len(palette)], "width": 2}, marker={"size": 6},
                          customdata=names, hovertemplate="%{customdata}<br>%{y:.5g}<extra></extra>")  # fmt: skip
        found.add_trace(line, **place)
        axis = _rank_axis(values) if title in ranks else {"rangemode": "tozero", "nticks": 5}
        found.update_yaxes(**axis, **place)
    step = max(1, -(-len(rows) // 12))
    found.update_layout(template=template(theme), margin={"l": 8, "r": 12, "t": 26, "b": 8})
    found.update_annotations(font={"size": 12, "color": colours(theme)["ink-2"]})
    found.update_xaxes(tickmode="array", tickvals=at[::step], ticktext=names[::step], zeroline=False)
    return found


def target_curves(logprobs: NDArray[np.floating], ranks: NDArray[np.integer], rows: Sequence[str], token: str, theme: str = "light") -> go.Figure:
    """Probability and rank of one token at one position through depth. logprobs (row,) in nats; ranks (row,) from 0, drawn from 1; -1: none."""
    probability, rank = f"probability of {token}", f"rank of {token}, 1 = best"
    curves = {probability: np.exp(logprobs.astype(np.float64)), rank: np.where(ranks >= 0, ranks + 1.0, np.nan)}
    return depth_curves(curves, rows, theme, ranks=(rank,), side_by_side=True)


def _rank_axis(ranks: NDArray[np.floating]) -> dict[str, Any]:
    """A log axis from just above rank 1 at the top to the worst rank, marked at powers of ten."""
    decades = max(1.0, float(np.ceil(np.log10(max(ranks[np.isfinite(ranks)], default=1.0)))))
    marks = [10**d for d in range(int(decades) + 1)]
    return {"type": "log", "range": [decades, -0.12], "tickmode": "array", "tickvals": marks, "ticktext": [f"{m:,}" for m in marks], "zeroline": False}


def row_label(row: str) -> str:
    """"embed", "L3", "3.1" (a head) or "model"."""
    return f"L{row}" if row.isdigit() else row


def _colour(values: NDArray[np.floating], mode: str) -> tuple[NDArray[np.floating], tuple[float, float], dict[str, Any]]:
    """What is drawn, its limits, its scale bar. Ranks are drawn as -log10(rank + 1): the best token darkest."""
    if mode == "rank":
        with np.errstate(invalid="ignore", divide="ignore"):
            shown = np.where(values >= 0, -np.log10(np.maximum(values, 0) + 1.0), np.nan)
        lowest = min(-1.0, float(np.nanmin(shown)) if np.isfinite(shown).any() else -1.0)
        decades = list(range(int(np.floor(lowest)), 1))
        bar = scale_bar(tickvals=decades, ticktext=[f"{10**-d:,}" for d in decades])
        return shown, (lowest, 0.0), bar
    if mode in ("probability", "chosen"):
        return values, (0.0, 1.0), scale_bar(tickvals=[0, 0.5, 1])
    finite = values[np.isfinite(values)]
    top = float(finite.max()) if len(finite) and finite.max() > 0 else 1.0
    return values, (0.0, top), scale_bar(nticks=4)


def _cell_text(token: str, value: float, mode: str) -> str:
    if mode == "rank":
        return f"{int(value) + 1:,}" if value >= 0 else ""
    cut = token if len(token) <= 8 else f"{token[:7]}…"
    return escape(cut)


def _hover(row: str, position: int, label: str, texts: Sequence[str], logprobs: NDArray[np.floating], value: float, mode: str, following: str | None) -> str:
    lines = [f"{row_label(row)} at {escape(label)} (position {position})"]
    if mode == "rank":
        rank = f"rank {int(value) + 1:,}" if value >= 0 else "no rank among NaN"
        lines.append(f"{escape(following)}: {rank}" if following else "nothing follows")
    elif mode == "chosen":
        lines.append(f"{escape(following)}: probability {number(float(value))}" if following else "nothing follows")
    elif mode != "probability":
        lines.append(f"{MODES[mode]} {number(float(value))}")
    lines += [f"{np.exp(float(lp)):8.4f}  {escape(text)}" for text, lp in zip(texts, logprobs, strict=True)]
    return "<br>".join(lines)


def held_out_bars(kl: NDArray[np.floating], rows: Sequence[str], theme: str = "light") -> go.Figure:
    """Mean KL(model || lens) of each row on held-out text, a bar before training (the logit lens) and one after. kl: (row, 2) in nats."""
    palette = LINES["dark" if theme == "dark" else "light"]
    names = [row_label(row) for row in rows]
    bars = [
        go.Bar(x=names, y=compact(kl[:, i]), name=name, marker={"color": colour}, hovertemplate=f"%{{x}}<br>{name}: KL %{{y:.4g}} nats<extra></extra>")
        for i, (name, colour) in enumerate((("logit lens", colours(theme)["line-strong"]), ("tuned lens", palette[0])))
    ]
    found = figure(theme, *bars, barmode="group", bargap=0.3, showlegend=True, margin={"l": 8, "r": 12, "t": 28, "b": 8})
    found.update_layout(legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"size": 12}})
    found.update_xaxes(type="category", zeroline=False, showgrid=False, nticks=34)
    found.update_yaxes(rangemode="tozero", nticks=5, title="KL on held-out text, nats", zeroline=False)
    return found

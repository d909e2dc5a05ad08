"""Attention as pictures: the pattern of one head, and one metric over all heads."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from components.figures.theme import colours, compact, diverging, escape, figure, number, scale_bar, sequential, span, token_ticks, with_scale

LARGEST = 256  # cells a side: more would be finer than the pixels of a card

Edges = NDArray[np.int64]

# Measuring labels to make room for them takes longer than drawing the cells: a row of them is laid out up to three times.
_QUICK_AXIS = {"automargin": False, "ticklabeloverflow": "allow", "showgrid": False, "zeroline": False}
_LETTER = 7  # pixels of a letter of a tick label


def attention_pattern(
    pattern: NDArray[np.floating],
    labels: Sequence[str],
    theme: str = "light",
    sqrt: bool = False,
    position: int | None = None,
    edges: tuple[Edges, Edges] | None = None,
    unit: str = "probability",
    limit: float = 1.0,
    signed: bool = False,
) -> go.Figure:
    """Where one head looks: rows are the tokens that look (queries), columns where they look (keys), colour the probability.

    pattern:  (q_pos, k_pos), NaN where nothing is, at most LARGEST a side: a larger map is reduced first, and its edges say which positions
              each cell stands for: [rows[a]:rows[a+1], columns[b]:columns[b+1]]. Both axes count positions.
    labels:   display text of every token of the prompt
    sqrt:     colour by the square root, which shows weak attention
    position: a query row to frame
    unit, limit: what the values are, and the top of their colours; signed: they run from -limit to limit

    What the hover says stands in the figure's `meta`, once a row and a column, and is put together in the browser (assets/attention.js): one
    text a cell would be ten times the picture. The triangle above the diagonal is left blank: a causal model cannot look ahead.
    """
    rows, columns = edges if edges is not None else (np.arange(pattern.shape[0] + 1), np.arange(pattern.shape[1] + 1))
    values = compact(pattern).copy()
    values[columns[None, :-1] > rows[1:, None] - 1] = np.nan
    root = sqrt and not signed
    top = go.Heatmap(
        z=compact(np.sqrt(values) if root else values), x=_centres(columns), y=_centres(rows), hoverinfo="none", hoverongaps=False, zmin=-limit if signed else 0,
        zmax=limit**0.5 if root else limit, colorscale=diverging(theme) if signed else sequential(theme), colorbar=_bar(limit, root, signed),
    )  # fmt: skip
    meta = {"sqrt": root, "unit": unit, "y": _names(labels, rows), "x": _names(labels, columns)}
    found = figure(theme, top, shapes=_outline(rows, columns, theme) + _frame(rows, position, columns, theme), meta=meta)
    x_ticks, y_ticks = _ticks(labels, columns), _ticks(labels, rows)
    found.update_layout(margin={"l": 14 + _LETTER * _longest(y_ticks), "t": 22 + int(0.72 * _LETTER * _longest(x_ticks)), "r": 30})
    whole = rows[0] == columns[0] == 0 and rows[-1] == columns[-1] == len(labels)
    square = {"scaleanchor": "x", "constrain": "domain", "constraintoward": "top"} if whole else {}
    found.update_xaxes(side="top", tickangle=-45, range=[columns[0] - 0.5, columns[-1] - 0.5], **_QUICK_AXIS, **x_ticks, **({"constrain": "domain"} if whole else {}))
    found.update_yaxes(autorange=False, range=[rows[-1] - 0.5, rows[0] - 0.5], **_QUICK_AXIS, **y_ticks, **square)
    return with_scale(found, f"{unit}, square root scale" if root else unit, theme)


def head_heatmap(values: NDArray[np.floating], layers: Sequence[int], title: str, chosen: tuple[int, int] | None = None, theme: str = "light",
                 limit: float | None = None) -> go.Figure:  # fmt: skip
    """One metric of every head. values: (layer, head), NaN where it is undefined; limit: top of the colour scale (None: the largest).

    `layers` are the layers' true numbers. Clicking a cell gives y = row index, x = head. The frame around `chosen` is the only shape: the browser moves it.
    """
    finite = values[np.isfinite(values)]
    top = limit if limit is not None else float(finite.max()) if len(finite) else 1.0
    hovers = np.array([[f"head {layer}.{h}<br>{escape(title)} {v:.4f}" for h, v in enumerate(row)] for layer, row in zip(layers, values, strict=True)])
    cells = go.Heatmap(z=compact(values), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", zmin=0, zmax=top or 1.0, xgap=1, ygap=1,
                       colorscale=sequential(theme), colorbar=scale_bar(nticks=4), hoverongaps=False)  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"], meta={"layers": list(layers)})
    if chosen is not None and chosen[0] in layers:
        row = list(layers).index(chosen[0])
        found.add_shape(type="rect", x0=chosen[1] - 0.5, x1=chosen[1] + 0.5, y0=row - 0.5, y1=row + 0.5, line={"color": colours(theme)["accent"], "width": 2})
    step = max(1, len(layers) // 16)
    found.update_xaxes(title="head", side="top", showgrid=False, zeroline=False, dtick=max(1, values.shape[1] // 16), tickangle=0, ticklabeloverflow="allow")
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, ticklabeloverflow="allow", tickmode="array", tickvals=list(range(0, len(layers), step)),
                       ticktext=[f"L{layer}" for layer in list(layers)[::step]])  # fmt: skip
    return with_scale(found, title, theme)


def _centres(edges: Edges) -> NDArray[np.float32]:
    """The middle of each cell, in positions."""
    return compact((edges[:-1] + edges[1:] - 1) / 2)


def _ticks(labels: Sequence[str], edges: Edges) -> dict[str, Any]:
    """Token labels at the positions between the edges, evenly thinned."""
    first = int(edges[0])
    ticks = token_ticks(labels[first : int(edges[-1])], 40 if edges[-1] - edges[0] <= LARGEST else 24)
    return {**ticks, "tickvals": [first + at for at in ticks["tickvals"]]}


def _longest(ticks: dict[str, Any]) -> int:
    return max((len(html.unescape(text)) for text in ticks["ticktext"]), default=0)


def _names(labels: Sequence[str], edges: Edges) -> list[str]:
    """What each row or column stands for: a token and its position, or a range of them."""
    return [_name(labels, *span(edges, i)) for i in range(len(edges) - 1)]


def _name(labels: Sequence[str], first: int, last: int) -> str:
    if first == last:
        return f"{escape(labels[first])} (position {first})"
    return f"positions {first}-{last}: {escape(labels[first])} ... {escape(labels[last])}"


def _bar(limit: float, root: bool, signed: bool) -> dict[str, object]:
    if signed:
        return scale_bar(tickvals=[-limit, 0, limit], ticktext=[number(-limit), "0", number(limit)])
    if not root:
        return scale_bar(tickvals=[0, limit / 2, limit], ticktext=["0", number(limit / 2), number(limit)])
    marks = [share * limit for share in (0, 0.01, 0.1, 0.25, 0.5, 1)]
    return scale_bar(tickvals=[mark**0.5 for mark in marks], ticktext=[number(mark) for mark in marks])


def _outline(rows: Edges, columns: Edges, theme: str) -> list[dict[str, object]]:
    """Hairlines around the cells of the triangle (its edge alone when the cells are small): zero is the card's own ground."""
    top, bottom, left, right = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
    if max(bottom - top, right - left) > 48:
        begin, end = max(left, top), min(bottom, right)  # of the diagonal
        edge = f"V{end - 0.5} L{begin - 0.5},{begin - 0.5}" if end > begin else f"V{top - 0.5}"
        path = f"M{left - 0.5},{top - 0.5} V{bottom - 0.5} H{end - 0.5} {edge}" if bottom > left else ""
    else:
        lines = [f"M{left - 0.5},{i + 0.5} H{min(i + 1, right) - 0.5}" for i in range(max(top, left), bottom)]
        lines += [f"M{j + 0.5},{max(j, top) - 0.5} V{bottom - 0.5}" for j in range(left, min(right, bottom))] + [f"M{left - 0.5},{max(top, left) - 0.5} V{bottom - 0.5}"]
        path = " ".join([*lines, f"M{left - 0.5},{max(top, left) - 0.5} H{min(max(top, left) + 1, right) - 0.5}"])
    return [{"type": "path", "path": path, "line": {"color": colours(theme)["line"], "width": 1}, "layer": "above"}] if path else []


def _frame(rows: Edges, position: int | None, columns: Edges, theme: str) -> list[dict[str, object]]:
    """A frame around the row of a position, as far as it can look."""
    if position is None or not rows[0] <= position < rows[-1]:
        return []
    first, last = span(rows, int(np.searchsorted(rows, position, side="right")) - 1)
    end = min(last + 1, int(columns[-1]))
    if end <= columns[0]:
        return []
    return [{"type": "rect", "x0": int(columns[0]) - 0.5, "x1": end - 0.5, "y0": first - 0.5, "y1": last + 0.5,
             "line": {"color": colours(theme)["accent"], "width": 1.5}, "layer": "above"}]  # fmt: skip

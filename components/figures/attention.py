"""Attention as pictures: the pattern of one head, and one metric over all heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from components.figures.theme import colours, compact, escape, figure, scale_bar, sequential, span, token_ticks, with_names, with_scale

LARGEST = 256  # cells a side: more would be finer than the pixels of a card

Edges = NDArray[np.int64]


def attention_pattern(
    pattern: NDArray[np.floating],
    labels: Sequence[str],
    theme: str = "light",
    sqrt: bool = False,
    position: int | None = None,
    edges: tuple[Edges, Edges] | None = None,
) -> go.Figure:
    """Where one head looks: rows are the tokens that look (queries), columns where they look (keys), colour the probability.

    pattern:  (q_pos, k_pos), at most LARGEST a side; reduce a larger one with `analysis.attention.reduce_max` and pass its edges,
              so that the hover says which tokens a cell stands for
    labels:   display text of every token of the prompt
    sqrt:     colour by the square root, which shows weak attention; hovers keep the probability
    position: a query row to frame

    The triangle above the diagonal is left blank: a causal model cannot look ahead.
    """
    rows, columns = edges if edges is not None else (np.arange(pattern.shape[0] + 1), np.arange(pattern.shape[1] + 1))
    values = compact(pattern).copy()
    values[columns[None, :-1] > rows[1:, None] - 1] = np.nan
    shown = np.sqrt(values) if sqrt else values
    top = go.Heatmap(
        z=compact(shown), customdata=_hovers(values, labels, rows, columns), hovertemplate="%{customdata}<extra></extra>", hoverongaps=False,
        name="square root of probability" if sqrt else "probability", zmin=0, zmax=1, colorscale=sequential(theme), colorbar=_probability_bar(sqrt),
    )  # fmt: skip
    row_labels = [labels[int(at)] for at in rows[:-1]]
    column_labels = [labels[int(at)] for at in columns[:-1]]
    side = max(values.shape)
    found = figure(theme, top, shapes=_outline(values.shape, theme) + _frame(rows, position, values.shape[1], theme))
    found.update_xaxes(side="top", tickangle=-45, showgrid=False, zeroline=False, range=[-0.5, side - 0.5], constrain="domain", **token_ticks(column_labels))
    found.update_yaxes(autorange=False, range=[side - 0.5, -0.5], showgrid=False, zeroline=False, scaleanchor="x", constrain="domain", constraintoward="top",
                       **token_ticks(row_labels))  # fmt: skip
    with_names(found, [_place(labels, *span(columns, j)) for j in range(len(columns) - 1)], [_place(labels, *span(rows, i)) for i in range(len(rows) - 1)])
    return with_scale(found, "probability, square root scale" if sqrt else "probability", theme)


def head_heatmap(values: NDArray[np.floating], layers: Sequence[int], title: str, chosen: tuple[int, int] | None = None, theme: str = "light",
                 limit: float | None = None) -> go.Figure:  # fmt: skip
    """One metric of every head. values: (layer, head), NaN where it is undefined; limit: top of the colour scale (None: the largest).

    `layers` are the layers' true numbers. Clicking a cell gives y = row index, x = head.
    """
    finite = values[np.isfinite(values)]
    top = limit if limit is not None else float(finite.max()) if len(finite) else 1.0
    hovers = np.array([[f"head {layer}.{h}<br>{escape(title)} {v:.4f}" for h, v in enumerate(row)] for layer, row in zip(layers, values, strict=True)])
    cells = go.Heatmap(z=compact(values), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", zmin=0, zmax=top or 1.0, xgap=1, ygap=1,
                       colorscale=sequential(theme), colorbar=scale_bar(nticks=4), hoverongaps=False)  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"])
    if chosen is not None and chosen[0] in layers:
        row = list(layers).index(chosen[0])
        found.add_shape(type="rect", x0=chosen[1] - 0.5, x1=chosen[1] + 0.5, y0=row - 0.5, y1=row + 0.5, line={"color": colours(theme)["accent"], "width": 2})
    step = max(1, len(layers) // 24)
    found.update_xaxes(title="head", side="top", showgrid=False, zeroline=False, dtick=max(1, values.shape[1] // 24))
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(layers), step)),
                       ticktext=[f"L{layer}" for layer in list(layers)[::step]])  # fmt: skip
    return with_scale(found, title, theme)


def _hovers(values: NDArray[np.floating], labels: Sequence[str], rows: Edges, columns: Edges) -> NDArray[np.object_]:
    """What each cell says: both tokens, their positions, the probability; for a reduced cell the two ranges and the largest value in it."""
    queries = [_name(labels, *span(rows, i)) for i in range(values.shape[0])]
    keys = [_name(labels, *span(columns, j)) for j in range(values.shape[1])]
    out = np.full(values.shape, "", dtype=object)
    for i, j in zip(*np.nonzero(~np.isnan(values)), strict=True):
        out[i, j] = f"{queries[i]}<br>looks at {keys[j]}<br>{values[i, j]:.5f}"
    return out


def _place(labels: Sequence[str], first: int, last: int) -> str:
    """A row or column of the CSV: position and token, of a reduced cell the range of positions."""
    return f"{first} {labels[first]}" if first == last else f"{first}-{last}"


def _name(labels: Sequence[str], first: int, last: int) -> str:
    if first == last:
        return f"{escape(labels[first])} (position {first})"
    return f"positions {first}-{last}: {escape(labels[first])} ... {escape(labels[last])}"


def _probability_bar(sqrt: bool) -> dict[str, object]:
    if not sqrt:
        return scale_bar(tickvals=[0, 0.5, 1])
    marks = [0, 0.01, 0.1, 0.25, 0.5, 1]
    return scale_bar(tickvals=[m**0.5 for m in marks], ticktext=[f"{m:g}" for m in marks])


def _outline(shape: tuple[int, ...], theme: str) -> list[dict[str, object]]:
    """Hairlines around the cells of the triangle (its edge alone when the cells are small): zero is the card's own ground."""
    rows, columns = shape
    if rows > 48:
        path = f"M-0.5,-0.5 L-0.5,{rows - 0.5} L{columns - 0.5},{rows - 0.5} Z"
    else:
        widths = [min(i + 1, columns) - 0.5 for i in range(rows)]
        lines = [f"M-0.5,{i + 0.5} H{width}" for i, width in enumerate(widths)] + ["M-0.5,-0.5 H0.5"]
        lines += [f"M{j + 0.5},{j - 0.5} V{rows - 0.5}" for j in range(columns)] + [f"M-0.5,-0.5 V{rows - 0.5}"]
        path = " ".join(lines)
    return [{"type": "path", "path": path, "line": {"color": colours(theme)["line"], "width": 1}, "layer": "above"}]


def _frame(rows: Edges, position: int | None, n_columns: int, theme: str) -> list[dict[str, object]]:
    if position is None or not 0 <= position < rows[-1]:
        return []
    row = int(np.searchsorted(rows, position, side="right")) - 1
    return [{"type": "rect", "x0": -0.5, "x1": min(row + 1, n_columns) - 0.5, "y0": row - 0.5, "y1": row + 0.5,
             "line": {"color": colours(theme)["accent"], "width": 1.5}, "layer": "above"}]  # fmt: skip

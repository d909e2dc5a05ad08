"""One token's attention as a small figure: what it looks at above, what looks at it below, over the positions of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from components.figures.theme import LINES, colours, compact, escape, template, token_ticks

MOST_BARS = 512  # more would be thinner than a pixel


def token_attention(looks_at: NDArray[np.floating], looked_at_by: NDArray[np.floating], position: int, labels: Sequence[str], theme: str = "light") -> go.Figure:
    """looks_at: (position + 1,) attention to each token up to itself; looked_at_by: (n - position,) from each token from itself on; labels: all n.

    Beyond MOST_BARS tokens a bar is the largest value of its run of tokens, and the hover names that one.
    """
    n = len(labels)
    found = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.14)
    for row, (values, first, words) in enumerate(((looks_at, 0, "looks at"), (looked_at_by, position, "is looked at by")), start=1):
        at, heights = _largest(np.asarray(values, np.float32), first, n)
        hovers = [f"{words} {escape(labels[i])} (position {i})<br>{height:.5f}" for i, height in zip(at, heights, strict=True)]
        look: dict[str, Any] = {"x": at, "y": compact(heights), "customdata": hovers, "hovertemplate": "%{customdata}<extra></extra>", "name": words}
        colour = LINES["dark" if theme == "dark" else "light"][row - 1]
        if n > MOST_BARS // 4:  # one outline instead of hundreds of bars, which take longer to draw than a pattern
            found.add_scatter(**look, mode="lines", line={"color": colour, "width": 1, "shape": "hvh"}, fill="tozeroy", row=row, col=1)
        else:
            found.add_bar(**look, marker={"color": colour}, width=0.8, row=row, col=1)
        top = float(np.max(heights[np.isfinite(heights)], initial=0.0))
        found.update_yaxes(title=words, range=[0, max(1.06 * top, 0.02)], tickformat="~g", nticks=4, row=row, col=1)
    found.update_layout(template=template(theme), bargap=0, margin={"b": 72, "l": 62})
    ticks = token_ticks(labels, 48 if n <= MOST_BARS // 2 else 24)
    found.update_xaxes(range=[-0.6, n - 0.4], showgrid=False, zeroline=False, **ticks, tickangle=-45, automargin=False, ticklabeloverflow="allow")
    found.update_xaxes(showticklabels=False, row=1, col=1)
    for row in (1, 2):
        found.add_vline(x=position, line={"color": colours(theme)["ink-3"], "width": 1, "dash": "dot"}, row=row, col=1)  # type: ignore[arg-type]
    return found


def _largest(values: NDArray[np.float32], first: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Positions and heights of the bars: all of them, or the largest of each run."""
    step = max(1, -(-n // MOST_BARS))
    at = [start + int(np.argmax(np.nan_to_num(values[start : start + step], nan=-1))) for start in range(0, len(values), step)]
    return np.array(at, np.int64) + first, values[at]

"""One neuron over the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from components.figures.theme import colours, compact, escape, figure, number, token_ticks, with_names


def neuron_bars(values: NDArray[np.floating], labels: Sequence[str], position: int, theme: str = "light") -> go.Figure:
    """The neuron's value at every token: red above 0, blue below; the chosen position outlined. values: (pos,)."""
    c = colours(theme)
    finite = np.isfinite(values)
    hovers = [f"{escape(label)} (position {at})<br>{number(float(value))}" for at, (label, value) in enumerate(zip(labels, values, strict=True))]
    bars = go.Bar(x=list(range(len(values))), y=compact(values), name="value", customdata=hovers, hovertemplate="%{customdata}<extra></extra>",
                  marker={"color": [c["pos"] if value >= 0 else c["neg"] for value in np.where(finite, values, 0)],
                          "line": {"color": c["ink"], "width": [2 if at == position else 0 for at in range(len(values))]}})  # fmt: skip
    found = figure(theme, bars, bargap=0.15)
    found.update_xaxes(tickangle=-45, showgrid=False, zeroline=False, **token_ticks(labels))
    found.update_yaxes(title="value", nticks=6, zeroline=True)
    return with_names(found, [f"{at} {label}" for at, label in enumerate(labels)])

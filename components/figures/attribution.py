"""Direct logit attribution as pictures: heads as a map, layers as bars, the sum through depth as a line."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from components.figures.theme import LINES, colours, compact, diverging, escape, figure, number, scale_bar, with_names, with_scale


def head_contributions(heads: NDArray[np.floating], theme: str = "light", unit: str = "logits") -> go.Figure:
    """What each head adds: red for, blue against, zero the ground. heads: (layer, head); NaN: the layer's heads are not known apart."""
    finite = np.abs(heads[np.isfinite(heads)])
    limit = float(finite.max()) if len(finite) and finite.max() > 0 else 1.0
    hovers = np.array([[f"head {layer}.{head}<br>{number(float(v))} {unit}" for head, v in enumerate(row)] for layer, row in enumerate(heads)], dtype=object)
    cells = go.Heatmap(z=compact(heads), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", zmin=-limit, zmax=limit, zmid=0, xgap=1, ygap=1,
                       colorscale=diverging(theme), colorbar=scale_bar(tickvals=[-limit, 0, limit], tickformat="+.2~f"), hoverongaps=True)  # fmt: skip
    found = figure(theme, cells, plot_bgcolor=colours(theme)["line"])
    step = max(1, len(heads) // 24)
    found.update_xaxes(title="head", side="top", showgrid=False, zeroline=False, dtick=max(1, heads.shape[1] // 24))
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(heads), step)),
                       ticktext=[f"L{layer}" for layer in range(0, len(heads), step)])  # fmt: skip
    with_names(found, [f"head {head}" for head in range(heads.shape[1])], [f"L{layer}" for layer in range(len(heads))])
    return with_scale(found, f"added to the logit, {unit}", theme)


def part_bars(names: list[str], attention: NDArray[np.floating], mlp: NDArray[np.floating], theme: str = "light") -> go.Figure:
    """Attention beside MLP of each layer. names: the rows, top first: what is outside the layers ("embed", ...), then "L0", ...;
    mlp: (row,), of the rows outside what they are themselves; attention: (layer,), which are the last rows."""
    palette = LINES["dark" if theme == "dark" else "light"]
    at = list(range(len(names)))
    bars = [
        go.Bar(y=at[-len(values) :], x=compact(values), name=title, orientation="h", marker={"color": colour}, customdata=[escape(name) for name in names[-len(values) :]],
               hovertemplate=f"%{{customdata}}, {title}<br>%{{x:.4f}}<extra></extra>")
        for title, values, colour in (("attention", attention, palette[0]), ("embedding or MLP", mlp, palette[1]))
    ]  # fmt: skip
    found = figure(theme, *bars, barmode="group", bargap=0.25, bargroupgap=0.05, showlegend=True, legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"})
    step = max(1, len(names) // 24)
    found.update_yaxes(autorange="reversed", tickmode="array", tickvals=at[::step], ticktext=[escape(name) for name in names[::step]], zeroline=False, showgrid=False)
    found.update_xaxes(title="added to the logit", zeroline=True, nticks=7)
    return found


def cumulative_line(names: list[str], values: NDArray[np.floating], logit: float | None, theme: str = "light", unit: str = "logit") -> go.Figure:
    """The sum so far, after each step of the computation. names: the steps ("embed", "attn 0", "mlp 0", ...); values: (step,); logit: the model's own, dotted."""
    palette = LINES["dark" if theme == "dark" else "light"]
    at = list(range(len(names)))
    line = go.Scatter(x=at, y=compact(values), name="sum so far",
                      mode="lines+markers", line={"color": palette[0], "width": 2}, marker={"size": 5}, customdata=[escape(name) for name in names],
                      hovertemplate="after %{customdata}<br>%{y:.4f}<extra></extra>")  # fmt: skip
    found = figure(theme, line)
    if logit is not None and np.isfinite(logit):
        found.add_hline(y=logit, line={"color": colours(theme)["ink-3"], "width": 1, "dash": "dot"}, annotation_text="the model", annotation_position="top left",
                        annotation_font={"size": 11, "color": colours(theme)["ink-3"]})  # fmt: skip
    step = max(1, -(-len(names) // 24))
    found.update_xaxes(tickmode="array", tickvals=at[::step], ticktext=[escape(name) for name in names[::step]], zeroline=False)
    found.update_yaxes(title=unit, zeroline=True, nticks=6)
    return with_names(found, names)

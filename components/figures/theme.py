"""The look of every figure: names and values of assets/layerscope.css as Plotly templates and colour scales.

Sequential scales run from the card's ground through the accent to ink, so that 0 is invisible; diverging scales have the
ground at 0. Plotly cannot read CSS variables, so the values stand here once more.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

Theme = Literal["light", "dark"]

COLOURS: dict[str, dict[str, str]] = {
    "light": {
        "surface": "#ffffff", "surface-2": "#f1f3f6", "line": "#e3e7ed", "line-strong": "#cbd2dc", "ink": "#16202e", "ink-2": "#4a5768", "ink-3": "#667286",
        "accent": "#3b5bdb", "seq-0": "#ffffff", "seq-1": "#dfe6ff", "seq-2": "#9db2ff", "seq-3": "#4b67e0", "seq-4": "#1b2a78",
        "neg": "#2166ac", "zero": "#ffffff", "pos": "#b2182b",
    },
    "dark": {
        "surface": "#151c26", "surface-2": "#1c2530", "line": "#263140", "line-strong": "#374659", "ink": "#e8edf4", "ink-2": "#aab6c6", "ink-3": "#8592a5",
        "accent": "#8ea6ff", "seq-0": "#151c26", "seq-1": "#24336b", "seq-2": "#3f59c4", "seq-3": "#87a0ff", "seq-4": "#f0f3ff",
        "neg": "#67a9cf", "zero": "#151c26", "pos": "#ef8a62",
    },
}  # fmt: skip

SANS = '"Inter Variable", system-ui, sans-serif'
MONO = '"JetBrains Mono Variable", ui-monospace, monospace'

# Lines that are compared in one picture: distinguishable in both themes and for the colour-blind (after Okabe and Ito 2008).
LINES: dict[str, tuple[str, ...]] = {
    "light": ("#3b5bdb", "#c2571a", "#1f7a4d", "#8e3b8a"),
    "dark": ("#8ea6ff", "#f0a35e", "#6fd3a0", "#d99ad6"),
}

Scale = list[list[Any]]

_BAR, _BELOW = 170, 46  # pixels: length of the scale bar, room under the picture for it


def colours(theme: str) -> dict[str, str]:
    """Colour names of one theme; anything but "dark" is light."""
    return COLOURS["dark" if theme == "dark" else "light"]


def sequential(theme: str) -> Scale:
    """0 = the card's ground, 1 = ink."""
    c = colours(theme)
    return [[i / 4, c[f"seq-{i}"]] for i in range(5)]


def diverging(theme: str) -> Scale:
    """-r = blue, 0 = the card's ground, r = red (light) or orange (dark)."""
    c = colours(theme)
    return [[0.0, c["neg"]], [0.5, c["zero"]], [1.0, c["pos"]]]


def template(theme: str) -> go.layout.Template:
    """Transparent paper, hairline grid, small quiet type."""
    c = colours(theme)
    axis = {"gridcolor": c["line"], "linecolor": c["line-strong"], "zerolinecolor": c["line-strong"], "zerolinewidth": 1,
            "ticks": "outside", "ticklen": 4, "tickcolor": "rgba(0,0,0,0)", "automargin": True,
            "title": {"font": {"size": 12, "color": c["ink-3"]}, "standoff": 8}, "tickfont": {"color": c["ink-2"]}}  # fmt: skip
    hover = {"bgcolor": c["surface"], "bordercolor": c["line-strong"], "font": {"family": MONO, "size": 12, "color": c["ink"]}, "align": "left"}
    layout = {
        "font": {"family": SANS, "size": 12, "color": c["ink-2"]},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "colorway": LINES["dark" if theme == "dark" else "light"],
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8}, "xaxis": axis, "yaxis": axis, "hoverlabel": hover, "showlegend": False, "dragmode": "zoom",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": c["ink-3"], "activecolor": c["accent"]},
    }  # fmt: skip
    return go.layout.Template(layout=layout)


def figure(theme: str, *traces: Any, **layout: Any) -> go.Figure:
    """A figure in the theme. Zoom survives a redraw as long as `uirevision` stays the same."""
    return go.Figure(data=list(traces), layout={"template": template(theme), **layout})


def no_figure(theme: str, text: str) -> go.Figure:
    """An empty figure that says why."""
    hidden = {"visible": False}
    note = {"text": escape(text), "showarrow": False, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5, "font": {"color": colours(theme)["ink-3"], "size": 13}}
    return figure(theme, xaxis=hidden, yaxis=hidden, annotations=[note])


def scale_bar(**marks: Any) -> dict[str, Any]:
    """A slim horizontal scale bar under the picture's left edge; `marks` are tickvals and ticktext."""
    return {"orientation": "h", "thickness": 8, "len": _BAR, "lenmode": "pixels", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom",
            "outlinewidth": 0, "ypad": 4, "xpad": 0, "tickfont": {"size": 11}, **marks}  # fmt: skip


def with_scale(found: go.Figure, title: str, theme: str) -> go.Figure:
    """Makes room under the picture for its scale bar and writes the unit beside it."""
    found.update_layout(margin={"b": _BELOW})
    found.add_annotation(text=escape(title), showarrow=False, xref="paper", yref="paper", x=0, y=0, xanchor="left", yanchor="middle", xshift=_BAR + 18,
                         yshift=24 - _BELOW, font={"size": 11, "color": colours(theme)["ink-2"]})  # fmt: skip
    return found


def with_names(found: go.Figure, x: Sequence[Any] = (), y: Sequence[Any] = ()) -> go.Figure:
    """Names every place of an axis for the CSV and the table (assets/graph_data.js): the axis itself writes only those there is room for.

    In the order of the data along that axis; escaped here, and taken apart again by what writes them.
    """
    named = {letter: [escape(str(name)) for name in names] for letter, names in (("x", x), ("y", y)) if len(names)}
    found.update_layout(meta={**(found.layout.meta or {}), **named})
    return found


def escape(text: str) -> str:
    """Text that Plotly shows as it is: its pseudo-HTML (<b>, <a href>, <br>) is taken apart. Never put token text in a template string."""
    return html.escape(text, quote=False)


def token_ticks(labels: Sequence[str], most: int = 40) -> dict[str, Any]:
    """Axis settings that write token labels at whole numbers, at most `most` of them, evenly thinned.

    The axis stays numeric: on a category axis two equal tokens would become one row.
    """
    step = 1 if len(labels) <= most else -(-len(labels) // (most * 3 // 4))
    at = list(range(0, len(labels), step))
    return {"tickmode": "array", "tickvals": at, "ticktext": [escape(labels[i]) for i in at], "tickfont": {"family": MONO, "size": 11}}


def compact(values: Any) -> NDArray[np.float32]:
    """float32: what Plotly sends as bytes. float16 would be sent as a list of text, five times the size."""
    return np.ascontiguousarray(values, dtype=np.float32)


def span(edges: Sequence[int] | NDArray[np.int64], cell: int) -> tuple[int, int]:
    """First and last original index that a reduced cell stands for."""
    return int(edges[cell]), int(edges[cell + 1]) - 1


def number(value: float) -> str:
    """A number for a hover: four significant digits, NaN and infinity by name."""
    return f"{value:.4g}"

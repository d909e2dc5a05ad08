"""graph(): the one way to put a Plotly figure on a page, and the tools that save it as PNG, SVG or CSV or show it as a table."""

from __future__ import annotations

from typing import Any

from dash import dcc, html

from components.card import full_screen_button

# plotly 7 draws a "Share chart" button that uploads the figure to a cloud: showSendToCloud must stay False everywhere.
GRAPH_CONFIG = {
    "showSendToCloud": False,
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["toImage", "select2d", "lasso2d", "autoScale2d"],
}

_HIDDEN_AXIS = {"visible": False, "fixedrange": True}
_WAITING = {"layout": {"xaxis": _HIDDEN_AXIS, "yaxis": _HIDDEN_AXIS, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}}


def graph(id: str, height: int | str = 420, figure: Any = None, className: str = "") -> dcc.Graph:
    """A graph of fixed height; until its figure arrives, and while it is computed, it shimmers (assets/layerscope.css)."""
    return dcc.Graph(
        id=id,
        figure=_WAITING if figure is None else figure,
        config=GRAPH_CONFIG,
        responsive=True,
        style={"height": height, "width": "100%"},
        className=f"graph {className}".strip(),
    )


def graph_tools(id: str, export_name: str | None = None) -> list[Any]:
    """The tools of a graph for `card(tools=...)`: PNG, SVG, CSV of its data, the same as a table, full screen.

    assets/graph_tools.js does the work, assets/graph_data.js says what a graph's data are.
    """
    name = export_name or id
    titles = {"png": "Save as PNG", "svg": "Save as SVG", "csv": "Save the numbers as CSV", "table": "Show the numbers as a table"}
    save = [
        html.Button("Table" if kind == "table" else kind.upper(), className="tool", title=title, **{"data-tool": kind, "data-graph": id, "data-name": name})
        for kind, title in titles.items()
    ]
    return [*save, full_screen_button()]

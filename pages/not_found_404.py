"""The page of an address that leads nowhere."""

from __future__ import annotations

import dash
from dash import dcc, html

from components.states import empty

dash.register_page(__name__, name="Not found", order=99, group="")


def layout(**_: str) -> html.Div:
    home = dcc.Link("Home", href="/", className="btn btn-primary")
    return html.Div(empty("There is no such page", "The address leads nowhere; it may belong to a newer Layerscope.", home, "file-question-mark"), className="page")

"""Card: the one frame for pictures and tables: a title that names the thing, how to read it, tools on the right, the body."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from dash import html

from components.drawn import is_still, still
from components.icons import icon


def card(
    title: Any,
    body: Any,
    subtitle: Any = "",
    tools: Sequence[Any] = (),
    about: Any = None,
    id: str | None = None,
    className: str = "",
) -> html.Section:
    """A card. `about` (text or a list of paragraphs) says what is shown, how it is computed and where that comes from.

    `className` places it: "wide" spans the page's two columns, "fill" stretches the body to the height of its row.
    """
    right: list[Any] = [about_button(about)] if about else []
    right += list(tools)
    head = html.Div(
        [
            html.Div([html.H2(title, className="card-title"), html.P(subtitle, className="card-subtitle") if subtitle else None]),
            _tools(right) if right else None,
        ],
        className="card-head",
    )
    name = {"id": id} if id else {}
    return html.Section([head, html.Div(body, className="card-body")], className=f"ls-card {className}".strip(), **name)


def _tools(right: list[Any]) -> html.Div:
    """The tools in their order; those that no callback knows are drawn, as most of a page's components would be tools otherwise."""
    if is_still(right):
        return still(right, "card-tools")
    runs = [(same, list(run)) for same, run in itertools.groupby(right, is_still)]
    return html.Div([each for same, run in runs for each in ([still(run)] if same else run)], className="card-tools")


def cards(*children: Any) -> html.Div:
    """The two-column grid that cards stand in; one column on a narrow screen."""
    return html.Div(list(children), className="cards")


def about_button(about: Any) -> html.Details:
    """A disclosure that opens over the card; assets/menus.js closes it on Escape or a click elsewhere."""
    paragraphs = about if isinstance(about, (list, tuple)) else [about]
    body = html.Div([html.P(part) if isinstance(part, str) else part for part in paragraphs], className="popup-body")
    return html.Details([html.Summary("About", className="tool"), body], className="popup")


def full_screen_button() -> html.Button:
    """Shows the card it stands in over the whole page (assets/menus.js)."""
    return html.Button(icon("expand"), className="tool", title="Full screen", **{"data-tool": "full-screen", "aria-label": "Full screen"})

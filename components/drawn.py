"""Many small elements without Dash: thousands of cells, tokens or rows are sent as one list and drawn in the browser (assets/drawn.js).

Dash keeps a record of each of its components and walks through all of them whenever one changes: a page with 6,000 took most of a minute.
What is drawn has no callbacks of its own; listeners sit on the page and look at data attributes, as they do for all lists here. Text arrives
as text: nothing of it is parsed as markup.

    still(content)                content that no callback changes part of, as one component
    drawing(id), draws(id)        a store whose elements are drawn into a component, for what a callback writes
"""

from __future__ import annotations

import json
from typing import Any

from dash import ClientsideFunction, Input, Output, clientside_callback, dcc, html
from dash.development.base_component import Component

_NAMES = {"className": "class", "tabIndex": "tabindex", "colSpan": "colspan"}
# The tags of assets/drawn.js.
_TAGS = frozenset({"div", "span", "b", "i", "p", "h3", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "button", "details", "summary", "dl", "dt", "dd"})
_ATTRIBUTES = frozenset({"className", "tabIndex", "colSpan", "title", "role", "style"})


def still(content: Any, className: str = "still") -> html.Div:
    """A div, which by itself does not show, with `content`: html components for which `is_still` holds.

    They cost Dash one component; the browser makes the rest from `data-still`.
    """
    made = html.Div(className=className, **{"data-still": json.dumps(elements(content), ensure_ascii=False, separators=(",", ":"))})
    made.content = content  # type: ignore[attr-defined]  # for whoever looks at a layout in Python
    return made


def is_still(content: Any) -> bool:
    """Whether content can be drawn: html components of a few kinds, without an id that a callback could use, and nothing that opens an address."""
    if not isinstance(content, Component):
        return all(map(is_still, content)) if isinstance(content, (list, tuple)) else True
    made = content.to_plotly_json()
    known = made["namespace"] == "dash_html_components" and made["type"].lower() in _TAGS
    plain = all(name == "children" or name in _ATTRIBUTES or (name.startswith(("data-", "aria-")) and name != "data-still") for name in made["props"])
    return known and plain and is_still(getattr(content, "children", None))


def drawing(id: str, content: Any = None, drawn: list[Any] | None = None) -> dcc.Store:
    """The store whose elements are drawn into the component `id`, which stands on the page, empty. A callback writes `elements(...)` into its `data`.

    `drawn`: elements to begin with, in place of content.

    Call `draws(id)` once, at the top level of a module.
    """
    return dcc.Store(id=f"{id}-drawing", data=elements(content) if drawn is None else drawn)


def draws(id: str) -> None:
    """Draw whatever the store of `drawing(id)` holds."""
    store = f"{id}-drawing"
    clientside_callback(ClientsideFunction("layerscope", "draw"), Output(store, "id"), Input(store, "data"), Input(store, "id"))


def elements(content: Any) -> list[Any]:
    """Dash's html components as plain lists: texts, and [tag, attributes, children] of elements.

    >>> from dash import html
    >>> elements(html.Td("a<b", className="num"))
    [['td', {'class': 'num'}, ['a<b']]]
    """
    if content is None:
        return []
    if isinstance(content, (list, tuple)):
        return [part for item in content for part in elements(item)]
    if not isinstance(content, Component):
        return [str(content)]
    made = content.to_plotly_json()
    if made["namespace"] != "dash_html_components":
        raise TypeError(f"{made['type']} cannot be drawn: only html components can.")
    properties = {name: value for name, value in made["props"].items() if name != "children" and value not in (None, "")}
    attributes = {_NAMES.get(name, name): value for name, value in properties.items()}
    return [[made["type"].lower(), attributes, elements(getattr(content, "children", None))]]

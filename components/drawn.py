"""Many small elements without Dash: thousands of cells, tokens or rows are sent as one list and drawn in the browser (assets/drawn.js).

Dash keeps a record of each of its components and walks through all of them whenever one changes: a page with 6,000 took most of a minute.
What is drawn has no callbacks of its own; listeners sit on the page and look at data attributes, as they do for all lists here. Text arrives
as text: nothing of it is parsed as markup.
"""

from __future__ import annotations

from typing import Any

from dash import ClientsideFunction, Input, Output, clientside_callback, dcc
from dash.development.base_component import Component

_NAMES = {"className": "class", "tabIndex": "tabindex", "colSpan": "colspan", "htmlFor": "for"}


class Drawn(list[Any]):
    """Elements in the form of `elements`, made without Dash's components where there are thousands of them."""


def drawing(id: str, content: Any = None) -> dcc.Store:
    """The store whose elements are drawn into the component `id`, which stands on the page, empty. A callback writes `elements(...)` into its `data`.

    Call `draws(id)` once, at the top level of a module.
    """
    return dcc.Store(id=f"{id}-drawing", data=elements(content))


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
    if isinstance(content, Drawn):
        return list(content)
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

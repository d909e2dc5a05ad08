"""Controls that several pages use: buttons that put a value into a store, labelled fields, facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash import html

from components.drawn import is_still, still


def set_button(label: Any, store: str, value: str, className: str = "btn btn-outline-secondary", confirm: str = "", **attributes: Any) -> html.Button:
    """A button that writes {"value": value, "at": time} into a store (assets/menus.js); `confirm` is asked first.

    One listener serves all of them, so that lists may be rendered again and again without a callback for each button.
    """
    data = {"data-set": store, "data-value": value} | ({"data-confirm": confirm} if confirm else {})
    return html.Button(label, className=className, type="button", **data, **attributes)


def field(label: str, control: Any, hint: str = "", id: str | None = None) -> html.Div:
    """A control under its label; `id` is that of the control, for the label to point at."""
    name: dict[str, Any] = {"htmlFor": id} if id else {}
    return html.Div([html.Label(label, className="field-label", **name), control, html.Div(hint, className="field-hint") if hint else None], className="field")


def facts(pairs: Mapping[str, Any]) -> html.Dl | html.Div:
    """Names and values in two columns; entries without a value are left out."""
    shown = [(name, value) for name, value in pairs.items() if value not in (None, "", [])]
    listed = html.Dl([part for name, value in shown for part in (html.Dt(name), html.Dd(value))], className="facts")
    return still(listed) if is_still(listed) else listed

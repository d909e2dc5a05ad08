"""The browser's theme where no callback has said it yet: in what a page shows before the first one runs."""

from __future__ import annotations

import flask

COOKIE = "layerscope-theme"  # kept by assets/theme.js


def browser_theme() -> str:
    """ "light" or "dark", as the browser's cookie says; light where it says nothing. The store `theme` has the last word."""
    said = flask.request.cookies.get(COOKIE) if flask.has_request_context() else None
    return "dark" if said == "dark" else "light"

"""The shell: the rail of pages, the stores that every page shares, the place of the page, the jobs tray, the line for problems.

The rail is made from Dash's page registry: a page names its `group` ("This trace" if it names none; "" keeps it out) and `icon` when
it registers, and what it needs of a trace in its module's REQUIRES. Nothing central is edited for a new page.
"""

from __future__ import annotations

import logging
import sys
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dash
import flask
from dash import ClientsideFunction, Input, Output, callback, clientside_callback, dcc, html, set_props

from backend.errors import LayerscopeError
from backend.sites import SITES
from backend.trace import Trace
from components import states
from components.icons import icon
from components.jobs_tray import jobs_tray
from components.services import services
from components.trace_view import first_missing

log = logging.getLogger(__name__)

GROUPS = ("Run", "This trace", "This model", "Cause")

INDEX = """<!DOCTYPE html>
<html lang="en">
<head>{%metas%}<title>{%title%}</title>{%favicon%}<script src="/assets/theme_first.js"></script>{%css%}</head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""


def shell() -> html.Div:
    """The layout around every page; the rail knows the trace of the address from the start, so that a quick click on it keeps the trace."""
    path, trace_id = _address()
    rail = _rail(path, _opened(trace_id), {})
    return html.Div(
        [
            dcc.Location(id="url", refresh="callback-nav"),
            dcc.Store(id="theme"),
            dcc.Store(id="trace-id", storage_type="session"),
            dcc.Store(id="position"),
            html.A("Skip to the page", href="#main", className="visually-hidden-focusable btn btn-primary"),
            html.Nav([_brand(), html.Div(rail, id="rail-groups"), html.Div(_theme_button(), className="rail-foot")], className="rail", **{"aria-label": "Pages"}),
            html.Main(dash.page_container, id="main", className="main"),
            jobs_tray(),
            html.Div(id="problem", className="problem", role="alert"),
        ],
        className="shell",
    )


def _brand() -> dcc.Link:
    return dcc.Link([html.Span([html.I(), html.I(), html.I()], className="brand-mark"), "Layerscope"], href="/", className="brand")


def _theme_button() -> html.Button:
    return html.Button([icon("sun-moon"), "Light or dark"], id="theme-button", className="tool", type="button")


def _rail(path: str, trace: Trace | None, counts: dict[str, int]) -> list[html.Div]:
    pages = sorted((page for page in dash.page_registry.values() if _group(page)), key=lambda page: page["order"] or 0)
    groups = []
    for group in GROUPS:
        links = [_link(page, path, trace, counts) for page in pages if _group(page) == group]
        if links:
            groups.append(html.Div([html.H2(group), *links], className="rail-group"))
    return groups


def _requires(page: dict[str, Any]) -> tuple[str, ...]:
    return getattr(sys.modules.get(page["module"]), "REQUIRES", ())


def _group(page: dict[str, Any]) -> str:
    return page.get("group", "This trace")


def _link(page: dict[str, Any], path: str, trace: Trace | None, counts: dict[str, int]) -> dcc.Link:
    href, note, why = page["path"], "", ""
    if _group(page) == "This trace":
        note, why = _why_dimmed(page, trace)
        href = f"{href}?trace={trace.id}" if trace else href
    elif page.get("takes_trace"):
        href = f"{href}?trace={trace.id}" if trace else href
    elif page["path"] == "/library" and counts.get("traces"):
        note = f"{counts['traces']:,}"
    elif page["path"] == "/jobs" and counts.get("active"):
        note = f"{counts['active']} running"
    classes = ["rail-link", "active" if path == page["path"] else "", "dimmed" if why else ""]
    inside = [icon(page.get("icon", "circle-dashed")), page["name"], html.Span(note, className="rail-note") if note else None]
    return dcc.Link(inside, href=href, className=" ".join(filter(None, classes)), title=why or page.get("description") or page["name"])


def _why_dimmed(page: dict[str, Any], trace: Trace | None) -> tuple[str, str]:
    """(a word beside the page's name, the whole reason) if the current trace cannot serve the page."""
    if trace is None:
        return "", "Open a trace first"
    lacking = first_missing(trace, _requires(page))
    if lacking is None:
        return "", ""
    if lacking in SITES and SITES[lacking].moe and not trace.info.is_moe:
        return "dense", f"{trace.info.name} has no experts"
    return "absent", f"This trace holds no {lacking}"


@callback(Output("rail-groups", "children"), Input("url", "pathname"), Input("trace-id", "data"), Input("counts", "data"))
def show_rail(path: str, trace_id: str | None, counts: dict[str, int] | None) -> list[html.Div]:
    """Mark the page that is shown, and dim what the current trace cannot serve."""
    return _rail(path, _opened(trace_id or _address()[1]), counts or {})


def _opened(trace_id: str | None) -> Trace | None:
    try:
        return services().library.open(trace_id) if trace_id else None
    except LayerscopeError:
        return None


def _address() -> tuple[str, str | None]:
    """Path and trace of the address that the browser asks the layout for; nothing where it does not say, or nobody asks (Dash, at the start)."""
    address = urlsplit(flask.request.referrer or "") if flask.has_request_context() else urlsplit("")
    return address.path, next(iter(parse_qs(address.query).get("trace", [])), None)


clientside_callback(ClientsideFunction("layerscope", "switchTheme"), Output("theme", "data"), Input("theme-button", "n_clicks"))
clientside_callback(
    ClientsideFunction("layerscope", "openTrace"),
    Output("trace-id", "data"),
    Output("position", "data"),
    Input("page-state", "data"),
)
clientside_callback(ClientsideFunction("layerscope", "framePosition"), Input("position", "data"))


def show_problem(problem: Exception) -> None:
    """Dash's error handler: one sentence on the page, never a traceback. What is no sentence for the user goes to the log."""
    if isinstance(problem, LayerscopeError):
        words = str(problem)
    else:
        log.error("callback failed", exc_info=problem)
        words = f"Internal error ({type(problem).__name__}); the log has the traceback."
    set_props("problem", {"children": [states.error(words)]})

"""trace_page(): the frame of every page about one trace: header band, token strip, title, then the page's own cards.

It opens the trace, checks that it holds what the page requires, and shows the right state when it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import dash
from dash import dcc, html

from backend.analysis.identities import TITLES
from backend.errors import LayerscopeError
from backend.sites import SITES
from backend.trace import Trace
from components import states
from components.drawn import still
from components.icons import icon
from components.services import services
from components.token_strip import token_strip
from components.url_state import as_int


def trace_page(
    page_key: str,
    trace_id: str | None,
    requires: tuple[str, ...],
    url_state: Mapping[str, str],
    build: Callable[[Trace], list[Any]],
    subtitle: Any = "",
    controls: Any = None,
) -> html.Div:
    """The layout of one page of a trace.

    page_key: the page's `__name__`; requires: site names or result names, all of which must be there; url_state: the page's query
    parameters (`pos` chooses the token); build(trace) -> cards. `controls` may also be a function of the trace.
    """
    title = dash.page_registry[page_key]["name"]
    if not trace_id:
        return _no_trace(title)
    try:
        trace = services().library.open(trace_id)
        position = as_int(url_state.get("pos"), trace.n_prompt - 1, 0, trace.n_tokens - 1)
        lacking = first_missing(trace, requires)
        body = [states.missing(lacking, trace_id)] if lacking else build(trace)
        shown = controls(trace) if callable(controls) and not lacking else None if lacking else controls
    except LayerscopeError as problem:
        return html.Div([_title(title, "", None), states.error(str(problem)), _home_link()], className="page")
    state = dcc.Store(id="page-state", data={"trace": trace.id, "position": position})
    bands = html.Div([_header(trace), token_strip(trace, position)], className="bands")
    return html.Div([state, bands, html.Div([_title(title, subtitle, shown), *body], className="page")])


def first_missing(trace: Trace, requires: tuple[str, ...]) -> str | None:
    """The first required site or result that the trace cannot give, or None."""
    for name in requires:
        if name not in trace.results and not (name in SITES and trace.has(name)):
            return name
    return None


def _title(title: str, subtitle: Any, controls: Any) -> html.Div:
    return html.Div([html.H1(title), html.Span(subtitle, className="page-subtitle"), html.Div(controls, className="page-controls")], className="page-title")


def _no_trace(title: str) -> html.Div:
    text = "This page looks into one run of a model. Run a prompt, or open a trace from the library."
    return html.Div([_title(title, "", None), states.empty("No trace chosen", text, _home_link(), "scan-text")], className="page")


def _home_link() -> html.Div:
    return html.Div(
        [dcc.Link("Run a prompt", href="/", className="btn btn-primary"), dcc.Link("Open the library", href="/library", className="btn btn-outline-secondary")],
        className="state-actions",
    )


def _header(trace: Trace) -> html.Header:
    info = trace.info
    name = f"{info.name} · {info.quantization}" if info.quantization and info.quantization.lower() not in info.name.lower() else info.name
    facts = f" · {trace.n_tokens} tokens · {short_date(trace.created_at)}"
    title = html.Div(
        [
            html.Div(name, className="band-model"),
            html.Div([html.Span(one_line(trace.prompt), className="band-prompt", title=trace.prompt[:2000]), html.Span(facts)], className="band-facts"),
        ],
        className="band-title",
    )
    buttons = html.Div(
        [
            html.A([icon("download"), "Export"], href=f"/download/{trace.id}.h5", className="btn btn-outline-secondary", title="Save the trace file (HDF5)"),
            html.Button([icon("link"), html.Span("Copy link")], className="btn btn-primary", **{"data-tool": "copy-link"}),
        ],
        className="band-buttons",
    )
    return html.Header([title, integrity_badge(trace), buttons], className="band")


def integrity_badge(trace: Trace) -> html.Details:
    """The badge, and every identity with its measured error in a popup."""
    checked = {name: entry for name, entry in trace.integrity.items() if entry.get("checked")}
    failed = [name for name, entry in checked.items() if not entry["ok"]]
    if not checked:
        words, look, symbol = "no identity checked", "warn", "info"
    elif failed:
        words, look, symbol = f"{len(failed)} of {len(checked)} identities fail", "bad", "triangle-alert"
    else:
        words, look, symbol = f"{len(checked)} identities hold" if len(checked) > 1 else "1 identity holds", "ok", "check"
    summary = html.Summary([icon(symbol), words], className=f"badge badge-{look}", title="What was checked on this trace")
    return html.Details([summary, html.Div(integrity_table(trace), className="popup-body popup-wide")], className="popup")


def integrity_table(trace: Trace) -> html.Div:
    """Every identity of the engine contract: whether it holds, its largest error, the tolerance, how many values were compared."""
    head = html.Thead(html.Tr([html.Th(""), html.Th("Identity"), html.Th("Max error", className="num"), html.Th("Tolerance", className="num")]))
    rows = [_identity_row(name, entry) for name, entry in trace.integrity.items()]
    return still(html.Table([head, html.Tbody(rows)], className="ls-table"))


def _identity_row(name: str, entry: Mapping[str, Any]) -> html.Tr:
    if not entry.get("checked"):
        mark, error = html.Span("–", title="not checked", className="muted"), "not checked"
    else:
        mark = html.Span(icon("check"), className="ok", title="holds") if entry["ok"] else html.Span(icon("triangle-alert"), className="bad", title="fails")
        error = f"{entry['max_error']:.1e}"
    title = html.Div([TITLES.get(name, name), html.Span(f" {name}", className="muted small mono")])
    words = [title, html.Div(entry.get("note", ""), className="muted small") if entry.get("note") else None]
    tolerance = "" if not entry.get("checked") else f"{entry['tolerance']:.0e}" if entry["tolerance"] else "exact"
    allowed = html.Td(tolerance, className="num", title=f"rounding of {entry['tolerance_for']}" if entry.get("tolerance_for") else "")
    return html.Tr([html.Td(mark), html.Td(words), html.Td(error, className="num"), allowed])


def one_line(text: str, length: int = 90) -> str:
    """Text on one line, cut with an ellipsis."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else f"{flat[: length - 1]}…"


def short_date(created_at: str) -> str:
    """ISO 8601 -> "20 Nov 18:58" UTC, with the year when it is not this one."""
    try:
        moment = datetime.fromisoformat(created_at.replace("Z", "+00:00"))
    except ValueError:
        return created_at
    this_year = datetime.now(moment.tzinfo).year == moment.year
    return moment.strftime("%-d %b %H:%M" if this_year else "%-d %b %Y %H:%M")

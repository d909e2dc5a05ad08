"""A list of traces as a table: of Home (the recent ones) and of the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dash import dcc, html

from backend.estimate import in_bytes
from components.controls import set_button
from components.icons import icon
from components.trace_view import one_line, short_date


def trace_table(traces: Sequence[Any], deletable: bool) -> html.Div:
    """One row a trace summary: prompt and answer, model, tokens, category, date, size; `deletable` adds a button (store `delete-trace`)."""
    names = ["Prompt and answer", "Model", "Tokens", "Category", "Date", "Size", ""]
    head = html.Thead(html.Tr([html.Th(name, className="num" if name in ("Tokens", "Size") else "") for name in names]))
    rows = html.Tbody([_row(trace, deletable) for trace in traces])
    return html.Div(html.Table([head, rows], className="ls-table trace-table"), className="table-scroll")


def _row(trace: Any, deletable: bool) -> html.Tr:
    model = trace.model_name if not trace.quantization or trace.quantization.lower() in trace.model_name.lower() else f"{trace.model_name} · {trace.quantization}"
    text = [html.Span(one_line(trace.prompt, 120)), html.Span(f" {one_line(trace.response, 60)}", className="answer") if trace.response else None]
    mark = html.Span(icon("triangle-alert"), className="bad", title="An identity of the engine contract fails") if trace.integrity_ok is False else None
    question = f"Delete the trace of {one_line(trace.prompt, 60)!r}? Its file is removed."
    delete = set_button(icon("trash-2"), "delete-trace", trace.id, "tool", question, title="Delete", **{"aria-label": "Delete"}) if deletable else None
    return html.Tr(
        [
            html.Td(dcc.Link(text, href=f"/trace?trace={trace.id}", className="row-link"), className="cut"),
            html.Td([model, " ", mark], className="nowrap"),
            html.Td(f"{trace.n_tokens}", className="num"),
            html.Td(trace.category),
            html.Td(short_date(trace.created_at), className="nowrap"),
            html.Td(in_bytes(trace.n_bytes), className="num nowrap"),
            html.Td(delete, className="num"),
        ]
    )

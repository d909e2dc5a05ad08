"""A model's metadata as a table that can be searched; everything in it is shown as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dash import html

from backend.reports.model_metadata import MetadataRow

MOST_ROWS = 300
_SHORT = 160  # characters of a text that stands in its cell without being unfolded


def metadata_table(rows: Sequence[MetadataRow], search: str) -> tuple[Any, str]:
    """The rows whose key or value holds every word of `search`, and a sentence on how many there are."""
    words = search.casefold().split()
    found = [row for row in rows if all(word in row.key.casefold() or word in row.value.casefold() for word in words)]
    shown = found[:MOST_ROWS]
    head = html.Thead(html.Tr([html.Th("Key"), html.Th("Type"), html.Th("Value")]))
    body = [html.Tr([html.Td(row.key, className="mono wrap"), html.Td(row.type, className="nowrap muted"), html.Td(_value(row))]) for row in shown]
    said = f"{len(found):,} of {len(rows):,} keys" if words else f"{len(rows):,} keys"
    said += f", the first {MOST_ROWS} shown" if len(found) > MOST_ROWS else ""
    return html.Table([head, html.Tbody(body)], className="ls-table compact metadata"), said


def _value(row: MetadataRow) -> Any:
    if row.n_items is not None:
        rest = ", …" if row.cut else ""
        return [html.Span(f"{row.n_items:,} item{'' if row.n_items == 1 else 's'}: ", className="muted"), html.Span(f"{row.value}{rest}", className="mono wrap")]
    cut = html.Div("… cut here; the file holds more", className="muted small") if row.cut else None
    if len(row.value) <= _SHORT and "\n" not in row.value:
        return [html.Span(row.value, className="mono wrap"), cut]
    first = " ".join(row.value[:_SHORT].split())
    summary = html.Summary([html.Span(f"{first}…", className="mono"), html.Span(f" {len(row.value):,} characters", className="muted small")])
    return html.Details([summary, html.Pre(row.value, className="metadata-text"), cut])

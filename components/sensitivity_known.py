"""What publications say of the super weights of the model that is chosen, before anything is run."""

from __future__ import annotations

from typing import Any

from dash import dcc, html

from backend.model_files import ModelEntry
from backend.reports.known_super_weights import recognise
from components.sensitivity_values import place_link


def known_line(entry: ModelEntry | None) -> Any:
    """The published places, each a link to the weight in its matrix; None for a model that none is known of."""
    matches = recognise(entry.info) if entry is not None and entry.info is not None else []
    if entry is None or not matches:
        return None
    names = ", ".join(dict.fromkeys(match.model for match in matches))
    said: list[Any] = [f"Published super weights of {names}" + ("" if matches[0].by_name else ", of which only the shape fits") + ": "]
    for i, match in enumerate(matches):
        place = match.place
        name = f"blocks.{place.layer}.mlp.{'' if place.expert is None else 'experts.'}W_out"
        words = f"layer {place.layer} [{'' if place.expert is None else f'{place.expert}, '}{place.row}, {place.column}]"
        said += [", " if i else "", dcc.Link(words, href=place_link(entry.name, name, place.row, place.column, place.expert), className="mono", title=place.source)]
    return html.P([*said, ". A run with Super weights measures what they do here."], className="field-hint")

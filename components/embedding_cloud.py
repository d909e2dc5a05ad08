"""The point cloud of the Embeddings page as assets/point_cloud.js takes it: places and texts once a projection, colours and what lies over the points apart.

Arrays go as base64 of their bytes. A hundred thousand token texts are sent once and not again when the colour changes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from dash import dcc, html
from numpy.typing import NDArray

from backend.analysis.token_classes import CLASSES
from components.controls import set_button
from components.embedding_source import View, layer_name
from components.figures.embeddings import PointColours, by_class, by_value, point_size, ramp
from components.icons import icon
from components.trace_view import one_line

COLOURS = {"class": "Token class", "layer": "Layer", "position": "Position", "norm": "Length", "trace": "Trace", "category": "Category of the trace", "id": "Token id"}
MAX_PATHS = 64  # paths that are drawn faintly beside the chosen one
_KINDS: dict[str, Any] = {"f4": np.float32, "i4": np.int32, "u1": np.uint8}
_LABELS = 40  # found points that are labelled


def colour_options(view: View) -> list[dict[str, str]]:
    """What the points of a view can be coloured by, the most telling first."""
    states = view.states
    if states is None:
        names = ["class", "norm", "id"]
    else:
        categories = {trace.category for trace in states.traces}
        several = {"layer": len(states.layers) > 1, "trace": len(states.traces) > 1, "category": len(categories) > 1}
        names = [name for name in ("layer", "position", "class", "norm", "trace", "category") if several.get(name, True)]
    return [{"label": COLOURS[name], "value": name} for name in names]


def cloud_key(view: View, shown: NDArray[np.int64]) -> str:
    """Another one means that places and texts must be sent again."""
    return f"{view.key[:24]}-{view.dims}-{hashlib.sha256(shown.tobytes()).hexdigest()[:16]}"


def points(view: View, shown: NDArray[np.int64]) -> dict[str, Any]:
    """Places, texts and what a hover tells of each point that is drawn."""
    rows = view.projection.rows[shown]
    texts, numbers = _texts(view, rows)
    fields = [{"name": name, "values": _packed(values, kind), **({"words": words} if words else {})} for name, kind, values, words in _fields(view, rows)]
    return {
        "key": cloud_key(view, shown), "dims": view.dims, "at": _packed(view.projection.coords[shown, : view.dims], "f4"), "axes": axis_titles(view),
        "texts": texts, "text": _packed(numbers, "i4"), "fields": fields,
    }  # fmt: skip


def axis_titles(view: View) -> list[str]:
    if view.spec.method == "pca":
        of = " of the variance" if view.dims == 2 else ""
        return [f"component {i + 1}: {100 * share:.1f} %{of}" for i, share in enumerate(view.projection.ratio[: view.dims])]
    return [f"{ {'umap': 'UMAP', 'tsne': 't-SNE'}[view.spec.method]} {i + 1}" for i in range(view.dims)]


def _packed(values: Any, kind: str) -> dict[str, str]:
    return {"kind": kind, "data": base64.b64encode(np.ascontiguousarray(values, _KINDS[kind]).tobytes()).decode("ascii")}


def _texts(view: View, rows: NDArray[np.int32]) -> tuple[list[str], NDArray[np.integer]]:
    """Each text once, and for every point the number of its text."""
    states = view.states
    if states is None:
        return [view.token(int(row)) for row in rows], np.arange(len(rows))
    groups, first, numbers = np.unique(states.groups[rows], return_index=True, return_inverse=True)
    return [view.label(int(rows[at])) for at in first], numbers


def _fields(view: View, rows: NDArray[np.int32]) -> list[tuple[str, str, NDArray[Any], list[str] | None]]:
    states, norms = view.states, view.projection.norms[rows]
    if states is None:
        return [("id", "i4", rows, None), ("class", "u1", view.classes[rows], list(CLASSES)), ("length", "f4", norms, None)]
    found: list[tuple[str, str, NDArray[Any], list[str] | None]] = [("position", "i4", states.position[rows], None)]
    if len(states.layers) > 1 or view.spec.choice.layer is not None:
        names = [layer_name(layer, states.what).removeprefix("layer ") for layer in range(-1, max(states.layers) + 1)]
        found.insert(0, ("layer", "i4", states.layer[rows] + 1, names))
    if len(states.traces) > 1:
        found.append(("trace", "i4", states.trace[rows], [f"{i + 1}: {one_line(trace.prompt, 40)}" for i, trace in enumerate(states.traces)]))
    return [*found, ("length", "f4", norms, None)]


# -- colours --------------------------------------------------------------------------------------------------------------------------


def coloured(view: View, shown: NDArray[np.int64], by: str, theme: str, only: str | None = None) -> tuple[dict[str, Any], PointColours]:
    """(what the cloud takes, the colours)."""
    rows = view.projection.rows[shown]
    found = _colours(view, rows, by, theme, only)
    data = {"key": cloud_key(view, shown), "values": _packed(found.values, "u1"), "palette": found.palette, "size": point_size(len(rows)),
            "opacity": 0.9 if len(rows) <= 4000 else 0.75 if len(rows) <= 40_000 else 0.6, "legend": found.legend}  # fmt: skip
    return data, found


def _colours(view: View, rows: NDArray[np.int32], by: str, theme: str, only: str | None) -> PointColours:
    states = view.states
    if by == "norm":
        return by_value(view.projection.norms[rows], "length", theme)
    if by == "id" or states is None:
        return by_value(rows.astype(np.float32), "token id", theme, whole=True) if by == "id" else by_class(view.classes[rows], list(CLASSES), theme, only)
    if by == "position":
        return by_value(states.position[rows].astype(np.float32), "position", theme, whole=True)
    if by == "trace":
        return by_class(states.trace[rows], [f"trace {i + 1}" for i in range(len(states.traces))], theme, only)
    if by == "category":
        categories = [trace.category or "no category" for trace in states.traces]
        names = sorted(set(categories))
        return by_class(np.array([names.index(name) for name in categories])[states.trace[rows]], names, theme, only)
    if by == "class":
        return by_class(view.classes[rows], list(CLASSES), theme, only)
    at = {layer: i for i, layer in enumerate(states.layers)}
    legend = {"kind": "scale", "title": "layer", "low": layer_name(states.layers[0], states.what).removeprefix("layer "), "high": str(states.layers[-1]), "n": len(states.layers)}
    return PointColours(np.array([at[int(layer)] for layer in states.layer[rows]], np.uint8), ramp(len(states.layers), theme), legend)


def legend(found: PointColours, only: str | None) -> html.Div:
    """Above the picture: the classes as buttons that dim the others (store `emb-only`), or the scale."""
    if found.legend["kind"] == "scale":
        bar = html.I(className="cloud-scale", style={"background": f"linear-gradient(90deg, {', '.join(found.palette)})"})
        return html.Div([html.Span(found.legend["title"]), html.Span(found.legend["low"]), bar, html.Span(found.legend["high"])], className="cloud-legend")
    chips = []
    for item in found.legend["items"]:
        words = [html.I(style={"background": item["colour"]}), item["words"]]
        pressed = {"aria-pressed": "true" if item["name"] == only else "false"}
        chips.append(set_button(words, "emb-only", item["name"], f"legend-chip{' chosen' if item['name'] == only else ''}", title=CLASSES.get(item["name"], ""), **pressed)
                     if item["name"] else html.Span(words, className="legend-chip"))  # fmt: skip
    return html.Div(chips, className="cloud-legend")


# -- what lies over the points -----------------------------------------------------------------------------------------------------------


def overlay(view: View, shown: NDArray[np.int64], chosen: int | None, found: Sequence[int], paths: str, zoom_at: Any) -> dict[str, Any]:
    """Marks of what a search found, the chosen point, the way of its token through the layers (and faintly those of the others).

    chosen: a row; found: rows. zoom_at: changes when the view shall go to what was found.
    """
    rows = view.projection.rows[shown]
    place = {int(row): i for i, row in enumerate(rows)} if len(rows) <= 1 << 16 else None

    def point(row: int) -> int:
        if place is not None:
            return place.get(row, -1)
        at = int(np.searchsorted(rows, row))
        return at if at < len(rows) and rows[at] == row else -1

    marks = [{"i": at, "label": view.label(row) if n < _LABELS else ""} for n, row in enumerate(found) if (at := point(int(row))) >= 0]
    data = {"key": cloud_key(view, shown), "chosen": -1 if chosen is None else point(chosen), "marks": marks, "paths": _paths(view, rows, chosen, paths),
            "zoom": [mark["i"] for mark in marks], "at": zoom_at}  # fmt: skip
    return data


def _paths(view: View, rows: NDArray[np.int32], chosen: int | None, wanted: str) -> list[dict[str, Any]]:
    states = view.states
    if states is None or len(states.layers) < 2 or wanted == "none":
        return []
    groups = states.groups[rows]
    own = None if chosen is None else int(states.groups[chosen])
    found = []
    if wanted == "all":
        some = np.unique(groups)
        some = some[np.linspace(0, len(some) - 1, min(len(some), MAX_PATHS)).astype(np.int64)]
        found = [{"points": np.flatnonzero(groups == group).tolist(), "strong": False} for group in some if group != own]
    if own is not None:
        mine = np.flatnonzero(groups == own)
        if len(mine) > 1:
            ends = [(at, layer_name(int(states.layer[rows[mine[at]]]), states.what)) for at in (0, len(mine) - 1)]
            found.append({"points": mine.tolist(), "strong": True, "labels": ends})
    return found


def cloud_tools(name: str) -> list[Any]:
    """What saves the cloud, and what brings all of it back into view (assets/point_cloud.js)."""
    reset = html.Button("Whole view", className="tool", title="Show all points again (double click, or 0)", **{"data-cloud": "reset"})
    save = [html.Button(kind.upper(), className="tool", title=f"Save as {kind.upper()}", **{"data-cloud": kind, "data-name": name}) for kind in ("png", "svg", "csv")]
    return [reset, *save, html.Button(icon("expand"), className="tool", title="Full screen", **{"data-tool": "full-screen", "aria-label": "Full screen"})]


def cloud() -> html.Div:
    """The frame that assets/point_cloud.js fills."""
    words = "Points in the projection; the arrow keys move the view, plus and minus zoom, 0 shows all. The search and the table beside it say the same in words."
    stores = [dcc.Store(id=name) for name in ("emb-points", "emb-colours", "emb-overlay", "emb-drawn", "emb-clicked", "emb-position")]
    return html.Div([*stores, html.Div(id="emb-cloud", className="cloud", tabIndex=0, role="application", **{"aria-label": words})], className="cloud-frame")

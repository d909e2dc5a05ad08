"""The head grid: a thumbnail of every attention head, and the pickers of one head.

All thumbnails are one picture (a sprite) that the route /thumbs serves per trace and theme; each cell shows its part of it through
CSS. One request and one element a head: 144 graphs took 2.5 s, 144 pictures 0.7 s.
The chosen head lies in the store `chosen-head` as {"layer": int, "head": int}; assets/heads.js keeps grid, pickers and store equal.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from dash import ClientsideFunction, Input, Output, clientside_callback, dcc, html
from numpy.typing import NDArray
from PIL import Image

from backend.trace import Trace
from components.drawn import drawing, draws
from components.figures.theme import sequential

THUMBS = "attn_thumbs"


def head_grid(trace: Trace, layer: int, head: int) -> html.Div:
    """Layers x heads of thumbnails with (layer, head) framed. Raises SiteNotCaptured if the trace has no thumbnails."""
    layers = trace.result_attrs(THUMBS)["layers"]
    n_heads = trace.info.n_heads
    rows = []
    for row, at in enumerate(layers):
        kept = trace.kept("attn_pattern", at)[0]
        cells = [_cell(at, h, chosen=(at, h) == (layer, head), row=row, n_rows=len(layers), n_heads=n_heads) if h in kept else _absent(at, h) for h in range(n_heads)]
        rows.append(html.Div([html.Span(f"L{at}", className="head-layer"), *cells], className="head-row", role="row"))
    style = {f"--thumbs-{theme}": f"url(/thumbs/{trace.id}/{theme}.png)" for theme in ("light", "dark")} | {"--heads": n_heads, "--rows": len(layers)}
    grid = html.Div(id="head-grid", className="head-grid", style=style, role="grid", tabIndex=0, **{"aria-label": "Attention heads; the arrow keys step"})
    return html.Div([grid, drawing("head-grid", rows)])


draws("head-grid")


def _cell(layer: int, head: int, chosen: bool, row: int, n_rows: int, n_heads: int) -> html.Div:
    at = f"{100 * head / max(n_heads - 1, 1):.4f}% {100 * row / max(n_rows - 1, 1):.4f}%"
    data = {"data-layer": layer, "data-head": head, "aria-selected": "true" if chosen else "false", "aria-label": f"Head {layer}.{head}"}
    return html.Div(className="head chosen" if chosen else "head", style={"backgroundPosition": at}, title=f"{layer}.{head}", role="gridcell", **data)


def _absent(layer: int, head: int) -> html.Div:
    """The place of a head whose map was not captured; nothing listens to it."""
    return html.Div(className="head-absent", title=f"{layer}.{head} was not captured", role="gridcell")


def head_picker(trace: Trace, layer: int, head: int) -> html.Div:
    """The store `chosen-head` and two pickers, ids `layer-picker` and `head-picker`. Every page with a head grid needs it once."""
    layers = trace.layers("attn_pattern") or list(range(trace.info.n_layers))
    return html.Div(
        [
            dcc.Store(id="chosen-head", data={"layer": layer, "head": head}),
            html.Label([html.Span("Layer"), _select("layer-picker", layers, layer)]),
            html.Label([html.Span("Head"), _select("head-picker", list(range(trace.info.n_heads)), head)]),
        ],
        className="controls",
    )


def _select(id: str, values: list[int], chosen: int) -> dcc.Dropdown:
    options: Any = [{"label": str(v), "value": v} for v in values]
    return dcc.Dropdown(options, chosen, id=id, clearable=False, searchable=len(values) > 12, className="picker-narrow")


# Two callbacks, and none that gives back the store it listens to: Dash would hold every other listener, the pattern's request too, until that one had ended.
clientside_callback(ClientsideFunction("layerscope", "showHead"), Output("layer-picker", "value"), Output("head-picker", "value"), Input("chosen-head", "data"))
clientside_callback(ClientsideFunction("layerscope", "pickHead"), Output("layer-picker", "id"), Input("layer-picker", "value"), Input("head-picker", "value"))


def thumbnail_sprite(thumbs: NDArray[np.uint8], theme: str) -> bytes:
    """One PNG of all thumbnails: (layer, head, t, t) uint8, 255 = probability 1, in `theme`'s sequential colours.

    The square root of the probability is shown, so that weak attention is still seen at this size.
    """
    n_layers, n_heads, size, _ = thumbs.shape
    flat = np.sqrt(thumbs.astype(np.float32) / 255.0).transpose(0, 2, 1, 3).reshape(n_layers * size, n_heads * size)
    picture = Image.frombytes("P", (flat.shape[1], flat.shape[0]), np.round(flat * 255).astype(np.uint8).tobytes())
    picture.putpalette(_palette(theme).tobytes())
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=False)
    return out.getvalue()


def _palette(theme: str) -> NDArray[np.uint8]:
    """(256, 3) colours from 0 to 1, linear between the theme's five stops."""
    stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for _, colour in sequential(theme)])
    at = np.linspace(0, len(stops) - 1, 256)
    return np.stack([np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3)], axis=1).round().astype(np.uint8)

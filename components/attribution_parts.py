"""The cards of the Attribution page, and what it says of an attribution: the sentence with both sums, the figures' rows, the table of parts."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import numpy as np
import plotly.graph_objects as go
from dash import dcc, html

from backend.reports.attribution import KINDS, Attribution, Part
from components.card import card, cards
from components.figures.attribution import cumulative_line, head_contributions, part_bars
from components.graph import graph, graph_tools

SORTS = {"size": "Size", "value": "Value", "order": "Part"}
MOST = 200  # rows of the table
ABOUT = (
    "The logit is linear in the residual stream once the final norm's scale is frozen at the value it had in this run, so it is a sum over everything that was added to the "
    "stream: direct logit attribution (TransformerLens; Elhage et al. 2021). Part · gain / scale · W_U; for a difference, of the two rows of W_U.",
    "It counts direct paths to the output alone: a head that works through later heads shows nothing here. Where a norm follows W_O (gemma, olmo2) its scale is frozen too.",
    "The parts are the captured values and are not adjusted: their sum misses the model's logit by the rounding of half precision and of quantized kernels, and both are shown.",
)  # fmt: skip
ABOUT_LINE = ("The sum of everything up to each step, through the final norm as the last layer scales it. The end is the logit; the dotted line is what the model itself gave.",)


def attribution_cards(n_layers: int, sort: str) -> list[Any]:
    """The cards of the page, empty, and the stores of its callbacks."""
    height = min(150 + 24 * max(n_layers, 5), 640)
    said = html.Div([html.Div("", id="attr-sums"), html.Div(id="attr-notes", className="notes"), html.Div(id="attr-vocabulary", className="attr-foot")], className="attr-sums")
    stores = [dcc.Store(id=name, data=data) for name, data in (("attr-sort", sort), ("attr-job", None), ("attr-vocabulary-job", None), ("attr-done", None))]
    return [
        *stores,
        said,
        html.Div(id="attr-state"),
        html.Div(
            cards(
                card("Heads", graph("attr-heads", height=height, className="fill"), "Red adds to the logit, blue takes from it. Click a head to open its pattern.",
                     graph_tools("attr-heads", "head-attribution"), list(ABOUT), className="fill"),
                card("Layers", graph("attr-layers", height=height, className="fill"), "All heads of a layer together, beside its MLP.",
                     graph_tools("attr-layers", "layer-attribution"), list(ABOUT), className="fill"),
                card("Through depth", graph("attr-depth", height=260), "What has been added so far, after each attention and MLP.",
                     graph_tools("attr-depth", "cumulative-attribution"), list(ABOUT_LINE), className="wide"),
                card("Every part", html.Div(id="attr-table", className="table-scroll table-tall"), "Click a column to sort by it, a head to open its pattern.", [], list(ABOUT),
                     className="wide"),
            ),
            id="attr-cards",
        ),
        dcc.Location(id="attr-go", refresh="callback-nav"),
    ]  # fmt: skip


def sums(found: Attribution, of: str) -> str:
    """ "parts sum to 12.31, the logit is 12.30", and what there is to say about it."""
    what = "logit" if found.against is None else "difference of logits"
    model = f"the model's {what} is {found.logit:.3f}" if found.logit is not None else f"the model's own {what} is not among the stored predictions"
    gap = "" if found.logit is None else f", {found.total - found.logit:+.1e} apart"
    return f"{of}: parts sum to {found.total:.3f}; {model}{gap}."


def pictures(found: Attribution, n_layers: int, n_heads: int, theme: str) -> tuple[go.Figure, go.Figure, go.Figure]:
    """Heads, layers, and the sum through depth."""
    unit = "logit" if found.against is None else "logit difference"
    by_layer = np.full((2, n_layers), np.nan)
    for part in found.parts:
        if part.layer is not None:
            row = 1 if part.kind == "mlp" else 0
            by_layer[row, part.layer] = np.nansum([by_layer[row, part.layer]]) + part.value
    outside = [part for part in found.parts if part.layer is None]
    names = [part.kind for part in outside] + [f"L{layer}" for layer in range(n_layers)]
    mlp = np.concatenate([[part.value for part in outside], by_layer[1]])
    middle, after = found.through_layers(n_layers)
    steps = ["embed"] + [f"{kind} {layer}" for layer in range(n_layers) for kind in ("attn", "mlp")]
    line = np.concatenate([[sum(part.value for part in outside)], np.stack([middle, after], axis=1).ravel()])
    return head_contributions(found.heads(n_layers, n_heads), theme), part_bars(names, by_layer[0], mlp, theme), cumulative_line(steps, line, found.logit, theme, unit)


def parts_table(found: Attribution, sort: str, trace_id: str) -> html.Table:
    """Parts with a bar each, at most MOST; a head leads to its pattern. Parts that are NaN come first: nothing is hidden at the end."""
    order = {"size": lambda p: -abs(p.value), "value": lambda p: -p.value, "order": lambda p: 0}[sort]
    parts = sorted(found.parts, key=lambda p: (not np.isnan(p.value) and sort != "order", order(p) if not np.isnan(p.value) else 0))
    top = max((abs(p.value) for p in found.parts if np.isfinite(p.value)), default=0.0) or 1.0
    head = [html.Th(_sorter("order", sort)), html.Th("What it is"), html.Th(_sorter("value", sort), className="num"), html.Th(_sorter("size", sort))]
    body = [_row(part, top, found.position, trace_id) for part in parts[:MOST]]
    if len(parts) > MOST:
        body.append(html.Tr(html.Td(f"{len(parts) - MOST:,} more parts, {sum(p.value for p in parts[MOST:]):.3f} together", colSpan=4, className="muted")))
    return html.Table([html.Thead(html.Tr(head)), html.Tbody(body)], className="ls-table compact")


def _sorter(name: str, sort: str) -> html.Button:
    return html.Button(SORTS[name] + (" ↓" if name == sort and name != "order" else " ↑" if name == sort else ""), id={"type": "sort-parts", "by": name}, className="th-button")


def _row(part: Part, top: float, position: int, trace_id: str) -> html.Tr:
    name: Any = part.name
    if part.kind == "head":
        name = dcc.Link(part.name, href=f"/attention?{urlencode({'trace': trace_id, 'layer': part.layer, 'head': part.head, 'pos': position})}", title="Open its pattern")
    width = 0.0 if not np.isfinite(part.value) else 100 * abs(part.value) / top
    bar = html.Span(className="bar " + ("bar-for" if part.value >= 0 else "bar-against"), style={"width": f"{width:.1f}%"})
    what = KINDS[part.kind] if part.kind != "head" else f"head {part.head} of layer {part.layer}"
    return html.Tr([html.Td(name, className="mono nowrap"), html.Td(what), html.Td(f"{part.value:+.4f}", className="num"), html.Td(bar, className="bar-cell")])

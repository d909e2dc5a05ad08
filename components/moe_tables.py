"""The tables and the strip of the MoE page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from dash import html
from numpy.typing import NDArray

from backend.analysis.moe import Routing
from backend.reports.routing import LayerComparison
from components.figures.moe import choices, expert_colours

TOKENS_SHOWN = 100

# name in the measures -> column title, format
_COLUMNS: dict[str, tuple[str, str]] = {
    "n_used": ("Used", "d"), "busiest": ("Busiest", "d"), "busiest_share": ("its share", ".1%"), "entropy": ("Entropy, nats", ".3f"), "entropy_norm": ("normalised", ".3f"),
    "gini": ("Gini", ".3f"), "variation": ("CV", ".3f"), "balance": ("Balance", ".3f"), "switch_loss": ("Switch loss", ".3f"), "z_loss": ("z-loss", ".3g"),
    "router_entropy": ("Router entropy", ".3f"),
}  # fmt: skip


def measures_table(measures: Sequence[dict[str, Any]], n_experts: int, chosen: int) -> html.Table:
    """One row a layer; what could not be computed is a dash."""
    head = html.Tr([html.Th("Layer"), *(html.Th(title, className="num") for title, _ in _COLUMNS.values())])
    rows = []
    for row in measures:
        cells = [_number(row[name], form) + (f" of {n_experts}" if name == "n_used" else "") for name, (_, form) in _COLUMNS.items()]
        rows.append(html.Tr([html.Td(row["layer"]), *(html.Td(cell, className="num nowrap") for cell in cells)], className="chosen" if row["layer"] == chosen else ""))
    return html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table")


def strip(routing: Routing, labels: Sequence[str], start: int, position: int, theme: str) -> list[html.Span]:
    """Tokens coloured by their first expert; the title names all k with their weights."""
    palette = expert_colours(routing.n_experts, theme)
    found = []
    for i, label in enumerate(labels):
        at = start + i
        style = {"--expert": palette[int(routing.indices[at, 0])]}
        found.append(html.Span(label, className="moe-tok chosen" if at == position else "moe-tok", style=style, title=f"position {at}: {choices(routing, at)}"))
    return found


def legend(routing: Routing, theme: str) -> list[html.Span]:
    """The colour of every expert."""
    return [html.Span(f"{e}", className="moe-key", style={"--expert": colour}, title=f"expert {e}") for e, colour in enumerate(expert_colours(routing.n_experts, theme))]


def token_table(labels: Sequence[str], n: NDArray[np.integer], share: NDArray[np.floating]) -> html.Table:
    """Which expert serves which token: the most frequent tokens first. share: (label, expert)."""
    head = html.Tr([html.Th("Token"), html.Th("Occurrences", className="num"), html.Th("Expert", className="num"), html.Th("of them", className="num"),
                    html.Th("Next expert", className="num"), html.Th("of them", className="num")])  # fmt: skip
    rows = []
    for i, label in enumerate(labels[:TOKENS_SHOWN]):
        best = np.argsort(-share[i], kind="stable")[:2]
        cells = [str(n[i])]
        for expert in best:
            cells += [str(expert), f"{share[i, expert]:.0%}"] if share[i, expert] else ["–", "–"]
        rows.append(html.Tr([html.Td(html.Span(label, className="chip-token")), *(html.Td(cell, className="num") for cell in cells)]))
    return html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact")


def alike_table(found: Sequence[LayerComparison], chosen: int) -> html.Table:
    """One row a layer: change token by token, and similarity of the loads."""
    titles = ("Experts", "First choice", "Choices", "Cosine", "Pearson", "JS, nats")
    head = html.Tr([html.Th("Layer"), *(html.Th(title, className="num") for title in titles)])
    rows = []
    for each in found:
        change, alike = each.change, each.alike
        first = [_number(change.share, ".1%"), _number(float(change.first.mean()), ".1%"), _number(change.slots, ".1%")] if change else ["–"] * 3
        cells = [*first, _number(alike.cosine, ".4f"), _number(alike.pearson, ".4f"), _number(alike.jensen_shannon, ".4f")]
        rows.append(html.Tr([html.Td(each.layer), *(html.Td(cell, className="num") for cell in cells)], className="chosen" if each.layer == chosen else ""))
    return html.Table([html.Thead(head), html.Tbody([_all_layers(found), *rows])], className="ls-table")


def _all_layers(found: Sequence[LayerComparison]) -> html.Tr:
    """The means over the layers."""
    changes = [each.change for each in found if each.change is not None]
    parts = [(change.share, float(change.first.mean()), change.slots) for change in changes]
    first = [_number(float(np.mean(part)), ".1%") for part in zip(*parts, strict=True)] if parts else ["–"] * 3
    alike = [[each.alike.cosine, each.alike.pearson, each.alike.jensen_shannon] for each in found]
    means = [float(np.mean([value for value in part if not math.isnan(value)] or [math.nan])) for part in zip(*alike, strict=True)]
    return html.Tr([html.Td("all, mean"), *(html.Td(cell, className="num") for cell in (*first, *(_number(value, ".4f") for value in means)))], className="total")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)

"""Attention: where each head looks.

All heads as thumbnails, the pattern of the chosen one beside a pinned one, one token's attention, every head's scores. Scores were computed at
capture from the full values, so choosing a head reads one head and nothing else. The cards are in components/attention_*.py.
"""

from __future__ import annotations

from typing import Any

import dash
import numpy as np
from dash import html

from backend.trace import Trace
from components.attention_detector import detector_card
from components.attention_metrics import metric_card, table_card
from components.attention_pattern import pattern_card
from components.attention_source import OF_TITLES, VIEW_TITLES, pin_of, window_of
from components.attention_token import SCOPES, token_card
from components.card import card
from components.head_table import METRIC_TEXTS
from components.heads import head_grid, head_picker
from components.over_batch_views import head_scores_card
from components.trace_view import trace_page
from components.url_state import as_choice, as_int, keep_url

dash.register_page(__name__, path="/attention", name="Attention", order=3, icon="grid-3x3", description="Where each head looks")

DEEP = 12  # layers
REQUIRES = ("attn_pattern", "attn_thumbs")
ABOUT_GRID = (
    "Every head's pattern as a small picture: rows look at columns. It is made while capturing from the softmax of the scaled, masked scores; a dot is the largest value of the "
    "cells it stands for, so no strong link is lost. Darker, in the dark theme lighter, is more attention."
)


def layout(trace: str | None = None, layer: str | None = None, head: str | None = None, metric: str | None = None, **state: str):
    def start(opened: Trace) -> tuple[int, int, str]:
        shown = as_choice(metric, list(METRIC_TEXTS), _telling_metric(opened))
        best_layer, best_head = _best_head(opened, shown)
        layers = opened.layers("attn_pattern")
        asked = as_int(layer, best_layer, 0, opened.info.n_layers - 1)
        return asked if asked in layers else layers[0], as_int(head, best_head, 0, opened.info.n_heads - 1), shown

    def build(opened: Trace) -> list[Any]:
        return _cards(opened, *start(opened), state)

    return trace_page(__name__, trace, REQUIRES, state, build, "Where each head looks.", lambda opened: head_picker(opened, *start(opened)[:2]))


def _cards(trace: Trace, layer: int, head: int, metric: str, state: dict[str, str]) -> list[Any]:
    """The page's cards in the state that its link names."""
    n_rows = len(trace.result_attrs("attn_thumbs")["layers"])
    grid, scores = card("All heads", head_grid(trace, layer, head), _groups(trace), about=ABOUT_GRID), metric_card(metric, n_rows)
    pattern = pattern_card(
        as_choice(state.get("of"), list(OF_TITLES), "head"),
        as_choice(state.get("view"), list(VIEW_TITLES), "pattern"),
        state.get("first") == "hidden",
        as_choice(state.get("scale"), ("linear", "sqrt"), "linear"),
        window_of(state.get("zoom"), trace.n_tokens),
        pin_of(state.get("pin"), trace),
    )
    token, table = token_card(as_choice(state.get("scope"), list(SCOPES), "head")), table_card(as_int(state.get("below"), 1, 0, 3))
    others = [token, table, head_scores_card(trace, state), detector_card(trace)]
    # The grid of a deep model is as high as pattern and scores together; that of a shallow one leaves room for the scores under it.
    columns = ([grid], [pattern, scores]) if n_rows > DEEP else ([grid, scores], [pattern])
    stacks = [html.Div(stack, className="card-stack") for stack in columns]
    return [html.Div([*stacks, *others], id="attention-cards", className="cards attention-cards")]


def _groups(trace: Trace) -> str:
    """How many heads there are and which share their keys and values (grouped-query attention)."""
    info = trace.info
    per_group = info.n_heads // info.n_kv_heads
    shared = f"{per_group} neighbouring heads share each of {info.n_kv_heads} key/value heads" if per_group > 1 else "each with its own keys and values"
    return f"{info.n_layers} layers × {info.n_heads} heads, {shared}. Colour: square root of attention. Click to open, arrow keys to step."


def _telling_metric(trace: Trace) -> str:
    """Induction where any token repeats, else the previous-token score, which every prompt has."""
    return "induction" if np.isfinite(trace.result("attn_induction")).any() else "previous"


def _best_head(trace: Trace, metric: str) -> tuple[int, int]:
    """The head to begin with: the highest score of the capture."""
    name = f"attn_{metric}" if f"attn_{metric}" in trace.results else "attn_previous"
    values = np.nan_to_num(trace.result(name), nan=-np.inf)
    row, head = np.unravel_index(int(np.argmax(values)), values.shape)
    return trace.result_attrs(name)["layers"][int(row)], int(head)


keep_url({
    "layer": ("chosen-head", "data", "layer"), "head": ("chosen-head", "data", "head"), "metric": ("head-metric", "value"), "scale": ("pattern-scale", "value"),
    "of": ("pattern-of", "value"), "view": ("pattern-view", "value"), "first": ("pattern-first", "value"), "zoom": ("pattern-window", "data"),
    "pin": ("pinned-head", "data", "name"), "scope": ("token-scope", "value"), "below": ("below-threshold", "value"),
})  # fmt: skip

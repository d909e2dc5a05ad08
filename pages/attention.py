"""Attention: where each head looks.

All heads as thumbnails, one head's pattern, and every head's scores; all of it was computed at capture, so a head is one read.
"""

from __future__ import annotations

from typing import Any

import dash
import numpy as np
from dash import ALL, Input, Output, State, callback, ctx, dcc, html, no_update

from backend.analysis.attention import METRICS, reduce_max
from backend.trace import Trace
from components import figures  # noqa: F401  (the package's docstring says what figures may touch)
from components.card import card, cards
from components.figures.attention import LARGEST, attention_pattern, head_heatmap
from components.graph import graph, graph_tools
from components.heads import head_grid, head_picker
from components.services import services
from components.token_label import token_labels
from components.trace_view import trace_page
from components.url_state import as_choice, as_int, keep_url

dash.register_page(__name__, path="/attention", name="Attention", order=3)

REQUIRES = ("attn_pattern", "attn_thumbs")

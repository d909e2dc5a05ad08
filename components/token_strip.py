"""The token strip: the sequence as the spine of every view of a trace. Colour is the chosen metric, the frame the chosen position.

The server renders the tokens once with every metric in CSS variables; assets/token_strip.js holds the one listener for the whole
strip (clicks, arrow keys, hover) and writes the position into the store `position`. A callback for each token would take 4 times
as long at a thousand tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dash import html

from backend.trace import Trace
from components.drawn import Drawn, drawing, draws
from components.token_label import token_label

METRICS = {"surprise": "surprise, nats", "entropy": "entropy, nats", "none": "no colour"}

# Nats at which the colour is full: a surprise of 8 is a probability of 1 in 3,000. The same scale in every trace, so strips compare.
FULL_SCALE = {"surprise": 8.0, "entropy": 6.0}


def token_strip(trace: Trace, position: int) -> html.Div:
    """The sticky strip. Surprise is -log p of the token given those before it; entropy is that of the prediction made at the token."""
    surprise, entropy = surprises(trace), trace.entropy
    tokens = [_token(trace, at, at == position, s, e) for at, (s, e) in enumerate(zip(surprise.tolist(), entropy.tolist(), strict=True))]
    menu = html.Select(
        [html.Option(words, value=name) for name, words in METRICS.items()], id="strip-metric", className="strip-metric", title="Metric that colours the tokens"
    )
    strip = html.Div(
        id="token-strip",
        className="strip-tokens",
        role="listbox",
        tabIndex=0,
        **{"data-metric": "surprise", "aria-label": "Tokens; the arrow keys choose a position"},
    )
    return html.Div([menu, strip, drawing("token-strip", Drawn(tokens))], className="strip")


draws("token-strip")


def surprises(trace: Trace) -> np.ndarray:
    """(pos,) -log p, nats, of each token given those before it; NaN at position 0, which nothing predicts."""
    return np.concatenate([[np.nan], -trace.next_logprobs[:-1]])


def _token(trace: Trace, at: int, chosen: bool, surprise: float, entropy: float) -> list[Any]:
    classes = ["tok", "chosen" if chosen else "", "generated" if at >= trace.n_prompt else "", "first-generated" if at == trace.n_prompt else ""]
    data: dict[str, Any] = {
        "role": "option",
        "class": " ".join(filter(None, classes)),
        "style": {"--surprise": _level(surprise, "surprise"), "--entropy": _level(entropy, "entropy")},
        "data-pos": at,
        "data-id": trace.token_ids[at],
        "data-surprise": "" if math.isnan(surprise) else f"{surprise:.3f}",
        "data-entropy": "" if math.isnan(entropy) else f"{entropy:.3f}",
        "aria-selected": "true" if chosen else "false",
    }
    return ["span", data, [token_label(trace.token_texts[at], at in trace.special)]]


def _level(value: float, metric: str) -> str:
    return "0%" if math.isnan(value) else f"{100 * min(max(value / FULL_SCALE[metric], 0.0), 1.0):.0f}%"

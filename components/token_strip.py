"""The token strip: the sequence as the spine of every view of a trace. Colour is the chosen metric, the frame the chosen position.

The server sends each metric as one list; assets/token_strip.js makes the tokens of them, with every metric in CSS variables, holds the
one listener for the whole strip (clicks, arrow keys, hover) and writes the position into the store `position`. A callback for each
token would take 4 times as long at a thousand tokens.
"""

from __future__ import annotations

import math

import numpy as np
from dash import ClientsideFunction, Input, Output, clientside_callback, dcc, html

from backend.trace import Trace
from components.token_label import token_labels

METRICS = {"surprise": "surprise, nats", "entropy": "entropy, nats", "none": "no colour"}

# Nats at which the colour is full: a surprise of 8 is a probability of 1 in 3,000. The same scale in every trace, so strips compare.
FULL_SCALE = {"surprise": 8.0, "entropy": 6.0}


def token_strip(trace: Trace, position: int) -> html.Div:
    """The sticky strip. Surprise is -log p of the token given those before it; entropy is that of the prediction made at the token."""
    tokens = {
        "labels": token_labels(trace.token_texts, trace.special), "ids": trace.token_ids, "generated": trace.n_prompt, "chosen": position,
        "surprise": _rounded(surprises(trace)), "entropy": _rounded(trace.entropy), "full": FULL_SCALE,
    }  # fmt: skip
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
    return html.Div([menu, strip, dcc.Store(id="strip-tokens", data=tokens)], className="strip")


# The output is never written: Dash runs a callback when a page opens only if it has one there.
clientside_callback(ClientsideFunction("layerscope", "drawStrip"), Output("strip-tokens", "id"), Input("strip-tokens", "data"))


def surprises(trace: Trace) -> np.ndarray:
    """(pos,) -log p, nats, of each token given those before it; NaN at position 0, which nothing predicts."""
    return np.concatenate([[np.nan], -trace.next_logprobs[:-1]])


def _rounded(values: np.ndarray) -> list[float | str | None]:
    """Nats to three places; None where there is no number. JSON has no infinity, but JavaScript reads its name."""
    return [None if math.isnan(value) else "Infinity" if math.isinf(value) else value for value in np.round(values.astype(np.float64), 3).tolist()]

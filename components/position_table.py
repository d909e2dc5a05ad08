"""The table of positions on the Overview: one block of rows around the chosen position.

A row is a dozen elements, so a thousand rows would take the browser twenty seconds; a block takes none that one notices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import html

from backend.trace import Trace
from components.drawn import still
from components.token_label import predicted_label, token_label
from components.token_strip import surprises

BLOCK = 100  # positions
SHOWN_TOP = 3  # next tokens in a row; the card of the chosen position shows all that were stored

_COLUMNS = (("", "num"), ("Token", ""), ("Id", "num"), ("Log-prob", "num"), ("Rank", "num"), ("Entropy", "num"), ("Predicts next", ""))


def block_of(position: int) -> int:
    """First position of the block that holds `position`."""
    return position // BLOCK * BLOCK


def position_table(trace: Trace, position: int) -> html.Div:
    """The block that holds `position`, which is marked."""
    start = block_of(position)
    stop = min(start + BLOCK, trace.n_tokens)
    log_probs, entropy, ranks = -surprises(trace), trace.entropy, trace.next_ranks
    ids, probs = trace.top_ids[:, :SHOWN_TOP], np.exp(trace.top_logprobs[:, :SHOWN_TOP])
    head = html.Thead(html.Tr([html.Th(name, className=look) for name, look in _COLUMNS]))
    rows = []
    for at in range(start, stop):
        guesses = [_guess(predicted_label(i, trace.token_text(i), trace.info, 16), float(p)) for i, p in zip(ids[at], probs[at], strict=True)]
        numbers = (float(log_probs[at]), int(ranks[at - 1]) if at else -1, float(entropy[at]))
        rows.append(_row(trace, at, at == position, numbers, guesses))
    return still(html.Table([head, html.Tbody(rows)], className="ls-table positions"))


def block_words(trace: Trace, position: int) -> str:
    """How to read the table, and which part of a long prompt it shows."""
    start = block_of(position)
    part = f"Positions {start} to {min(start + BLOCK, trace.n_tokens) - 1} of {trace.n_tokens:,}; a token above moves to its part. " if trace.n_tokens > BLOCK else ""
    return f"{part}Click a row, or a token above, to choose a position."


def _row(trace: Trace, at: int, chosen: bool, numbers: tuple[float, int, float], guesses: list[html.Span]) -> html.Tr:
    log_prob, rank, entropy = numbers
    mark = html.Span("new", className="badge badge-accent", title="generated") if at >= trace.n_prompt else None
    token = html.Td([html.Span(token_label(trace.token_texts[at], at in trace.special, 24), className="chip-token"), " ", mark], className="nowrap")
    texts = ["" if np.isnan(log_prob) else f"{log_prob:z.2f}", "" if rank < 0 else f"{rank + 1:,}", f"{entropy:z.2f}"]
    cells = [html.Td(at, className="num muted"), token, html.Td(trace.token_ids[at], className="num muted"), *(html.Td(text, className="num") for text in texts)]
    data: dict[str, Any] = {"data-pos": at}
    return html.Tr([*cells, html.Td(guesses, className="guesses")], tabIndex=0, className="chosen" if chosen else "", **data)


def _guess(label: str, prob: float) -> html.Span:
    return html.Span([html.Span(label, className="chip-token"), html.Span(f" {prob:.2f}", className="muted small")], className="guess")

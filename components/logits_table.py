"""The tables of the Logits page: one prediction a row, in blocks around the chosen position; and what prompt and generated tokens come to."""

from __future__ import annotations

import numpy as np
from dash import html

from backend.analysis.logits import cumulative_perplexity
from backend.trace import Trace
from components.drawn import still
from components.position_table import BLOCK, block_of
from components.token_label import predicted_label, token_label

UNITS = {"nats": 1.0, "bits": float(np.log(2))}  # nats in one
_LOOKS = ("num muted", "chip-token", "num", "chip-token", "num", "num", "num", "num", "chip-token")  # of the columns
SHOWN_TOP = 3  # next tokens in a row; the bars of the chosen position show all


def prediction_table(trace: Trace, position: int, unit: str) -> html.Div:
    """The block of positions that holds `position`: what each predicted, what followed, and what that cost.

    A cell is one piece of text: every element inside it would cost the browser as much as another cell.
    """
    start = block_of(position)
    stop, scale = min(start + BLOCK, trace.n_tokens), UNITS[unit]
    ids, probs = trace.top_ids[start:stop, :SHOWN_TOP], np.exp(trace.top_logprobs[start:stop, :SHOWN_TOP])
    logprobs, ranks, entropy = trace.next_logprobs / scale, trace.next_ranks, trace.entropy / scale
    perplexity = cumulative_perplexity(trace.next_logprobs)
    rows = []
    for at in range(start, stop):
        guesses = "   ".join(f"{predicted_label(i, trace.token_text(i), trace.info, 14)} {p:.3f}" for i, p in zip(ids[at - start], probs[at - start], strict=True))
        follows = ["–"] * 5
        if at + 1 < trace.n_tokens:
            rank = "no rank" if ranks[at] < 0 else f"{ranks[at] + 1:,}"
            follows = [_token(trace, at + 1), _number(logprobs[at]), rank, _number(-logprobs[at]), _number(perplexity[at])]
        cells = [str(at), _token(trace, at), _number(entropy[at]), *follows, guesses]
        rows.append(html.Tr([html.Td(cell, className=look) for cell, look in zip(cells, _LOOKS, strict=True)],
                            tabIndex=0, className="chosen" if at == position else "", **{"data-pos": at}))  # fmt: skip
    titles = ("Position", "After", f"Entropy, {unit}", "What follows", f"Log-prob, {unit}", "Rank", f"Surprise, {unit}", "Perplexity so far", f"Top {SHOWN_TOP}")
    head = [html.Th(title, className="num" if look.startswith("num") else "") for title, look in zip(titles, _LOOKS, strict=True)]
    return still(html.Table([html.Thead(html.Tr(head)), html.Tbody(rows)], className="ls-table positions"))


def totals_table(trace: Trace, unit: str) -> html.Div:
    """The tokens of the prompt and those that were generated: how many were predicted, how well."""
    logprobs, ranks, entropy = trace.next_logprobs, trace.next_ranks, trace.entropy
    parts = {"Prompt": slice(0, trace.n_prompt - 1), "Generated": slice(trace.n_prompt - 1, trace.n_tokens - 1), "Both": slice(0, trace.n_tokens - 1)}
    columns = [_totals(logprobs[part], ranks[part], entropy[part], UNITS[unit]) for part in parts.values()]
    names = ("Tokens predicted", f"Mean surprise, {unit}", "Perplexity", f"Mean entropy, {unit}", "First choice", "Among the first 5", "NaN")
    head = html.Thead(html.Tr([html.Th(""), *(html.Th(name, className="num") for name in parts)]))
    body = [html.Tr([html.Td(name), *(html.Td(column[i], className="num") for column in columns)]) for i, name in enumerate(names)]
    return still(html.Table([head, html.Tbody(body)], className="ls-table"))


def _totals(logprobs: np.ndarray, ranks: np.ndarray, entropy: np.ndarray, scale: float) -> list[str]:
    n = len(logprobs)
    if not n:
        return ["0", *["–"] * 5, "0"]
    surprise = -float(np.mean(logprobs, dtype=np.float64))
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(np.float64(surprise)))
    shares = [f"{100 * np.count_nonzero((ranks >= 0) & (ranks < best)) / n:.1f} %" for best in (1, 5)]
    mean_entropy = float(np.mean(entropy, dtype=np.float64))
    return [f"{n:,}", _number(surprise / scale), _number(perplexity), _number(mean_entropy / scale), *shares, f"{np.count_nonzero(np.isnan(logprobs)):,}"]


def _token(trace: Trace, at: int) -> str:
    return f"{token_label(trace.token_texts[at], at in trace.special, 20)}{' (new)' if at >= trace.n_prompt else ''}"


def _number(value: float) -> str:
    return f"{value:z.3f}" if abs(value) < 1e4 else f"{value:.3g}"

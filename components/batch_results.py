"""How a batch stands and what came of each prompt: the results table, block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dash import dcc, html

from backend.batches import Batch, Item
from components.controls import set_button
from components.trace_view import one_line

PAGE_SIZE = 50


def results_table(items: Sequence[Item]) -> html.Div:
    """One row a prompt: perplexity and mean log-probability of its tokens, mean entropy, the way to its trace or the sentence that says why there is none."""
    names = ("", "Prompt", "Category", "Tokens", "Log-prob", "Perplexity", "Entropy", "")
    head = html.Thead(html.Tr([html.Th(name, className="" if name in ("Prompt", "Category") else "num") for name in names]))
    return html.Div(html.Table([head, html.Tbody([_row(item) for item in items])], className="ls-table compact batch-table"), className="table-scroll")


def _row(item: Item) -> html.Tr:
    text = one_line(item.prompt.text, 140)
    first = [html.Td(item.number + 1, className="num muted")]
    if item.error:
        words = html.Td([html.Div(text, className="mono"), html.Div(item.error, className="bad small")])
        return html.Tr([*first, words, html.Td(item.prompt.category), html.Td("failed", className="bad num", colSpan=5)])
    link = dcc.Link(text, href=f"/trace?trace={item.trace_id}", className="row-link") if item.trace_id else html.Span(text, className="muted")
    numbers = [
        f"{item.n_tokens}" if item.n_tokens is not None else "",
        "" if item.logprob is None else f"{item.logprob:.3f}",
        "" if item.logprob is None else perplexity(item.logprob),
        "" if item.entropy is None else f"{item.entropy:.3f}",
    ]
    way = dcc.Link("Open", href=f"/trace?trace={item.trace_id}", className="btn btn-outline-secondary") if item.trace_id else html.Span("waiting", className="muted small")
    cells = [html.Td(number, className="num nowrap") for number in numbers]
    return html.Tr([*first, html.Td(link, className="cut mono"), html.Td(item.prompt.category), *cells, html.Td(way, className="num")])


def perplexity(logprob: float) -> str:
    """exp of minus a mean log-probability, written so that columns compare."""
    value = math.exp(min(-logprob, 700))
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def page_buttons(at: int, n: int) -> Any:
    """Blocks of PAGE_SIZE prompts; the store is `batch-page`."""
    last = max(n - 1, 0) // PAGE_SIZE
    if not last:
        return None
    back = set_button("Before", "batch-page", str(at - 1), disabled=at == 0)
    on = set_button("After", "batch-page", str(at + 1), disabled=at == last)
    return [back, on, html.Span(f"Prompts {at * PAGE_SIZE + 1:,} to {min((at + 1) * PAGE_SIZE, n):,} of {n:,}", className="muted small")]


def batch_words(batch: Batch) -> str:
    """ "12 of 20 done, 1 failed"."""
    failed = f", {batch.n_failed:,} failed" if batch.n_failed else ""
    return f"{batch.n_done:,} of {batch.n:,} done{failed}"


def batch_list(batches: Sequence[Batch]) -> html.Div:
    """Every batch, newest first, as a table with the way into each."""
    head = html.Thead(html.Tr([html.Th("Batch"), html.Th("Model"), html.Th("Prompts", className="num"), html.Th("State")]))
    rows = [
        html.Tr([html.Td(dcc.Link(batch.name or f"batch {batch.id}", href=f"/batch?batch={batch.id}", className="row-link")), html.Td(batch.model),
                 html.Td(f"{batch.n:,}", className="num"), html.Td(batch_words(batch))])
        for batch in batches
    ]  # fmt: skip
    return html.Div(html.Table([head, html.Tbody(rows)], className="ls-table"), className="table-scroll")

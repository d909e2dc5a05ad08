"""Choosing a token of the vocabulary by its text: the tokens of the trace at once, all others after the model's vocabulary was listed.

Only a tokenizer knows how a file's tokens read as text, and the server runs none: listing them is a job, whose result is kept.
"""

from __future__ import annotations

import functools
from typing import Any

from dash import dcc, html

from backend.trace import Trace
from components.services import services
from components.token_label import token_label

SHOWN = 40  # suggestions at a time
AUTO = "auto"
NONE = "none"


def vocabulary(identity: str) -> list[str] | None:
    """Texts of every token of a model, by id; None while nobody has listed them."""
    try:
        return _vocabulary(identity) if identity else None
    except LookupError:
        return None


@functools.lru_cache(maxsize=2)
def _vocabulary(identity: str) -> list[str]:
    texts = services().derived.get_json(("vocabulary", identity))
    if texts is None:
        raise LookupError(identity)
    return texts


def text_of(trace: Trace, identity: str, token_id: int) -> str:
    """The text of any token, "‹id 123›" where neither the trace nor a listed vocabulary has it."""
    known = trace.vocabulary.get(token_id)
    if known is not None:
        return known
    texts = vocabulary(identity)
    return texts[token_id] if texts is not None and 0 <= token_id < len(texts) else trace.token_text(token_id)


def token_picker(id: str, value: str, clearable: bool = False) -> dcc.Dropdown:
    """A searchable list of tokens; its options come from `suggestions`. value: AUTO, NONE or a token id as text."""
    return dcc.Dropdown([{"label": value, "value": value}], value, id=id, clearable=clearable, className="picker-token", optionHeight=30)


def suggestions(trace: Trace, identity: str, position: int, search: str, value: str, first: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Options of a picker: `first`, then what matches the search, then the best tokens at the position; the value in any case."""
    ids = [] if value in (AUTO, NONE) else [int(value)]
    ids += _matches(trace, identity, search) if search else []
    ids += [int(i) for i in trace.top_ids[position]]
    return first + [token_option(i, text_of(trace, identity, i)) for i in list(dict.fromkeys(ids))[:SHOWN]]


def token_option(token_id: int, text: str) -> dict[str, Any]:
    """One token of a list, found by its text as it is and as it is written on screen."""
    label = token_label(text, max_length=24)
    words = html.Span([html.Span(label, className="chip-token"), html.Span(f" {token_id}", className="muted small")])
    return {"label": words, "value": str(token_id), "search": f"{text} {label} {token_id}"}


def _matches(trace: Trace, identity: str, search: str) -> list[int]:
    """Ids whose text holds the search: those that are it first, then those that begin with it, short ones first."""
    texts = vocabulary(identity)
    known = trace.vocabulary if texts is None else dict(enumerate(texts))
    wanted = search.replace("·", " ").casefold()
    bare = wanted.strip()
    words = ((i, text.casefold(), text.casefold().strip()) for i, text in known.items())
    found = [(short != bare, not short.startswith(bare), len(text), i) for i, text, short in words if wanted in text]
    return [i for *_, i in sorted(found)[:SHOWN]]


def parse_token(text: str | None, n_vocab: int, *words: str) -> str:
    """A picker's value out of a query: one of `words`, an id in the vocabulary, or the first of `words`."""
    if text in words:
        return str(text)
    return text if text is not None and text.isdecimal() and len(text) < 9 and int(text) < n_vocab else words[0]

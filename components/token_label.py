"""How a token is written on screen: its whitespace shown, special tokens in ‹ ›, nothing invisible left in it."""

from __future__ import annotations

import functools
import unicodedata

from backend.model_info import ModelInfo

_VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}


@functools.lru_cache(maxsize=4096)
def token_label(text: str, special: bool = False, max_length: int | None = None) -> str:
    """The display form of one token.

    >>> token_label(" Mary"), token_label("\\n\\n"), token_label("<s>", special=True), token_label("")
    ('·Mary', '⏎⏎', '‹s›', '∅')

    Control, formatting and unassigned characters (a right-to-left override, a zero-width space) become ⟨U+202E⟩, so that a token
    cannot reorder or hide the text around it. `max_length` cuts with an ellipsis.
    """
    if special:
        inner = text[1:-1] if len(text) > 2 and text[0] in "<[" and text[-1] in ">]" else text
        label = f"‹{_shown(inner)}›"
    else:
        label = _shown(text) or "∅"
    if max_length is not None and len(label) > max_length:
        label = f"{label[: max_length - 1]}…"
    return label


def predicted_label(token_id: int, text: str, info: ModelInfo, max_length: int | None = None) -> str:
    """The display form of a token that a model predicts: its start and end of text are special wherever they stand."""
    return token_label(text, int(token_id) in (info.bos_id, info.eos_id), max_length)


def token_labels(texts: list[str], special: set[int] = frozenset(), max_length: int | None = None) -> list[str]:  # type: ignore[assignment]
    """Display forms of a whole sequence; `special` holds positions."""
    return [token_label(text, position in special, max_length) for position, text in enumerate(texts)]


def _shown(text: str) -> str:
    return "".join(_VISIBLE.get(char) or (f"⟨U+{ord(char):04X}⟩" if _is_invisible(char) else char) for char in text)


def _is_invisible(char: str) -> bool:
    category = unicodedata.category(char)
    return category in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") or (category == "Zs" and char != " ")

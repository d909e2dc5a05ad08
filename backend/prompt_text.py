"""What typed text may hold: a Python string can hold half a character, and HDF5 keeps no NUL in a name."""

from __future__ import annotations

from backend.errors import LayerscopeError


def prompt_bytes(text: str) -> bytes:
    """UTF-8 of a prompt. Raises LayerscopeError for a lone surrogate, which is no Unicode text."""
    return _utf8(text, "The prompt")


def check_label(text: str, what: str) -> None:
    """Raise LayerscopeError for a lone surrogate or a NUL in a category or a tag; `what` names it at the start of the sentence."""
    if "\0" in _utf8(text, what).decode("utf-8"):
        raise LayerscopeError(f"{what} holds a NUL character, which no name can.")


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LayerscopeError(f"{what} holds {text[error.start]!r}, which is half a character and no Unicode text.") from None

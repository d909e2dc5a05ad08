"""What kind of text a token is, by its characters alone (Unicode categories), for colouring a vocabulary."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

CLASSES: dict[str, str] = {
    "lower": "letters in lower case: cat,  the",
    "capitalised": "one capital, then lower case: Paris, A",
    "upper": "two capitals or more, nothing in lower case: NASA",
    "mixed": "capitals inside a word: getElement",
    "digit": "numbers without a letter: 1984, ½",
    "punctuation": "punctuation and symbols alone: ..., +=, €",
    "whitespace": "spaces, tabs, line breaks alone",
    "other script": "a letter that is not Latin: кот, 猫",
    "byte": "a byte that is no character alone: <0xE2>",
    "special": "control tokens of the model: <s>, <|endoftext|>",
    "unused": "a row that no token of the tokenizer names",
}
_NUMBER = {name: i for i, name in enumerate(CLASSES)}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_class(text: str, special: bool = False) -> str:
    """The class of one token.

    >>> token_class(" Paris"), token_class("<0xE2><0x80>"), token_class("猫"), token_class("don't"), token_class("\\n ")
    ('capitalised', 'byte', 'other script', 'lower', 'whitespace')
    """
    if special:
        return "special"
    if _BYTE.search(text):
        return "byte"
    if not text.strip():
        return "whitespace"
    letters = [char for char in text if char.isalpha()]
    if any(not _is_latin(char) for char in letters):
        return "other script"
    cased = [char for char in letters if char.isupper() or char.islower()]
    if cased:
        return _by_case(cased)
    if letters:
        return "lower"  # Latin letters without case, such as ª
    return "digit" if any(unicodedata.category(char)[0] == "N" for char in text) else "punctuation"


def _by_case(cased: Sequence[str]) -> str:
    n_upper = sum(char.isupper() for char in cased)
    if not n_upper:
        return "lower"
    if n_upper == 1 and cased[0].isupper():
        return "capitalised"
    return "upper" if n_upper == len(cased) else "mixed"


def _is_latin(char: str) -> bool:
    return char.isascii() or unicodedata.name(char, "").startswith(("LATIN", "FEMININE ORDINAL", "MASCULINE ORDINAL", "MICRO", "FULLWIDTH LATIN", "MODIFIER LETTER"))


def token_classes(texts: Sequence[str], special: Collection[int] = (), unused: Collection[int] = ()) -> NDArray[np.uint8]:
    """(token,) numbers into CLASSES. special, unused: numbers of tokens."""
    known = set(special)
    found = np.array([_NUMBER[token_class(text, i in known)] for i, text in enumerate(texts)], np.uint8)
    found[np.array(sorted(unused), np.int64)] = _NUMBER["unused"]
    return found

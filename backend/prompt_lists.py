"""Lists of prompts for a batch: pasted lines, CSV and JSON Lines, read with bounds.

Pasted text and .txt: one prompt a line, as it stands; blank lines are left out. CSV: a header with the column `prompt`, and if wanted
`category` and `tags` (several between semicolons); quoted prompts may hold line breaks. JSON Lines: an object a line with the same names
(tags as a list), or a plain string. What is wrong is said with its line in one sentence.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from backend.errors import LayerscopeError
from backend.prompt_text import check_label, prompt_bytes

MAX_PROMPTS = 2000
MAX_BYTES = 8 << 20  # of a file, or of all prompts of a batch together
MAX_CHARACTERS = 100_000  # of one prompt
MAX_LABEL = 80  # characters of a category or a tag
MAX_TAGS = 16
COLUMNS = ("prompt", "category", "tags")


@dataclass(frozen=True)
class BatchPrompt:
    """One prompt of a batch."""

    text: str
    category: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptList:
    """What was read. `ignored`: columns or keys that mean nothing here."""

    prompts: tuple[BatchPrompt, ...]
    ignored: tuple[str, ...] = ()

    @property
    def categories(self) -> dict[str, int]:
        """Category -> number of prompts, in order of appearance; "" holds those without one."""
        found: dict[str, int] = {}
        for prompt in self.prompts:
            found[prompt.category] = found.get(prompt.category, 0) + 1
        return found


def parse_file(name: str, data: bytes) -> PromptList:
    """By the name's ending: .csv, .jsonl or .ndjson, .txt. Raises LayerscopeError."""
    ending = name.rpartition(".")[2].lower() if "." in name else ""
    shown = name[-80:]
    if ending not in ("csv", "jsonl", "ndjson", "txt"):
        raise LayerscopeError(f"{shown!r} is none of .csv, .jsonl, .ndjson and .txt.")
    if len(data) > MAX_BYTES:
        raise LayerscopeError(f"{shown} has {len(data):,} bytes, and the limit is {MAX_BYTES:,}.")
    text = _decode(shown, data)
    return parse_csv(text, shown) if ending == "csv" else parse_lines(text, shown) if ending == "txt" else parse_jsonl(text, shown)


def parse_lines(text: str, name: str = "the text") -> PromptList:
    """One prompt a line, its spaces kept; lines that are blank are left out."""
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    return _checked(name, ((number, line, "", []) for number, line in lines if line.strip()))


def parse_csv(text: str, name: str = "the file") -> PromptList:
    """Comma-separated values (RFC 4180) with a header."""
    before = csv.field_size_limit(MAX_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise LayerscopeError(f"Line {reader.line_num} of {name} is not CSV: {error}.") from None
    finally:
        csv.field_size_limit(before)
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    if "prompt" not in header:
        raise LayerscopeError(f"The first line of {name} names no column 'prompt'; it names {', '.join(cell[:40] for cell in header[:8]) or 'nothing'}.")
    for line, row in rows[1:]:
        if len(row) > len(header):
            raise LayerscopeError(f"Line {line} of {name} has {len(row)} cells, and the header names {len(header)}; put text with commas between quotes.")

    def read() -> Iterator[tuple[int, Any, Any, Any]]:
        for line, row in rows[1:]:
            cells = dict(zip(header, row, strict=False))
            tags = [tag.strip() for tag in cells.get("tags", "").split(";") if tag.strip()]
            yield line, cells.get("prompt", ""), cells.get("category", "").strip(), tags

    return _checked(name, read(), tuple(cell for cell in header if cell and cell not in COLUMNS))


def parse_jsonl(text: str, name: str = "the file") -> PromptList:
    """One JSON object (or string) a line."""
    ignored: dict[str, None] = {}

    def read() -> Iterator[tuple[int, Any, Any, Any]]:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise LayerscopeError(f"Line {number} of {name} is not JSON ({str(error)[:80]}).") from None
            entry = {"prompt": found} if isinstance(found, str) else found
            if not isinstance(entry, dict) or "prompt" not in entry:
                raise LayerscopeError(f"Line {number} of {name} is no object with the key 'prompt'.")
            ignored.update(dict.fromkeys(key for key in entry if key not in COLUMNS))
            tags = entry.get("tags") or []
            yield number, entry["prompt"], entry.get("category") or "", [tags] if isinstance(tags, str) else tags

    found = _checked(name, read())
    return PromptList(found.prompts, tuple(ignored)[:20])


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise LayerscopeError(f"Line {line} of {name} is not UTF-8: byte 0x{data[error.start]:02x} belongs to no character; save the file as UTF-8.") from None


def _checked(name: str, entries: Iterator[tuple[int, Any, Any, Any]], ignored: tuple[str, ...] = ()) -> PromptList:
    """entries: line, prompt, category, tags. Raises LayerscopeError for what is no text, too long or too many, and for no prompt at all."""
    prompts: list[BatchPrompt] = []
    for line, text, category, tags in entries:
        where = f"Line {line} of {name}"
        if not isinstance(text, str) or not text:
            raise LayerscopeError(f"{where} has {'an empty prompt' if text == '' else 'a prompt that is no text'}.")
        if len(text) > MAX_CHARACTERS:
            raise LayerscopeError(f"{where} has a prompt of {len(text):,} characters, and the limit is {MAX_CHARACTERS:,}.")
        if not isinstance(tags, list) or len(tags) > MAX_TAGS:
            raise LayerscopeError(f"{where} has tags that are no list of at most {MAX_TAGS}.")
        for label in (category, *tags):
            if not isinstance(label, str) or len(label) > MAX_LABEL:
                raise LayerscopeError(f"{where} has a category or tag that is no text of at most {MAX_LABEL} characters.")
            check_label(label, f"{where}: a category or tag")
        try:
            prompt_bytes(text)
        except LayerscopeError as error:
            raise LayerscopeError(f"{where}: {error}") from None
        prompts.append(BatchPrompt(text, category, tuple(dict.fromkeys(tags))))
        if len(prompts) > MAX_PROMPTS:
            raise LayerscopeError(f"{name} holds more than {MAX_PROMPTS:,} prompts, the limit of one batch.")
    if not prompts:
        raise LayerscopeError(f"{name} holds no prompt.")
    return PromptList(tuple(prompts), ignored)

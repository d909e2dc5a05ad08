"""JSON objects from files that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backend.errors import LayerscopeError
from backend.files.stand_ins import SHOWN_BYTES, stand_in


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; raises LayerscopeError otherwise."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise LayerscopeError(f"{path.name} of {path.parent.name} has more than the {limit:,} bytes allowed.")
    if not data.lstrip().startswith(b"{") and (instead := stand_in(data[:SHOWN_BYTES])):
        raise LayerscopeError(f"{path.name} of {path.parent.name} is no valid JSON: it is {instead}.")
    return parse_json(data, f"{path.name} of {path.parent.name}")


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """One JSON object from untrusted bytes. Duplicate keys are refused: two readers could each believe another one."""
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise LayerscopeError(f"{what} is no valid JSON: {str(error)[:120]}.") from None
    if not isinstance(value, dict):
        raise LayerscopeError(f"{what} holds a JSON {type(value).__name__}, not an object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value

"""Everything a model says about itself, as rows: the metadata of a GGUF file, the config.json of a folder.

Read by the bounded readers alone. Long lists are folded to their count and first items, long texts to their beginning, and control
characters are spelled out, so that a row can be shown and sent whatever the file holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.reports.graph_formats import plain

FIRST_ITEMS = 8
ITEM_CHARACTERS = 60
TEXT_CHARACTERS = 20_000  # of one text; chat templates are shorter
KEY_CHARACTERS = 200


@dataclass(frozen=True)
class MetadataRow:
    """`value` is what can be shown; `n_items` is None for what is no list; `cut`: there is more than `value` shows."""

    key: str
    type: str
    value: str
    n_items: int | None = None
    cut: bool = False


def read_metadata(path: Path) -> tuple[dict[str, Any], list[MetadataRow]]:
    """The values by key (nested keys of a config joined with dots), and the rows in the order of the file.

    Raises LayerscopeError as the readers do.
    """
    if path.is_dir():
        from backend.files.hf_config import check_folder

        values = dict(_flat(check_folder(path).config, ""))
        return values, [metadata_row(key, _json_type(value), value) for key, value in values.items()]
    from backend.files.gguf_header import read_header

    header = read_header(path)
    return header.metadata, [metadata_row(key, header.types[key], value) for key, value in header.metadata.items()]


def metadata_row(key: str, kind: str, value: Any) -> MetadataRow:
    """One value as it is shown."""
    name = plain(key[:KEY_CHARACTERS]) + ("…" if len(key) > KEY_CHARACTERS else "")
    if isinstance(value, str):
        return MetadataRow(name, kind, _readable(value[:TEXT_CHARACTERS]), None, len(value) > TEXT_CHARACTERS)
    single = "float32" in kind
    if not isinstance(value, Sequence) and not hasattr(value, "tolist"):
        return MetadataRow(name, kind, _scalar(value, single))
    shown = ", ".join(_scalar(item, single) for item in value[:FIRST_ITEMS])
    return MetadataRow(name, kind, shown, len(value), len(value) > FIRST_ITEMS)


def _scalar(value: Any, single: bool = False) -> str:
    """`single`: a float32, whose seven digits are all it has."""
    if isinstance(value, str):
        return "'" + plain(value[:ITEM_CHARACTERS]) + ("…'" if len(value) > ITEM_CHARACTERS else "'")
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and single:
        return f"{value:.7g}"
    return plain(json.dumps(value, ensure_ascii=False)[:ITEM_CHARACTERS])


def _readable(text: str) -> str:
    """Line breaks and tabs stay, every other control character is spelled out."""
    return "\n".join("\t".join(plain(part) for part in line.split("\t")) for line in text.split("\n"))


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value and prefix.count(".") < 4:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _json_type(value: Any) -> str:
    names = {str: "string", bool: "bool", int: "integer", float: "number", type(None): "null", dict: "object"}
    if isinstance(value, list):
        inside = {names.get(type(item), "list") for item in value}
        return f"array of {inside.pop()}" if len(inside) == 1 else "array"
    return names[type(value)]

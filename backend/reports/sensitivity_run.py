"""A sensitivity run as it lies in its folder: manifest, statistics, top weights. The format is docs/sensitivity.md; folders are read as files of a stranger."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.errors import LayerscopeError
from backend.files.bounded_json import read_json

SCHEMA = "layerscope.sensitivity/1"
MANIFEST, STATS, TOP = "manifest.json", "sensitivity_stats.json", "top_weights.csv"
FOLDER = "sensitivity"  # of the data folder: the page's runs, one folder each, named by their id
TOP_COLUMNS = ("scope", "rank", "name", "layer", "component", "expert", "row", "column", "value", "score", "percentile")
_JSON_LIMIT = 64 << 20
_TOP_LIMIT = 256 << 20
_INTEGERS = ("rank", "layer", "expert", "row", "column")
_NUMBERS = ("value", "score", "percentile")


@dataclass(frozen=True)
class SensitivityRun:
    """One finished run. top: rows of top_weights.csv, numbers as numbers, None where a field is empty."""

    folder: Path
    manifest: dict[str, Any]
    stats: dict[str, Any]
    top: list[dict[str, Any]]

    @property
    def id(self) -> str:
        return str(self.manifest["id"])

    @property
    def label(self) -> str:
        """As figures and tables name it: model and metric."""
        return f"{self.manifest['model']['name']}, {self.stats['metric']}"


def open_run(folder: Path) -> SensitivityRun:
    """Read a run. Raises LayerscopeError for a folder that is none, or one of another version."""
    if not (folder / MANIFEST).is_file():
        raise LayerscopeError(f"{folder} holds no sensitivity run: {MANIFEST} is missing.")
    try:
        manifest, stats = (read_json(folder / name, _JSON_LIMIT) for name in (MANIFEST, STATS))
        for found in (manifest, stats):
            if found.get("schema") != SCHEMA:
                raise LayerscopeError(f"The run in {folder} has the schema {str(found.get('schema'))[:40]!r}; this version reads {SCHEMA}.")
        run = SensitivityRun(folder, manifest, stats, read_top(folder / TOP))
        for part, keys in ((manifest, ("id", "created", "spec", "model", "text", "notes")), (stats, ("metric", "mode", "tensors"))):
            if lacking := [key for key in keys if key not in part]:
                raise LayerscopeError(f"The run in {folder} is damaged: {lacking[0]!r} is missing.")
    except OSError as error:
        raise LayerscopeError(f"The run in {folder} cannot be read: {error.strerror}.") from None
    return run


def read_top(path: Path) -> list[dict[str, Any]]:
    """The rows of a top_weights.csv. Raises LayerscopeError where columns are missing or hold no numbers; OSError."""
    if path.stat().st_size > _TOP_LIMIT:
        raise LayerscopeError(f"{path.name} has {path.stat().st_size:,} bytes, and the limit is {_TOP_LIMIT:,}.")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if lacking := [name for name in TOP_COLUMNS if name not in (reader.fieldnames or ())]:
            raise LayerscopeError(f"{path.name} of {path.parent.name} has no column {lacking[0]!r}.")
        try:
            return [_typed(row) for row in reader]
        except (ValueError, TypeError, csv.Error, UnicodeDecodeError) as error:
            raise LayerscopeError(f"{path.name} of {path.parent.name} is damaged: {str(error)[:100]}.") from None


def _typed(row: dict[str, str]) -> dict[str, Any]:
    numbers = {name: int(row[name]) if row[name] else None for name in _INTEGERS} | {name: float(row[name]) if row[name] else None for name in _NUMBERS}
    return {**{name: row[name] for name in TOP_COLUMNS}, **numbers}


def runs(data_dir: Path) -> Iterator[SensitivityRun]:
    """The page's runs, newest first; what cannot be read is left out."""
    folders = [folder for folder in (data_dir / FOLDER).glob("*") if (folder / MANIFEST).is_file()]
    for folder in sorted(folders, key=lambda each: (each / MANIFEST).stat().st_mtime, reverse=True):
        try:
            yield open_run(folder)
        except LayerscopeError:
            continue

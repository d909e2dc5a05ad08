"""A sensitivity run as it lies in its folder: manifest, statistics, top weights. The format is docs/sensitivity.md; folders are read as files of a stranger."""

from __future__ import annotations

import csv
import re
import shutil
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
_MANIFEST_LIMIT = 1 << 20  # of one in a list
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
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


def run_folder(data_dir: Path, run_id: str) -> Path:
    """The folder of one of the page's runs. Raises LayerscopeError for a name that is none of a folder there."""
    if not _ID.fullmatch(run_id):
        raise LayerscopeError(f"{run_id[:80]!r} is not the id of a sensitivity run; ids are 1 to 64 characters of a-z, A-Z, 0-9, _ and -.")
    folder = data_dir / FOLDER / run_id
    if folder.is_symlink() or not folder.is_dir():
        raise LayerscopeError(f"There is no sensitivity run {run_id!r}; it may have been deleted.")
    return folder


def delete_run(data_dir: Path, run_id: str) -> None:
    """Delete one of the page's runs with its folder: first out of the list, then from the disk. Raises LayerscopeError."""
    folder = run_folder(data_dir, run_id)
    gone = folder.with_name(f".{folder.name}.deleted")
    try:
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        raise LayerscopeError(f"The run {run_id!r} cannot be deleted: {error.strerror}.") from None


def manifests(data_dir: Path) -> list[dict[str, Any]]:
    """What the page's runs say of themselves, newest first, each with `folder`, the name of its folder; nothing else of them is read.

    What says nothing readable is left out; opened by its id, it says why.
    """
    found: list[tuple[float, dict[str, Any]]] = []
    for path in (data_dir / FOLDER).glob(f"*/{MANIFEST}"):
        try:
            manifest = read_json(path, _MANIFEST_LIMIT)
            spec, model = manifest["spec"], manifest["model"]
            if _ID.fullmatch(path.parent.name) and all(isinstance(text, str) for text in (manifest["created"], model["name"], spec["metric"], spec["mode"])):
                found.append((path.stat().st_mtime, {**manifest, "folder": path.parent.name}))
        except (LayerscopeError, OSError, KeyError, TypeError):
            continue
    return [manifest for _, manifest in sorted(found, key=lambda each: each[0], reverse=True)]

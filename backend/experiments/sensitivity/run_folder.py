"""The files of a run (docs/sensitivity.md), written beside their place and moved there when they are whole."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
import platform
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from backend.durable import sync_folder
from backend.engines import Engine
from backend.errors import LayerscopeError
from backend.experiments.sensitivity import Spec
from backend.experiments.sensitivity.checks import check_out_dir
from backend.experiments.sensitivity.contracts import Ranking
from backend.experiments.sensitivity.ranking import place
from backend.experiments.sensitivity.texts import Text
from backend.model_files import identity
from backend.reports.sensitivity_run import MANIFEST, SCHEMA, STATS, TOP, TOP_COLUMNS

PACKAGES = ("numpy", "scipy", "torch", "transformers", "safetensors", "llama-cpp-python", "matplotlib")
PART = ".part"
_PROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"


@contextmanager
def part_of(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is gone afterwards, unless `publish` moved it. Raises LayerscopeError where it cannot be made."""
    part = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}{PART}")
    with _said(out):
        part.mkdir(parents=True)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _said(out: Path) -> Iterator[None]:
    """What the disk refuses, as a sentence."""
    try:
        yield
    except OSError as error:
        raise LayerscopeError(f"The run cannot be written to {out}: {error.strerror}.") from None


def publish(part: Path, out: Path, about: dict[str, Any], stats: dict[str, Any], top: Iterable[Sequence[Any]]) -> None:
    """Write the files and make the folder visible as `out`. Raises LayerscopeError if something lies there by now, or the disk refuses."""
    with _said(out):
        write(part, about, stats, top)
        sync_folder(part)
        check_out_dir(out)
        os.rename(part, out.absolute())  # onto an empty folder at most: any other is refused by the kernel as well
        sync_folder(out.absolute().parent)


def remove_parts(folder: Path) -> None:
    """Delete what runs left in `folder` whose process died."""
    for part in folder.glob(f".*{PART}"):
        pid = part.name.removesuffix(PART).rpartition(".")[2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists()):
            shutil.rmtree(part, ignore_errors=True)


def write(folder: Path, about: dict[str, Any], stats: dict[str, Any], top: Iterable[Sequence[Any]]) -> None:
    """The three files, the manifest last: a folder without one is no run."""
    with open(folder / TOP, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(TOP_COLUMNS)
        writer.writerows(top)
        file.flush()
        os.fsync(file.fileno())
    for name, value in ((STATS, stats), (MANIFEST, about)):
        with open(folder / name, "w", encoding="utf-8") as file:
            json.dump(plain(value), file, ensure_ascii=False, allow_nan=False, indent=1)
            file.flush()
            os.fsync(file.fileno())


def plain(value: Any) -> Any:
    """The same in JSON's own types, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def manifest(engine: Engine, spec: Spec, text: Text, run_id: str, command: list[str], seconds: dict[str, float], notes: list[str]) -> dict[str, Any]:
    """manifest.json."""
    info = engine.info
    return {
        "schema": SCHEMA, "id": run_id, "created": datetime.now(UTC).isoformat(timespec="seconds"), "layerscope": version(), "command": command,
        "spec": spec.to_json(),
        "model": {"name": info.name, "architecture": info.architecture, "n_layers": info.n_layers, "n_params": info.n_params, "quantization": info.quantization,
                  "engine": info.engine, "engine_version": engine.version, "identity": identity(Path(info.source))},
        "text": text.to_json(), "packages": packages(), "seconds": seconds, "notes": list(dict.fromkeys(notes)),
    }  # fmt: skip


def version() -> str:
    return str(tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["version"])


def packages() -> dict[str, str]:
    """Python's version and those of the packages that the numbers come from, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def top_rows(ranking: Ranking) -> Iterator[tuple[Any, ...]]:
    """The rows of top_weights.csv in the order of TOP_COLUMNS, scope by scope."""
    top, size_of = ranking.top, _scope_sizes(ranking)
    for scope in np.unique(top.scope).tolist():
        for rank, i in enumerate(np.flatnonzero(top.scope == scope).tolist(), 1):
            name = top.names[top.tensor[i]]
            layer, component = place(name)
            *lead, row, column = (int(axis) for axis in np.unravel_index(int(top.at[i]), ranking.shapes[name]))
            percentile = 100 * (size_of[scope] - rank) / size_of[scope]
            yield ("global" if ranking.mode == "global" else scope, rank, name, "" if layer is None else layer, component, lead[0] if lead else "", row, column,
                   repr(float(top.value[i])), repr(float(top.score[i])), repr(percentile))  # fmt: skip


def _scope_sizes(ranking: Ranking) -> dict[int, int]:
    """Scope -> how many weights are ranked in it."""
    sizes: dict[int, int] = {}
    for row in ranking.tensors:
        scope = 0 if ranking.mode == "global" else row["layer"]
        sizes[scope] = sizes.get(scope, 0) + row["n"]
    return sizes

"""Tuned lenses on disk: a folder of `<data>/tuned_lenses` each, with `translators.safetensors` and `tuned_lens.json`, which says how it was made.

A translator is affine, one for each row of the lens but the last (Belrose et al. 2023, arXiv:2303.08112): h + A h + b, before the final norm. Stored are
`<row>.A` (d_model, d_model) and `<row>.b` (d_model,), float32. The last layer needs none, so there the tuned lens is the model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from backend.durable import sha256, sync_folder
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo

Rows = NDArray[np.float32]

FOLDER = "tuned_lenses"
_TENSORS, _MADE = "translators.safetensors", "tuned_lens.json"
_MADE_LIMIT = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIZES = ("n_layers", "d_model", "d_vocab")


@dataclass(frozen=True)
class TunedLens:
    """One tuned lens. `made`: its JSON; `tag`: its name with the beginning of its checksum, which tells it from another of that name."""

    folder: Path
    made: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def tag(self) -> str:
        return f"{self.name}:{self.made['sha256'][:8]}"

    def translator(self, row: str) -> tuple[Rows, Rows] | None:
        """A (d_model, d_model) and b (d_model,) of a row; None for one that has no translator. Raises LayerscopeError for a damaged file."""
        if row not in self.made["rows"]:
            return None
        d_model = self.made["d_model"]
        try:
            with safe_open(self.folder / _TENSORS, framework="numpy") as file:
                a, b = (np.asarray(file.get_tensor(f"{row}.{part}"), np.float32) for part in ("A", "b"))
        except (OSError, SafetensorError) as error:
            raise LayerscopeError(f"The tuned lens {self.name} cannot be read: {error}.") from None
        if a.shape != (d_model, d_model) or b.shape != (d_model,):
            raise LayerscopeError(f"The tuned lens {self.name} has a translator of {a.shape} and {b.shape} at {row}, not of d_model {d_model:,}.")
        return a, b

    def translate(self, row: str, stream: Rows) -> Rows:
        """h + A h + b of a stream (pos, d_model) at `row`; the stream itself where there is no translator."""
        found = self.translator(row)
        return stream if found is None else stream + stream @ found[0].T + found[1]


def check_name(name: str) -> str:
    """The name, if it can be a folder's. Raises LayerscopeError."""
    if not _NAME.fullmatch(name):
        raise LayerscopeError(f"The name {name[:80]!r} of a tuned lens is not of letters, digits, '.', '_' and '-', 64 at most.")
    return name


def tuned_lenses(folder: Path, info: ModelInfo) -> list[TunedLens]:
    """The tuned lenses in a folder that fit a model of these sizes, by name; those made on the model of that name first."""
    found = []
    for path in sorted(folder.glob(f"*/{_MADE}")):
        try:
            lens = read_tuned_lens(path.parent)
        except LayerscopeError:
            continue  # another program's folder, or a damaged one: it says so when it is opened by name
        if all(lens.made[size] == getattr(info, size) for size in _SIZES):
            found.append(lens)
    return sorted(found, key=lambda lens: lens.made["model"] != info.name)


def open_tuned_lens(folder: Path, tag: str, info: ModelInfo) -> TunedLens:
    """A tuned lens by its tag, or by its name alone. Raises LayerscopeError where it is missing, has changed, or does not fit the model."""
    name, _, digest = tag.partition(":")
    lens = read_tuned_lens(folder / check_name(name))
    if digest and lens.tag != tag:
        raise LayerscopeError(f"The tuned lens {name} has been made anew since; choose it again.")
    for size in _SIZES:
        if lens.made[size] != getattr(info, size):
            raise LayerscopeError(f"The tuned lens {name} is for {size} {lens.made[size]:,}, and {info.name} has {getattr(info, size):,}.")
    return lens


def read_tuned_lens(folder: Path) -> TunedLens:
    """A tuned lens by its folder; its tensors are read when they are used. Raises LayerscopeError."""
    path = folder / _MADE
    try:
        if path.stat().st_size > _MADE_LIMIT:
            raise ValueError(f"{path.name} is larger than {_MADE_LIMIT:,} bytes")
        made = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(made["sha256"], str) and isinstance(made["model"], str) and all(type(made[size]) is int for size in _SIZES)
        if not good or not all(isinstance(row, str) for row in made["rows"]):
            raise ValueError("its fields are not of the kinds they should be")
    except FileNotFoundError:
        raise LayerscopeError(f"There is no tuned lens {folder.name[:80]!r}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LayerscopeError(f"{path} does not say how a tuned lens was made: {error}.") from None
    return TunedLens(folder, made)


def write_tuned_lens(folder: Path, translators: Mapping[str, tuple[Rows, Rows]], made: Mapping[str, Any]) -> TunedLens:
    """Publish translators (row -> A, b) in a new folder with `made`, to which rows and checksum are added. Raises LayerscopeError if the folder exists."""
    check_name(folder.name)
    if folder.exists():
        raise LayerscopeError(f"{folder} exists already; choose another name, or delete it.")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        tensors = {f"{row}.{name}": values for row, pair in translators.items() for name, values in zip("Ab", pair, strict=True)}
        save_file({name: np.ascontiguousarray(values, np.float32) for name, values in tensors.items()}, part / _TENSORS)
        said = {**made, "rows": list(translators), "sha256": sha256(part / _TENSORS)}
        (part / _MADE).write_text(json.dumps(said, indent=1, ensure_ascii=False), encoding="utf-8")
        sync_folder(part)
        part.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise LayerscopeError(f"The tuned lens cannot be written to {folder}: {error.strerror}.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return TunedLens(folder, said)

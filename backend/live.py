"""Live records: what a running generation has written so far, for a page to follow, and the word that it is enough.

One file a job, one JSON object a line: the prompt first, then every token as it is chosen. The worker appends whole lines; a reader takes the
lines that are complete. Small and bounded: a record ends at MAX_BYTES, and the newest KEPT records stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from backend.durable import private_folder
from backend.errors import LayerscopeError

MAX_BYTES = 16 << 20
KEPT = 50
_JOB = re.compile(r"[0-9a-f]{20}")
_RECORD, _STOP = ".jsonl", ".stop"


@dataclass(frozen=True)
class WrittenStep:
    """One token of a generation. Probabilities are the model's own, over the whole vocabulary and before any temperature; entropy in nats."""

    token: int
    text: str
    probability: float
    sampler_probability: float  # with which it was drawn, after cuts and temperature; 1 for a greedy choice
    entropy: float
    alternatives: tuple[tuple[int, str, float], ...]  # the most probable tokens, best first: id, text, probability
    resid_norms: tuple[float, ...]  # of resid_post a layer, at the position that the token was chosen at; NaN where unknown
    special: bool = False  # whether it marks a beginning or an end

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> WrittenStep:
        return cls(**{**data, "alternatives": tuple((int(i), text, p) for i, text, p in data["alternatives"]), "resid_norms": tuple(data["resid_norms"])})


@dataclass(frozen=True)
class LiveState:
    """What a record holds now: texts of the prompt's tokens (None until the model is loaded), and the steps."""

    prompt: tuple[str, ...] | None = None
    special: frozenset[int] = frozenset()  # positions of the prompt's tokens that mark a beginning or an end
    steps: tuple[WrittenStep, ...] = ()
    full: bool = False  # the record reached its limit; later steps are in the trace alone


class LiveWriter:
    """Appends to one record. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb", buffering=0)  # a line is one write
        self._size, self._full = 0, False

    def prompt(self, texts: Sequence[str], special: Sequence[int] = ()) -> None:
        self._append({"prompt": list(texts), "special_positions": list(special)})

    def step(self, step: WrittenStep) -> None:
        self._append(asdict(step))

    def _append(self, data: dict[str, Any]) -> None:
        line = json.dumps(data, ensure_ascii=True).encode("ascii") + b"\n"
        if self._full:
            return
        if self._size + len(line) > MAX_BYTES:
            self._full, line = True, b'{"full": true}\n'
        self._file.write(line)
        self._size += len(line)

    def __enter__(self) -> LiveWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class LiveRecords:
    """The records in one folder; the server reads them and the worker writes them."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = private_folder(data_dir) / "live"

    def begin(self, job_id: str) -> LiveWriter:
        """A new record for the job, empty whatever was there; the oldest of too many go."""
        private_folder(self._folder)
        records = sorted(self._folder.glob(f"*{_RECORD}"), key=lambda path: path.stat().st_mtime)
        for old in records[: max(0, len(records) - KEPT + 1)]:
            self.discard(old.name.removesuffix(_RECORD))
        return LiveWriter(self._path(job_id, _RECORD))

    def read(self, job_id: str) -> LiveState:
        """The record as far as its lines are complete; an empty state where there is none."""
        try:
            with open(self._path(job_id, _RECORD), "rb") as file:
                lines = file.read(MAX_BYTES + 64).split(b"\n")[:-1]  # what stands after the last line's end is half a line
        except FileNotFoundError:
            return LiveState()
        found = [json.loads(line) for line in lines]
        prompts = [(tuple(data["prompt"]), frozenset(data.get("special_positions", ()))) for data in found if "prompt" in data]
        steps = tuple(WrittenStep.from_json(data) for data in found if "token" in data)
        texts, special = prompts[0] if prompts else (None, frozenset[int]())
        return LiveState(texts, special, steps, full=any("full" in data for data in found))

    def size(self, job_id: str) -> int:
        """Bytes of the record: whether there is anything new."""
        path = self._path(job_id, _RECORD)
        return path.stat().st_size if path.is_file() else 0

    def stop(self, job_id: str) -> None:
        """Say that the tokens so far are enough: the job goes on with them."""
        private_folder(self._folder)
        self._path(job_id, _STOP).touch()

    def stopped(self, job_id: str) -> bool:
        return self._path(job_id, _STOP).exists()

    def discard(self, job_id: str) -> None:
        for suffix in (_RECORD, _STOP):
            self._path(job_id, suffix).unlink(missing_ok=True)

    def _path(self, job_id: str, suffix: str) -> Path:
        if not _JOB.fullmatch(job_id):
            raise LayerscopeError(f"{job_id[:80]!r} is not a job's id.")
        return self._folder / f"{job_id}{suffix}"

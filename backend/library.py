"""The library: the shelf of models, and the index of the traces that were made here.

`library.sqlite` is the list. A trace file that is not in it is not listed and not opened, so a file put into the folder from
elsewhere is never read by the server. Each trace that is added gets a seal beside it (its checksum, signed with this
machine's secret key): if the index is lost, `rescan` finds again what was written here, and nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.durable import connect, private_folder, publish, remove_stale_parts, sha256, sync_folder
from backend.errors import LayerscopeError
from backend.model_files import ModelEntry, Shelf
from backend.settings import Settings
from backend.trace import Trace, open_trace
from backend.tracefile.trace_layout import ID_PATTERN, SUFFIX, check_id

log = logging.getLogger(__name__)

OPEN_TRACES = 8
PAST_RUNS = 20
_SEAL = ".seal"

_TABLE = """CREATE TABLE IF NOT EXISTS traces (
    id TEXT PRIMARY KEY, model_name TEXT NOT NULL, architecture TEXT NOT NULL, is_moe INTEGER NOT NULL, engine TEXT NOT NULL,
    quantization TEXT NOT NULL, prompt TEXT NOT NULL, response TEXT NOT NULL, n_tokens INTEGER NOT NULL, n_prompt INTEGER NOT NULL,
    category TEXT NOT NULL, tags TEXT NOT NULL, created_at TEXT NOT NULL, n_bytes INTEGER NOT NULL, sites TEXT NOT NULL,
    integrity_ok INTEGER, seconds REAL, sha256 TEXT NOT NULL)"""


@dataclass(frozen=True)
class TraceSummary:
    """What a list of traces shows of one, without opening its file."""

    id: str
    path: Path
    model_name: str
    architecture: str
    is_moe: bool
    engine: str
    quantization: str
    prompt: str
    response: str
    n_tokens: int
    n_prompt: int
    category: str
    tags: list[str]
    created_at: str  # ISO 8601, UTC
    n_bytes: int
    sites: list[str]
    integrity_ok: bool | None  # None: nothing could be checked
    sha256: str


class Library:
    """Models and traces. Safe to use from several threads; several processes may share the folder."""

    def __init__(self, data_dir: Path, shelf: Shelf, secret_key: bytes) -> None:
        self.shelf, self._key = shelf, secret_key
        self.traces_dir = private_folder(data_dir) / "traces"
        self.traces_dir.mkdir(exist_ok=True)
        self._database = data_dir / "library.sqlite"
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Trace] = OrderedDict()
        with self._connection() as db:
            db.execute(_TABLE)

    @classmethod
    def from_settings(cls, settings: Settings) -> Library:
        return cls(settings.data_dir, Shelf.from_settings(settings), settings.secret_key)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            db = connect(self._database)
        except sqlite3.DatabaseError as error:
            raise LayerscopeError(f"The index {self._database} cannot be read ({error}); delete it and restart, and it is rebuilt from the traces.") from None
        try:
            yield db
        finally:
            db.close()

    # -- models ----------------------------------------------------------------------------------------------------------------

    def models(self) -> list[ModelEntry]:
        """Every model on the shelf, those that cannot be opened with the reason."""
        return self.shelf.entries()

    def resolve_model(self, name: str) -> ModelEntry:
        """The model of that name, or at that path under the configured folders. Raises LayerscopeError."""
        return self.shelf.resolve(name, confined=True)

    # -- the list of traces ------------------------------------------------------------------------------------------------------

    def traces(self, search: str = "", model: str = "", category: str = "", limit: int = 50, offset: int = 0) -> list[TraceSummary]:
        """Summaries, newest first. `search` is text that must occur in prompt, response, model, category, a tag, or be the id."""
        where, values = _conditions(search, model, category)
        with self._connection() as db:
            rows = db.execute(f"SELECT * FROM traces {where} ORDER BY created_at DESC, rowid DESC LIMIT ? OFFSET ?", (*values, limit, offset)).fetchall()
        return [self._summary(row) for row in rows]

    def count_traces(self, search: str = "", model: str = "", category: str = "") -> int:
        where, values = _conditions(search, model, category)
        with self._connection() as db:
            return int(db.execute(f"SELECT COUNT(*) FROM traces {where}", values).fetchone()[0])

    def categories(self) -> list[str]:
        with self._connection() as db:
            return [row[0] for row in db.execute("SELECT DISTINCT category FROM traces WHERE category != '' ORDER BY category")]

    def trace_models(self) -> list[str]:
        """Names of the models that traces were made of."""
        with self._connection() as db:
            return [row[0] for row in db.execute("SELECT DISTINCT model_name FROM traces ORDER BY model_name")]

    def past_runs(self, model: str) -> list[tuple[int, float]]:
        """(tokens, seconds) of this model's newest captures, for `estimate`."""
        query = "SELECT n_tokens, seconds FROM traces WHERE model_name = ? AND seconds > 0 ORDER BY created_at DESC LIMIT ?"
        with self._connection() as db:
            return [(int(row[0]), float(row[1])) for row in db.execute(query, (model, PAST_RUNS))]

    def summary(self, trace_id: str) -> TraceSummary:
        """Raises LayerscopeError if no trace in the index has that id."""
        with self._connection() as db:
            row = db.execute("SELECT * FROM traces WHERE id = ?", (check_id(trace_id),)).fetchone()
        if row is None:
            raise LayerscopeError(f"There is no trace {trace_id!r} in the library.")
        return self._summary(row)

    # -- one trace -----------------------------------------------------------------------------------------------------------------

    def path_of(self, trace_id: str) -> Path:
        """The file of a trace in the index. Raises LayerscopeError for an id that is malformed or not there, before any path is formed."""
        return self.summary(trace_id).path

    def open(self, trace_id: str) -> Trace:
        """The trace, kept open for the next caller: do not close it.

        A trace that drops out of the cache is not closed here, since another thread may be reading it: its file closes when the
        last reader lets go of it.
        """
        path = self.path_of(trace_id)
        with self._lock:
            if trace_id in self._open:
                self._open.move_to_end(trace_id)
                return self._open[trace_id]
            trace = self._open[trace_id] = open_trace(path)
            while len(self._open) > OPEN_TRACES:
                self._open.popitem(last=False)
            return trace

    def add(self, path: Path) -> TraceSummary:
        """Put a published trace of the traces folder into the index, with its seal. Adding it again changes nothing."""
        trace_id = check_id(Path(path).name.removesuffix(SUFFIX))
        if Path(path).resolve() != self._file(trace_id).resolve():
            raise LayerscopeError(f"{path} is not in the traces folder {self.traces_dir}.")
        with open_trace(path) as trace:
            if trace.id != trace_id:
                raise LayerscopeError(f"{path} calls itself {trace.id!r}; a trace's file is named after its id.")
            row = _row(trace)
        row["sha256"] = sha256(path)
        self._write_seal(trace_id, row["sha256"])
        with self._connection() as db:
            db.execute(f"INSERT OR IGNORE INTO traces ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", tuple(row.values()))
        return self.summary(trace_id)

    def delete(self, trace_id: str) -> None:
        """Remove a trace from the index, then its file. Raises LayerscopeError if there is none."""
        path = self.path_of(trace_id)
        with self._connection() as db:
            db.execute("DELETE FROM traces WHERE id = ?", (trace_id,))
        with self._lock:
            self._open.pop(trace_id, None)
        path.unlink(missing_ok=True)
        self._seal(trace_id).unlink(missing_ok=True)
        sync_folder(self.traces_dir)

    def is_intact(self, trace_id: str) -> bool:
        """Whether the file still has the bytes that were published."""
        found = self.summary(trace_id)
        return found.path.is_file() and sha256(found.path) == found.sha256

    # -- start-up ------------------------------------------------------------------------------------------------------------------

    def rescan(self) -> list[str]:
        """Bring index and folder together: half-written files of dead writers go, rows without a file go, sealed traces
        without a row come back. Returns the ids that came back."""
        for part in remove_stale_parts(self.traces_dir):
            log.info("removed %s, left half-written by a process that ended", part.name)
        with self._connection() as db:
            known = {row[0] for row in db.execute("SELECT id FROM traces")}
            for trace_id in known:
                if not self._file(trace_id).is_file():
                    db.execute("DELETE FROM traces WHERE id = ?", (trace_id,))
                    log.warning("the file of trace %s is gone; it leaves the list", trace_id)
        found = []
        for path in sorted(self.traces_dir.glob(f"*{SUFFIX}")):
            trace_id = path.name.removesuffix(SUFFIX)
            if trace_id in known or not ID_PATTERN.fullmatch(trace_id):
                continue
            if not self._is_sealed(trace_id):
                log.warning("%s is not in the index and was not sealed here; it is left alone", path.name)
                continue
            self.add(path)
            found.append(trace_id)
        return found

    def _file(self, trace_id: str) -> Path:
        return self.traces_dir / f"{trace_id}{SUFFIX}"

    def _seal(self, trace_id: str) -> Path:
        return self.traces_dir / f"{trace_id}{_SEAL}"

    def _signature(self, trace_id: str, digest: str) -> str:
        return hmac.new(self._key, f"trace:{trace_id}:{digest}".encode(), hashlib.sha256).hexdigest()

    def _write_seal(self, trace_id: str, digest: str) -> None:
        seal = self._seal(trace_id)
        part = seal.with_name(f"{seal.name}.part")
        part.write_text(self._signature(trace_id, digest), encoding="ascii")
        publish(part, seal)

    def _is_sealed(self, trace_id: str) -> bool:
        seal = self._seal(trace_id)
        if not seal.is_file() or seal.stat().st_size > 64:
            return False
        return hmac.compare_digest(seal.read_bytes(), self._signature(trace_id, sha256(self._file(trace_id))).encode("ascii"))

    def _summary(self, row: sqlite3.Row) -> TraceSummary:
        fields = {name: row[name] for name in row.keys() if name != "seconds"}
        verdict = None if row["integrity_ok"] is None else bool(row["integrity_ok"])
        lists = {name: json.loads(row[name]) for name in ("tags", "sites")}
        return TraceSummary(**{**fields, **lists, "path": self._file(row["id"]), "is_moe": bool(row["is_moe"]), "integrity_ok": verdict})


def _row(trace: Trace) -> dict[str, Any]:
    checked = [item["ok"] for item in trace.integrity.values() if item.get("checked")]
    return {
        "id": trace.id, "model_name": trace.info.name, "architecture": trace.info.architecture, "is_moe": int(trace.info.is_moe),
        "engine": trace.engine, "quantization": trace.info.quantization, "prompt": trace.prompt, "response": trace.response,
        "n_tokens": trace.n_tokens, "n_prompt": trace.n_prompt, "category": trace.category, "tags": json.dumps(trace.tags, ensure_ascii=False),
        "created_at": trace.created_at, "n_bytes": trace.path.stat().st_size, "sites": json.dumps(list(trace.stored)),
        "integrity_ok": int(all(checked)) if checked else None, "seconds": trace.metadata.get("timings", {}).get("total_s"),
    }  # fmt: skip


def _conditions(search: str, model: str, category: str) -> tuple[str, tuple[str, ...]]:
    """The WHERE clause of a search, and its values."""
    parts: list[str] = []
    values: list[str] = []
    if search:
        pattern = "%" + search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        columns = ("prompt", "response", "model_name", "category", "tags")
        parts.append("(id = ? OR " + " OR ".join(f"{column} LIKE ? ESCAPE '\\'" for column in columns) + ")")
        values += [search, *[pattern] * len(columns)]
    for column, value in (("model_name", model), ("category", category)):
        if value:
            parts.append(f"{column} = ?")
            values.append(value)
    return ("WHERE " + " AND ".join(parts) if parts else ""), tuple(values)

"""Batches: lists of prompts that run one after another, and how each of them ended.

`batches.sqlite` holds the prompts, so that a job's record stays small and a batch that was interrupted can go on: what has a trace is
never run again, and a prompt's trace has an id that follows from its batch and its number.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.durable import connect, private_folder
from backend.errors import LayerscopeError
from backend.prompt_lists import BatchPrompt

_TABLES = (
    """CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, model TEXT NOT NULL, settings TEXT NOT NULL, created_at REAL NOT NULL, job_id TEXT NOT NULL DEFAULT '')""",
    """CREATE TABLE IF NOT EXISTS prompts (
    batch_id TEXT NOT NULL, number INTEGER NOT NULL, text TEXT NOT NULL, category TEXT NOT NULL, tags TEXT NOT NULL, trace_id TEXT NOT NULL DEFAULT '',
    error TEXT NOT NULL DEFAULT '', n_tokens INTEGER, logprob REAL, entropy REAL, PRIMARY KEY (batch_id, number)) WITHOUT ROWID""",
)
_COUNTS = "COUNT(*) AS n, SUM(trace_id != '') AS n_done, SUM(error != '') AS n_failed"


@dataclass(frozen=True)
class Batch:
    """One batch as it stands. settings: the parameters of a capture that all prompts share."""

    id: str
    name: str
    model: str
    settings: dict[str, Any]
    created_at: float
    job_id: str  # of the job that ran it last
    n: int
    n_done: int
    n_failed: int

    @property
    def n_waiting(self) -> int:
        return self.n - self.n_done - self.n_failed

    @property
    def tag(self) -> str:
        """The tag of its traces, by which the library finds them."""
        return f"batch:{self.id}"


@dataclass(frozen=True)
class Item:
    """One prompt of a batch and how it ended. logprob, entropy: means over the prompt's tokens, nats."""

    batch_id: str
    number: int
    prompt: BatchPrompt
    trace_id: str
    error: str
    n_tokens: int | None
    logprob: float | None
    entropy: float | None

    @property
    def future_trace_id(self) -> str:
        """The id that its trace has or will have."""
        return f"{self.batch_id}_{self.number:05d}"


class Batches:
    """The record of all batches. Safe to use from several threads and processes."""

    def __init__(self, data_dir: Path) -> None:
        self._database = private_folder(data_dir) / "batches.sqlite"
        with self._connection() as db:
            for table in _TABLES:
                db.execute(table)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        db = connect(self._database)
        try:
            yield db
        finally:
            db.close()

    def create(self, name: str, model: str, settings: dict[str, Any], prompts: Sequence[BatchPrompt]) -> Batch:
        batch_id = secrets.token_hex(8)
        rows = [(batch_id, number, prompt.text, prompt.category, json.dumps(prompt.tags)) for number, prompt in enumerate(prompts)]
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT INTO batches (id, name, model, settings, created_at) VALUES (?, ?, ?, ?, ?)", (batch_id, name, model, json.dumps(settings), time.time()))
            db.executemany("INSERT INTO prompts (batch_id, number, text, category, tags) VALUES (?, ?, ?, ?, ?)", rows)
            db.execute("COMMIT")
        return self.get(batch_id)

    def get(self, batch_id: str) -> Batch:
        """Raises LayerscopeError if there is no such batch."""
        with self._connection() as db:
            row = db.execute("SELECT * FROM batches WHERE id = ?", (batch_id,)).fetchone()
            if row is None:
                raise LayerscopeError(f"There is no batch {str(batch_id)[:80]!r}.")
            return _batch(row, db.execute(f"SELECT {_COUNTS} FROM prompts WHERE batch_id = ?", (batch_id,)).fetchone())

    def list(self, limit: int = 50) -> list[Batch]:
        """Newest first."""
        with self._connection() as db:
            rows = db.execute(f"SELECT batches.*, {_COUNTS} FROM batches JOIN prompts ON batch_id = id GROUP BY id ORDER BY created_at DESC LIMIT ?", (limit,)).fetchall()
        return [_batch(row, row) for row in rows]

    def items(self, batch_id: str, offset: int = 0, limit: int = -1) -> Sequence[Item]:
        """Its prompts in order."""
        with self._connection() as db:
            rows = db.execute("SELECT * FROM prompts WHERE batch_id = ? ORDER BY number LIMIT ? OFFSET ?", (batch_id, limit, offset)).fetchall()
        return [_item(row) for row in rows]

    def next_item(self, batch_id: str) -> Item | None:
        """The first prompt that has neither a trace nor an error."""
        with self._connection() as db:
            row = db.execute("SELECT * FROM prompts WHERE batch_id = ? AND trace_id = '' AND error = '' ORDER BY number LIMIT 1", (batch_id,)).fetchone()
        return None if row is None else _item(row)

    def categories(self, batch_id: str) -> dict[str, int]:
        """Category -> prompts of it that have a trace; those without a category are left out."""
        query = "SELECT category, COUNT(*) FROM prompts WHERE batch_id = ? AND category != '' AND trace_id != '' GROUP BY category ORDER BY category"
        with self._connection() as db:
            return dict(tuple(row) for row in db.execute(query, (batch_id,)))

    def trace_ids(self, batch_id: str, category: str = "") -> Sequence[str]:
        """Of the prompts that are done, of one category if it is named, in order."""
        query = "SELECT trace_id FROM prompts WHERE batch_id = ? AND trace_id != '' AND (? = '' OR category = ?) ORDER BY number"
        with self._connection() as db:
            return [row[0] for row in db.execute(query, (batch_id, category, category))]

    def assigned(self, batch_id: str, job_id: str) -> None:
        """The job that is to run it."""
        with self._connection() as db:
            db.execute("UPDATE batches SET job_id = ? WHERE id = ?", (job_id, batch_id))

    def started(self, batch_id: str) -> None:
        """It begins or goes on: prompts that failed are tried again."""
        with self._connection() as db:
            db.execute("UPDATE prompts SET error = '' WHERE batch_id = ?", (batch_id,))

    def done(self, item: Item, n_tokens: int, logprob: float | None, entropy: float | None) -> None:
        query = "UPDATE prompts SET trace_id = ?, error = '', n_tokens = ?, logprob = ?, entropy = ? WHERE batch_id = ? AND number = ?"
        with self._connection() as db:
            db.execute(query, (item.future_trace_id, n_tokens, logprob, entropy, item.batch_id, item.number))

    def failed(self, item: Item, error: str) -> None:
        with self._connection() as db:
            db.execute("UPDATE prompts SET error = ? WHERE batch_id = ? AND number = ?", (error, item.batch_id, item.number))


def _batch(row: sqlite3.Row, counts: sqlite3.Row) -> Batch:
    numbers = {name: int(counts[name] or 0) for name in ("n", "n_done", "n_failed")}
    return Batch(row["id"], row["name"], row["model"], json.loads(row["settings"]), row["created_at"], row["job_id"], **numbers)


def _item(row: sqlite3.Row) -> Item:
    prompt = BatchPrompt(row["text"], row["category"], tuple(json.loads(row["tags"])))
    return Item(row["batch_id"], row["number"], prompt, row["trace_id"], row["error"], row["n_tokens"], row["logprob"], row["entropy"])

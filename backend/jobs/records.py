"""Jobs: the records of what was asked for, and the only place where a job's state changes.

A record lives in `jobs.sqlite` and moves one way: queued -> running -> done, failed, cancelled, timed_out or crashed. Each move is
one guarded UPDATE, so that a worker that finishes, a user who cancels and a supervisor that finds the worker dead can all act at
once and one of them wins. The queue carries ids alone; losing or doubling a message loses and doubles nothing.
"""

from __future__ import annotations

import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from backend.durable import connect, private_folder
from backend.errors import LayerscopeError
from backend.jobs.processes import Owner
from backend.jobs.task_queue import RUN_JOB, open_queue
from backend.settings import Settings

log = logging.getLogger(__name__)

STATES = ("queued", "running", "done", "failed", "cancelled", "timed_out", "crashed")
ACTIVE = ("queued", "running")

# A running job whose worker lives elsewhere counts as dead when its supervisor has not been heard of for this long.
HEARTBEAT_LIMIT_S = 60.0
# Finished records beyond this many are forgotten, oldest first.
KEPT_RECORDS = 2000

_TABLE = """CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, title TEXT NOT NULL, params TEXT NOT NULL, state TEXT NOT NULL,
    stage TEXT NOT NULL DEFAULT '', done INTEGER NOT NULL DEFAULT 0, total INTEGER NOT NULL DEFAULT 0,
    created_at REAL NOT NULL, started_at REAL, stage_at REAL, finished_at REAL, heartbeat REAL, cancel_at REAL,
    owner TEXT, error TEXT NOT NULL DEFAULT '', signal TEXT NOT NULL DEFAULT '', result TEXT NOT NULL DEFAULT '{}')"""


@dataclass(frozen=True)
class Job:
    """One job as it is now. Times are seconds since the epoch; `error` is one sentence for the user."""

    id: str
    kind: str
    title: str
    params: dict[str, Any]
    state: str
    stage: str = ""  # what the experiment is doing; `done` of `total` steps of it are finished
    done: int = 0
    total: int = 0
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    elapsed_s: float | None = None  # since it started, until it ended
    eta_s: float | None = None  # until the end of this stage, if it goes on at its present pace
    error: str = ""
    signal: str = ""  # of a crashed job: what ended its worker, for example SIGSEGV
    result: dict[str, Any] = field(default_factory=dict)
    owner: Owner | None = None
    cancel_at: float | None = None  # when it was asked to stop

    @property
    def pid(self) -> int | None:
        """Process id of the worker that has it."""
        return self.owner.pid if self.owner else None

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


class Jobs:
    """The job records, and the queue that workers take from. Safe to use from several threads and processes."""

    def __init__(self, settings: Settings, run: Callable[[str], None] | None = None) -> None:
        """`run` is what a worker does with a job's id; a process that only submits gives none."""
        self.limit = settings.queue_limit
        private_folder(settings.data_dir)
        self._database = settings.data_dir / "jobs.sqlite"
        with self._connection() as db:
            db.execute(_TABLE)
            db.execute("CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, created_at)")
        self.huey = open_queue(settings.data_dir, settings.secret_key, settings.redis_url)

        @self.huey.task(name=RUN_JOB)
        def run_job(job_id: str) -> None:
            if run is None:
                raise RuntimeError(f"job {job_id} reached a process that is no worker")
            run(job_id)

        self._send = run_job

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        db = connect(self._database)
        try:
            yield db
        finally:
            db.close()

    # -- for the server --------------------------------------------------------------------------------------------------------

    def submit(self, kind: str, params: dict[str, Any], title: str) -> Job:
        """Queue a job. Raises LayerscopeError, naming the limit, when too many are waiting or running."""
        job_id = secrets.token_hex(10)
        try:
            self._insert((job_id, kind, title, json.dumps(params), "queued", time.time()))
            self._send(job_id)
        except sqlite3.OperationalError as error:
            raise LayerscopeError(f"The job cannot be recorded in {self._database.parent}: {error}.") from None
        return self.get(job_id)

    def _insert(self, row: tuple[Any, ...]) -> None:
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            active = db.execute("SELECT COUNT(*) FROM jobs WHERE state IN (?, ?)", ACTIVE).fetchone()[0]
            if active >= self.limit:
                db.execute("ROLLBACK")
                raise LayerscopeError(f"{active} jobs are waiting or running, and the limit is {self.limit}; wait for one to end or cancel one.")
            db.execute("INSERT INTO jobs (id, kind, title, params, state, created_at) VALUES (?, ?, ?, ?, ?, ?)", row)
            db.execute("COMMIT")
            surplus = "SELECT id FROM jobs WHERE state NOT IN (?, ?) ORDER BY created_at DESC LIMIT -1 OFFSET ?"
            db.execute(f"DELETE FROM jobs WHERE id IN ({surplus})", (*ACTIVE, KEPT_RECORDS))

    def get(self, job_id: str) -> Job:
        """Raises LayerscopeError if there is no such job."""
        with self._connection() as db:
            row = db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise LayerscopeError(f"There is no job {str(job_id)[:80]!r}.")
        return _job(row)

    def list(self, active_only: bool = False, limit: int = 50) -> list[Job]:
        """Newest first."""
        where = "WHERE state IN (?, ?)" if active_only else ""
        with self._connection() as db:
            rows = db.execute(f"SELECT * FROM jobs {where} ORDER BY created_at DESC, rowid DESC LIMIT ?", (*(ACTIVE if active_only else ()), limit)).fetchall()
        return [_job(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Number of jobs in each state, all states named."""
        with self._connection() as db:
            found = dict(tuple(row) for row in db.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state"))
        return {state: found.get(state, 0) for state in STATES}

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: at once if it waits; if it runs it is asked to stop, and its worker is killed after the grace period.

        A job that has ended stays as it is. Raises LayerscopeError if there is no such job.
        """
        if not self._end(job_id, "cancelled", only_from="queued"):
            with self._connection() as db:
                db.execute("UPDATE jobs SET cancel_at = ? WHERE id = ? AND state = 'running' AND cancel_at IS NULL", (time.time(), job_id))
        return self.get(job_id)

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """Keep the database open for a while: SQLite tidies up and waits for the disk each time its last connection closes."""
        with self._connection() as db:
            db.execute("SELECT 1 FROM jobs LIMIT 1").fetchall()
            yield

    # -- for the worker ----------------------------------------------------------------------------------------------------------

    def claim(self, job_id: str, owner: Owner) -> Job | None:
        """Make a queued job this process's own; None if somebody else has it or it was cancelled."""
        now = time.time()
        with self._connection() as db:
            query = "UPDATE jobs SET state = 'running', started_at = ?, stage_at = ?, heartbeat = ?, owner = ? WHERE id = ? AND state = 'queued'"
            if not db.execute(query, (now, now, now, owner.to_json(), job_id)).rowcount:
                return None
        return self.get(job_id)

    def is_cancelled(self, job_id: str) -> bool:
        with self._connection() as db:
            row = db.execute("SELECT cancel_at FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return row is None or row[0] is not None

    def progress(self, job_id: str, stage: str, done: int, total: int) -> None:
        query = """UPDATE jobs SET stage_at = CASE WHEN stage = ?1 THEN stage_at ELSE ?4 END, stage = ?1, done = ?2, total = ?3, heartbeat = ?4
                   WHERE id = ?5 AND state = 'running'"""
        with self._connection() as db:
            db.execute("PRAGMA synchronous=NORMAL")  # progress may be lost in a power cut; waiting for the disk would slow the job
            db.execute(query, (stage, int(done), int(total), time.time(), job_id))

    def finish(self, job_id: str, result: dict[str, Any]) -> bool:
        """running -> done. False if the job had ended already."""
        return self._end(job_id, "done", result=result)

    def end(self, job_id: str, state: str, error: str = "", signal: str = "") -> bool:
        """running -> failed, cancelled, timed_out or crashed. False if the job had ended already."""
        return self._end(job_id, state, error, signal)

    def _end(self, job_id: str, state: str, error: str = "", signal: str = "", result: dict[str, Any] | None = None, only_from: str = "running") -> bool:
        query = "UPDATE jobs SET state = ?, error = ?, signal = ?, result = ?, finished_at = ? WHERE id = ? AND state = ?"
        with self._connection() as db:
            return db.execute(query, (state, error, signal, json.dumps(result or {}), time.time(), job_id, only_from)).rowcount > 0

    # -- for the supervisor --------------------------------------------------------------------------------------------------------

    def running(self) -> Sequence[Job]:
        with self._connection() as db:
            return [_job(row) for row in db.execute("SELECT * FROM jobs WHERE state = 'running'")]

    def heartbeat(self, job_id: str) -> None:
        with self._connection() as db:
            db.execute("UPDATE jobs SET heartbeat = ? WHERE id = ? AND state = 'running'", (time.time(), job_id))

    def reap(self, spared: int | None = None) -> Sequence[str]:
        """Mark running jobs whose worker is dead as crashed; their ids. At start-up this is what the last crash left behind.

        spared: id of a process on this machine whose parent asks, and will say itself how it ended.
        """
        with self._connection() as db:
            rows = db.execute("SELECT * FROM jobs WHERE state = 'running'").fetchall()
        reaped = []
        for row in rows:
            owner = Owner.from_json(row["owner"])
            if owner.is_here() and owner.pid == spared:
                continue
            silent = time.time() - row["heartbeat"]
            if owner.is_dead() or (not owner.is_here() and silent > HEARTBEAT_LIMIT_S):
                stage = f" while {row['stage']}" if row["stage"] else ""
                if self.end(row["id"], "crashed", f"The worker process {owner.pid} ended{stage} and left this job unfinished; run it again."):
                    reaped.append(row["id"])
        return reaped

    def requeue_lost(self) -> Sequence[str]:
        """Send queued jobs again that no message waits for: their worker died between taking the message and claiming the job.

        A message too many is harmless, since only one claim succeeds.
        """
        waiting = {message.args[0] for message in self._messages()}
        with self._connection() as db:
            queued = [row[0] for row in db.execute("SELECT id FROM jobs WHERE state = 'queued' ORDER BY created_at")]
        lost = [job_id for job_id in queued if job_id not in waiting]
        for job_id in lost:
            self._send(job_id)
        return lost

    def _messages(self) -> Iterator[Any]:
        for data in self.huey.storage.enqueued_items():
            try:
                yield self.huey.serializer.deserialize(data)
            except ValueError as error:
                log.warning("a message waits in the queue that no worker will take: %s", error)


def _job(row: sqlite3.Row) -> Job:
    now = row["finished_at"] or time.time()
    elapsed = None if row["started_at"] is None else max(0.0, now - row["started_at"])
    eta = None
    if row["state"] == "running" and 0 < row["done"] < row["total"]:
        eta = max(0.0, now - row["stage_at"]) * (row["total"] - row["done"]) / row["done"]
    return Job(
        id=row["id"], kind=row["kind"], title=row["title"], params=json.loads(row["params"]), state=row["state"], stage=row["stage"],
        done=row["done"], total=row["total"], created_at=row["created_at"], signal=row["signal"], started_at=row["started_at"], finished_at=row["finished_at"],
        elapsed_s=elapsed, eta_s=eta, error=row["error"], result=json.loads(row["result"]),
        owner=Owner.from_json(row["owner"]) if row["owner"] else None, cancel_at=row["cancel_at"],
    )  # fmt: skip

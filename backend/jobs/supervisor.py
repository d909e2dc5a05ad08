"""The supervisor: Huey's consumer, watching over the one process that runs jobs.

It is the parent of that process, so it learns how the process ended, and no other process can have its id meanwhile. Ten times a
second it restarts a dead worker and names the signal in the job's record, kills a worker whose job outlived its time or did
not stop when it was cancelled, and tells the record that the job is still watched.
"""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huey.consumer import Consumer, Scheduler

from backend.jobs.processes import die_with_parent, exit_reason
from backend.jobs.records import Job, Jobs
from backend.settings import Settings

log = logging.getLogger(__name__)

CHECK_EVERY_S = 0.1
# Slower rounds: the heartbeat and the search for jobs, messages and files that dead processes left.
SWEEP_EVERY_S = 5.0
# A stopped process is at rest within microseconds, unless it sits in the kernel.
_STOP_LIMIT_S = 0.05


class _IdleScheduler(Scheduler):
    """Huey always starts a scheduler; ours has nothing to schedule and must not outlive its parent."""

    def initialize(self) -> None:
        die_with_parent(self.huey.supervisor_pid)


class Supervisor(Consumer):
    """Runs until it is told to stop (SIGTERM: now; SIGINT: after the running job)."""

    scheduler_class = _IdleScheduler

    def __init__(self, jobs: Jobs, settings: Settings, sweep: Callable[[], Any]) -> None:
        """`sweep` is called at start, after a worker died, and every few seconds: it removes what dead processes left."""
        self.jobs, self.settings, self._sweep, self._swept_at = jobs, settings, sweep, 0.0
        self._watched: Any = None  # the process of the last round: Huey may find it dead, and start another, after this class found it alive
        jobs.huey.supervisor_pid = os.getpid()
        super().__init__(jobs.huey, workers=1, worker_type="process", periodic=False, initial_delay=0.05, backoff=1.2, max_delay=0.2,
                         scheduler_interval=60, check_worker_health=True, health_check_interval=CHECK_EVERY_S)  # fmt: skip

    @property
    def process(self) -> Any:
        """The multiprocessing.Process that runs jobs."""
        return self.worker_threads[0][1]

    def check_worker_health(self) -> bool:
        """Huey's own hook, called about every CHECK_EVERY_S."""
        try:
            watched = self._watched = self._watched or self.process
            dead = not watched.is_alive()
            if dead:
                self._record_death(watched)
                self._watched = None
            else:
                self._judge_running_job()
            if dead or time.monotonic() - self._swept_at >= SWEEP_EVERY_S:
                self._swept_at = time.monotonic()
                self.jobs.reap(spared=watched.pid)  # it may have died just now: the next round knows of what
                self.jobs.requeue_lost()
                self._sweep()
        except (sqlite3.Error, OSError):
            # A full disk or a locked database passes; what could not be recorded now is recorded in a later round.
            log.exception("a round of supervision failed")
        return bool(super().check_worker_health())

    def _of(self, process: Any) -> list[Job]:
        return [job for job in self.jobs.running() if job.owner and job.owner.is_here() and job.owner.pid == process.pid]

    def _record_death(self, process: Any) -> None:
        reason = exit_reason(process.exitcode)
        log.error("the worker process %s ended: %s", process.pid, reason)
        for job in self._of(process):
            stage = f" while {job.stage}" if job.stage else ""
            hint = "; the kernel does this when memory runs out" if reason == "SIGKILL" else ""
            self.jobs.end(job.id, "crashed", f"The worker process ended by {reason}{stage}{hint}. The next job gets a new worker.", reason)

    def _judge_running_job(self) -> None:
        now = time.time()
        for job in self._of(self.process):
            if job.cancel_at is not None and now - job.cancel_at > self.settings.cancel_grace_s:
                self._kill(job, "cancelled", "")
            elif job.started_at is not None and now - job.started_at > self.settings.job_timeout_s:
                self._kill(job, "timed_out", f"The job ran longer than the limit of {self.settings.job_timeout_s:g} s and was stopped.")
            elif time.monotonic() - self._swept_at >= SWEEP_EVERY_S:
                self.jobs.heartbeat(job.id)

    def _kill(self, job: Job, state: str, error: str) -> None:
        """End the worker and the job, unless the worker finished it at this very moment and is at the next one."""
        process = self.process
        os.kill(process.pid, signal.SIGSTOP)
        try:
            _wait_until_stopped(process.pid)
            still_at_it = self.jobs.get(job.id).state == "running"
            if still_at_it:
                process.kill()
        finally:
            os.kill(process.pid, signal.SIGCONT)  # whatever happened, a worker is never left standing; its id is ours until it is joined
        if not still_at_it:
            return
        process.join()
        self.jobs.end(job.id, state, error)
        log.warning("the worker process %s was killed: job %s %s", process.pid, job.id, state)


def _wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + _STOP_LIMIT_S
    while time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] in "TtZX":
            return
        time.sleep(0.001)

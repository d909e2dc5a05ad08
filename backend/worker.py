"""The worker: takes jobs from the queue and runs their experiments, in a process of its own that may crash.

`main` is the supervisor's process, which stays small: neither torch nor llama_cpp is imported there. It forks the process that
runs jobs; that one loads the engines when a job first needs them and keeps the last model warm.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Mapping

from backend.batches import Batches
from backend.derived import Derived
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import KINDS, Context, Experiment
from backend.jobs.processes import Owner, die_with_parent, no_core_dumps, prefer_as_oom_victim
from backend.jobs.records import Job, Jobs
from backend.jobs.supervisor import Supervisor
from backend.jobs.warm_engine import WarmEngine
from backend.jobs.worker_process import PARENT_VARIABLE
from backend.library import Library
from backend.live import LiveRecords
from backend.settings import Settings

log = logging.getLogger(__name__)

# How often the record is read for a cancel and written with progress: a layer may take less than a millisecond.
ASK_EVERY_S = 0.05
TELL_EVERY_S = 0.2


def main(settings: Settings, kinds: Mapping[str, Experiment] = KINDS) -> None:
    """Run the supervisor and its worker until SIGTERM or SIGINT. `kinds` names the experiments that jobs may ask for."""
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if parent:
        die_with_parent(int(parent))
    no_core_dumps()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    worker = Worker(settings, kinds)
    worker.jobs.reap()
    worker.jobs.requeue_lost()
    Supervisor(worker.jobs, settings, worker.library.rescan).run()


class Worker:
    """Runs one job at a time. Made in the supervisor, used in the process forked from it."""

    def __init__(self, settings: Settings, kinds: Mapping[str, Experiment]) -> None:
        self.settings, self.kinds = settings, kinds
        self.jobs = Jobs(settings, self.run)
        self.library = Library.from_settings(settings)
        self.engine = WarmEngine(settings, self.library.shelf)
        self._supervisor = os.getpid()
        self.jobs.huey.on_startup()(self.start)

    def start(self) -> None:
        """First thing in the forked process."""
        die_with_parent(self._supervisor)
        prefer_as_oom_victim()
        faulthandler.enable()  # a SIGSEGV leaves the Python stack in the log

    def run(self, job_id: str) -> None:
        """Run the job unless it was cancelled or taken, and record how it ended."""
        job = self.jobs.claim(job_id, Owner.this())
        if job is None:
            return
        log.info("job %s (%s) begins", job.id, job.kind)
        try:
            with self.jobs.held_open():
                self._run(job)
        except sqlite3.Error:
            # The job's end could not be recorded. Ending this process lets the supervisor record it as soon as it can.
            log.exception("the record of job %s cannot be written", job.id)
            os._exit(os.EX_IOERR)

    def _run(self, job: Job) -> None:
        try:
            self.jobs.finish(job.id, self._experiment(job)(self._context(job), job.params))
        except Cancelled:
            self.jobs.end(job.id, "cancelled")
        except LayerscopeError as error:
            self.jobs.end(job.id, "failed", str(error))
        except MemoryError:
            log.exception("job %s ran out of memory", job.id)
            self.engine.close()
            self.jobs.end(job.id, "failed", "The job needed more memory than is free; choose fewer sites or layers, a shorter prompt or a smaller model.")
        except KeyboardInterrupt:
            self.jobs.end(job.id, "failed", "Layerscope was stopped while this job ran; run it again.")
            raise
        except sqlite3.Error:
            raise
        except Exception as error:
            log.exception("job %s (%s) failed", job.id, job.kind)
            self.engine.close()
            self.jobs.end(job.id, "failed", f"Internal error ({type(error).__name__}); {self.settings.worker_log} has the traceback.")
        log.info("job %s ends: %s", job.id, self.jobs.get(job.id).state)

    def _experiment(self, job: Job) -> Experiment:
        if job.kind not in self.kinds:
            raise LayerscopeError(f"There is no kind of job {job.kind[:80]!r}; there are {', '.join(sorted(self.kinds))}.")
        return self.kinds[job.kind]

    def _context(self, job: Job) -> Context:
        link = _Link(self.jobs, job.id)
        derived = Derived(self.settings.data_dir / "cache", self.settings.derived_cache_mb << 20)
        return Context(engine=self.engine, traces_dir=self.library.traces_dir, library=self.library, derived=derived, job_id=job.id,
                       live=LiveRecords(self.settings.data_dir), batches=Batches(self.settings.data_dir), progress=link.progress,
                       should_stop=link.should_stop)  # fmt: skip


class _Link:
    """A running job's line to its record, used as often as the experiment likes and no more often than is useful."""

    def __init__(self, jobs: Jobs, job_id: str) -> None:
        self._jobs, self._id = jobs, job_id
        self._stage, self._told_at, self._asked_at, self._stop = "", 0.0, 0.0, False

    def progress(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage or done >= total or now - self._told_at >= TELL_EVERY_S:
            self._stage, self._told_at = stage, now
            self._jobs.progress(self._id, stage, done, total)

    def should_stop(self) -> bool:
        now = time.monotonic()
        if not self._stop and now - self._asked_at >= ASK_EVERY_S:
            self._asked_at = now
            self._stop = self._jobs.is_cancelled(self._id)
        return self._stop



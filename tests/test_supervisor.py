"""How a worker ended is said whenever it ends, between two looks of the supervisor too."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from huey.consumer import Consumer
from test_jobs import settings_in

from backend.jobs.processes import Owner, _start_ticks
from backend.jobs.records import Jobs
from backend.jobs.supervisor import Supervisor


def sleeper() -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    process.start()
    return process


@pytest.mark.parametrize("moment", ["before the search for lost jobs", "after it"])
def test_a_worker_that_dies_after_it_was_seen_alive_is_named_in_the_next_round(tmp_path: Path, monkeypatch, moment: str):
    settings = settings_in(tmp_path)
    jobs = Jobs(settings)
    process, successor = sleeper(), sleeper()

    def die() -> None:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()

    supervisor = Supervisor(jobs, settings, sweep=die if moment == "after it" else lambda: None)
    supervisor.worker_threads = [(None, process)]
    if moment != "after it":
        monkeypatch.setattr(supervisor, "_judge_running_job", die)

    def hueys_own(self: Supervisor) -> bool:  # what Huey does: it finds the worker dead and starts another
        if not self.process.is_alive():
            self.worker_threads = [(None, successor)]
        return True

    monkeypatch.setattr(Consumer, "check_worker_health", hueys_own)
    job = jobs.submit("count", {}, "count")
    jobs.claim(job.id, replace(Owner.this(), pid=process.pid, started=_start_ticks(process.pid)))
    supervisor.check_worker_health()
    assert jobs.get(job.id).state == "running" and supervisor.process is successor
    supervisor.check_worker_health()
    assert (jobs.get(job.id).state, jobs.get(job.id).signal) == ("crashed", "SIGKILL")
    successor.kill()

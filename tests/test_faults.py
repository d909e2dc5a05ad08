"""Fault injection: workers and servers that die at random moments, many times over (`make faults`).

Each claim has a count and an outcome that must hold every time; with 0 failures in N the failure rate is below 3/N at 95 %.
LAYERSCOPE_FAULT_RUNS scales the counts (1.0 is the full run).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from backend.errors import LayerscopeError
from backend.jobs.records import Jobs
from backend.jobs.worker_process import ROOT, WorkerKeeper
from backend.library import Library
from backend.trace import open_trace
from tests.test_jobs import COMMAND, settings_in, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

SERVER = """
import signal, sys
from backend.jobs.worker_process import WorkerKeeper
from config import load_settings
settings = load_settings()
lock = settings.lock()
with WorkerKeeper(settings, (sys.executable, "-m", "tests.fake_worker")) as keeper:
    print("up", flush=True)
    signal.pause()
"""


def runs(full: int) -> int:
    return max(2, int(full * float(os.environ.get("LAYERSCOPE_FAULT_RUNS", "1.0"))))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Jobs]:
    settings = settings_in(tmp_path, cancel_grace_s=0.5, queue_limit=1000, job_timeout_s=60)
    with WorkerKeeper(settings, COMMAND):
        jobs = Jobs(settings)
        wait_for(jobs, jobs.submit("count", {}, "warm up"))
        yield jobs


def library_of(jobs: Jobs) -> Library:
    return Library.from_settings(settings_in(jobs._database.parent.parent))


def test_a_worker_killed_at_any_moment_of_a_capture_leaves_no_unreadable_trace_and_loses_none(lab: Jobs):
    random.seed(0)
    library = library_of(lab)
    outcomes = {"done": 0, "crashed": 0}
    acknowledged = set()
    alone = wait_for(lab, lab.submit("capture", {}, "capture")).elapsed_s or 0.0
    for _ in range(runs(500)):
        job = lab.submit("capture", {}, "capture")
        job = wait_for(lab, job, "running", "done")
        time.sleep(random.uniform(0, 1.5 * alone))
        pid = job.pid
        if lab.get(job.id).is_active and pid:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it died of the last round's signal
        job = wait_for(lab, job, limit_s=5.0)
        assert job.state in outcomes, job
        outcomes[job.state] += 1
        if job.state == "done":
            acknowledged.add(job.result["trace_id"])
    listed = {summary.id for summary in library.traces(limit=10_000)}
    assert acknowledged <= listed
    for trace_id in listed:
        assert library.is_intact(trace_id)
        with open_trace(library.path_of(trace_id)) as trace:
            assert trace["resid_post", 1].shape == (4, 8)
    assert min(outcomes.values()) > 0, f"the kills must fall on both sides of the end: {outcomes}"


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGKILL"])
def test_a_crash_is_named_and_the_next_job_runs_every_time(lab: Jobs, name: str):
    for _ in range(runs(50)):
        job = wait_for(lab, lab.submit("die", {"signal": name}, name), limit_s=5.0)
        assert (job.state, job.signal) == ("crashed", name)
        assert wait_for(lab, lab.submit("count", {"steps": 1}, "next"), limit_s=5.0).state == "done"


def test_a_cancel_at_any_moment_ends_within_two_seconds_and_leaves_nothing(lab: Jobs):
    random.seed(1)
    folder = library_of(lab).traces_dir
    states = set()
    for number in range(runs(200)):
        job = lab.submit("write" if number % 2 else "count", {"steps": 50}, "to be cancelled")
        time.sleep(random.uniform(0, 0.3))
        asked = time.time()
        lab.cancel(job.id)
        job = wait_for(lab, job, limit_s=10.0)
        states.add(job.state)
        assert job.state in ("cancelled", "done") and job.finished_at is not None and job.finished_at - asked < 2.0
    deadline = time.monotonic() + 20  # the sweep after a death takes what is no longer young
    while list(folder.glob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert list(folder.glob("*.part")) == []
    assert "cancelled" in states


def test_the_innocent_next_job_is_never_killed_for_the_cancelled_one(lab: Jobs):
    """Cancels that arrive just as a deaf job ends by itself: its successor must run to its end."""
    for _ in range(runs(50)):
        first = lab.submit("count", {"steps": 5}, "first")
        second = lab.submit("count", {"steps": 30}, "second")
        wait_for(lab, first, "running", "done")
        lab.cancel(first.id)
        assert wait_for(lab, second).state == "done"


def test_a_killed_server_leaves_no_process_behind_and_the_next_one_carries_on(tmp_path: Path):
    settings = settings_in(tmp_path)
    jobs = Jobs(settings)
    environment = {**os.environ, **settings.environment()}
    for _ in range(runs(100)):
        server = subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None and server.stdout.readline() == "up\n"
        job = wait_for(jobs, jobs.submit("deaf", {}, "deaf"), "running", stage="hanging")
        family = psutil.Process(server.pid).children(recursive=True)
        assert len(family) == 3  # the supervisor, its scheduler, the worker
        with pytest.raises(LayerscopeError, match="in use by another Layerscope"):
            settings.lock()
        server.kill()
        server.wait()
        assert not psutil.wait_procs(family, timeout=5)[1]
        jobs.reap()
        assert jobs.get(job.id).state == "crashed"


def test_a_stopped_worker_is_killed_soon_after_its_time(tmp_path: Path):
    settings = settings_in(tmp_path, job_timeout_s=0.3)
    jobs = Jobs(settings)
    with WorkerKeeper(settings, COMMAND):
        for _ in range(runs(50)):
            job = wait_for(jobs, jobs.submit("die", {"signal": "SIGSTOP"}, "stop"))
            assert job.state == "timed_out" and job.elapsed_s is not None and job.elapsed_s < 0.3 + 5.0


def test_the_supervisor_killed_at_any_moment_loses_no_queued_job(tmp_path: Path):
    random.seed(2)
    settings = settings_in(tmp_path, queue_limit=1000)
    jobs = Jobs(settings)
    with WorkerKeeper(settings, COMMAND) as keeper:
        for _ in range(runs(30)):
            batch = [jobs.submit("count", {"steps": 2}, "count") for _ in range(4)]
            time.sleep(random.uniform(0, 1.5))
            if keeper.pid:
                os.kill(keeper.pid, signal.SIGKILL)
            states = [wait_for(jobs, job, limit_s=30).state for job in batch]
            assert set(states) <= {"done", "crashed"} and states.count("crashed") <= 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_sentence_and_jobs_run_again_once_there_is_room(tmp_path: Path):
    disk = tmp_path / "small"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        settings = settings_in(disk)
        jobs = Jobs(settings)
        with WorkerKeeper(settings, COMMAND):
            before = jobs.submit("count", {}, "before")
            assert wait_for(jobs, before).state == "done"
            running = wait_for(jobs, jobs.submit("count", {"steps": 300}, "running"), "running", stage="counting")
            filler = disk / "filler"
            with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(4096))
            with pytest.raises(LayerscopeError, match="The job cannot be recorded in .*full"):
                for _ in range(100):
                    jobs.submit("count", {"text": "x" * 4000}, "no room")
            time.sleep(4)
            filler.unlink()
            assert wait_for(jobs, running).state in ("done", "crashed", "failed"), "what could not be recorded then is recorded now"
            assert wait_for(jobs, jobs.submit("count", {}, "after")).state == "done"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

"""What a job may go through, with real worker processes: every ending is recorded, and the next job runs."""

from __future__ import annotations

import os
import pickle
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from huey.registry import Message

from backend.errors import LayerscopeError
from backend.jobs.processes import Owner, exit_reason
from backend.jobs.records import Job, Jobs
from backend.jobs.task_queue import JsonSerializer
from backend.jobs.worker_process import WorkerKeeper, start_worker, stop_worker
from config import Settings, load_settings

COMMAND = (sys.executable, "-m", "tests.fake_worker")


def settings_in(folder: Path, **more: object) -> Settings:
    return load_settings(data_dir=folder / "data", models_dirs=[folder / "models"], use_hf_cache=False, **more)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    """Records and a queue without a worker."""
    return Jobs(settings_in(tmp_path, queue_limit=3))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """Jobs with a running worker, shared by the tests of this file: each leaves it fit for the next."""
    settings = settings_in(tmp_path_factory.mktemp("lab"), cancel_grace_s=0.5, queue_limit=50)
    process = start_worker(settings, COMMAND)
    yield Jobs(settings)
    stop_worker(process)


def has_ended(pid: int, limit_s: float = 10.0) -> bool:
    """Whether a process is gone, or only waits for its new parent to read its exit code."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def wait_for(jobs: Jobs, job: Job, *states: str, stage: str = "", limit_s: float = 30.0) -> Job:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        job = jobs.get(job.id)
        if (job.state in states) if states else not job.is_active:
            if not stage or job.stage == stage:
                return job
        time.sleep(0.02)
    raise AssertionError(f"after {limit_s} s the job is still {job.state} ({job.stage})")


# -- records ------------------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_by_number(jobs: Jobs):
    for _ in range(3):
        jobs.submit("count", {}, "count")
    with pytest.raises(LayerscopeError, match="3 jobs are waiting or running, and the limit is 3"):
        jobs.submit("count", {}, "one too many")
    assert jobs.counts()["queued"] == 3
    jobs.cancel(jobs.list()[0].id)
    jobs.submit("count", {}, "now there is room")


def test_a_job_ends_once(jobs: Jobs):
    job = jobs.submit("count", {}, "count")
    assert not jobs.finish(job.id, {}), "a job that never ran cannot be done"
    assert jobs.claim(job.id, Owner.this()) is not None
    assert jobs.claim(job.id, Owner.this()) is None, "a doubled message claims nothing"
    assert jobs.finish(job.id, {"trace_id": "abcdefgh"})
    assert not jobs.end(job.id, "crashed", "too late")
    assert jobs.cancel(job.id).state == "done"
    assert jobs.get(job.id).result == {"trace_id": "abcdefgh"}


def test_a_waiting_job_is_cancelled_at_once(jobs: Jobs):
    job = jobs.submit("count", {}, "count")
    assert jobs.cancel(job.id).state == "cancelled"
    assert jobs.claim(job.id, Owner.this()) is None


def test_the_remaining_time_is_that_of_the_stage_at_its_pace(jobs: Jobs):
    job = jobs.submit("count", {}, "count")
    jobs.claim(job.id, Owner.this())
    jobs.progress(job.id, "loading", 0, 1)
    jobs.progress(job.id, "running", 1, 4)
    with sqlite3.connect(jobs._database) as db:
        db.execute("UPDATE jobs SET stage_at = stage_at - 10")
    now = jobs.get(job.id)
    assert (now.stage, now.done, now.total) == ("running", 1, 4)
    assert now.eta_s == pytest.approx(30.0, abs=1.0)  # one step took 10 s, three are left


def test_a_job_whose_worker_is_dead_is_reaped_and_others_are_not(jobs: Jobs):
    here = Owner.this()
    dead = Owner(here.host, here.boot, here.namespace, here.pid, here.started - 1)  # the id was reused by a younger process
    rebooted = Owner(here.host, "another-boot", here.namespace, here.pid, here.started)
    elsewhere = Owner("another-host", "another-boot", here.namespace, here.pid, here.started)
    owners = {jobs.submit("count", {}, name).id: (name, owner) for name, owner in {"alive": here, "dead": dead, "elsewhere": elsewhere}.items()}
    for job_id, (_, owner) in owners.items():
        jobs.claim(job_id, owner)
    jobs.reap()
    states = {name: jobs.get(job_id).state for job_id, (name, _) in owners.items()}
    assert states == {"alive": "running", "dead": "crashed", "elsewhere": "running"}
    assert rebooted.is_dead() and not elsewhere.is_dead()
    with sqlite3.connect(jobs._database) as db:
        db.execute("UPDATE jobs SET heartbeat = heartbeat - 3600")
    assert len(jobs.reap()) == 1, "a worker elsewhere that went silent counts as dead; one that is seen alive does not"


def test_a_queued_job_without_a_message_is_sent_again(jobs: Jobs):
    job = jobs.submit("count", {}, "count")
    assert jobs.requeue_lost() == []
    jobs.huey.storage.dequeue()  # as a worker does that dies before it claims the job
    assert jobs.requeue_lost() == [job.id]
    assert jobs.huey.dequeue().args == (job.id,) or jobs.huey.dequeue() is None


def test_exit_codes_are_named():
    assert exit_reason(-signal.SIGSEGV) == "SIGSEGV"
    assert exit_reason(70) == "exit code 70"


# -- the queue's messages --------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.marker),)


def test_messages_survive_the_way_and_forgeries_do_not(tmp_path: Path):
    ours = JsonSerializer(b"k" * 32)
    message = Message(id="1", name="run_job", args=["abc"], kwargs={}, retries=0)
    assert ours.deserialize(ours.serialize(message)) == message
    assert ours.deserialize(ours.serialize({"a": [1, None]})) == {"a": [1, None]}
    signed = ours.serialize(message)
    for forged in (JsonSerializer(b"x" * 32).serialize(message), signed[:-1] + b" ", signed[:40], b"", pickle.dumps(message)):
        with pytest.raises(ValueError, match="not signed"):
            ours.deserialize(forged)


def test_a_pickle_planted_in_the_queue_never_runs(lab: Jobs, tmp_path: Path):
    marker = tmp_path / "pwned"
    payload = pickle.dumps(Payload(marker))
    lab.huey.storage.enqueue(payload)
    lab.huey.storage.enqueue(lab.huey.serializer._sign(b"other") + payload)
    job = wait_for(lab, lab.submit("count", {}, "after the forgery"))
    assert job.state == "done"
    assert not marker.exists()
    pickle.loads(payload)  # noqa: S301  the negative control
    assert marker.exists(), "the payload itself works"


# -- with a worker -------------------------------------------------------------------------------------------------------------


def test_a_job_runs_and_reports(lab: Jobs):
    job = wait_for(lab, lab.submit("count", {"steps": 5}, "count to five"))
    assert (job.state, job.error, job.stage, job.done, job.total) == ("done", "", "counting", 5, 5)
    assert job.result["counted"] == 5
    assert job.pid == job.result["pid"] and job.elapsed_s is not None


def test_the_worker_stays_warm_between_jobs(lab: Jobs):
    first, second = (wait_for(lab, lab.submit("pids", {}, "pids")) for _ in range(2))
    assert first.result == second.result
    assert first.result["core"] == "0", "no core dumps"


def test_jobs_run_in_the_order_in_which_they_came(lab: Jobs):
    ended = [wait_for(lab, job) for job in [lab.submit("count", {}, str(n)) for n in range(4)]]
    assert [job.started_at for job in ended] == sorted(job.started_at for job in ended)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("refuse", r"^The prompt has 9 tokens, more than the 8 of the context\.$"),
        ("stumble", r"^Internal error \(KeyError\); .*worker\.log has the traceback\.$"),
        ("exhaust", r"more memory than is free"),
        ("unheard_of", r"^There is no kind of job 'unheard_of'; there are capture, count, deaf"),
    ],
)
def test_a_job_that_raises_fails_with_one_sentence(lab: Jobs, kind: str, sentence: str):
    job = wait_for(lab, lab.submit(kind, {}, kind))
    assert job.state == "failed"
    assert re.search(sentence, job.error)
    assert wait_for(lab, lab.submit("count", {}, "next")).state == "done"


def test_the_traceback_of_an_internal_error_is_in_the_log(lab: Jobs):
    wait_for(lab, lab.submit("stumble", {}, "stumble"))
    assert "KeyError: 'the secret key'" in (lab._database.parent / "logs" / "worker.log").read_text()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_worker_that_is_killed_is_named_and_the_next_job_runs(lab: Jobs, name: str):
    job = wait_for(lab, lab.submit("die", {"signal": name}, name), limit_s=5.0)
    assert (job.state, job.signal, job.done, job.total) == ("crashed", name, 1, 4)
    assert f"ended by {name} while dying" in job.error
    assert wait_for(lab, lab.submit("count", {}, "next"), limit_s=5.0).state == "done"


@pytest.mark.parametrize("kind", ["count", "deaf"])
def test_a_running_job_is_cancelled_whether_it_listens_or_not(lab: Jobs, kind: str):
    job = wait_for(lab, lab.submit(kind, {"steps": 100_000}, kind), "running", stage="counting" if kind == "count" else "hanging")
    asked = time.time()
    lab.cancel(job.id)
    job = wait_for(lab, job)
    assert (job.state, job.error) == ("cancelled", "")
    assert job.finished_at is not None and job.finished_at - asked < 2.0
    assert wait_for(lab, lab.submit("count", {}, "next")).state == "done"


def test_a_job_that_listens_keeps_its_worker(lab: Jobs):
    before = wait_for(lab, lab.submit("pids", {}, "pids")).result["pid"]
    job = wait_for(lab, lab.submit("count", {"steps": 100_000}, "count"), "running", stage="counting")
    lab.cancel(job.id)
    wait_for(lab, job)
    assert wait_for(lab, lab.submit("pids", {}, "pids")).result["pid"] == before


def test_a_stopped_worker_is_killed_at_its_time_limit(tmp_path: Path):
    settings = settings_in(tmp_path, job_timeout_s=0.5)
    jobs = Jobs(settings)
    with WorkerKeeper(settings, COMMAND):
        job = wait_for(jobs, jobs.submit("die", {"signal": "SIGSTOP"}, "stop"))
        assert job.state == "timed_out"
        assert "longer than the limit of 0.5 s" in job.error
        assert wait_for(jobs, jobs.submit("count", {}, "next")).state == "done"


def test_killing_the_supervisor_takes_the_worker_along_and_a_new_one_starts(tmp_path: Path):
    settings = settings_in(tmp_path)
    jobs = Jobs(settings)
    with WorkerKeeper(settings, COMMAND) as keeper:
        job = wait_for(jobs, jobs.submit("deaf", {}, "deaf"), "running", stage="hanging")
        assert job.pid is not None and keeper.pid is not None
        os.kill(keeper.pid, signal.SIGKILL)
        job = wait_for(jobs, job)
        assert job.state == "crashed" and "run it again" in job.error
        assert has_ended(job.pid)
        assert wait_for(jobs, jobs.submit("count", {}, "next")).state == "done"
        family = [psutil.Process(keeper.pid), *psutil.Process(keeper.pid).children(recursive=True)]
    assert not psutil.wait_procs(family, timeout=5)[1], "nothing outlives the server's stop"

"""Following a job on a page: its progress, its end, and that the end is said until it must have been heard."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from dash import no_update

from components import job_follow


def job(state: str, ended_s_ago: float | None = None, error: str = "") -> Any:
    finished = None if ended_s_ago is None else time.time() - ended_s_ago
    return SimpleNamespace(id="j1", state=state, is_active=state == "running", finished_at=finished, error=error)


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Any:
    def following(record: Any, told: str | None = None) -> tuple[Any, Any]:
        monkeypatch.setattr(job_follow, "job_or_none", lambda job_id: record)
        monkeypatch.setattr(job_follow, "job_panel", lambda record: "panel")
        return job_follow.follow_job("j1", told)

    return following


def test_no_job_changes_nothing_and_a_running_one_shows_its_panel(follow: Any) -> None:
    assert follow(None) == (no_update, no_update)
    assert follow(job("running")) == ("panel", no_update)


def test_the_end_is_said_again_while_it_may_not_have_been_heard_and_not_for_ever(follow: Any) -> None:
    assert follow(job("done", 0.1)) == ("", "j1") == follow(job("done", 0.1), told="j1")
    assert follow(job("done", 60), told="j1") == (no_update, no_update)
    assert follow(job("done", 60), told="an earlier job") == ("", "j1")


def test_a_job_that_failed_says_why(follow: Any) -> None:
    said, ready = follow(job("failed", 1, "The disk is full."))
    assert ready is no_update and "The disk is full." in str(said)
    assert "timed out" in str(follow(job("timed_out", 1))[0])

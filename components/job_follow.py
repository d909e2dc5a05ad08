"""Following one job on a page: what is said meanwhile, and that it is done.

That it is done is said again for a while. A callback that waits for the news is dropped by Dash where the one that brings it runs once
more in the meantime and changes nothing; said once, the page could wait for ever for a result that is there.
"""

from __future__ import annotations

import time
from typing import Any

from dash import no_update

from components.jobs_tray import job_or_none, job_panel
from components.states import error

_SAID_AGAIN_S = 5.0


def taken_up(job: Any, told: str | None) -> bool:
    """Whether the page has heard of this job's end, and long enough ago."""
    return told == job.id and (job.finished_at or 0.0) < time.time() - _SAID_AGAIN_S


def follow_job(job_id: str | None, told: str | None) -> tuple[Any, Any]:
    """(progress, the job's id once it is done) for a callback of the job's store and of `jobs-now`; told: the id that was given before."""
    job = job_or_none(job_id)
    if job is None or taken_up(job, told):
        return no_update, no_update
    if job.state == "done":
        return "", job.id
    return (job_panel(job) if job.is_active else error(job.error or f"The job was {job.state.replace('_', ' ')}.")), no_update

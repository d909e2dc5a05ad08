"""A real worker whose experiments misbehave on request: `python -m tests.fake_worker`, settings from the environment."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Context
from backend.worker import main
from config import load_settings


def count(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Take params["steps"] steps of 10 ms and stop when asked."""
    steps = int(params.get("steps", 3))
    for step in range(steps):
        if context.should_stop():
            raise Cancelled
        context.progress("counting", step + 1, steps)
        time.sleep(0.01)
    return {"counted": steps, "pid": os.getpid()}


def deaf(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Never ask whether to stop."""
    context.progress("hanging", 0, 1)
    time.sleep(600)
    return {}


def die(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    context.progress("dying", 1, 4)
    os.kill(os.getpid(), getattr(signal, params["signal"]))
    time.sleep(600)
    return {}


def refuse(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    raise LayerscopeError("The prompt has 9 tokens, more than the 8 of the context.")


def stumble(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    return {}["the secret key"]


def exhaust(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    raise MemoryError


def write(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Leave a half-written trace and hang."""
    with open(context.traces_dir / f"{context.job_id}.h5.part", "wb") as file:
        file.write(b"half")
        file.flush()
        context.progress("writing", 1, 2)
        time.sleep(600)
    return {}


def capture(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Publish a small trace as the real capture does, with a pause in each step for a kill to fall into."""
    from tests.small_traces import write_trace

    context.progress("writing", 0, 1)
    path = write_trace(context.traces_dir, pause_s=0.002)
    context.library.add(path)
    return {"trace_id": path.stem}


def pids(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    limits = Path("/proc/self/limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core"))
    return {"pid": os.getpid(), "supervisor": os.getppid(), "core": core.split()[4], "parent_variable": "LAYERSCOPE_PARENT_PID" in os.environ}


KINDS = {"capture": capture, "count": count, "deaf": deaf, "die": die, "refuse": refuse, "stumble": stumble, "exhaust": exhaust, "write": write, "pids": pids}

if __name__ == "__main__":
    main(load_settings(), KINDS)

"""Starting the worker from the server: a spawned process in its own session, tied to the server's life, and started again if it ends.

Spawned, not forked: it inherits no socket, so a worker can never hold the server's port. The server imports this module and
nothing of the worker.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from backend.settings import Settings

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
# Tells the worker which process it must not outlive.
PARENT_VARIABLE = "LAYERSCOPE_PARENT_PID"
COMMAND = (sys.executable, "-m", "backend", "worker")
LOG_LIMIT = 10 << 20
_RESTART_AFTER_S = 1.0
_STOP_WITHIN_S = 2.0


def start_worker(settings: Settings, command: Sequence[str] = COMMAND) -> subprocess.Popen[bytes]:
    """Start the worker with these settings; what it prints goes to data_dir/logs/worker.log.

    The kernel kills the worker when the calling *thread* ends, so call it from one that lives as long as the server.
    """
    path = settings.worker_log
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_LIMIT:
        os.replace(path, path.with_suffix(".log.1"))
    environment = {**os.environ, **settings.environment(), PARENT_VARIABLE: str(os.getpid())}
    with open(path, "ab") as output:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)


def stop_worker(process: subprocess.Popen[bytes]) -> None:
    """End the worker with all its processes. A running job is recorded as failed, or as crashed at the next start."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            log.warning("the worker %s did not stop within %s s and is killed", process.pid, _STOP_WITHIN_S)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # the whole group is gone already, as it should be
    process.wait()


class WorkerKeeper:
    """Keeps a worker running for as long as the server does. Use as a context manager, or start() and stop()."""

    def __init__(self, settings: Settings, command: Sequence[str] = COMMAND) -> None:
        self._settings, self._command = settings, command
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="worker-keeper", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the worker's supervisor, None between two of them."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the worker and wait for it. Safe to call twice."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _keep(self) -> None:
        while not self._stopping.is_set():
            process = self._process = start_worker(self._settings, self._command)
            while process.poll() is None and not self._stopping.wait(0.1):
                pass
            if self._stopping.is_set():
                stop_worker(process)
            else:
                log.error("the worker ended with code %s; see %s. A new one starts", process.returncode, self._settings.worker_log)
                stop_worker(process)
                self._stopping.wait(_RESTART_AFTER_S)

    def __enter__(self) -> WorkerKeeper:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

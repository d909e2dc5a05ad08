"""Facts about processes: who owns a job, whether the owner is still alive, and dying with one's parent.

A process id alone is no name: ids are reused. An `Owner` adds when the process started and on which machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# The kernel's out-of-memory killer takes the process with the higher number: the worker, not the server.
_OOM_SCORE = 800


@dataclass(frozen=True)
class Owner:
    """One process, named so that no other process is ever taken for it."""

    host: str
    boot: str  # differs after each start of the machine
    namespace: str  # process ids of another container mean other processes
    pid: int
    started: int  # clock ticks since the machine started

    @classmethod
    def this(cls) -> Owner:
        """The calling process."""
        return cls(*_place(), os.getpid(), _start_ticks(os.getpid()) or 0)

    def is_here(self) -> bool:
        """True if this process's pid can be looked up from here."""
        return (self.host, self.boot, self.namespace) == _place()

    def is_dead(self) -> bool:
        """True if the process certainly ended; False if it runs, or cannot be seen from here."""
        host, boot, namespace = _place()
        if self.host != host:
            return False
        if self.boot != boot:
            return True
        return self.namespace == namespace and _start_ticks(self.pid) != self.started

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Owner:
        return cls(**json.loads(text))


def _place() -> tuple[str, str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")


def _start_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)); None if there is no such process or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends. Exits at once if the parent, process `parent`, is gone already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


def no_core_dumps() -> None:
    """A crash must not fill the disk with a copy of the model."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def prefer_as_oom_victim() -> None:
    """Tell the kernel to end this process first when memory runs out."""
    try:
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")
    except PermissionError:
        pass  # some containers forbid it; the worker then competes with the server like any process


def exit_reason(exitcode: int) -> str:
    """An exit code as multiprocessing reports it, in words: -11 -> "SIGSEGV", 3 -> "exit code 3".

    >>> exit_reason(-9), exit_reason(3)
    ('SIGKILL', 'exit code 3')
    """
    if exitcode >= 0:
        return f"exit code {exitcode}"
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"

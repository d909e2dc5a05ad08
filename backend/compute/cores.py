"""How many cores there are to compute with: of this process, which may have fewer than the machine."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil


@functools.cache
def n_cores() -> int:
    """Those that this process may use: by its affinity mask, and by the CPU quota of its container, rounded up.

    In a container that is given 4 of 64 cores as a quota, 64 threads would wait for each other at every step while the quota is used up.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, quotas())]))


@functools.cache
def n_physical_cores() -> int:
    """Cores, counted once however many threads each runs, as far as this process may use them."""
    return min(psutil.cpu_count(logical=False) or n_cores(), n_cores())


def quotas(root: Path = Path("/")) -> Iterator[float]:
    """What Linux' control groups let this process use, in cores: of its own group and of each around it; nothing where there is no limit.

    Formats: cgroup-v2.rst (cpu.max) and sched-bwc.rst (cpu.cfs_quota_us, version 1) of the kernel's documentation. `root`: where /proc and /sys lie.
    """
    groups = root / "sys/fs/cgroup"
    own = next((line[3:] for line in _words(root / "proc/self/cgroup") if line.startswith("0::/")), "/")
    inside = groups / own.lstrip("/")
    for group in (inside, *inside.parents):
        if group.is_relative_to(groups):
            yield from _cores(_words(group / "cpu.max"))
    yield from _cores([*_words(groups / "cpu/cpu.cfs_quota_us"), *_words(groups / "cpu/cpu.cfs_period_us")])


def _cores(words: list[str]) -> Iterator[float]:
    """["150000", "100000"], microseconds in each period, -> 1.5; of "max", and -1 in version 1, nothing."""
    if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
        yield int(words[0]) / int(words[1])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []

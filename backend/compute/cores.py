"""How many cores there are to compute with: of this process, which may have fewer than the machine."""

from __future__ import annotations

import functools


@functools.cache
def n_cores() -> int:
    """Those that this process may use: by its affinity mask, and by the CPU quota of its container, rounded up.

    In a container that is given 4 of 64 cores as a quota, 64 threads would wait for each other at every step while the quota is used up.
    """
    from joblib import cpu_count  # reads both versions of cgroups; a fifth of a second to import

    return cpu_count()


@functools.cache
def n_physical_cores() -> int:
    """Cores, counted once however many threads each runs, where this process may use all of the machine; else `n_cores()`."""
    from joblib import cpu_count

    return min(cpu_count(only_physical_cores=True), n_cores())

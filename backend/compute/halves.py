"""Two halves of a computation at once, for compiled loops and NumPy calls that let go of Python's lock."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from backend.compute.cores import n_cores


def in_halves(work: Callable[[slice], None], n: int) -> None:
    """`work` with the first and with the second half of n places, on two threads; all at once where there is one core, or one place."""
    if n < 2 or n_cores() < 2:
        work(slice(0, n))
        return
    other = _helper().submit(work, slice(n // 2, n))
    try:
        work(slice(0, n // 2))
    finally:
        other.result()


@functools.cache
def _helper() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="half")

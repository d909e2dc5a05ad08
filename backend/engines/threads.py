"""Threads of a process that runs models: how many, how they wait for each other, and the heap that they share.

To be said before llama.cpp or PyTorch is loaded: libgomp reads its settings once, and glibc keeps the heaps that are there.
"""

from __future__ import annotations

import ctypes
import functools
import os

from backend.compute.cores import n_cores, n_physical_cores

_M_ARENA_MAX = -8  # of glibc's malloc.h
_FEW_CORES = 4
_SPINS = "300"


def default_threads() -> int:
    """Threads of what Layerscope computes itself: one a core."""
    return n_cores()


def engine_threads() -> int:
    """Threads that an engine computes with if nobody says: where cores are many, one a physical core, as llama.cpp's own programs choose.

    A core that runs two threads has one set of arithmetic units: its second thread adds little to matrix products, and is free for what
    is done with the values meanwhile.
    """
    return n_cores() if few_cores() else n_physical_cores()


def few_cores() -> bool:
    """Whether an engine that computes with all cores leaves none to anything else."""
    return n_cores() <= _FEW_CORES


def let_waiting_threads_sleep() -> None:
    """Where cores are few, let the threads of ggml and PyTorch give theirs up soon when they wait for each other (libgomp's GOMP_SPINCOUNT).

    By default a thread that waits at a barrier keeps its core busy for milliseconds, which the thread it waits for may want. Measured on two
    cores that other programs used too: a decode took 5.0 s with the default and 2.2 s with this; with the cores to itself, the same within 2 %.
    To be called before either library is loaded; what the user has set stays.
    """
    if few_cores() and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


@functools.cache
def share_one_heap() -> None:
    """Let all threads from now on take memory from one heap (glibc's M_ARENA_MAX), where the C library can do that.

    By default each thread has its own. Values are made on one thread and freed on another here, so those heaps would keep about as
    much memory as passed through them: 60 MB instead of 25 for 32 layers of a small model, and more with every capture.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Give free pages of the heap back to the system, where the C library can do that (glibc's malloc_trim).

    Between a layer's large arrays lie small things that stay, so that the heap grows with every layer though nothing large is kept: measured with PyTorch, 32 layers
    of a small model took 1.3 times the memory of 8, and no more with this every sixteenth layer. The next layer's pages cost some milliseconds then.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def prepare() -> None:
    """Both, before an engine's library is loaded."""
    let_waiting_threads_sleep()
    share_one_heap()

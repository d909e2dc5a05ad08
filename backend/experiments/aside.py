"""Aside: what is done with an engine's values is done on another thread, in order, while the engine computes the next layer.

The engine may be a few layers ahead and then waits, so memory is a few layers' values however many layers there are.
NumPy's matrix products stay on one thread meanwhile: the cores belong to the engine, and its threads and OpenBLAS' would wait
for each other.
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable

import numpy as np
from threadpoolctl import ThreadpoolController

from backend.engines import Piece


@functools.cache
def _blas() -> ThreadpoolController:
    """The libraries that NumPy multiplies with; looking for them takes a few milliseconds."""
    return ThreadpoolController().select(internal_api="openblas")


LAYERS_HELD = 3  # layers whose values are in memory at once, the one that is being worked on among them


class Aside:
    """A sink that hands pieces to `work` on a thread of its own. Use as a context manager around the engine's run.

    An exception in `work` is raised by the next `put`, or at the end of the `with`; after one nothing more is worked on.
    """

    def __init__(self, work: Callable[[Piece], None]) -> None:
        self._work = work
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(LAYERS_HELD)
        self._error: BaseException | None = None
        self._at: tuple[int, int | None] | None = None
        self._thread = threading.Thread(target=self._run, name="aside", daemon=True)

    def put(self, piece: Piece) -> None:
        """Take a piece over; its values are copied unless they are its own. Waits while the engine is too far ahead."""
        if self._error is not None:
            raise self._error
        at = (piece.start, piece.layer)
        if at != self._at:
            self._at = at
            self._room.acquire()
        values = piece.values if piece.owned else np.array(piece.values, order="C")
        self._pieces.put(dataclasses.replace(piece, values=values, owned=True))

    def _run(self) -> None:
        at: tuple[int, int | None] | None = None
        while (piece := self._pieces.get()) is not None:
            if (piece.start, piece.layer) != at:
                if at is not None:
                    self._room.release()
                at = (piece.start, piece.layer)
            if self._error is None:
                try:
                    self._work(piece)
                except BaseException as error:  # noqa: BLE001 - raised again on the engine's thread
                    self._error = error
            del piece  # the last reference to its values

    def __enter__(self) -> Aside:
        self._blas = _blas().limit(limits=1, user_api="blas")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pieces.put(None)
        self._thread.join()
        self._blas.restore_original_limits()
        if kind is None and self._error is not None:
            raise self._error

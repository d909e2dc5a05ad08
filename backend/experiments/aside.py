"""Aside: what is done with an engine's values is done on another thread, in order, while the engine computes the next layer.

The engine may be a few layers ahead and then waits, less where their values are large, so memory is a few layers' values however
many layers there are and however long the prompt is.
NumPy's matrix products stay on one thread meanwhile: the cores belong to the engine, and its threads and OpenBLAS' would wait
for each other.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from backend.engines import Piece
from backend.engines.threads import share_one_heap

LAYERS_HELD = 3  # layers whose values are in memory at once, the one that is worked on among them
BYTES_HELD = 256 << 20  # and the most that they may take, unless one piece takes more


class Aside:
    """A sink that hands pieces to `work` on a thread of its own. Use as a context manager around the engine's run.

    An exception in `work` is raised by the next `put`, or at the end of the `with`; after one nothing more is worked on.
    """

    def __init__(self, work: Callable[[Piece], None]) -> None:
        self._work = work
        self._pieces: collections.deque[Piece | None] = collections.deque()
        self._changed = threading.Condition()
        self._n_bytes = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="aside", daemon=True)

    def put(self, piece: Piece) -> None:
        """Take a piece over; its values are copied where somebody may write into them. Waits while the engine is too far ahead."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(piece))
        if self._error is not None:
            raise self._error
        values = piece.values if piece.owned or piece.steady else np.array(piece.values, order="C")
        with self._changed:
            self._pieces.append(dataclasses.replace(piece, values=values, owned=True))
            self._n_bytes += values.nbytes
            self._changed.notify_all()

    def _has_room(self, piece: Piece) -> bool:
        layers = {(waiting.start, waiting.layer) for waiting in self._pieces if waiting} | {(piece.start, piece.layer)}
        return self._error is not None or not self._pieces or (len(layers) <= LAYERS_HELD and self._n_bytes + piece.values.nbytes <= BYTES_HELD)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._pieces) > 0)
                piece = self._pieces[0]  # it stays in the queue, and counts, until it is done with
            if piece is None:
                return
            if self._error is None:
                try:
                    self._work(piece)
                except BaseException as error:  # noqa: BLE001 - raised again on the engine's thread
                    self._error = error
            with self._changed:
                self._n_bytes -= piece.values.nbytes
                self._pieces.popleft()
                self._changed.notify_all()
            del piece  # the last reference to its values

    def __enter__(self) -> Aside:
        share_one_heap()
        self._blas = one_blas_thread()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._pieces.append(None)
            self._changed.notify_all()
        self._thread.join()
        self._blas.restore_original_limits()
        if kind is None and self._error is not None:
            raise self._error


def one_blas_thread() -> Any:
    """Keep NumPy's matrix products on one thread, until `restore_original_limits` of what is returned."""
    return _blas().limit(limits=1, user_api="blas")


@functools.cache
def _blas() -> ThreadpoolController:
    """The libraries that NumPy multiplies with; looking for them takes a few milliseconds."""
    return ThreadpoolController().select(internal_api="openblas")

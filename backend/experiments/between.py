"""Between: what is done with an engine's values is done between two steps of the engine, on its own thread and with all cores.

Beside an engine that fills the cores (`aside`), every thread waits for another one to get its turn, ggml's and PyTorch's at each operation:
measured on two cores, the same capture took about a tenth of a plain run longer, and held three layers in memory instead of one. Where the
engine computes on a GPU, leaves a core, or cores are many, they can be had beside it: with one of the two cores left, residual stream and
attention cost 6 % of a plain run beside it and 10 % between its steps.
"""

from __future__ import annotations

from collections.abc import Callable

from backend.compute.cores import n_cores
from backend.engines import Engine, Piece
from backend.engines.threads import few_cores, share_one_heap
from backend.experiments.aside import Aside, one_blas_thread


class Between:
    """A sink that does `work` with each piece before the engine goes on. Use as a context manager around the run.

    The piece's values are lent: `work` copies what must outlive it, and leaves no thread at work.
    """

    def __init__(self, work: Callable[[Piece], None]) -> None:
        self._work = work

    def put(self, piece: Piece) -> None:
        self._work(piece)

    def __enter__(self) -> Between:
        share_one_heap()
        self._blas = one_blas_thread()
        return self

    def __exit__(self, *_: object) -> None:
        self._blas.restore_original_limits()


def sink_for(engine: Engine, work: Callable[[Piece], None]) -> Aside | Between:
    """Where `work` is best done for this engine on this machine."""
    fills_the_cores = engine.on_cpu and few_cores() and engine.n_threads >= n_cores()
    return Between(work) if fills_the_cores else Aside(work)

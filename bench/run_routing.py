"""A case: the engine runs a prompt, with the logits of every position alone and, the next time, with the four sites of the routers too; values are received and dropped."""

from __future__ import annotations

import itertools
import json
import sys

from backend import open_model
from backend.engines import Piece, Request, never_stop
from backend.reports.routing import SITES
from bench.measure import serve


def main(path: str, n_threads: int, ids: list[int]) -> None:
    """n_threads reaches the engine as LAYERSCOPE_N_THREADS."""
    engine = open_model(path, device="cpu", n_gpu_layers=0).engine
    turns = itertools.cycle((Request(("logits",)), Request((*SITES, "logits"))))

    def sink(piece: Piece) -> None:
        assert len(piece.values)

    serve(lambda: engine.run(ids, next(turns), sink, (), never_stop), lambda: engine.run(ids[:4], Request(("logits",)), sink, (), never_stop))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

"""A case: the logit lens of a trace that was captured without one. The trace is made while warming up."""

from __future__ import annotations

import json
import sys
from typing import Any

from backend import open_model, open_trace
from backend.experiments import no_progress
from backend.experiments.capture import CaptureSpec, capture
from backend.experiments.logit_lens import lens_of_trace
from bench.measure import serve
from bench.models import FOLDER


def main(path: str, n_threads: int, ids: list[int]) -> None:
    """n_threads reaches the engine as LAYERSCOPE_N_THREADS."""
    engine = open_model(path, device="cpu", n_gpu_layers=0).engine
    spec = CaptureSpec(token_ids=tuple(ids), sites=("embed", "resid_post"), lens=False)
    trace = open_trace(capture(engine, spec, FOLDER / "traces"))

    def about(result: Any) -> dict[str, Any]:
        rows, found = result
        return {"rows": len(rows), "result_bytes": sum(values.nbytes for values in found.values())}

    try:
        serve(lambda: lens_of_trace(engine, trace, progress=no_progress, should_stop=lambda: False), lambda: engine.unembed(trace["embed"][:2]), about)
    finally:
        trace.path.unlink()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

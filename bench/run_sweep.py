"""A case: every expert of a model is taken out in turn, over all the prompts."""

from __future__ import annotations

import json
import sys
from typing import Any

from backend import open_model
from backend.experiments.experts import sweep_over
from bench.measure import serve


def main(path: str, n_threads: int, prompts: list[str]) -> None:
    """n_threads reaches the engine as LAYERSCOPE_N_THREADS."""
    engine = open_model(path, device="cpu", n_gpu_layers=0).engine
    ids = [engine.tokenize(prompt) for prompt in prompts]

    def about(found: Any) -> dict[str, Any]:
        layers, values = found
        return {"n_runs": len(ids) * (1 + len(layers) * values.shape[2]), "n_tokens": sum(map(len, ids))}

    serve(lambda: sweep_over(engine, ids), lambda: engine.tokenize(prompts[0]), about)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

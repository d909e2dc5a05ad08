"""A case: weights of a loaded GGUF model change sign, the prompt is run for its logits, and the weights are put back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from backend.engines import OpenOptions, Piece, Request, open_engine
from backend.engines.weight_edits import WeightChange
from backend.weights import Weights, open_weights
from bench.measure import serve


def main(path: str, ids: list[int], n_threads: int, n_changed: int = 0) -> None:
    engine = open_engine(Path(path), OpenOptions(device="cpu", n_gpu_layers=0, n_threads=n_threads, editable_weights=True))
    changes = _sign_flips(open_weights(path), n_changed)

    def evaluate(tokens: list[int]) -> list[np.ndarray]:
        logits: list[np.ndarray] = []

        def keep(piece: Piece) -> None:
            logits.append(np.array(piece.values[-1]))

        engine.run(tokens, Request(("logits",)), keep)
        return logits

    def cycle(tokens: list[int]) -> None:
        with engine.perturbed(changes):
            evaluate(tokens)

    before = evaluate(ids[:4])

    def about(_: Any) -> dict[str, bool]:
        return {"restored": all(np.array_equal(a, b) for a, b in zip(before, evaluate(ids[:4]), strict=True))}

    run = cycle if changes else evaluate
    serve(lambda: run(ids), lambda: run(ids[:4]), about)


def _sign_flips(weights: Weights, n: int) -> list[WeightChange]:
    """n entries drawn evenly from all matrices of attention and MLPs."""
    names = [name for name in weights if ".W_" in name and name.startswith("blocks.")]
    sizes = np.array([weights.lazy(name).size for name in names])
    drawn = np.sort(np.random.default_rng(0).choice(sizes.sum(), n, replace=False))
    owner, starts = np.searchsorted(np.cumsum(sizes), drawn, side="right"), np.cumsum(sizes) - sizes
    changes = []
    for i in np.unique(owner):
        at = drawn[owner == i] - starts[i]
        changes.append(WeightChange(names[i], at, -weights[names[i]].reshape(-1)[at]))
    return changes


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

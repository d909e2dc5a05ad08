"""A case: the weight report of a GGUF file, or (plain) gguf's dequantization of the same tensors and nothing else."""

from __future__ import annotations

import json
import sys
from typing import Any

import gguf
import numpy as np

from backend.experiments.weight_report import weight_report
from backend.weights import open_weights
from bench.measure import serve

_ROWS = 4096  # gguf's dequantization takes a few times the memory of its result: a few rows at a time, as a careful user would


def main(path: str, n_threads: int, plain: bool = False) -> None:
    weights = open_weights(path)
    n_weights = sum(weights.stored(name).size for name in weights.native_names)
    reader = gguf.GGUFReader(path) if plain else None

    def dequantize() -> int:
        assert reader is not None
        for tensor in reader.tensors:
            for start in range(0, len(tensor.data), _ROWS):
                gguf.quants.dequantize(tensor.data[start : start + _ROWS], tensor.tensor_type)
        return n_weights

    def warm_up() -> None:
        weights.stored("blk.0.attn_norm.weight")[...]
        gguf.quants.dequantize(np.zeros((1, 144), np.uint8), gguf.GGMLQuantizationType.Q4_K)

    serve(dequantize if plain else lambda: weight_report(weights, n_threads=n_threads), warm_up, lambda _: _about(n_weights))


def _about(n_weights: int) -> dict[str, Any]:
    return {"n_weights": n_weights}


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

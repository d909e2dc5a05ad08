"""A case: a model's matrices ranked by grad_x_weight, or (plain) the forward and backward passes over the same windows with autograd alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from backend.engines import OpenOptions
from backend.engines.hf import HfEngine
from backend.experiments.sensitivity.ranking import matrices, rank
from bench.measure import serve


def main(path: str, n_threads: int, windows: list[list[int]], k: int, plain: bool = False) -> None:
    torch.set_num_threads(n_threads)
    if plain:
        return serve(*_plain(path, windows))
    engine = HfEngine(Path(path), OpenOptions(device="cpu", n_threads=n_threads))
    names = matrices(engine)

    def ranked(n: int) -> Any:
        return rank(engine, windows[:n], "grad_x_weight", names, k, "global")

    serve(lambda: ranked(len(windows)), lambda: ranked(1), lambda ranking: {"n_weights": sum(row["n"] for row in ranking.tensors), "n_top": len(ranking.top.at)})


def _plain(path: str, windows: list[list[int]]) -> tuple[Any, Any]:
    """What a careful user writes: only the matrices take gradients, and their sum over the windows is left in them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj" in name)

    def passes(n: int) -> None:
        for window in windows[:n]:
            ids = torch.tensor([window])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
        model.zero_grad()

    return lambda: passes(len(windows)), lambda: passes(1)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

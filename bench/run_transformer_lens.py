"""A case, in the peers' environment: TransformerLens keeps activations in memory (run_with_cache), weights not processed.

With `out` it runs once and saves them instead, for the comparison of values.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from bench.measure import serve


def main(path: str, ids: list[int], n_threads: int, hooks: list[str] | None = None, out: str | None = None) -> None:
    """hooks: names of hook points to keep; None: all of them."""
    torch.set_num_threads(n_threads)
    hf_model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    # No folding, no centering: a bridge in its default mode runs the weights as they are.
    bridge = TransformerBridge.boot_transformers(path, hf_model=hf_model.eval(), dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def run(tokens: list[int]) -> tuple[Any, Any]:
        return bridge.run_with_cache(torch.tensor([tokens]), names_filter=hooks)

    if out is None:
        serve(lambda: run(ids), lambda: run(ids[:4]))
    else:
        logits, cache = run(ids)
        kept = {name: values[0].numpy() for name, values in cache.items() if isinstance(values, torch.Tensor)}
        np.savez(out, **{"unembed.hook_out": logits[0].numpy(), **kept})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

"""A case: the plain forward pass of transformers over the prompt, logits of every position, nothing kept."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.measure import serve


def main(path: str, ids: list[int], n_threads: int, attention: str = "sdpa", device: str = "cpu", dtype: str = "float32") -> None:
    torch.set_num_threads(n_threads)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation=attention)
    model = model.to(device).eval()

    @torch.no_grad()
    def forward(tokens: list[int]) -> None:
        # Copied to the CPU, as the logits of a capture are; the copy also waits for a GPU.
        model(torch.tensor([tokens], device=device), use_cache=False).logits.to("cpu")

    serve(lambda: forward(ids), lambda: forward(ids[:4]))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

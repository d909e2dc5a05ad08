"""What the demo models are made of: previous-token heads, induction heads and what cutting them does, experts and their domains.

All of it straight from transformers and independent of the dashboard's engines, so that it can serve as their oracle.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_text import CATEGORIES, Item, documents, held_out_items
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

Head = tuple[int, int]  # (layer, head)


@dataclass
class HuggingFaceModel:
    """A demo model in transformers, in float32, with the tokenizer it was saved with."""

    folder: Path

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager").eval()

    def encode(self, text: str) -> list[int]:
        """Token ids with the BOS first."""
        return list(self.tokenizer.encode(text))

    @torch.no_grad()
    def next_token(self, ids: list[int]) -> str:
        """Text of the most probable next token."""
        logits = self.model(torch.tensor([ids])).logits  # (1, pos, d_vocab)
        return str(self.tokenizer.decode([int(logits[0, -1].argmax())]))

    @contextmanager
    def without(self, heads: list[Head]) -> Iterator[None]:
        """Inside the block the given heads add nothing: their slice of the input of W_O is zero."""
        d_head = self.model.config.hidden_size // self.model.config.num_attention_heads
        handles = []
        for layer, head in heads:

            def cut(_module: Any, args: tuple[torch.Tensor], head: int = head) -> tuple[torch.Tensor]:
                z = args[0].clone()  # (1, pos, n_heads * d_head)
                z[..., head * d_head : (head + 1) * d_head] = 0
                return (z,)

            handles.append(self.model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(cut))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def share_right(model: HuggingFaceModel, items: list[Item]) -> float:
    return sum(model.next_token(model.encode(item.prompt)) == item.answer for item in items) / len(items)


@torch.no_grad()
def head_scores(model: HuggingFaceModel, period: int = 50, seed: int = 0) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """(previous-token scores, induction scores), each (n_layers, n_heads), on BOS and `period` random tokens said twice.

    Previous token: mean of A[i, i - 1]. Induction: mean over the second copy of A[i, i - (period - 1)], the token after the
    earlier copy of the present one. Both as in TransformerLens' head detector.
    """
    words = torch.randint(2, model.model.config.vocab_size, (period,), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([torch.tensor([model.model.config.bos_token_id]), words, words])[None]
    patterns = torch.stack([a[0] for a in model.model(ids, output_attentions=True).attentions])  # (n_layers, n_heads, q_pos, k_pos)
    previous = patterns.diagonal(-1, dim1=2, dim2=3).mean(-1)
    induction = patterns.diagonal(1 - period, dim1=2, dim2=3)[..., 2:].mean(-1)  # queries from the second copy's first token on
    return previous.numpy(), induction.numpy()


def strongest(scores: NDArray[np.floating], n: int) -> list[Head]:
    """The `n` heads with the highest score, best first."""
    order = np.argsort(-scores, axis=None)[:n]
    return [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, scores.shape), strict=True)]


def random_heads(shape: tuple[int, ...], n: int, leaving_out: list[Head], seed: int) -> list[Head]:
    candidates = [(layer, head) for layer in range(shape[0]) for head in range(shape[1]) if (layer, head) not in leaving_out]
    return random.Random(seed).sample(candidates, n)


def induction_ablation(model: HuggingFaceModel, n_heads: int = 4, n_items: int = 100, draws: int = 5) -> dict[str, float]:
    """Share of repeated sequences continued rightly: whole, without the best induction heads, without as many random others."""
    _, scores = head_scores(model)
    items, best = held_out_items("induction", n_items), strongest(scores, n_heads)
    whole = share_right(model, items)
    with model.without(best):
        without_induction = share_right(model, items)
    others = []
    for seed in range(draws):
        with model.without(random_heads(scores.shape, n_heads, leaving_out=best, seed=seed)):
            others.append(share_right(model, items))
    found = {"whole": whole, "without_induction": without_induction}
    return found | {"without_others": float(np.mean(others)), "without_others_worst": min(others)}


@torch.no_grad()
def expert_use(model: HuggingFaceModel, n_documents: int = 600, seed: int = 12345) -> NDArray[np.floating]:
    """(n_layers, category, expert): of a category's tokens, the share whose first choice is the expert; categories as in CATEGORIES."""
    config = model.model.config
    counts = np.zeros((config.num_hidden_layers, len(CATEGORIES), config.num_local_experts))
    for _, (category, text) in zip(range(n_documents), documents(seed), strict=False):
        ids = torch.tensor([model.encode(text)])
        routers = model.model(ids, output_router_logits=True).router_logits  # per layer (pos, expert)
        for layer, logits in enumerate(routers):
            for expert, times in Counter(logits.argmax(-1).tolist()).items():
                counts[layer, CATEGORIES.index(category), expert] += times
    return np.asarray(counts / counts.sum(-1, keepdims=True))

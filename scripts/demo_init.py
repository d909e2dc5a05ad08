"""Initial weights for the demo models that give copying a start, so that induction forms in minutes on two cores.

Weights are random, scaled so that activations start at one size; then one key-value group of heads per layer gets a direction:

- layers 0 and 1, group 0: the two heads look at the previous token (a constant direction of the embedding, turned by one rotary
  step in the queries) and write what they find there, through a random projection, into dims of the residual stream kept free;
- layers 2 and 3, groups 0 and 1: the heads compare the present token with those dims, so they look, faintly at first, at tokens
  that followed an earlier copy of the present one, and add what they see there to the prediction.

At this point the best induction score is 0.11 (chance 0.01) and no task is solved. Training does the rest, and may undo it.
Starting attention from structure instead of noise: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (2023).
"""

from __future__ import annotations

import math
from typing import Any

import torch

EMBEDDING_STD, CONSTANT = 0.1, 0.2
PREVIOUS_SCORE, COPIED, MATCH, WRITTEN = 4.0, 0.15, 3.0, 0.6

_CONSTANT_DIMS = slice(0, 64)  # the same value in every token's embedding; what rotary attention by position rests on
_FREE_DIMS = slice(192, 256)  # zero in every embedding at first: room for what the previous-token heads write


@torch.no_grad()
def start_copying(model: Any, generator: torch.Generator) -> None:
    """Set the weights of a Mistral or Mixtral model with d_model 256, 4 layers, 8 heads and 4 kv heads, in place."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
            weight.normal_(0, 0.1 / 16 if writes else 1 / 16, generator=generator)
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, EMBEDDING_STD, generator=generator)
    embedding[:, _FREE_DIMS] = 0
    model.lm_head.weight.copy_(embedding * 0.3)  # W_U like W_E: a head can raise any token it sees from the first step on
    embedding[:, _CONSTANT_DIMS] += CONSTANT
    looked_for = [_look_back(model, layer, _FREE_DIMS.start + 32 * layer) for layer in (0, 1)]
    for layer in (2, 3):
        for group, projection in enumerate(looked_for):
            _look_after_copies(model, layer, group, projection, _FREE_DIMS.start + 32 * group, generator)


def _views(model: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """W_Q (group, head, d_head, d_model), W_K and W_V (group, d_head, d_model), W_O (d_model, group, head, d_head), as views."""
    attention = model.model.layers[layer].self_attn
    return (
        attention.q_proj.weight.view(4, 2, 32, 256),
        attention.k_proj.weight.view(4, 32, 256),
        attention.v_proj.weight.view(4, 32, 256),
        attention.o_proj.weight.view(256, 4, 2, 32),
    )


def _look_back(model: Any, layer: int, free_dim: int) -> torch.Tensor:
    """Turn group 0 into previous-token heads. Returns the projection (32, d_model) of the token that they write down."""
    w_q, w_k, w_v, w_o = _views(model, layer)
    w_q[0] *= 0.1
    w_k[0] *= 0.1
    constant = CONSTANT / math.sqrt(EMBEDDING_STD**2 + CONSTANT**2 / 4)  # its value after the norm
    size = PREVIOUS_SCORE / (64 * constant)
    for pair in range(6):  # the fast rotary pairs, which tell one step from two
        angle = 10000.0 ** (-pair / 16)
        w_k[0, pair, _CONSTANT_DIMS] += size
        w_q[0, :, pair, _CONSTANT_DIMS] += size * math.cos(angle)
        w_q[0, :, pair + 16, _CONSTANT_DIMS] -= size * math.sin(angle)
    w_v[0, :, _CONSTANT_DIMS] = 0
    w_o[:, 0] = 0
    w_o[free_dim : free_dim + 32, 0] = COPIED * torch.eye(32)[:, None]
    return w_v[0].clone()


def _look_after_copies(model: Any, layer: int, group: int, projection: torch.Tensor, free_dim: int, generator: torch.Generator) -> None:
    """Turn a group into induction heads: queries hold the present token, keys the one before theirs, in slow rotary pairs."""
    w_q, w_k, w_v, w_o = _views(model, layer)
    slow = [*range(8, 16), *range(24, 32)]
    mix = MATCH * torch.randn(16, 32, generator=generator) / math.sqrt(32)
    w_q[group] *= 0.1
    w_k[group] *= 0.1
    w_k[group][slow] = 0
    w_k[group, slow, free_dim : free_dim + 32] = mix
    w_q[group][:, slow] = mix @ projection
    w_o[:, group] = WRITTEN * w_v[group].T[:, None]

"""A case, in the peers' environment: nnsight saves the standard sites, or residual stream and attention, of a Llama in memory."""

from __future__ import annotations

import json
import sys
from typing import Any

import nnsight
import torch
from transformers import AutoModelForCausalLM

from bench.measure import serve


def main(path: str, ids: list[int], n_threads: int, everything: bool) -> None:
    """everything: the standard sites; without it embed, attn_pattern, resid_mid and resid_post."""
    torch.set_num_threads(n_threads)
    hf_model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model = nnsight.NNsight(hf_model.eval())
    if everything:
        for layer in model.model.layers:
            layer.self_attn.source  # noqa: B018 - asked for before the trace, so that the forward pass runs through it
    save = _standard if everything else _residual_and_attention
    serve(lambda: save(model, torch.tensor([ids])), lambda: save(model, torch.tensor([ids[:4]])))


@torch.no_grad()
def _residual_and_attention(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Site and layer -> values. A trace reads modules in the order in which they run."""
    with model.trace(ids, use_cache=False):
        kept = {"embed": model.model.embed_tokens.output}
        for i, layer in enumerate(model.model.layers):
            kept[f"attn_pattern {i}"] = layer.self_attn.output[1]
            kept[f"resid_mid {i}"] = layer.post_attention_layernorm.input
            kept[f"resid_post {i}"] = layer.output
        kept["logits"] = model.lm_head.output
        kept = nnsight.save(kept)
    return kept


@torch.no_grad()
def _standard(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Site and layer -> values."""
    with model.trace(ids, use_cache=False):
        kept = {"embed": model.model.embed_tokens.output}
        for i, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            kept[f"q {i}"], kept[f"k {i}"], kept[f"v {i}"] = attention.q_proj.output, attention.k_proj.output, attention.v_proj.output
            rotated = attention.source.attention_interface_1.inputs[0]  # (module, query, key, value, mask)
            kept[f"rot_q {i}"], kept[f"rot_k {i}"] = rotated[1], rotated[2]
            kept[f"z {i}"] = attention.o_proj.input
            kept[f"attn_out {i}"], kept[f"attn_pattern {i}"] = attention.output[0], attention.output[1]
            kept[f"resid_mid {i}"] = layer.post_attention_layernorm.input
            kept[f"mlp_post {i}"] = layer.mlp.down_proj.input
            kept[f"mlp_out {i}"], kept[f"resid_post {i}"] = layer.mlp.output, layer.output
        kept["ln_final_out"], kept["logits"] = model.model.norm.output, model.lm_head.output
        kept = nnsight.save(kept)
    return kept


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

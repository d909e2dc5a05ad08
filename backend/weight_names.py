"""Canonical weight names and the names that files use for them, one row per architecture. {} is the layer, {e} the expert."""

from __future__ import annotations

from collections.abc import Mapping

_HEADS = ("Q", "K", "V")

_GGUF_BLOCK = {
    "blocks.{}.ln1.w": "blk.{}.attn_norm.weight",
    **{f"blocks.{{}}.attn.W_{x}": f"blk.{{}}.attn_{x.lower()}.weight" for x in _HEADS},
    "blocks.{}.attn.W_O": "blk.{}.attn_output.weight",
    **{f"blocks.{{}}.attn.b_{x}": f"blk.{{}}.attn_{x.lower()}.bias" for x in _HEADS},
    "blocks.{}.attn.b_O": "blk.{}.attn_output.bias",
    "blocks.{}.ln2.w": "blk.{}.ffn_norm.weight",
}
_GGUF_MLP = {
    "blocks.{}.mlp.W_gate": "blk.{}.ffn_gate.weight",
    "blocks.{}.mlp.W_in": "blk.{}.ffn_up.weight",
    "blocks.{}.mlp.W_out": "blk.{}.ffn_down.weight",
    "blocks.{}.mlp.b_gate": "blk.{}.ffn_gate.bias",
    "blocks.{}.mlp.b_in": "blk.{}.ffn_up.bias",
    "blocks.{}.mlp.b_out": "blk.{}.ffn_down.bias",
}
_GGUF_EXPERTS = {
    "blocks.{}.mlp.W_router": "blk.{}.ffn_gate_inp.weight",
    "blocks.{}.mlp.experts.W_gate": "blk.{}.ffn_gate_exps.weight",
    "blocks.{}.mlp.experts.W_in": "blk.{}.ffn_up_exps.weight",
    "blocks.{}.mlp.experts.W_out": "blk.{}.ffn_down_exps.weight",
}
_GGUF_ENDS = {"embed.W_E": "token_embd.weight", "ln_final.w": "output_norm.weight", "unembed.W_U": "output.weight"}

_GGUF_QK_NORM = {"blocks.{}.attn.q_norm.w": "blk.{}.attn_q_norm.weight", "blocks.{}.attn.k_norm.w": "blk.{}.attn_k_norm.weight"}
_GGUF_DENSE = {**_GGUF_ENDS, **_GGUF_BLOCK, **_GGUF_MLP}

# Llama, Mistral and Mixtral files all carry "llama".
GGUF_NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": {**_GGUF_DENSE, **_GGUF_EXPERTS},
    "qwen2": _GGUF_DENSE,
    "qwen3": {**_GGUF_DENSE, **_GGUF_QK_NORM},
    "smollm3": _GGUF_DENSE,
}

# GGUF architectures whose converter reorders the rows of W_Q and W_K, from RoPE pairs (i, i + d_head/2) to (2i, 2i + 1).
ROTARY_INTERLEAVED = frozenset({"llama", "smollm3"})

_HF_BLOCK = {
    "blocks.{}.ln1.w": "model.layers.{}.input_layernorm.weight",
    **{f"blocks.{{}}.attn.W_{x}": f"model.layers.{{}}.self_attn.{x.lower()}_proj.weight" for x in (*_HEADS, "O")},
    **{f"blocks.{{}}.attn.b_{x}": f"model.layers.{{}}.self_attn.{x.lower()}_proj.bias" for x in (*_HEADS, "O")},
    "blocks.{}.ln2.w": "model.layers.{}.post_attention_layernorm.weight",
}
_HF_MLP = {
    f"blocks.{{}}.mlp.{letter}_{ours}": f"model.layers.{{}}.mlp.{theirs}_proj.{kind}"
    for letter, kind in (("W", "weight"), ("b", "bias"))
    for ours, theirs in (("gate", "gate"), ("in", "up"), ("out", "down"))
}
_HF_ENDS = {"embed.W_E": "model.embed_tokens.weight", "ln_final.w": "model.norm.weight", "unembed.W_U": "lm_head.weight"}

_HF_QK_NORM = {f"blocks.{{}}.attn.{x}_norm.w": f"model.layers.{{}}.self_attn.{x}_norm.weight" for x in "qk"}
_HF_DENSE = {**_HF_ENDS, **_HF_BLOCK, **_HF_MLP}

HF_NAMES: Mapping[str, Mapping[str, str]] = {
    "llama": _HF_DENSE,
    "mistral": _HF_DENSE,
    "qwen2": _HF_DENSE,
    "qwen3": {**_HF_DENSE, **_HF_QK_NORM},
    "smollm3": _HF_DENSE,
    "mixtral": {
        **_HF_ENDS,
        **_HF_BLOCK,
        "blocks.{}.mlp.W_router": "model.layers.{}.block_sparse_moe.gate.weight",
        "blocks.{}.mlp.experts.W_gate": "model.layers.{}.block_sparse_moe.experts.{e}.w1.weight",
        "blocks.{}.mlp.experts.W_in": "model.layers.{}.block_sparse_moe.experts.{e}.w3.weight",
        "blocks.{}.mlp.experts.W_out": "model.layers.{}.block_sparse_moe.experts.{e}.w2.weight",
    },
}

"""Canonical weight names and the names that files use for them, one row per architecture. {} is the layer.

{e}, {h} and {k} are the expert, head and key/value head where a file has one tensor for each; here they are one, that axis first.

A name alone is a tensor as it lies in the file, (out, in). `Stored` says what else must be done to get the canonical numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend.model_info import ModelInfo


@dataclass(frozen=True)
class Stored:
    """A weight inside a stored tensor.

    section     which rows of a fused tensor: Q, K, V of [Q; K; V], gate, in of [gate; in], UK, UV as `section_rows` has them; empty: all
    half        0 or 1: the first or second half of each expert's rows, where its two matrices of the input lie fused
    step        (i, n): every n-th column from the i-th, of matrices that lie interleaved; empty: all
    transposed  stored (in, out)
    flat        stored (head, out, in), and here (head out, in)
    plus        added to every value: a gain that is stored as its distance from 1
    """

    name: str
    section: str = ""
    half: int | None = None
    step: tuple[int, int] | tuple[()] = ()
    transposed: bool = False
    flat: bool = False
    plus: float = 0.0


Names = Mapping[str, str | Stored]


def section(name: str, info: ModelInfo) -> slice:
    """The rows (outputs) of one section of a fused tensor."""
    widths = {"Q": info.n_heads * info.d_head, "K": info.n_kv_heads * info.d_head, "V": info.n_kv_heads * info.dims["d_head_v"]}
    order = list(widths) if name in widths else ["gate", "in"]
    start = sum(widths.get(before, info.d_mlp) for before in order[: order.index(name)])
    return slice(start, start + widths.get(name, info.d_mlp))


def section_rows(name: str, info: ModelInfo, n_rows: int) -> NDArray[np.int64]:
    """The same as row numbers, and for UK, UV: a head's rows of keys come before its rows of values, head after head."""
    rows = np.arange(n_rows, dtype=np.int64)
    if name not in ("UK", "UV"):
        return rows[section(name, info)]
    of_head, d_v = rows.reshape(info.n_heads, -1), info.dims["d_head_v"]
    return (of_head[:, :-d_v] if name == "UK" else of_head[:, -d_v:]).reshape(-1)


# Axes along which a checkpoint may keep one tensor each, by their mark in its name.
EACH = {"{e}": "expert", "{h}": "head", "{k}": "kv_head"}

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
_GGUF_SHARED_EXPERT = {
    **{f"blocks.{{}}.mlp.shared.W_{ours}": f"blk.{{}}.ffn_{theirs}_shexp.weight" for ours, theirs in (("gate", "gate"), ("in", "up"), ("out", "down"))},
}
_GGUF_NORM_BIASES = {"blocks.{}.ln1.b": "blk.{}.attn_norm.bias", "blocks.{}.ln2.b": "blk.{}.ffn_norm.bias", "ln_final.b": "output_norm.bias"}
_GGUF_POST_NORMS = {"blocks.{}.ln1_post.w": "blk.{}.post_attention_norm.weight", "blocks.{}.ln2_post.w": "blk.{}.post_ffw_norm.weight"}
_GGUF_FUSED_QKV = {
    f"blocks.{{}}.attn.{letter}_{x}": Stored(f"blk.{{}}.attn_qkv.{kind}", section=x) for letter, kind in (("W", "weight"), ("b", "bias")) for x in _HEADS
}
_GGUF_FUSED_MLP = {f"blocks.{{}}.mlp.W_{x}": Stored("blk.{}.ffn_up.weight", section=x) for x in ("gate", "in")}
_GGUF_DENSE = {**_GGUF_ENDS, **_GGUF_BLOCK, **_GGUF_MLP}


def _without(names: Mapping[str, str], *endings: str) -> dict[str, str]:
    return {name: stored for name, stored in names.items() if not name.endswith(endings)}


# Llama, Mistral and Mixtral files all carry "llama".
GGUF_NAMES: Mapping[str, Names] = {
    "llama": {**_GGUF_DENSE, **_GGUF_EXPERTS},
    "qwen2": _GGUF_DENSE,
    "qwen3": {**_GGUF_DENSE, **_GGUF_QK_NORM},
    "smollm3": _GGUF_DENSE,
    "olmo2": {**_without(_GGUF_DENSE, "ln1.w", "ln2.w"), **_GGUF_QK_NORM, **_GGUF_POST_NORMS},
    "gemma2": {**_GGUF_DENSE, **_GGUF_POST_NORMS},
    "gemma3": {**_GGUF_DENSE, **_GGUF_QK_NORM, **_GGUF_POST_NORMS},
    "qwen3moe": {**_GGUF_ENDS, **_GGUF_BLOCK, **_GGUF_QK_NORM, **_GGUF_EXPERTS},
    "qwen2moe": {**_GGUF_ENDS, **_GGUF_BLOCK, **_GGUF_EXPERTS, **_GGUF_SHARED_EXPERT},
    "olmoe": {**_GGUF_ENDS, **_GGUF_BLOCK, **_GGUF_QK_NORM, **_GGUF_EXPERTS},
    "phi3": {**_GGUF_DENSE, **_GGUF_FUSED_QKV, **_GGUF_FUSED_MLP},
    "gpt2": {**_without(_GGUF_DENSE, "gate"), **_GGUF_FUSED_QKV, **_GGUF_NORM_BIASES, "pos_embed.W_pos": "position_embd.weight"},
    "starcoder2": {**_without(_GGUF_DENSE, "gate"), **_GGUF_NORM_BIASES},
    "stablelm": {**_GGUF_DENSE, **_GGUF_NORM_BIASES, **_GGUF_QK_NORM},
    "granite": _GGUF_DENSE,
    "granitemoe": {**_GGUF_ENDS, **_GGUF_BLOCK, **_GGUF_EXPERTS, **_GGUF_SHARED_EXPERT},
    "phimoe": {**_GGUF_ENDS, **_GGUF_BLOCK, **_GGUF_NORM_BIASES, **_GGUF_EXPERTS, "unembed.b_U": "output.bias"},
    "gpt-oss": {
        **_GGUF_ENDS,
        **_GGUF_BLOCK,
        "blocks.{}.attn.sinks": "blk.{}.attn_sinks.weight",
        "blocks.{}.ln2.w": "blk.{}.post_attention_norm.weight",
        **_GGUF_EXPERTS,
        **{name.replace("W_", "b_"): stored.replace(".weight", ".bias") for name, stored in _GGUF_EXPERTS.items()},
    },
    "deepseek2": {
        **_without(_GGUF_DENSE, "W_K", "W_V", "b_Q", "b_K", "b_V", "b_O", "b_gate", "b_in", "b_out"),
        **_GGUF_EXPERTS,
        **_GGUF_SHARED_EXPERT,
        "blocks.{}.attn.W_DQ": "blk.{}.attn_q_a.weight",
        "blocks.{}.attn.q_a_norm.w": "blk.{}.attn_q_a_norm.weight",
        "blocks.{}.attn.W_UQ": "blk.{}.attn_q_b.weight",
        "blocks.{}.attn.W_DKV": "blk.{}.attn_kv_a_mqa.weight",
        "blocks.{}.attn.kv_a_norm.w": "blk.{}.attn_kv_a_norm.weight",
        "blocks.{}.attn.W_UK": Stored("blk.{}.attn_k_b.weight", transposed=True, flat=True),
        "blocks.{}.attn.W_UV": Stored("blk.{}.attn_v_b.weight", flat=True),
        "blocks.{}.mlp.b_correction": "blk.{}.exp_probs_b.bias",
    },
}

# GGUF architectures whose converter reorders the rows of W_Q and W_K, from RoPE pairs (i, i + d_head/2) to (2i, 2i + 1).
ROTARY_INTERLEAVED = frozenset({"llama", "smollm3", "granite", "granitemoe"})

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

_HF_EXPERTS = {
    "blocks.{}.mlp.W_router": "model.layers.{}.mlp.gate.weight",
    **{
        f"blocks.{{}}.mlp.experts.W_{ours}": f"model.layers.{{}}.mlp.experts.{{e}}.{theirs}_proj.weight"
        for ours, theirs in (("gate", "gate"), ("in", "up"), ("out", "down"))
    },
}
_HF_SHARED_EXPERT = {
    **{
        f"blocks.{{}}.mlp.shared.W_{ours}": f"model.layers.{{}}.mlp.shared_expert.{theirs}_proj.weight"
        for ours, theirs in (("gate", "gate"), ("in", "up"), ("out", "down"))
    },
}
_HF_NORM_BIASES = {
    "blocks.{}.ln1.b": "model.layers.{}.input_layernorm.bias",
    "blocks.{}.ln2.b": "model.layers.{}.post_attention_layernorm.bias",
    "ln_final.b": "model.norm.bias",
}
_HF_POST_NORMS = {"blocks.{}.ln1_post.w": "model.layers.{}.post_attention_layernorm.weight", "blocks.{}.ln2_post.w": "model.layers.{}.post_feedforward_layernorm.weight"}
_HF_FUSED = {
    **{f"blocks.{{}}.attn.W_{x}": Stored("model.layers.{}.self_attn.qkv_proj.weight", section=x) for x in _HEADS},
    **{f"blocks.{{}}.mlp.W_{x}": Stored("model.layers.{}.mlp.gate_up_proj.weight", section=x) for x in ("gate", "in")},
}
_HF_PLAIN_MLP = {
    f"blocks.{{}}.mlp.{letter}_{ours}": f"model.layers.{{}}.mlp.{theirs}.{kind}"
    for letter, kind in (("W", "weight"), ("b", "bias"))
    for ours, theirs in (("in", "c_fc"), ("out", "c_proj"))
}
# Mixtral's names of its experts, as transformers 4 had them and checkpoints keep them.
_HF_SPARSE_BLOCK = {
    "blocks.{}.mlp.W_router": "model.layers.{}.block_sparse_moe.gate.weight",
    "blocks.{}.mlp.experts.W_gate": "model.layers.{}.block_sparse_moe.experts.{e}.w1.weight",
    "blocks.{}.mlp.experts.W_in": "model.layers.{}.block_sparse_moe.experts.{e}.w3.weight",
    "blocks.{}.mlp.experts.W_out": "model.layers.{}.block_sparse_moe.experts.{e}.w2.weight",
}
_HF_GEMMA2_GAINS = {
    "blocks.{}.ln1.w": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.ln2.w": "model.layers.{}.pre_feedforward_layernorm.weight",
    "ln_final.w": "model.norm.weight",
    **_HF_POST_NORMS,
}
_HF_GPT2: Names = {
    "embed.W_E": "transformer.wte.weight",
    "pos_embed.W_pos": "transformer.wpe.weight",
    **{f"blocks.{{}}.ln{i}.{letter}": f"transformer.h.{{}}.ln_{i}.{kind}" for i in (1, 2) for letter, kind in (("w", "weight"), ("b", "bias"))},
    **{f"blocks.{{}}.attn.W_{x}": Stored("transformer.h.{}.attn.c_attn.weight", section=x, transposed=True) for x in _HEADS},
    **{f"blocks.{{}}.attn.b_{x}": Stored("transformer.h.{}.attn.c_attn.bias", section=x) for x in _HEADS},
    "blocks.{}.attn.W_O": Stored("transformer.h.{}.attn.c_proj.weight", transposed=True),
    "blocks.{}.attn.b_O": "transformer.h.{}.attn.c_proj.bias",
    "blocks.{}.mlp.W_in": Stored("transformer.h.{}.mlp.c_fc.weight", transposed=True),
    "blocks.{}.mlp.b_in": "transformer.h.{}.mlp.c_fc.bias",
    "blocks.{}.mlp.W_out": Stored("transformer.h.{}.mlp.c_proj.weight", transposed=True),
    "blocks.{}.mlp.b_out": "transformer.h.{}.mlp.c_proj.bias",
    "ln_final.w": "transformer.ln_f.weight",
    "ln_final.b": "transformer.ln_f.bias",
    "unembed.W_U": "lm_head.weight",
}

_HF_DEEPSEEK: Names = {
    **_without(_HF_DENSE, "W_K", "W_V", "b_Q", "b_K", "b_V"),
    **_HF_EXPERTS,
    **{name: stored.replace("shared_expert.", "shared_experts.") for name, stored in _HF_SHARED_EXPERT.items()},
    "blocks.{}.attn.W_DQ": "model.layers.{}.self_attn.q_a_proj.weight",
    "blocks.{}.attn.q_a_norm.w": "model.layers.{}.self_attn.q_a_layernorm.weight",
    "blocks.{}.attn.W_UQ": "model.layers.{}.self_attn.q_b_proj.weight",
    "blocks.{}.attn.W_DKV": "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight",
    "blocks.{}.attn.kv_a_norm.w": "model.layers.{}.self_attn.kv_a_layernorm.weight",
    **{f"blocks.{{}}.attn.W_{x}": Stored("model.layers.{}.self_attn.kv_b_proj.weight", section=x) for x in ("UK", "UV")},
    "blocks.{}.mlp.b_correction": "model.layers.{}.mlp.gate.e_score_correction_bias",
}

HF_NAMES: Mapping[str, Names] = {
    "llama": _HF_DENSE,
    "mistral": _HF_DENSE,
    "qwen2": _HF_DENSE,
    "qwen3": {**_HF_DENSE, **_HF_QK_NORM},
    "smollm3": _HF_DENSE,
    "olmo2": {**_without(_HF_DENSE, "ln1.w", "ln2.w"), **_HF_QK_NORM, **_HF_POST_NORMS},
    "gemma2": {**_HF_DENSE, **{name: Stored(stored, plus=1.0) for name, stored in _HF_GEMMA2_GAINS.items()}},
    "gemma3_text": {**_HF_DENSE, **{name: Stored(stored, plus=1.0) for name, stored in {**_HF_GEMMA2_GAINS, **_HF_QK_NORM}.items()}},
    "qwen3_moe": {**_HF_ENDS, **_HF_BLOCK, **_HF_QK_NORM, **_HF_EXPERTS},
    "qwen2_moe": {**_HF_ENDS, **_HF_BLOCK, **_HF_EXPERTS, **_HF_SHARED_EXPERT},
    "olmoe": {**_HF_ENDS, **_HF_BLOCK, **_HF_QK_NORM, **_HF_EXPERTS},
    "phi3": {**_HF_DENSE, **_HF_FUSED},
    "gpt2": _HF_GPT2,
    "starcoder2": {**_HF_ENDS, **_HF_BLOCK, **_HF_PLAIN_MLP, **_HF_NORM_BIASES},
    "stablelm": {
        **_HF_DENSE,
        **_HF_NORM_BIASES,
        "blocks.{}.attn.q_norm.w": "model.layers.{}.self_attn.q_layernorm.norms.{h}.weight",
        "blocks.{}.attn.k_norm.w": "model.layers.{}.self_attn.k_layernorm.norms.{k}.weight",
    },
    "granite": _HF_DENSE,
    "gpt_oss": {
        **_HF_ENDS,
        **_HF_BLOCK,
        "blocks.{}.attn.sinks": "model.layers.{}.self_attn.sinks",
        "blocks.{}.mlp.W_router": "model.layers.{}.mlp.router.weight",
        "blocks.{}.mlp.b_router": "model.layers.{}.mlp.router.bias",
        **{f"blocks.{{}}.mlp.experts.W_{x}": Stored("model.layers.{}.mlp.experts.gate_up_proj", step=(i, 2), transposed=True) for i, x in enumerate(("gate", "in"))},
        **{f"blocks.{{}}.mlp.experts.b_{x}": Stored("model.layers.{}.mlp.experts.gate_up_proj_bias", step=(i, 2)) for i, x in enumerate(("gate", "in"))},
        "blocks.{}.mlp.experts.W_out": Stored("model.layers.{}.mlp.experts.down_proj", transposed=True),
        "blocks.{}.mlp.experts.b_out": "model.layers.{}.mlp.experts.down_proj_bias",
    },
    "deepseek_v2": _HF_DEEPSEEK,
    "deepseek_v3": _HF_DEEPSEEK,
    "mixtral": {**_HF_ENDS, **_HF_BLOCK, **_HF_SPARSE_BLOCK},
    "phimoe": {**_HF_ENDS, **_HF_BLOCK, **_HF_NORM_BIASES, **_HF_SPARSE_BLOCK, "unembed.b_U": "lm_head.bias"},
    "granitemoe": {
        **_HF_ENDS,
        **_HF_BLOCK,
        "blocks.{}.mlp.W_router": "model.layers.{}.block_sparse_moe.router.layer.weight",
        **{f"blocks.{{}}.mlp.experts.W_{x}": Stored("model.layers.{}.block_sparse_moe.input_linear.weight", half=i) for i, x in enumerate(("gate", "in"))},
        "blocks.{}.mlp.experts.W_out": "model.layers.{}.block_sparse_moe.output_linear.weight",
    },
}

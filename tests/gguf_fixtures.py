"""GGUF files of the tiny random models whose architecture the project's own writer does not know: F32, one table row each.

Tensor names come from gguf's TensorNameMap, metadata from the configuration that transformers reads, and what llama.cpp's
converter does to the numbers (a gain of 1 + w, transposed or reordered matrices) from the row of the architecture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from backend.files.gguf_writer import _add_vocabulary, _read_safetensors, interleave_rotary

Array = NDArray[Any]
Change = Callable[[str, Array, Any], Array]
Split = Callable[[str, Array, Any], Mapping[str, Array]]


def _gain_is_one_plus(name: str, values: Array, config: Any) -> Array:
    return values + 1 if name.endswith("norm.weight") else values


def _rotary_pairs(name: str, values: Array, config: Any) -> Array:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    return interleave_rotary(values, heads) if heads else values


def _transposed(name: str, values: Array, config: Any) -> Array:
    """Conv1D keeps (in, out)."""
    return values.T if values.ndim == 2 and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") else values


def _router_is_flat(name: str, values: Array, config: Any) -> Array:
    return values[0] if name.endswith("shared_expert_gate.weight") else values


def _experts_apart(name: str, values: Array, config: Any) -> Mapping[str, Array]:
    """gpt-oss keeps its experts as (expert, in, out), gate and up interleaved along out."""
    if name.endswith("sinks"):
        return {f"{name}.weight": values}
    if ".experts." not in name:
        return {name: values}
    bias = name.endswith("_bias")
    stem, kind = (name.removesuffix("_bias"), "bias") if bias else (name, "weight")
    parts = {stem.replace("gate_up", "gate"): values[..., ::2], stem.replace("gate_up", "up"): values[..., 1::2]} if "gate_up" in stem else {stem: values}
    return {f"{part}.{kind}": array if bias else array.swapaxes(-1, -2) for part, array in parts.items()}


def _gate_and_up_apart(name: str, values: Array, config: Any) -> Mapping[str, Array]:
    """GraniteMoE keeps the two matrices of its experts' input as one, (expert, 2 out, in)."""
    if not name.endswith("input_linear.weight"):
        return {name: values}
    gate, up = np.split(values, 2, axis=1)
    stem = name.replace("block_sparse_moe.input_linear", "mlp.experts.{}_proj")
    return {stem.format("gate"): gate, stem.format("up"): up}


def _keys_and_values_apart(name: str, values: Array, config: Any) -> Mapping[str, Array]:
    """Latent attention: what makes keys, (head, in, out), and what makes values, (head, out, in)."""
    if name.endswith("e_score_correction_bias"):
        return {name.replace("_bias", ".bias"): values}
    if not name.endswith("kv_b_proj.weight"):
        return {name: values}
    of_heads = values.reshape(config.num_attention_heads, -1, values.shape[-1])
    keys, of_values = np.split(of_heads, [config.qk_nope_head_dim], axis=1)
    return {name.replace("kv_b_proj", "k_b_proj"): keys.swapaxes(1, 2), name.replace("kv_b_proj", "v_b_proj"): of_values}


@dataclass(frozen=True)
class Row:
    """`keys`: metadata beyond the common sizes, key without the architecture's name -> attribute of the configuration, or a number."""

    architecture: gguf.MODEL_ARCH
    keys: Mapping[str, str | int] = field(default_factory=dict)
    change: Change = lambda name, values, config: values
    split: Split = lambda name, values, config: {name: values}


_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_LOCAL_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_GRANITE = {
    **_RMS, "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}  # fmt: skip
_WINDOW = {"attention.sliding_window": "sliding_window"}
_DEEPSEEK = {
    **_RMS, "leading_dense_block_count": "first_k_dense_replace", "attention.kv_lora_rank": "kv_lora_rank", "attention.key_length_mla": "qk_head_dim",
    "attention.value_length_mla": "v_head_dim", "expert_feed_forward_length": "moe_intermediate_size", "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok", "expert_shared_count": "n_shared_experts", "expert_weights_scale": "routed_scaling_factor",
}  # fmt: skip
ROWS: Mapping[str, Row] = {
    "qwen2": Row(gguf.MODEL_ARCH.QWEN2, _RMS),
    "qwen3": Row(gguf.MODEL_ARCH.QWEN3, _RMS),
    "smollm3": Row(gguf.MODEL_ARCH.SMOLLM3, _RMS, _rotary_pairs),
    "olmo2": Row(gguf.MODEL_ARCH.OLMO2, _RMS),
    "gemma2": Row(
        gguf.MODEL_ARCH.GEMMA2,
        {**_RMS, "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping", **_WINDOW},
        _gain_is_one_plus,
    ),
    "gemma3_text": Row(gguf.MODEL_ARCH.GEMMA3, {**_RMS, **_WINDOW}, _gain_is_one_plus),
    "qwen3_moe": Row(gguf.MODEL_ARCH.QWEN3MOE, {**_RMS, **_EXPERTS, "expert_feed_forward_length": "moe_intermediate_size"}),
    "qwen2_moe": Row(
        gguf.MODEL_ARCH.QWEN2MOE,
        {**_RMS, **_EXPERTS, "expert_feed_forward_length": "moe_intermediate_size", "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        _router_is_flat,
    ),
    "olmoe": Row(gguf.MODEL_ARCH.OLMOE, {**_RMS, **_EXPERTS}),
    "phi3": Row(gguf.MODEL_ARCH.PHI3, {**_RMS, **_WINDOW, "rope.scaling.original_context_length": "original_max_position_embeddings"}),
    "gpt2": Row(gguf.MODEL_ARCH.GPT2, {"attention.layer_norm_epsilon": "layer_norm_epsilon"}, _transposed),
    "starcoder2": Row(gguf.MODEL_ARCH.STARCODER2, {"attention.layer_norm_epsilon": "norm_epsilon"}),
    "granite": Row(gguf.MODEL_ARCH.GRANITE, _GRANITE, _rotary_pairs),
    "stablelm": Row(gguf.MODEL_ARCH.STABLELM, {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"}),
    "granitemoe": Row(gguf.MODEL_ARCH.GRANITE_MOE, {**_GRANITE, **_LOCAL_EXPERTS}, _rotary_pairs, _gate_and_up_apart),
    "phimoe": Row(gguf.MODEL_ARCH.PHIMOE, {**_RMS, **_LOCAL_EXPERTS}),
    "gpt_oss": Row(
        gguf.MODEL_ARCH.GPT_OSS,
        {
            **_RMS, **_WINDOW, **_LOCAL_EXPERTS, "expert_feed_forward_length": "intermediate_size",
        },
        split=_experts_apart,
    ),
    "deepseek_v2": Row(gguf.MODEL_ARCH.DEEPSEEK2, {**_DEEPSEEK, "attention.q_lora_rank": 0, "expert_gating_func": 1}, split=_keys_and_values_apart),
    "deepseek_v3": Row(
        gguf.MODEL_ARCH.DEEPSEEK2,
        {
            **_DEEPSEEK, "attention.q_lora_rank": "q_lora_rank", "expert_gating_func": 2, "expert_weights_norm": "norm_topk_prob",
            "expert_group_count": "n_group", "expert_group_used_count": "topk_group",
        },
        split=_keys_and_values_apart,
    ),
}


def write_f32(folder: Path, out: Path) -> None:
    """Write the checkpoint in `folder` to `out`, every weight as it is."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    row = ROWS[config.model_type]
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[row.architecture])
    writer.add_name("a tiny random model")  # llama.cpp looks for special tokens of its own where "phi3" is in the name
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_sizes(writer, config)
    for key, attribute in row.keys.items():
        value = attribute if isinstance(attribute, int) else getattr(config, attribute)
        if value is None:
            continue
        kinds = {float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
        kinds[type(value)](f"{writer.arch}.{key}", value)
    _add_vocabulary(writer, folder, config.to_dict())
    for name, values in _tensors(folder, config, row):
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # where windowed layers have a frequency of their own, it is llama.cpp's default
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(config.num_attention_heads)
    latent = getattr(config, "kv_lora_rank", 0)  # latent attention counts as one key/value head: the latent and the rotary key
    writer.add_head_count_kv(1 if latent else getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(latent + d_head)
    writer.add_value_length(latent or d_head)
    writer.add_rope_dimension_count(int(d_head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "mscale_all_dim" in rope:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _tensors(folder: Path, config: Any, row: Row) -> Iterator[tuple[str, Array]]:
    names = gguf.get_tensor_name_map(row.architecture, config.num_hidden_layers)
    for name, values in _stacked(_read_safetensors(folder)).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for part, array in row.split(name, values, config).items():
            stored = names.get_name(part, try_suffixes=(".weight", ".bias"))
            assert stored is not None, part
            yield stored, row.change(part, array, config)


def _stacked(tensors: dict[str, Array]) -> dict[str, Array]:
    """The experts of a layer as one tensor (expert, out, in), the norms of its heads as one (head, d_head)."""
    whole: dict[str, Array] = {}
    each: dict[str, dict[int, Array]] = {}
    for name, values in tensors.items():
        match = re.fullmatch(r"(.+\.experts|.+_layernorm)(?:\.norms)?\.(\d+)\.(.+)", name)
        if match:
            each.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = values
        else:
            whole[name] = values
    return whole | {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in each.items()}

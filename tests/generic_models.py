"""Tiny random models of architectures that have no row in Layerscope's tables: a Hugging Face folder each and, where llama.cpp knows
the architecture, an F32 GGUF file of the same weights.

As in tiny_models: every size another, every parameter away from its default, weights large enough that attention is not uniform.
What llama.cpp's converter does to the numbers of an architecture (a gain of 1 + w, a fused matrix in another order) is its row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from backend.files.gguf_writer import _add_vocabulary, _read_safetensors
from tests.gguf_fixtures import _stacked
from tests.tiny_models import N_TOKENS, save_tokenizer

Array = NDArray[Any]
_IDS = {"vocab_size": N_TOKENS, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_SIZES = {**_IDS, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 1024}
_ROPE = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}

# Configurations by model_type.
CONFIGS: Mapping[str, dict[str, Any]] = {
    "falcon": {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": False, "ffn_hidden_size": 256, "tie_word_embeddings": True},
    "bloom": {**_IDS, "hidden_size": 64, "n_layer": 3, "n_head": 4, "tie_word_embeddings": True},
    "mpt": {**_IDS, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 1024, "expansion_ratio": 4, "tie_word_embeddings": True},
    "phi": {**_SIZES, "intermediate_size": 256, "rope_parameters": {**_ROPE, "rope_type": "default"}},
    "gpt_neox": {**_SIZES, "intermediate_size": 96, "use_parallel_residual": True, "rope_parameters": {**_ROPE, "rope_type": "default"}},
    "cohere": {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 96, "logit_scale": 0.25, "tie_word_embeddings": True},
    "glm4": {
        **_SIZES, "num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 96, "rms_norm_eps": 1e-5, "attention_bias": True,
        "rope_parameters": {**_ROPE, "rope_type": "default"},
    },
    "nemotron": {**_SIZES, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "norm_eps": 1e-4, "rope_parameters": {**_ROPE, "rope_type": "default"}},
    "gemma": {**_SIZES, "num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 96, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    "mamba": {
        **_IDS, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 16, "conv_kernel": 4, "expand": 2, "time_step_rank": 8,
        "layer_norm_epsilon": 1e-4, "tie_word_embeddings": True, "use_mambapy": False,
    },
    "jamba": {
        **_SIZES, "num_key_value_heads": 2, "intermediate_size": 96, "rms_norm_eps": 1e-5, "num_experts": 4, "num_experts_per_tok": 2,
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0, "use_mamba_kernels": False,
        "mamba_d_state": 16, "mamba_dt_rank": 8, "tie_word_embeddings": False,
    },
    "opt": {**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True, "tie_word_embeddings": True},
    "granitemoeshared": {
        **_SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "shared_intermediate_size": 80, "num_local_experts": 5, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.5,
    },
    "flex_olmo": {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "num_experts": 5, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5},
    "cohere2": {**_SIZES, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "logit_scale": 0.25, "sliding_window": 8, "num_hidden_layers": 4},
    "nanochat": {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 96, "final_logit_softcapping": 4.0},
    "gpt_bigcode": {**_IDS, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024, "n_inner": 96, "tie_word_embeddings": True},
}  # fmt: skip


def save_generic(kind: str, folder: Path, **changes: Any) -> Path:
    """A random model of `kind` in `folder`, in float32 with the tokenizer of the tiny models."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(sum(kind.encode()))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**CONFIGS[kind], **changes}), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("A_log", "dt_proj.bias", ".D")):
                    continue  # a state-space model decays: its own initialisation says how fast
                parameter.normal_(std=1.4 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3)
                if parameter.dim() == 1 and name.endswith(".weight") and kind not in ("gemma", "nemotron"):  # those multiply with 1 + w
                    parameter.add_(1.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


# GGUF


def _same(name: str, values: Array, config: Any) -> Array:
    return values


def _gain_is_one_plus(name: str, values: Array, config: Any) -> Array:
    return values + 1 if name.endswith("norm.weight") else values


def _heads_apart(name: str, values: Array, config: Any) -> Array:
    """(head, (q, k, v), d_head) -> ((q, k, v), head, d_head)."""
    if "query_key_value" not in name:
        return values
    heads = getattr(config, "n_head", None) or config.num_attention_heads
    return np.ascontiguousarray(values.reshape(heads, 3, -1, *values.shape[1:]).swapaxes(0, 1)).reshape(values.shape)


def _groups_apart(name: str, values: Array, config: Any) -> Array:
    """(kv head, (its queries, k, v), d_head) -> (queries, keys, values)."""
    if "query_key_value" not in name:
        return values
    grouped = values.reshape(config.num_kv_heads, -1, config.hidden_size // config.num_attention_heads, values.shape[-1])
    return np.concatenate([grouped[:, :-2].reshape(-1, values.shape[-1]), grouped[:, -2].reshape(-1, values.shape[-1]), grouped[:, -1].reshape(-1, values.shape[-1])])


def _decay(name: str, values: Array, config: Any) -> Array:
    return -np.exp(values) if name.endswith("A_log") else values[:, 0] if name.endswith("conv1d.weight") else values


@dataclass(frozen=True)
class Row:
    """`keys`: metadata key without the architecture's name -> attribute of the configuration, or what computes it from one."""

    architecture: gguf.MODEL_ARCH
    keys: Mapping[str, str | Callable[[Any], Any]] = field(default_factory=dict)
    change: Callable[[str, Array, Any], Array] = _same
    prefix: str = ""  # of tensor names, that gguf's own table leaves out


def _rotary(config: Any) -> int:
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(d_head * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))


_LAYER_NORM, _RMS = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
_SSM = {"ssm.conv_kernel": "conv_kernel", "ssm.inner_size": "intermediate_size", "ssm.state_size": "state_size", "ssm.time_step_rank": "time_step_rank"}
ROWS: Mapping[str, Row] = {
    "falcon": Row(gguf.MODEL_ARCH.FALCON, {_LAYER_NORM: "layer_norm_epsilon"}, _groups_apart),
    "bloom": Row(gguf.MODEL_ARCH.BLOOM, {_LAYER_NORM: "layer_norm_epsilon"}, _heads_apart, "transformer."),
    "mpt": Row(gguf.MODEL_ARCH.MPT, {_LAYER_NORM: "layer_norm_epsilon", "attention.max_alibi_bias": lambda config: 8.0}),
    "phi": Row(gguf.MODEL_ARCH.PHI2, {_LAYER_NORM: "layer_norm_eps", "rope.dimension_count": _rotary}),
    "gpt_neox": Row(
        gguf.MODEL_ARCH.GPTNEOX, {_LAYER_NORM: "layer_norm_eps", "rope.dimension_count": _rotary, "use_parallel_residual": "use_parallel_residual"}, _heads_apart
    ),
    "cohere": Row(gguf.MODEL_ARCH.COMMAND_R, {_LAYER_NORM: "layer_norm_eps", "logit_scale": "logit_scale", "rope.dimension_count": _rotary}),
    "cohere2": Row(
        gguf.MODEL_ARCH.COHERE2,
        {_LAYER_NORM: "layer_norm_eps", "logit_scale": "logit_scale", "rope.dimension_count": _rotary, "attention.sliding_window": "sliding_window"},
    ),
    "glm4": Row(gguf.MODEL_ARCH.GLM4, {_RMS: "rms_norm_eps", "rope.dimension_count": _rotary}),
    "nemotron": Row(gguf.MODEL_ARCH.NEMOTRON, {_LAYER_NORM: "norm_eps", "rope.dimension_count": _rotary}, _gain_is_one_plus),
    "gemma": Row(gguf.MODEL_ARCH.GEMMA, {_RMS: "rms_norm_eps", "rope.dimension_count": _rotary}, _gain_is_one_plus),
    "mamba": Row(gguf.MODEL_ARCH.MAMBA, {_RMS: "layer_norm_epsilon", **_SSM}, _decay),
    "jamba": Row(
        gguf.MODEL_ARCH.JAMBA,
        {
            _RMS: "rms_norm_eps", "ssm.conv_kernel": "mamba_d_conv", "ssm.inner_size": lambda config: config.mamba_expand * config.hidden_size,
            "ssm.state_size": "mamba_d_state", "ssm.time_step_rank": "mamba_dt_rank", "expert_count": "num_experts", "expert_used_count": "num_experts_per_tok",
        },
        _decay,
    ),
}  # fmt: skip


def write_f32(folder: Path, out: Path) -> Path:
    """Write the checkpoint in `folder` to `out`, every weight as it is."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    row = ROWS[config.model_type]
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[row.architecture])
    writer.add_name("a tiny random model")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    n_layers = _add_sizes(writer, config)
    for key, source in row.keys.items():
        value = source(config) if callable(source) else getattr(config, source)
        add = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{writer.arch}.{key}", value)  # type: ignore[operator]
    _add_vocabulary(writer, folder, config.to_dict())
    names = gguf.get_tensor_name_map(row.architecture, n_layers)
    for name, values in _stacked(_read_safetensors(folder)).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        plain = name.removeprefix(row.prefix)
        stored = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, np.ascontiguousarray(row.change(name, values, config), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> int:
    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    width, heads, n_layers = first("hidden_size", "d_model"), first("num_attention_heads", "n_head", "n_heads") or 0, first("num_hidden_layers", "n_layer", "n_layers")
    writer.add_context_length(first("max_position_embeddings", "max_seq_len") or 1024)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(width)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(0 if config.model_type == "mamba" else first("ffn_hidden_size", "intermediate_size") or 4 * width)
    writer.add_head_count(heads)
    if config.model_type == "jamba":
        writer.add_head_count_kv([config.num_key_value_heads if kind == "attention" else 0 for kind in config.layers_block_type])
    elif heads:
        writer.add_head_count_kv(first("num_kv_heads", "num_key_value_heads") or heads)
    if heads and isinstance(first("head_dim"), int):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if theta := (getattr(config, "rope_parameters", None) or {}).get("rope_theta"):
        writer.add_rope_freq_base(theta)
    return int(n_layers)

"""Where each architecture's config.json keeps its sizes: one row an architecture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConfigKeys:
    """Where one architecture's config.json keeps what ModelInfo wants; one row an architecture."""

    n_layers: str = "num_hidden_layers"
    n_heads: str = "num_attention_heads"
    n_kv_heads: str = "num_key_value_heads"
    d_model: str = "hidden_size"
    d_head: str | tuple[str, ...] = "head_dim"  # several: their sum
    d_head_v: str | None = None
    d_kv_latent: tuple[str, ...] = ()
    d_mlp: str = "intermediate_size"
    d_expert: str | None = None  # where layers of both kinds can be: the width of an expert
    n_dense_layers: str | None = None
    n_ctx: str = "max_position_embeddings"
    norm_eps: str = "rms_norm_eps"
    n_experts: str | None = None
    n_experts_alias: str | None = None  # transformers 5 writes another name than the model's makers did
    n_experts_used: str | None = None
    sliding_window: str | None = None
    sliding_window_if: str | None = None  # it counts only where this is true
    tied: bool = False  # whether embedding and output matrix are one where the config leaves it out
    mlp_ratio: int | None = None  # d_mlp / d_model where the config leaves d_mlp out
    requires: tuple[tuple[str, object], ...] = ()  # what else must be set so: variants that would need other sites
    embed: str = "model.embed_tokens.weight"  # its tensor: (d_vocab, d_model)
    generic: bool = False  # no row: keys found by their usual names; a size may be absent, or a list with one value a layer


# Every head has keys and values of its own, made from what all share: so there are as many key/value heads as heads.
_DEEPSEEK = ConfigKeys(
    n_kv_heads="num_attention_heads", d_head=("qk_nope_head_dim", "qk_rope_head_dim"), d_head_v="v_head_dim",
    d_kv_latent=("kv_lora_rank", "qk_rope_head_dim"), d_expert="moe_intermediate_size", n_dense_layers="first_k_dense_replace",
    n_experts="n_routed_experts", n_experts_used="num_experts_per_tok",
)  # fmt: skip

# The architectures that the PyTorch engine runs, by config.json's `model_type`; backend.engines.hf_sites has a row for each.
ARCHITECTURES: dict[str, ConfigKeys] = {
    "llama": ConfigKeys(),
    "mistral": ConfigKeys(sliding_window="sliding_window"),
    "mixtral": ConfigKeys(n_experts="num_local_experts", n_experts_used="num_experts_per_tok", sliding_window="sliding_window"),
    "qwen2": ConfigKeys(sliding_window="sliding_window", sliding_window_if="use_sliding_window"),
    "qwen3": ConfigKeys(sliding_window="sliding_window", sliding_window_if="use_sliding_window"),
    "smollm3": ConfigKeys(sliding_window="sliding_window", sliding_window_if="use_sliding_window"),
    "olmo2": ConfigKeys(),
    "gemma2": ConfigKeys(sliding_window="sliding_window", tied=True),
    "gemma3_text": ConfigKeys(sliding_window="sliding_window", tied=True),
    "qwen3_moe": ConfigKeys(
        sliding_window="sliding_window", sliding_window_if="use_sliding_window", d_mlp="moe_intermediate_size",
        n_experts="num_experts", n_experts_alias="num_local_experts", n_experts_used="num_experts_per_tok",
        requires=(("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    ),
    "qwen2_moe": ConfigKeys(
        sliding_window="sliding_window", sliding_window_if="use_sliding_window", d_mlp="moe_intermediate_size",
        n_experts="num_experts", n_experts_alias="num_local_experts", n_experts_used="num_experts_per_tok",
        requires=(("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    ),
    "olmoe": ConfigKeys(n_experts="num_experts", n_experts_alias="num_local_experts", n_experts_used="num_experts_per_tok"),
    "phi3": ConfigKeys(sliding_window="sliding_window"),
    "gpt2": ConfigKeys(
        n_layers="n_layer", n_heads="n_head", d_model="n_embd", d_mlp="n_inner", n_ctx="n_positions", norm_eps="layer_norm_epsilon",
        tied=True, mlp_ratio=4, requires=(("add_cross_attention", False),), embed="transformer.wte.weight",
    ),
    "starcoder2": ConfigKeys(tied=True, norm_eps="norm_epsilon", sliding_window="sliding_window"),
    "stablelm": ConfigKeys(norm_eps="layer_norm_eps"),
    "granite": ConfigKeys(),
    "granitemoe": ConfigKeys(n_experts="num_local_experts", n_experts_used="num_experts_per_tok"),
    # Its router picks two experts, whatever the configuration says.
    "phimoe": ConfigKeys(n_experts="num_local_experts", n_experts_used="num_experts_per_tok", sliding_window="sliding_window", requires=(("num_experts_per_tok", 2),)),
    "gpt_oss": ConfigKeys(n_experts="num_local_experts", n_experts_used="num_experts_per_tok", sliding_window="sliding_window"),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}

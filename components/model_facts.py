"""What a model's own metadata says of its parts, in a few words each: heads, RoPE, windows, experts, caps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.model_info import ModelInfo
from backend.reports.graph_formats import plain
from backend.reports.model_parts import Anatomy, BlockGroup, layer_ranges
from backend.weight_names import GGUF_NAMES, HF_NAMES

# Fact -> keys of GGUF metadata (the architecture's name left out) and of config.json; the first that is there counts.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rope_scaling": (("rope.scaling.type",), ("rope_parameters.rope_type", "rope_scaling.rope_type", "rope_scaling.type")),
    "rope_factor": (("rope.scaling.factor", "rope.scale_linear"), ("rope_parameters.factor", "rope_scaling.factor")),
    "rope_original": (("rope.scaling.original_context_length",), ("rope_parameters.original_max_position_embeddings", "rope_scaling.original_max_position_embeddings")),
    "rope_dimensions": (("rope.dimension_count",), ("qk_rope_head_dim",)),
    "rope_share": ((), ("partial_rotary_factor", "rope_parameters.partial_rotary_factor")),
    "score_cap": (("attn_logit_softcapping",), ("attn_logit_softcapping",)),
    "logit_cap": (("final_logit_softcapping",), ("final_logit_softcapping",)),
    "value_width": (("attention.value_length",), ("v_head_dim",)),
    "kv_rank": (("attention.kv_lora_rank",), ("kv_lora_rank",)),
    "shared_experts": (("expert_shared_count",), ("n_shared_experts",)),
    "shared_width": (("expert_shared_feed_forward_length",), ("shared_expert_intermediate_size",)),
    "dense_width": (("feed_forward_length",), ("intermediate_size",)),
    "activation": ((), ("hidden_act", "hidden_activation", "activation_function")),
}


class Facts:
    """`values`: metadata by key, as backend.reports.model_metadata.read_metadata gives it; nothing in it is trusted to have a type."""

    def __init__(self, info: ModelInfo, values: Mapping[str, Any], anatomy: Anatomy) -> None:
        self.info, self.values, self.anatomy = info, values, anatomy

    def get(self, fact: str) -> Any:
        """A number or a short text, or None."""
        gguf, config = _KEYS[fact]
        keys = [f"{self.info.architecture}.{key}" for key in gguf] if self.info.engine == "gguf" else list(config)
        found = next((self.values[key] for key in keys if self.values.get(key) is not None), None)
        if isinstance(found, str):
            return plain(found[:40])
        return found if isinstance(found, int | float) and not isinstance(found, bool) else None

    @property
    def says_parallel(self) -> bool:
        """Whether the metadata says that attention and MLP start from the same residual stream."""
        keys = (f"{self.info.architecture}.use_parallel_residual", "use_parallel_residual", "parallel_attn")
        return any(self.values.get(key) is True for key in keys)

    def of(self, key: str, group: BlockGroup | None) -> list[str]:
        """Lines for the part of that key."""
        makers = {"attention": self._attention, "mlp": self._mlp, "experts": self._experts, "shared": self._shared, "router": self._router, "embedding": self._embedding,
                  "unembedding": self._unembedding}  # fmt: skip
        if key in makers:
            return makers[key]()
        return [f"{'LayerNorm' if self._has_norm_bias() else 'RMS norm'}, ε {self.info.norm_eps:.3g}"] if "norm" in key else []

    def _attention(self) -> list[str]:
        info = self.info
        shared = info.n_heads // info.n_kv_heads
        heads = f"{info.n_heads} heads of {info.d_head}"
        groups = f", {info.n_kv_heads} key/value heads, {shared} heads share one" if shared > 1 else ", each with its own keys and values"
        rank = self.get("kv_rank")
        latent = [f"keys and values from a latent of {rank:,} (MLA)"] if rank else []
        extra = [f"scores capped at ±{cap:g}"] if (cap := self.get("score_cap")) else []
        return [heads + ("" if latent else groups), *latent, *self._positions(), *self._window(), *extra]

    def _positions(self) -> list[str]:
        if not any("rope" in key for key in self.values):
            if any(_is_position(tensor.name) for part in self.anatomy.before for tensor in part.tensors):
                return ["learned positions, no RoPE"]
            if self.info.architecture not in (GGUF_NAMES if self.info.engine == "gguf" else HF_NAMES):
                return []  # its file does not say how it knows positions
        dims, share = self.get("rope_dimensions"), self.get("rope_share")
        part = f" on {dims:,} of {self.info.d_head} dimensions" if dims and dims != self.info.d_head else f" on {share:.0%} of each head" if share and share < 1 else ""
        kind, factor, original = self.get("rope_scaling"), self.get("rope_factor"), self.get("rope_original")
        scaled = ""
        if kind not in (None, "none", "default") or factor:
            scaled = f", scaling {kind or 'linear'}" + (f" × {factor:g}" if factor else "") + (f" from {original:,} tokens" if original else "")
        return [f"RoPE θ {self.info.rope_theta:,.0f}{part}{scaled}"]

    def _window(self) -> list[str]:
        if not self.info.sliding_window:
            return []
        kinds = self.values.get("layer_types")
        windowed = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"] if isinstance(kinds, list) else []
        where = f" in layers {layer_ranges(windowed)}" if 0 < len(windowed) < self.info.n_layers else ""
        return [f"sliding window of {self.info.sliding_window:,} tokens{where}"]

    def _mlp(self) -> list[str]:
        width = self.get("dense_width") if self.info.is_moe else self.info.d_mlp
        gated = any("gate" in tensor.suffix or "up_proj" in tensor.suffix for _, part in self.anatomy.parts if part.key == "mlp" for tensor in part.tensors)
        kind = f", {self.get('activation')}" if self.get("activation") else ""
        middle = f" → {width:,}" if isinstance(width, int) else ""
        return [f"{self.info.d_model:,}{middle} → {self.info.d_model:,}{', gated' if gated else ''}{kind}"]

    def _experts(self) -> list[str]:
        info = self.info
        kind = f", {self.get('activation')}" if self.get("activation") else ""
        return [f"{info.n_experts} experts, {info.n_experts_used} used per token", f"each {info.d_model:,} → {info.d_mlp:,} → {info.d_model:,}{kind}"]

    def _shared(self) -> list[str]:
        n, width = self.get("shared_experts"), self.get("shared_width")
        return [f"{n if n else 1} shared, always used" + (f", width {width:,}" if isinstance(width, int) else "")]

    def _router(self) -> list[str]:
        return [f"scores {self.info.n_experts} experts, takes the best {self.info.n_experts_used}"]

    def _embedding(self) -> list[str]:
        return [f"{self.info.d_vocab:,} tokens × {self.info.d_model:,}"]

    def _unembedding(self) -> list[str]:
        cap = self.get("logit_cap")
        own = "the embedding's matrix again (tied)" if self.anatomy.tied else "a matrix of its own (not tied)"
        return [f"{self.info.d_model:,} → {self.info.d_vocab:,} logits, {own}", *([f"logits capped at ±{cap:g}"] if cap else [])]

    def _has_norm_bias(self) -> bool:
        return any("norm" in part.key and tensor.suffix.endswith("bias") for _, part in self.anatomy.parts for tensor in part.tensors)


def _is_position(name: str) -> bool:
    return "position" in name or name.endswith(("wpe.weight", "embed_positions.weight"))

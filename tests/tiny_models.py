"""Tiny random models for the tests: real architectures, every size different, every parameter away from its default.

Sizes that coincide, gains of 1 and biases of 0 hide mistakes (a transposed matrix, a forgotten gain), so none are left. The
weights are large enough that attention is far from uniform. Each model comes as a Hugging Face folder in float32 with a
byte-level tokenizer, and, made on first use, as an F32 GGUF file of the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

N_TOKENS = 320  # 2 special tokens, 256 bytes, and merges

_COMMON = {
    "vocab_size": N_TOKENS, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass
class TinyModel:
    """One model in both formats. `hf`: the folder; `gguf`: the F32 file, written when first asked for."""

    hf: Path
    kind: str

    @cached_property
    def gguf(self) -> Path:
        from backend.files.gguf_writer import write_gguf
        from tests import gguf_fixtures

        out = self.hf.with_name(f"{self.hf.name}-f32.gguf")
        if architecture_of(self.kind) in gguf_fixtures.ROWS:
            gguf_fixtures.write_f32(self.hf, out)
        else:
            write_gguf(self.hf, out, ftype="f32")
        return out


_DEEPSEEK_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 256}
_DEEPSEEK = {  # the norms of the latents have an epsilon of their own in transformers, 1e-6
    "rms_norm_eps": 1e-6, "num_key_value_heads": 4, "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 32, "qk_nope_head_dim": 20, "qk_rope_head_dim": 12, "v_head_dim": 28,
}  # fmt: skip

# What a tiny model of each kind has besides _COMMON: sizes that differ from each other, and the parts that make it special.
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 96, "attention_bias": True},
    "mistral": {"intermediate_size": 112, "head_dim": 24, "sliding_window": None},
    "mixtral": {"intermediate_size": 48, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {"intermediate_size": 96},
    "qwen3": {"intermediate_size": 96, "head_dim": 24},
    "smollm3": {"intermediate_size": 96, "num_hidden_layers": 5, "pad_token_id": None},  # layer 3 has no rotary embedding
    "olmo2": {"intermediate_size": 96, "pad_token_id": None},
    "gemma2": {  # windows shorter than the prompts of the tests, caps that bend scores and logits
        "intermediate_size": 96, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 8, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0, "tie_word_embeddings": True, "pad_token_id": None, "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "intermediate_size": 96, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 8, "num_hidden_layers": 6, "tie_word_embeddings": True,
        "pad_token_id": None,
    },
    "qwen3_moe": {"intermediate_size": 96, "moe_intermediate_size": 48, "head_dim": 24, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "qwen2_moe": {
        "intermediate_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "num_experts": 5, "num_experts_per_tok": 2,
        "norm_topk_prob": False,
    },
    "olmoe": {"num_key_value_heads": 4, "intermediate_size": 48, "num_experts": 5, "num_experts_per_tok": 2, "pad_token_id": None},
    "phi3": {"intermediate_size": 96, "original_max_position_embeddings": 1024, "sliding_window": None, "pad_token_id": None},
    "gpt2": {"n_inner": 112, "num_key_value_heads": None, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-4},
    "starcoder2": {"intermediate_size": 96, "sliding_window": None, "norm_epsilon": 1e-4, "use_bias": True, "tie_word_embeddings": True},
    "granite": {
        "intermediate_size": 96, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.5,
    },
    "granitemoe": {
        "intermediate_size": 48, "num_local_experts": 5, "num_experts_per_tok": 2, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6, "logits_scaling": 2.5,
    },
    "phimoe": {
        "intermediate_size": 48, "num_local_experts": 5, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True, "sliding_window": None,
        "router_jitter_noise": 0.2,  # so that more than one expert often comes close to the best
    },
    "gpt_oss": {
        "intermediate_size": 48, "head_dim": 24, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 8,
        "rope_parameters": {  # llama.cpp rounds the range that YaRN bends, so "truncate"
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
            "original_max_position_embeddings": 256,
        },
    },
    "deepseek_v2": {  # the first layer is dense; queries straight from W_Q
        **_DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.0, "rope_parameters": {**_DEEPSEEK_ROPE, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": {
        **_DEEPSEEK, "q_lora_rank": 40, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0,
        "rope_parameters": {**_DEEPSEEK_ROPE, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "stablelm": {"intermediate_size": 96, "use_qkv_bias": True, "layer_norm_eps": 1e-4, "partial_rotary_factor": 0.5},
    "stablelm, parallel": {  # as StableLM 2 12B
        "intermediate_size": 96, "layer_norm_eps": 1e-4, "partial_rotary_factor": 0.5, "use_parallel_residual": True, "qk_layernorm": True,
    },
}


def architecture_of(kind: str) -> str:
    """The architecture of a tiny model; what follows a comma in its kind is a variant."""
    return kind.partition(",")[0]


def save_tiny(kind: str, folder: Path, **changes: Any) -> TinyModel:
    """A random model of `kind` in `folder`; `changes` go into its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(sum(kind.encode()))
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture_of(kind), **{**_COMMON, **_KINDS[kind], **changes}), dtype=torch.float32)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(std=0.1)
            for name, parameter in model.named_parameters():
                lies_in_out = (kind == "gpt2" and ".h." in name) or (kind == "gpt_oss" and parameter.dim() == 3)
                fan_in = parameter.shape[-2 if lies_in_out and parameter.dim() > 1 else -1]
                parameter.normal_(std=1.4 * fan_in**-0.5 if parameter.dim() > 1 else 0.3)
                if parameter.dim() == 1 and name.endswith(".weight") and not kind.startswith("gemma"):  # Gemma multiplies with 1 + w
                    parameter.add_(1.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return TinyModel(folder, kind)


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of N_TOKENS tokens that puts <s> first, as the demo models' does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["The capital of France is Paris and the capital of Italy is Rome. Mary gave the book to John, John gave the key to Mary."]
    specials = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=N_TOKENS, special_tokens=specials, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)

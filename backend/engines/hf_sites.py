"""Where each architecture of transformers keeps the sites and weights: one row an architecture, module paths as data.

Adding an architecture is a row here and one in `backend.files.hf_keys.ARCHITECTURES` (its config keys). Rows share the parts that
their modules share; what an architecture lacks is absent from its row. `{}` in a path stands for the layer. rot_q, rot_k,
attn_scores, attn_pattern and z are not modules: the attention function sees them (hf_attention). No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from backend.engines.hf_architecture import Architecture, Experts, GatedExpert, Place, Router, Weight

_LAYER, _ATTN, _MLP = "model.layers.{}", "model.layers.{}.self_attn", "model.layers.{}.mlp"

_BLOCK_PLACES = {
    "embed": Place("model.embed_tokens"),
    "ln1_out": Place(f"{_LAYER}.input_layernorm"),
    "q": Place(f"{_ATTN}.q_proj", heads=True),
    "k": Place(f"{_ATTN}.k_proj", heads=True),
    "v": Place(f"{_ATTN}.v_proj", heads=True),
    "attn_out": Place(_ATTN, part=0),
    "resid_mid": Place(f"{_LAYER}.post_attention_layernorm", side="input"),
    "ln2_out": Place(f"{_LAYER}.post_attention_layernorm"),
    "mlp_out": Place(_MLP),
    "resid_post": Place(_LAYER),
    "ln_final_out": Place("model.norm"),
    "logits": Place("", part="logits"),
}
_GATED_MLP_PLACES = {
    "mlp_pre": Place(f"{_MLP}.gate_proj"),
    "mlp_pre_linear": Place(f"{_MLP}.up_proj"),
    "mlp_post": Place(f"{_MLP}.down_proj", side="input"),
}

_BLOCK_WEIGHTS = {
    "embed.W_E": Weight("model.embed_tokens.weight"),
    "ln_final.w": Weight("model.norm.weight"),
    "unembed.W_U": Weight("lm_head.weight"),
    "blocks.{}.ln1.w": Weight(f"{_LAYER}.input_layernorm.weight"),
    "blocks.{}.ln2.w": Weight(f"{_LAYER}.post_attention_layernorm.weight"),
    **{f"blocks.{{}}.attn.W_{x}": Weight(f"{_ATTN}.{x.lower()}_proj.weight") for x in "QKVO"},
    **{f"blocks.{{}}.attn.b_{x}": Weight(f"{_ATTN}.{x.lower()}_proj.bias") for x in "QKVO"},
}
_GATED_MLP_WEIGHTS = {
    f"blocks.{{}}.mlp.{kind}_{name}": Weight(f"{_MLP}.{projection}.{parameter}")
    for name, projection in (("gate", "gate_proj"), ("in", "up_proj"), ("out", "down_proj"))
    for kind, parameter in (("W", "weight"), ("b", "bias"))
}
_FUSED_EXPERT_WEIGHTS = {
    "blocks.{}.mlp.W_router": Weight(f"{_MLP}.gate.weight"),
    "blocks.{}.mlp.experts.W_gate": Weight(f"{_MLP}.experts.gate_up_proj", half=0),
    "blocks.{}.mlp.experts.W_in": Weight(f"{_MLP}.experts.gate_up_proj", half=1),
    "blocks.{}.mlp.experts.W_out": Weight(f"{_MLP}.experts.down_proj"),
}

_LLAMA = Architecture(
    layer=_LAYER,
    attention=_ATTN,
    final_norm="model.norm",
    unembed="lm_head",
    places={**_BLOCK_PLACES, **_GATED_MLP_PLACES},
    weights={**_BLOCK_WEIGHTS, **_GATED_MLP_WEIGHTS},
)
_QWEN3 = replace(
    _LLAMA, weights={**_LLAMA.weights, **{f"blocks.{{}}.attn.{x}_norm.w": Weight(f"{_ATTN}.{x}_norm.weight") for x in "qk"}}
)
_MIXTRAL = Architecture(
    layer=_LAYER,
    attention=_ATTN,
    final_norm="model.norm",
    unembed="lm_head",
    places=_BLOCK_PLACES,
    weights={**_BLOCK_WEIGHTS, **_FUSED_EXPERT_WEIGHTS},
    router=Router(f"{_MLP}.gate", renormalise=True),
    experts=Experts(f"{_MLP}.experts"),
)

_POST_NORM_WEIGHTS = {
    "blocks.{}.ln1_post.w": Weight(f"{_LAYER}.post_attention_layernorm.weight"),
    "blocks.{}.ln2_post.w": Weight(f"{_LAYER}.post_feedforward_layernorm.weight"),
}
# What enters the residual stream is the norm of what attention and MLP give.
_POST_NORM_PLACES = {
    "attn_out": Place(f"{_LAYER}.post_attention_layernorm"),
    "mlp_out": Place(f"{_LAYER}.post_feedforward_layernorm"),
}
_NORM_BIASES = {
    "blocks.{}.ln1.b": Weight(f"{_LAYER}.input_layernorm.bias"),
    "blocks.{}.ln2.b": Weight(f"{_LAYER}.post_attention_layernorm.bias"),
    "ln_final.b": Weight("model.norm.bias"),
}
_OLMO2 = replace(
    _QWEN3,
    places={
        **{site: place for site, place in _LLAMA.places.items() if site not in ("ln1_out", "ln2_out")},
        **_POST_NORM_PLACES,
        "resid_mid": Place(_MLP, side="input"),
    },
    weights={**{name: w for name, w in _QWEN3.weights.items() if not name.endswith(("ln1.w", "ln2.w"))}, **_POST_NORM_WEIGHTS},
)
_GEMMA2_GAINS = {
    "blocks.{}.ln1.w": Weight(f"{_LAYER}.input_layernorm.weight"),
    "blocks.{}.ln2.w": Weight(f"{_LAYER}.pre_feedforward_layernorm.weight"),
    "ln_final.w": Weight("model.norm.weight"),
    **_POST_NORM_WEIGHTS,
}
_GEMMA2 = replace(
    _LLAMA,
    places={
        **_LLAMA.places,
        **_POST_NORM_PLACES,
        "resid_mid": Place(f"{_LAYER}.pre_feedforward_layernorm", side="input"),
        "ln2_out": Place(f"{_LAYER}.pre_feedforward_layernorm"),
    },
    weights={**_LLAMA.weights, **{name: replace(gain, plus=1.0) for name, gain in _GEMMA2_GAINS.items()}},
    logit_softcap="final_logit_softcapping",
)
_GEMMA3 = replace(
    _GEMMA2,
    weights={**_GEMMA2.weights, **{f"blocks.{{}}.attn.{x}_norm.w": Weight(f"{_ATTN}.{x}_norm.weight", plus=1.0) for x in "qk"}},
)
_QWEN3_MOE = replace(
    _QWEN3,
    places=_BLOCK_PLACES,
    weights={**{name: w for name, w in _QWEN3.weights.items() if ".mlp." not in name}, **_FUSED_EXPERT_WEIGHTS},
    router=Router(f"{_MLP}.gate", renormalise="norm_topk_prob"),
    experts=Experts(f"{_MLP}.experts"),
)
_QWEN2_MOE = replace(
    _QWEN3_MOE,
    weights={
        **{name: w for name, w in _QWEN3_MOE.weights.items() if "_norm.w" not in name},
        **{
            f"blocks.{{}}.mlp.shared.W_{ours}": Weight(f"{_MLP}.shared_expert.{theirs}_proj.weight")
            for ours, theirs in (("gate", "gate"), ("in", "up"), ("out", "down"))
        },
    },
    shared=GatedExpert(f"{_MLP}.shared_expert", f"{_MLP}.shared_expert_gate"),
)
_PHI3 = replace(
    _LLAMA,
    places={
        **_LLAMA.places,
        **{x.lower(): Place(f"{_ATTN}.qkv_proj", heads=True, section=x) for x in "QKV"},
        "mlp_pre": Place(f"{_MLP}.gate_up_proj", section="gate"),
        "mlp_pre_linear": Place(f"{_MLP}.gate_up_proj", section="in"),
    },
    weights={
        **_LLAMA.weights,
        **{f"blocks.{{}}.attn.W_{x}": Weight(f"{_ATTN}.qkv_proj.weight", section=x) for x in "QKV"},
        **{f"blocks.{{}}.mlp.W_{x}": Weight(f"{_MLP}.gate_up_proj.weight", section=x) for x in ("gate", "in")},
    },
)
_STARCODER2 = replace(
    _LLAMA,
    norm="layer",
    places={**_BLOCK_PLACES, "mlp_pre": Place(f"{_MLP}.c_fc"), "mlp_post": Place(f"{_MLP}.c_proj", side="input")},
    weights={
        **_BLOCK_WEIGHTS,
        **_NORM_BIASES,
        **{f"blocks.{{}}.mlp.W_{ours}": Weight(f"{_MLP}.{theirs}.weight") for ours, theirs in (("in", "c_fc"), ("out", "c_proj"))},
        **{f"blocks.{{}}.mlp.b_{ours}": Weight(f"{_MLP}.{theirs}.bias") for ours, theirs in (("in", "c_fc"), ("out", "c_proj"))},
    },
)
_STABLELM = replace(
    _LLAMA,
    norm="layer",
    weights={
        **_LLAMA.weights,
        **_NORM_BIASES,
        "blocks.{}.attn.q_norm.w": Weight(f"{_ATTN}.q_layernorm.norms.{{}}.weight", each="head"),
        "blocks.{}.attn.k_norm.w": Weight(f"{_ATTN}.k_layernorm.norms.{{}}.weight", each="kv_head"),
    },
)
_GRANITE = replace(
    _LLAMA,
    places={
        **_LLAMA.places,
        "embed": Place("model.layers.0", side="input"),  # embeddings are multiplied outside their module
        "attn_out": Place(_ATTN, part=0, times="residual_multiplier"),
        "mlp_out": Place(_MLP, times="residual_multiplier"),
    },
    logit_divisor="logits_scaling",
)
_SPARSE = f"{_LAYER}.block_sparse_moe"
_GRANITE_MOE = replace(
    _GRANITE,
    places={
        **{site: place for site, place in _GRANITE.places.items() if not site.startswith("mlp_")},
        "mlp_out": Place(_SPARSE, times="residual_multiplier"),
    },
    weights={
        **_BLOCK_WEIGHTS,
        **{name: replace(weight, parameter=weight.parameter.replace(_MLP, _SPARSE)) for name, weight in _FUSED_EXPERT_WEIGHTS.items()},
        "blocks.{}.mlp.W_router": Weight(f"{_SPARSE}.router.weight"),
    },
    # A softmax over the logits of the chosen experts: the same as one over all of them, renormalised.
    router=Router(f"{_SPARSE}.router", renormalise=True),
    experts=Experts(f"{_SPARSE}.experts", times="residual_multiplier"),
)
_PHIMOE = replace(
    _MIXTRAL,
    norm="layer",
    weights={**_MIXTRAL.weights, **_NORM_BIASES, "blocks.{}.mlp.W_router": Weight(f"{_MLP}.router.weight"), "unembed.b_U": Weight("lm_head.bias")},
    router=Router(f"{_MLP}.router", probs="sparsemixer"),
)

_GPT_OSS = Architecture(
    layer=_LAYER,
    attention=_ATTN,
    final_norm="model.norm",
    unembed="lm_head",
    places={**_BLOCK_PLACES, "mlp_out": Place(_MLP, part=0)},
    weights={
        **_BLOCK_WEIGHTS,
        "blocks.{}.attn.sinks": Weight(f"{_ATTN}.sinks"),
        "blocks.{}.mlp.W_router": Weight(f"{_MLP}.router.weight"),
        "blocks.{}.mlp.b_router": Weight(f"{_MLP}.router.bias"),
        **{f"blocks.{{}}.mlp.experts.W_{x}": Weight(f"{_MLP}.experts.gate_up_proj", step=(i, 2), transposed=True) for i, x in enumerate(("gate", "in"))},
        **{f"blocks.{{}}.mlp.experts.b_{x}": Weight(f"{_MLP}.experts.gate_up_proj_bias", step=(i, 2)) for i, x in enumerate(("gate", "in"))},
        "blocks.{}.mlp.experts.W_out": Weight(f"{_MLP}.experts.down_proj", transposed=True),
        "blocks.{}.mlp.experts.b_out": Weight(f"{_MLP}.experts.down_proj_bias"),
    },
    router=Router(f"{_MLP}.router", probs="chosen"),
    experts=Experts(f"{_MLP}.experts"),
)

# Latent attention (MLA) has no module that gives keys or values before the rotary embedding, and llama.cpp has them nowhere.
_DEEPSEEK_V3 = Architecture(
    layer=_LAYER,
    attention=_ATTN,
    final_norm="model.norm",
    unembed="lm_head",
    places={
        **{site: place for site, place in _BLOCK_PLACES.items() if site not in ("k", "v")},
        "q": Place(f"{_ATTN}.q_b_proj", otherwise=f"{_ATTN}.q_proj", heads=True),
        **_GATED_MLP_PLACES,  # of the dense layers; the others have them for experts only
        "shared_expert_out": Place(f"{_MLP}.shared_experts"),
    },
    weights={
        **{name: w for name, w in _BLOCK_WEIGHTS.items() if not name.endswith(("W_K", "W_V", "b_Q", "b_K", "b_V"))},
        **_GATED_MLP_WEIGHTS,
        **_FUSED_EXPERT_WEIGHTS,
        "blocks.{}.attn.W_DQ": Weight(f"{_ATTN}.q_a_proj.weight"),
        "blocks.{}.attn.q_a_norm.w": Weight(f"{_ATTN}.q_a_layernorm.weight"),
        "blocks.{}.attn.W_UQ": Weight(f"{_ATTN}.q_b_proj.weight"),
        "blocks.{}.attn.W_DKV": Weight(f"{_ATTN}.kv_a_proj_with_mqa.weight"),
        "blocks.{}.attn.kv_a_norm.w": Weight(f"{_ATTN}.kv_a_layernorm.weight"),
        **{f"blocks.{{}}.attn.W_{x}": Weight(f"{_ATTN}.kv_b_proj.weight", section=x) for x in ("UK", "UV")},
        "blocks.{}.mlp.b_correction": Weight(f"{_MLP}.gate.e_score_correction_bias"),
        **{
            f"blocks.{{}}.mlp.shared.W_{ours}": Weight(f"{_MLP}.shared_experts.{theirs}_proj.weight")
            for ours, theirs in (("gate", "gate"), ("in", "up"), ("out", "down"))
        },
    },
    router=Router(
        f"{_MLP}.gate", renormalise="norm_topk_prob", probs="sigmoid", correction="e_score_correction_bias", group_best=2, scale="routed_scaling_factor"
    ),
    experts=Experts(f"{_MLP}.experts"),
    rotary=False,
)
_DEEPSEEK_V2 = replace(_DEEPSEEK_V3, router=Router(f"{_MLP}.gate", group_best=1, scale="routed_scaling_factor"))

_H = "transformer.h.{}"
_GPT2 = Architecture(
    layer=_H,
    attention=f"{_H}.attn",
    final_norm="transformer.ln_f",
    unembed="lm_head",
    norm="layer",
    places={
        "embed": Place("transformer.h.0", side="input"),  # tokens and positions
        "ln1_out": Place(f"{_H}.ln_1"),
        **{x.lower(): Place(f"{_H}.attn.c_attn", heads=True, section=x) for x in "QKV"},
        "attn_out": Place(f"{_H}.attn", part=0),
        "resid_mid": Place(f"{_H}.ln_2", side="input"),
        "ln2_out": Place(f"{_H}.ln_2"),
        "mlp_pre": Place(f"{_H}.mlp.c_fc"),
        "mlp_post": Place(f"{_H}.mlp.c_proj", side="input"),
        "mlp_out": Place(f"{_H}.mlp"),
        "resid_post": Place(_H),
        "ln_final_out": Place("transformer.ln_f"),
        "logits": Place("", part="logits"),
    },
    weights={
        "embed.W_E": Weight("transformer.wte.weight"),
        "pos_embed.W_pos": Weight("transformer.wpe.weight"),
        **{f"blocks.{{}}.ln{i}.{letter}": Weight(f"{_H}.ln_{i}.{kind}") for i in (1, 2) for letter, kind in (("w", "weight"), ("b", "bias"))},
        **{f"blocks.{{}}.attn.W_{x}": Weight(f"{_H}.attn.c_attn.weight", section=x, transposed=True) for x in "QKV"},
        **{f"blocks.{{}}.attn.b_{x}": Weight(f"{_H}.attn.c_attn.bias", section=x) for x in "QKV"},
        "blocks.{}.attn.W_O": Weight(f"{_H}.attn.c_proj.weight", transposed=True),
        "blocks.{}.attn.b_O": Weight(f"{_H}.attn.c_proj.bias"),
        **{f"blocks.{{}}.mlp.W_{ours}": Weight(f"{_H}.mlp.{theirs}.weight", transposed=True) for ours, theirs in (("in", "c_fc"), ("out", "c_proj"))},
        **{f"blocks.{{}}.mlp.b_{ours}": Weight(f"{_H}.mlp.{theirs}.bias") for ours, theirs in (("in", "c_fc"), ("out", "c_proj"))},
        "ln_final.w": Weight("transformer.ln_f.weight"),
        "ln_final.b": Weight("transformer.ln_f.bias"),
        "unembed.W_U": Weight("lm_head.weight"),
    },
    rotary=False,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "smollm3": _LLAMA,
    "olmo2": _OLMO2,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "qwen3_moe": _QWEN3_MOE,
    "qwen2_moe": _QWEN2_MOE,
    "olmoe": _QWEN3_MOE,
    "phi3": _PHI3,
    "gpt2": _GPT2,
    "starcoder2": _STARCODER2,
    "stablelm": _STABLELM,
    "granite": _GRANITE,
    "granitemoe": _GRANITE_MOE,
    "phimoe": _PHIMOE,
    "gpt_oss": _GPT_OSS,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
}

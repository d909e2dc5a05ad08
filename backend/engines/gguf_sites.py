"""Which node of llama.cpp's graph holds which site, one row per architecture.

llama.cpp names a node "name-L" in layer L and "name" outside the layers. The same name can stand for several nodes (Qcur: the
projection, its reshape, its rotation) and for different sites in different architectures, so a row says name and op, or the
weight that an unnamed node multiplies. `backend.engines.gguf_graph` looks the rows up in the graph of the model at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Node:
    """One candidate for a site. Where several candidates of a site are in the graph, the one that is computed last counts.

    name    ggml's name without "-L"; empty: the node has no name of its own
    op      ggml's op; empty: any
    weight  in place of a name: a weight or bias that an op takes, without "blk.L.", or a named node without "-L"; `op` is needed
            then. An ADD also takes the weight of the product that it adds; and of a sum with a bias that it adds, "BIAS (added)"
    part    (i, n): the i-th of n equal parts of the last axis; empty: all of it
    beside  a weight, without "blk.L.", that some node of the same layer takes: in layers without it the name stands for something else
    scaled  the block multiplies the node with the factor of `Architecture.residual_scale` later: the site is what it is then
    """

    site: str
    name: str = ""
    op: str = ""
    weight: str = ""
    part: tuple[int, int] | tuple[()] = ()
    beside: str = ""
    scaled: bool = False


@dataclass(frozen=True)
class Architecture:
    """What the engine must know of one architecture beyond its header.

    norm             of the residual stream: RMS norm, or LayerNorm with a bias
    logit_divisor    metadata key, without the architecture, of what logits are divided by
    logit_softcap    likewise of the cap c in c tanh(logits / c)
    residual_scale   likewise of the factor on what attention and MLP add to the residual stream
    window_period    layers l with l % period != period - 1 see a sliding window only; 0: no layer does
    """

    nodes: tuple[Node, ...]
    norm: Literal["rms", "layer"] = "rms"
    logit_divisor: str = ""
    logit_softcap: str = ""
    residual_scale: str = ""
    window_period: int = 0


_EMBEDDING = (Node("embed", "embd", "GET_ROWS"),)
_ATTENTION = (
    Node("ln1_out", "attn_norm"),
    Node("q", "Qcur", "RESHAPE"),
    Node("k", "Kcur", "RESHAPE"),
    Node("v", "Vcur", "RESHAPE"),
    Node("rot_q", "Qcur", "ROPE"),
    Node("rot_k", "Kcur", "ROPE"),
    Node("attn_scores", "kq", "MUL_MAT"),
    Node("attn_pattern", "kq_soft_max", "SOFT_MAX"),
    Node("z", "kqv_out", "CONT"),
)
# Architectures that leave attention's output without a name have it as the product with this weight.
_ATTENTION_OUT = (Node("attn_out", weight="attn_output.weight", op="MUL_MAT"), Node("attn_out", "attn_out"))
_MLP = (
    Node("resid_mid", "ffn_inp"),
    Node("ln2_out", "ffn_norm"),
    Node("mlp_pre", "ffn_gate"),
    Node("mlp_pre_linear", "ffn_up"),
    Node("mlp_post", "ffn_swiglu"),
    Node("mlp_out", "ffn_out"),
    Node("resid_post", "l_out"),
)
_EXPERTS = (
    Node("router_logits", "ffn_moe_logits", "MUL_MAT"),
    Node("router_probs", "ffn_moe_probs", "SOFT_MAX"),
    Node("expert_indices", "ffn_moe_topk", "VIEW"),
    Node("expert_weights", "ffn_moe_weights"),
    Node("expert_weights", "ffn_moe_weights_softmax"),
    Node("expert_weights", "ffn_moe_weights_norm"),
    Node("expert_weights", "ffn_moe_weights_scaled"),
    Node("expert_out", "ffn_moe_weighted", "MUL"),
    Node("mlp_out", "ffn_moe_out"),
)
# A gate that multiplies the shared expert's output is another node.
_SHARED_EXPERT, _GATED_SHARED_EXPERT = (Node("shared_expert_out", "ffn_shexp"),), (Node("shared_expert_out", "ffn_shexp_out"),)
_OUTPUT = (Node("ln_final_out", "result_norm"), Node("logits", "result_output"))

# Some layers may turn nothing (SmolLM3): there the projection itself is what attention gets. Elsewhere the rotation comes later.
_UNROTATED = (Node("rot_q", "Qcur", "RESHAPE"), Node("rot_k", "Kcur", "RESHAPE"))
# RMS norm of all heads together before the heads are split (OLMo 2): the projection is a plain product.
_WIDE_QK = (Node("q", "Qcur", "MUL_MAT"), Node("k", "Kcur", "MUL_MAT"))
_FUSED_QKV = (Node("q", "Qcur", "VIEW"), Node("k", "Kcur", "VIEW"), Node("v", "Vcur", "VIEW"))
# What a norm makes of the output of attention and MLP is what enters the residual stream. The second carries no layer in its name.
_POST_NORMS = (Node("attn_out", "attn_post_norm"), Node("mlp_out", weight="post_ffw_norm.weight", op="MUL"))
_SOFTCAP = (Node("attn_scores", "kq_scaled_2", "SCALE"),)
_ATTENTION_OUT_BIAS = (Node("attn_out", weight="attn_output.bias", op="ADD"),)
_UNGATED_MLP = (
    Node("resid_mid", "ffn_inp"),
    Node("ln2_out", "ffn_norm"),
    Node("mlp_pre", "ffn_up"),
    Node("mlp_pre", "ffn_up_b"),
    Node("mlp_post", "ffn_gelu"),
    Node("mlp_out", "ffn_out"),
    Node("resid_post", "l_out"),
)
# The dense MLP's names stand for the shared expert there, which has another width: its hidden values are no site.
_SHARED_EXPERT_BLOCK = tuple(node for node in _MLP if not node.site.startswith("mlp_p"))
_SCALED = (Node("embed", "embd", "SCALE"), Node("attn_out", weight="attn_out", op="SCALE"), Node("mlp_out", weight="ffn_out", op="SCALE"))
# The same with experts. The factor on the residual stream follows the sum of all, and of shared experts where a file has them.
_GRANITE_MOE_BLOCK = (
    *_SHARED_EXPERT_BLOCK,
    *(replace(node, scaled=node.site == "expert_out") for node in _EXPERTS),
    *(replace(node, scaled=True) for node in _SHARED_EXPERT),
    *_SCALED,
    Node("mlp_out", weight="ffn_moe_out", op="SCALE"),
)
_FUSED_MLP = (Node("mlp_pre", "ffn_up", part=(0, 2)), Node("mlp_pre_linear", "ffn_up", part=(1, 2)))
# The router is a product and a bias, and the sum is called ffn_moe_probs; there are no probabilities over all experts: the weights
# are a softmax over the logits of the chosen ones. So router_probs is no site.
_GPT_OSS_BLOCK = (
    Node("resid_mid", "ffn_inp"),
    Node("ln2_out", "attn_post_norm"),
    Node("router_logits", "ffn_moe_probs", "ADD"),
    *(node for node in _EXPERTS if node.site in ("expert_indices", "expert_weights", "expert_out", "mlp_out")),
    Node("resid_post", "l_out"),
)
# Latent attention (MLA): llama.cpp multiplies what makes keys into the queries, so that there are no keys, values or turned queries of
# a head; z is what enters W_O all the same. The names of the one MLP of the first layers stand for the shared expert in the others.
_DEEPSEEK_BLOCK = (
    Node("ln1_out", "attn_norm"),
    Node("q", "q", "RESHAPE"),
    *(node for node in _ATTENTION if node.site in ("attn_scores", "attn_pattern", "z")),
    *_ATTENTION_OUT,
    *(replace(node, beside="ffn_down.weight") if node.site.startswith("mlp_p") else node for node in _MLP),
    *(node for node in _EXPERTS if node.site != "mlp_out"),
    *_SHARED_EXPERT,
    Node("router_probs", "ffn_moe_probs", "UNARY"),
)
_DENSE = _EMBEDDING + _ATTENTION + _ATTENTION_OUT + _MLP + _OUTPUT

ARCHITECTURES: Mapping[str, Architecture] = {
    # Llama, Mistral and Mixtral files: the last two carry the same name.
    "llama": Architecture(_DENSE + _EXPERTS),
    "qwen2": Architecture(_DENSE),
    "qwen3": Architecture(_DENSE),
    "smollm3": Architecture(_DENSE + _UNROTATED),
    # Olmo 3 files carry the name too, and have windows.
    "olmo2": Architecture(_DENSE + _WIDE_QK + _POST_NORMS, window_period=4),
    "gemma2": Architecture(
        (*_DENSE, *_SOFTCAP, *_POST_NORMS, Node("embed", "inp_scaled"), Node("resid_mid", "sa_out"), Node("mlp_post", "ffn_geglu")),
        logit_softcap="final_logit_softcapping",
        window_period=2,
    ),
    "gemma3": Architecture(
        (*_DENSE, *_POST_NORMS, Node("embed", "inp_scaled"), Node("resid_mid", "sa_out"), Node("mlp_post", "ffn_geglu")),
        logit_softcap="final_logit_softcapping",
        window_period=6,
    ),
    "qwen3moe": Architecture(_EMBEDDING + _ATTENTION + _ATTENTION_OUT + _MLP + _EXPERTS + _OUTPUT),
    "qwen2moe": Architecture(_EMBEDDING + _ATTENTION + _ATTENTION_OUT + _SHARED_EXPERT_BLOCK + _EXPERTS + _GATED_SHARED_EXPERT + _OUTPUT),
    "olmoe": Architecture(_EMBEDDING + _ATTENTION + _WIDE_QK + _ATTENTION_OUT + _MLP + _EXPERTS + _OUTPUT),
    "phi3": Architecture((*_DENSE, *_FUSED_QKV, *_FUSED_MLP, Node("resid_mid", weight="attn_output.weight", op="ADD"))),
    "gpt2": Architecture(
        (Node("embed", "inpL"), *(node for node in _ATTENTION if node.op != "ROPE"), *_FUSED_QKV, *_ATTENTION_OUT, *_ATTENTION_OUT_BIAS, *_UNGATED_MLP, *_OUTPUT),
        norm="layer",
    ),
    "starcoder2": Architecture(_EMBEDDING + _ATTENTION + _ATTENTION_OUT + _ATTENTION_OUT_BIAS + _UNGATED_MLP + _OUTPUT, norm="layer"),
    # StableLM 2 12B has no second norm: attention and MLP read the same, and the sum of the first two is nothing that a block reads.
    "stablelm": Architecture(tuple(replace(node, beside="ffn_norm.weight") if node.site == "resid_mid" else node for node in _DENSE), norm="layer"),
    "granite": Architecture(_DENSE + _SCALED, logit_divisor="logit_scale", residual_scale="residual_scale"),
    "granitemoe": Architecture(_EMBEDDING + _ATTENTION + _ATTENTION_OUT + _GRANITE_MOE_BLOCK + _OUTPUT, logit_divisor="logit_scale", residual_scale="residual_scale"),
    # llama.cpp runs Phi-3.5-MoE with RMS norms and renormalised weights, where its makers and transformers have LayerNorm and sparsemixer.
    "phimoe": Architecture(
        (
            *_EMBEDDING, *_ATTENTION, *_ATTENTION_OUT, *_ATTENTION_OUT_BIAS, *(node for node in _SHARED_EXPERT_BLOCK if node.site != "resid_mid"),
            Node("resid_mid", weight="attn_output.bias (added)", op="ADD"), *_EXPERTS, *_OUTPUT,
        ),
    ),  # fmt: skip
    "gpt-oss": Architecture(_EMBEDDING + _ATTENTION + _ATTENTION_OUT + _GPT_OSS_BLOCK + _OUTPUT, window_period=2),
    "deepseek2": Architecture(_EMBEDDING + _DEEPSEEK_BLOCK + _OUTPUT),
}


# What an architecture without a row gets: the names that llama.cpp gives in nearly every graph, nothing of doubtful meaning.
# `backend.engines.gguf_generic` keeps of it what a probe of the model finds to be there.
GENERIC = Architecture(
    (Node("resid_post", "l_out"), Node("attn_pattern", "kq_soft_max", "SOFT_MAX"), Node("z", "kqv_out"), *_OUTPUT),
)


def architecture(name: str) -> Architecture:
    """The row of an architecture, or GENERIC."""
    return ARCHITECTURES.get(name, GENERIC)

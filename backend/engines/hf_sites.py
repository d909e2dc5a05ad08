"""Where each architecture of transformers keeps the sites and weights: one row an architecture, module paths as data.

Adding an architecture is a row here and one in `backend.hf_config.ARCHITECTURES` (its config keys). Rows share the parts that
their modules share; what an architecture lacks is absent from its row. `{}` in a path stands for the layer. rot_q, rot_k,
attn_scores, attn_pattern and z are not modules: the attention function sees them (hf_attention). No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

# Sites that the attention function offers in every architecture that goes through transformers' attention interface.
ATTENTION_SITES = ("rot_q", "rot_k", "attn_scores", "attn_pattern", "z")
ROUTER_SITES = ("router_logits", "router_probs", "expert_indices", "expert_weights")


@dataclass(frozen=True)
class Place:
    """A site as a module's input or output. `part` picks out of a tuple (by index) or an output object (by field name).

    An input is edited in place, because the residual stream that feeds a norm is the same tensor that later is added to.
    """

    module: str
    side: Literal["input", "output"] = "output"
    part: int | str | None = None
    heads: bool = False  # the last axis is (head, d_head) flattened


@dataclass(frozen=True)
class Router:
    """A router module that returns (logits, weights, indices); its weights are the top k of softmax(logits)."""

    module: str
    renormalise: bool  # the weights of the chosen experts are made to sum to 1


@dataclass(frozen=True)
class Weight:
    """A canonical weight as a parameter; `half` 0 or 1 picks the upper or lower half of the rows of a fused matrix."""

    parameter: str
    half: int | None = None


@dataclass(frozen=True)
class Architecture:
    layer: str
    attention: str
    final_norm: str
    unembed: str
    places: Mapping[str, Place]
    weights: Mapping[str, Weight]
    router: Router | None = None

    @property
    def sites(self) -> frozenset[str]:
        return frozenset((*self.places, *ATTENTION_SITES, *(ROUTER_SITES if self.router else ())))


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
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "smollm3": _LLAMA,
}

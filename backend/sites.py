"""The vocabulary of sites: every place in a transformer that Layerscope can capture or edit, as one table.

A site has the name that TransformerLens made standard, fixed dims in a fixed order, and aliases: TransformerLens' hook name
and ggml's node name. Wherever a site is named (API, command line, URL) an alias is accepted and resolved here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from backend.errors import LayerscopeError


@dataclass(frozen=True)
class Site:
    """One row of the vocabulary. `dims` names the axes of one layer's array, in order."""

    name: str
    dims: tuple[str, ...]
    doc: str
    hook: str  # TransformerLens' name inside a block, or the whole name for a site without layers
    ggml: tuple[str, ...] = ()  # node names that users type; engines keep exact tables of their own
    per_layer: bool = True
    dtype: str = "float"
    moe: bool = False
    derived: bool = False  # computed by Trace on reading, never stored

    @property
    def is_attention_map(self) -> bool:
        return "q_pos" in self.dims


_RESID = ("pos", "d_model")
_HEAD, _KV = ("pos", "head", "d_head"), ("pos", "kv_head", "d_head")
_HEAD_V, _KV_V = ("pos", "head", "d_head_v"), ("pos", "kv_head", "d_head_v")  # values may have another width than keys
_MAP = ("head", "q_pos", "k_pos")

# fmt: off
_TABLE = (
    Site("embed", _RESID, "Token embeddings as they enter block 0.", "hook_embed", ("embd", "inp_scaled", "inpL"), per_layer=False),
    Site("resid_pre", _RESID, "Residual stream that enters the block.", "hook_resid_pre", derived=True),
    Site("ln1_out", _RESID, "Output of the norm before attention, gain included.", "ln1.hook_out", ("attn_norm",)),
    Site("q", _HEAD, "Queries before rotary embedding.", "attn.hook_q"),
    Site("k", _KV, "Keys before rotary embedding.", "attn.hook_k"),
    Site("v", _KV_V, "Values.", "attn.hook_v", ("Vcur",)),
    Site("rot_q", _HEAD, "Queries after rotary embedding.", "attn.hook_rot_q", ("Qcur",)),
    Site("rot_k", _KV, "Keys after rotary embedding.", "attn.hook_rot_k", ("Kcur",)),
    Site("attn_scores", _MAP, "Attention scores: scaled and masked (-inf), before the softmax.", "attn.hook_attn_scores", ("kq",)),
    Site("attn_pattern", _MAP, "Attention probabilities; each row is one query position.", "attn.hook_pattern", ("kq_soft_max",)),
    Site("z", _HEAD_V, "Attention-weighted values of each head, before W_O.", "attn.hook_z", ("kqv_out",)),
    Site("result", ("pos", "head", "d_model"), "Each head's own output, z W_O: before W_O's bias, and before what follows W_O in some architectures (a norm, a multiplier).",
         "attn.hook_result", derived=True),
    Site("attn_out", _RESID, "What attention adds to the residual stream.", "hook_attn_out", ("attn_out",)),
    Site("resid_mid", _RESID, "Residual stream between attention and MLP.", "hook_resid_mid", ("ffn_inp",)),
    Site("ln2_out", _RESID, "Output of the norm before the MLP, gain included.", "ln2.hook_out", ("ffn_norm",)),
    Site("mlp_pre", ("pos", "d_mlp"), "MLP hidden values before the activation function (the gate).", "mlp.hook_pre", ("ffn_gate",)),
    Site("mlp_pre_linear", ("pos", "d_mlp"), "The linear half of a gated MLP.", "mlp.hook_pre_linear", ("ffn_up",)),
    Site("mlp_post", ("pos", "d_mlp"), "MLP hidden values that enter W_out.", "mlp.hook_post",
         ("ffn_swiglu", "ffn_geglu", "ffn_silu", "ffn_gelu", "ffn_gate_par")),
    Site("mlp_out", _RESID, "What the MLP (or the experts together) adds to the residual stream.", "hook_mlp_out", ("ffn_out", "ffn_moe_out")),
    Site("resid_post", _RESID, "Residual stream that leaves the block.", "hook_resid_post", ("l_out",)),
    Site("router_logits", ("pos", "expert"), "Router scores before the softmax.", "mlp.hook_router_scores", ("ffn_moe_logits",), moe=True),
    Site("router_probs", ("pos", "expert"), "Router probabilities over all experts.", "mlp.hook_router_probs", ("ffn_moe_probs",), moe=True),
    Site("expert_indices", ("pos", "k"), "Experts chosen for each token, best first.", "mlp.hook_expert_indices", ("ffn_moe_topk",), dtype="int", moe=True),
    Site("expert_weights", ("pos", "k"), "Weights that the chosen experts' outputs are summed with.", "mlp.hook_expert_weights",
         ("ffn_moe_weights", "ffn_moe_weights_norm"), moe=True),
    Site("expert_out", ("pos", "k", "d_model"), "What each chosen expert adds to the residual stream, best first: its output times its weight.", "mlp.hook_expert_out",
         ("ffn_moe_weighted",), moe=True),
    Site("shared_expert_out", _RESID, "What the shared expert, which every token goes through, adds to the residual stream; times its gate where it has one.",
         "mlp.hook_shared_expert_out", ("ffn_shexp_out", "ffn_shexp"), moe=True),
    Site("ln_final_out", _RESID, "Output of the final norm, gain included.", "ln_final.hook_out", ("result_norm",), per_layer=False),
    Site("logits", ("pos", "d_vocab"), "Next-token logits.", "unembed.hook_out", ("result_output",), per_layer=False),
)
# fmt: on

SITES: dict[str, Site] = {site.name: site for site in _TABLE}

# What a run captures when nobody says otherwise: enough for every page of a trace. `logits` are always summarised (top-k,
# logsumexp, log-prob of the next token); naming `logits` stores the full matrix as well.
STANDARD_SITES = ("embed", "q", "k", "v", "rot_q", "rot_k", "attn_pattern", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out",
                  "resid_post", "router_logits", "router_probs", "expert_indices", "expert_weights", "ln_final_out")  # fmt: skip

# Instead of a list of sites: every site that the model has, but not the full matrix of logits, which is named apart.
ALL_SITES = "all"

# In a list of sites: a tensor by the engine's own name for it, "native:ffn_moe_gate-1" or "native:model.layers.1.mlp.act_fn".
NATIVE = "native:"
MAX_NATIVE = 256  # of one run

_HOOK_TO_SITE = {site.hook: site.name for site in _TABLE}
_GGML_TO_SITE = {name: site.name for site in _TABLE for name in site.ggml}


def resolve_site(name: str) -> tuple[str, int | None]:
    """Resolve a site name or alias to (canonical name, layer or None).

    >>> resolve_site("blocks.3.attn.hook_pattern"), resolve_site("kq_soft_max-3"), resolve_site("z")
    (('attn_pattern', 3), ('attn_pattern', 3), ('z', None))

    Raises LayerscopeError, naming near matches, when no site has that name.
    """
    if name in SITES:
        return name, None
    block = re.fullmatch(r"blocks\.(\d{1,5})\.(.+)", name)
    if block and block[2] in _HOOK_TO_SITE:
        return _HOOK_TO_SITE[block[2]], int(block[1])
    if name in _HOOK_TO_SITE:
        return _HOOK_TO_SITE[name], None
    node = re.fullmatch(r"([A-Za-z_]+)(?:-(\d{1,5}))?", name)
    if node and node[1] in _GGML_TO_SITE:
        return _GGML_TO_SITE[node[1]], int(node[2]) if node[2] else None
    near = difflib.get_close_matches(name, SITES, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise LayerscopeError(f"There is no site {name[:80]!r}.{hint} Sites: {', '.join(SITES)}.")


def resolve_sites(names: Iterable[str]) -> tuple[str, ...]:
    """Canonical names in table order, duplicates dropped. Layers inside aliases are not allowed here: name layers apart."""
    wanted = {resolve_site(name)[0] for name in names}
    return tuple(name for name in SITES if name in wanted)


def split_native(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of sites, and native names without their prefix, each in the order given and once.

    >>> split_native(["z", "native:Qcur-0/ROPE", "resid_post"])
    (('z', 'resid_post'), ('Qcur-0/ROPE',))
    """
    every = tuple(dict.fromkeys(names))
    native = tuple(name.removeprefix(NATIVE) for name in every if name.startswith(NATIVE))
    if len(native) > MAX_NATIVE:
        raise LayerscopeError(f"{len(native)} native tensors are asked for, and {MAX_NATIVE} is the most of one run.")
    return tuple(name for name in every if not name.startswith(NATIVE)), native


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """ "0-2, 5" -> (0, 1, 2, 5); "all" or nothing -> None. Raises LayerscopeError."""
    if text is None or text.strip().lower() in ("", "all"):
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 12:
            raise LayerscopeError(f'Layers {text[:60]!r} are not of the form "0-2, 5" or "all".')
        low, high = int(first), int(last or first)
        if low > high or high > 9999:
            raise LayerscopeError(f"Layers {part.strip()!r} are not a range of layers between 0 and 9999.")
        layers.update(range(low, high + 1))
    return tuple(sorted(layers))


def parse_heads(text: str | None) -> tuple[tuple[int, int], ...] | None:
    """ "3.1, 2.0" -> ((2, 0), (3, 1)), pairs of layer and head; "all" or nothing -> None. Raises LayerscopeError."""
    if text is None or text.strip().lower() in ("", "all"):
        return None
    found = [re.fullmatch(r"\s*(\d{1,4})\.(\d{1,4})\s*", part) for part in text.split(",")]
    if not all(found):
        raise LayerscopeError(f'Heads {text[:60]!r} are not of the form "3.1, 2.0" (layer.head) or "all".')
    return tuple(sorted({(int(match[1]), int(match[2])) for match in found if match}))


def parse_rows(text: str | None) -> tuple[int, int] | None:
    """ "100-163" -> (100, 164), the first position and the one after the last; "all" or nothing -> None. Raises LayerscopeError."""
    if text is None or text.strip().lower() in ("", "all"):
        return None
    match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise LayerscopeError(f'Rows {text[:60]!r} are not of the form "100-163", positions from first to last, or "all".')
    return int(match[1]), int(match[2] or match[1]) + 1

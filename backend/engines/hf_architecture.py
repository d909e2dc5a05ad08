"""What a row of hf_sites says of an architecture of transformers: where its sites and weights are, how it routes, how it ends. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from backend.sites import SITES

# Sites that the attention function offers in every architecture that goes through transformers' attention interface.
ATTENTION_SITES = ("attn_scores", "attn_pattern", "z")
ROTARY_SITES = ("rot_q", "rot_k")  # offered there too, where the architecture turns queries and keys
ROUTER_SITES = ("router_logits", "router_probs", "expert_indices", "expert_weights")


@dataclass(frozen=True)
class Place:
    """A site as a module's input or output. `part` picks out of a tuple (by index) or an output object (by field name).

    An input is edited in place, because the residual stream that feeds a norm is the same tensor that later is added to.
    """

    module: str
    otherwise: str = ""  # where there is no such module, the site is here
    side: Literal["input", "output"] = "output"
    part: int | str | None = None
    heads: bool = False  # the last axis is (head, d_head) flattened
    section: str = ""  # which columns of a fused projection, as backend.weight_names.section has them; empty: all
    times: str = ""  # the configuration's factor that the block multiplies the module's output with
    collected: bool = False  # the model only collects it: it is handed out and dropped there, and editing it would change nothing

    def paths(self, layer: int | None) -> tuple[str, ...]:
        """The modules of which the first that the model has is the site's."""
        return tuple(path.format(layer) for path in ((self.module, self.otherwise) if self.otherwise else (self.module,)))


@dataclass(frozen=True)
class Router:
    """A router module that returns (logits, weights, indices).

    renormalise  the weights of the chosen experts are made to sum to 1; a name: the module's attribute that says so
    probs        what makes probabilities of the logits. "chosen": none over all experts exist, the weights are a softmax over the
                 chosen experts' logits alone (gpt-oss), so that router_probs is no site. "sparsemixer": nor here, each of two chosen
                 experts has a softmax of its own (Phi-3.5-MoE)
    correction   the module's attribute that is added to the probabilities to choose by, but not to the weights
    group_best   experts are chosen out of the best groups only, a group counting as much as its best so many experts together;
                 0: there are no groups
    scale        the module's attribute that the weights are multiplied with
    """

    module: str
    renormalise: bool | str = False
    probs: Literal["softmax", "sigmoid", "chosen", "sparsemixer"] = "softmax"
    correction: str = ""
    group_best: int = 0
    scale: str = ""

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(site for site in ROUTER_SITES if self.probs in ("softmax", "sigmoid") or site != "router_probs")


@dataclass(frozen=True)
class Experts:
    """A module that takes (hidden states, indices, weights) and returns the chosen experts' weighted sum; `expert_out` is read there.

    times  the configuration's factor that the block multiplies the sum with
    """

    module: str
    times: str = ""


@dataclass(frozen=True)
class GatedExpert:
    """A shared expert whose output the block multiplies with the sigmoid of what another module, the gate, puts out after it."""

    module: str
    gate: str


@dataclass(frozen=True)
class Weight:
    """A canonical weight as a parameter.

    each        an axis: there is one parameter for each of its entries, the second {} in the path
    half        0 or 1: the upper or lower half of the rows of a fused matrix
    step        (i, n): every n-th column from the i-th, of matrices that lie interleaved; empty: all
    section     which rows of a fused matrix, as backend.weight_names.section has them
    transposed  the parameter is (in, out)
    plus        added: the module multiplies with 1 + its parameter
    """

    parameter: str
    each: str = ""
    half: int | None = None
    step: tuple[int, int] | tuple[()] = ()
    section: str = ""
    transposed: bool = False
    plus: float = 0.0


@dataclass(frozen=True)
class Architecture:
    layer: str
    attention: str
    final_norm: str
    unembed: str
    places: Mapping[str, Place]
    weights: Mapping[str, Weight]
    router: Router | None = None
    experts: Experts | None = None
    shared: GatedExpert | None = None  # a shared expert without a gate is a place like others
    rotary: bool = True
    norm: Literal["rms", "layer"] = "rms"  # of the residual stream: RMS norm, or LayerNorm with a bias
    logit_divisor: str = ""  # the configuration's name for what logits are divided by
    logit_softcap: str = ""  # the configuration's cap c in c tanh(logits / c)
    logit_scale: str = ""  # the configuration's name for what logits are multiplied with
    attends: frozenset[int] | None = None  # layers whose `attention` the attention function sees; None: all
    attention_sites: tuple[str, ...] = ATTENTION_SITES

    def sites_of(self, n_layers: int, has: Callable[[str], bool]) -> frozenset[tuple[str, int | None]]:
        """Every (site, layer) whose module is in the model, as `has` says of a path; layer None: a site without layers.

        A dense layer among layers with experts has no router, a parallel block no second norm: a variant is a module that is not there.
        """
        found: set[tuple[str, int | None]] = set()
        for site, place in self.places.items():
            found |= {(site, at) for at in (range(n_layers) if SITES[site].per_layer else (None,)) if any(has(path) for path in place.paths(at))}
        attending = range(n_layers) if self.attends is None else self.attends
        found |= {(site, layer) for layer in attending for site in (*(ROTARY_SITES if self.rotary else ()), *self.attention_sites)}
        if self.router:
            found |= {(site, layer) for layer in range(n_layers) for site in self.router.sites if has(self.router.module.format(layer))}
        for site, part in (("expert_out", self.experts), ("shared_expert_out", self.shared)):
            found |= {(site, layer) for layer in range(n_layers) if part and has(part.module.format(layer))}
        return frozenset(found)


def finished(row: Architecture, config: Any, logits: Any) -> Any:
    """The product with W_U as the model's own last step leaves it. config: transformers' configuration."""
    divisor, scale, cap = (getattr(config, key) if key else None for key in (row.logit_divisor, row.logit_scale, row.logit_softcap))
    logits = logits / divisor if divisor else logits
    logits = logits * scale if scale else logits
    return (logits / cap).tanh() * cap if cap else logits

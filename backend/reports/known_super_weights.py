"""Super weights of public models, as they were published: which a model could have, told by its sizes and its name.

Places are [row = output channel, column = input channel] of W_out. Two models can have the same sizes (LLaMA 7B and Llama 2 7B) and different super
weights, so where only the sizes fit, the sentence says so, and with it how the opened file's own value ranks: nearly every published weight is among
the six largest of its matrix, and one that ranks far below is another model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from backend.model_info import ModelInfo

FITTING_RANK = 10  # 20 of 21 published places rank 1 to 6 by |w|

_BOTH = "Yu et al. 2024 (arXiv:2411.07191), Table 2 and its code"
_PAPER = "Yu et al. 2024 (arXiv:2411.07191), Table 2; not in its code"
_CODE = "the code of Yu et al. 2024 (arXiv:2411.07191); not in the paper"
_EXPERTS = "the Super Experts paper (ICLR 2026), Table 8"
_OTHERS = "a replication by others found"


@dataclass(frozen=True)
class Published:
    """One place. expert: None in a dense MLP; source: who published it, and what others found there."""

    layer: int
    row: int
    column: int
    source: str
    expert: int | None = None


@dataclass(frozen=True)
class KnownModel:
    """called: a pattern of how its name begins, in lower case with all but letters and digits as "-"; sizes: fields of ModelInfo that it has."""

    name: str
    called: str
    sizes: Mapping[str, int]
    weights: tuple[Published, ...]


@dataclass(frozen=True)
class Match:
    """A place that the opened model could have. by_name: its name fits too, and not its sizes alone."""

    model: str
    by_name: bool
    place: Published

    def fits(self, rank: int) -> bool:
        """Whether the place is taken for this model's, given the rank of |w| there."""
        return self.by_name or rank <= FITTING_RANK

    def sentence(self, value: float, rank: int) -> str:
        """Where the place was published and what the opened file has there. value: the weight; rank: of |w| in its matrix, 1 the largest."""
        here = f"here w = {value:.4g}, number {rank:,} of its matrix by |w|"
        if self.by_name:
            return f"{self.model}: {self.place.source}; {here}."
        verdict = "which such a weight would be" if self.fits(rank) else "too small for it: probably another model of that shape"
        return f"{self.model}, of which only the shape fits: {self.place.source}; {here}, {verdict}."


def _sizes(n_layers: int, d_model: int, d_mlp: int, d_vocab: int, n_kv_heads: int, n_experts: int = 0) -> Mapping[str, int]:
    return {"n_layers": n_layers, "d_model": d_model, "d_mlp": d_mlp, "d_vocab": d_vocab, "n_kv_heads": n_kv_heads, "n_experts": n_experts}


def _places(layer: int, source: str, *places: tuple[int, int]) -> tuple[Published, ...]:
    return tuple(Published(layer, row, column, source) for row, column in places)


_PHI = f"{_BOTH}; {_OTHERS} each alone without effect (x 1.0)"
_OLMO_7B = f"{_BOTH}; {_OTHERS}"

MODELS = (
    KnownModel("LLaMA 7B", r"llama-(1-|v1-)?7b", _sizes(32, 4096, 11008, 32000, 32), _places(
        2, f"{_BOTH}: perplexity of WikiText-2 from 5.67 to 1,211; {_OTHERS} x 181, w = -1.9268", (3968, 7003))),
    KnownModel("LLaMA 13B", r"llama-(1-|v1-)?13b", _sizes(40, 5120, 13824, 32000, 40), _places(2, _BOTH, (2231, 2278), (2231, 6939))),
    KnownModel("LLaMA 30B", r"llama-(1-|v1-)?3[03]b", _sizes(60, 6656, 17920, 32000, 52), (
        *_places(3, _BOTH, (5633, 12817), (5633, 17439)), *_places(10, _BOTH, (5633, 14386)))),
    KnownModel("Llama 2 7B", r"llama-?2-7b", _sizes(32, 4096, 11008, 32000, 32), _places(1, f"{_PAPER}; {_OTHERS} it nearly without effect alone", (2533, 7890))),
    KnownModel("Llama 2 13B", r"llama-?2-13b", _sizes(40, 5120, 13824, 32000, 40), _places(3, _PAPER, (4743, 7678))),
    KnownModel("Llama 3 8B", r"llama-?3-8b", _sizes(32, 4096, 14336, 128256, 8), _places(1, _CODE, (788, 2427), (1384, 2427), (4062, 2427))),
    KnownModel("Llama 3.2 1B", r"llama-?3-2-1b", _sizes(16, 2048, 8192, 128256, 8), _places(1, _EXPERTS, (400, 1417), (698, 1417), (2029, 1417), (1159, 1417))),
    KnownModel("LLaVA 1.5 7B", r"llava-(v)?1-5-7b", _sizes(32, 4096, 11008, 32000, 32), _places(1, _EXPERTS, (1415, 7890), (2533, 7890))),
    KnownModel("Mistral 7B v0.1", r"mistral-7b-(instruct-)?v0-1", _sizes(32, 4096, 14336, 32000, 8), _places(
        1, f"{_BOTH}; {_OTHERS} x 1,430 on WikiText-2, w = -0.2734", (2070, 7310))),
    KnownModel("OLMo 1B 0724", r"olmo-1b-0724", _sizes(16, 2048, 8192, 50304, 16), (
        *_places(1, f"{_BOTH}; {_OTHERS} x 3,667 on WikiText-2, w = +0.6323", (1764, 1710)),
        *_places(1, f"Yu et al. 2024 (arXiv:2411.07191), Table 2, whose code has it in layer 2; {_OTHERS} 0.0018 here, one of the smaller weights", (1764, 8041)),
        *_places(2, f"the code of Yu et al. 2024, whose Table 2 has it in layer 1; {_OTHERS} -0.5924, the largest of its matrix, and no effect (x 1.0)", (1764, 8041)))),
    KnownModel("OLMo 7B 0724", r"olmo-7b-0724", _sizes(32, 4096, 11008, 50304, 32), (
        *_places(1, f"{_OLMO_7B} x 79", (269, 7467)), *_places(2, f"{_OLMO_7B} little effect alone", (269, 8275)),
        *_places(7, f"{_OLMO_7B} little effect alone", (269, 453)), *_places(24, f"{_OLMO_7B} little effect alone", (269, 2300)))),
    KnownModel("Phi-3 mini 4k", r"phi-3-mini-4k", _sizes(32, 3072, 8192, 32064, 32), (
        *_places(2, _PHI, (525, 808), (1693, 808), (1113, 808)), *_places(4, _PHI, (525, 2723), (1113, 2723), (1693, 2723)))),
    KnownModel("Qwen3 0.6B", r"qwen3-0-6b", _sizes(28, 1024, 3072, 151936, 8), _places(2, "a blog; not verified by anybody", (35, 55))),
    KnownModel("Qwen3 30B A3B", r"qwen3-30b-a3b", _sizes(48, 2048, 768, 151936, 4, 128), tuple(
        Published(layer, 940, column, _EXPERTS, expert) for layer, expert, column in ((1, 68, 711), (2, 92, 59), (3, 82, 423)))),
)  # fmt: skip


def recognise(info: ModelInfo) -> list[Match]:
    """The published places that a model could have: those of models of its sizes, and of these only the one that it is named after, if it is."""
    name = re.sub(r"[^a-z0-9]+", "-", info.name.lower())
    fitting = [model for model in MODELS if all(getattr(info, field) == size for field, size in model.sizes.items())]
    named = [model for model in fitting if re.match(rf"(meta-)?{model.called}(-|$)", name)]  # from its start: open-llama-7b is another model
    return [Match(model.name, bool(named), place) for model in named or fitting for place in model.weights]

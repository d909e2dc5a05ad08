"""An architecture without a row in the table: what is there under llama.cpp's common names, kept only as far as a probe finds it true.

llama.cpp gives the same few names in nearly every graph (`gguf_sites.GENERIC`). A name promises little, so each is held against the
graph of the model at hand: one node of that name in a layer, of the size of its site; a pattern that spends at most 1 on the keys
there are and nothing beyond; logits that are llama.cpp's own. What does not fit is left out, layer by layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from backend.engines.ggml import F32
from backend.engines.gguf_graph import Place, SeenNode, Where
from backend.model_info import ModelInfo

# Why a trace of such a model says less than others; shown in its integrity report.
NO_ROW = "no table row: names are llama.cpp's, meaning unverified"
NO_UNEMBED = "no final norm and output matrix that Layerscope knows makes this model's logits of its last layer"
_ROW_SUM_ERROR = 1e-3


def fitting(places: Mapping[Where, Place], nodes: Iterable[SeenNode], info: ModelInfo, n: int) -> dict[Where, Place]:
    """Those of `places` whose node is the only one of its name and has the size of its site, in a pass over `n` tokens."""
    nodes = list(nodes)
    count, by_name = Counter(node.name for node in nodes), {node.name: node for node in nodes}
    sizes = {
        "resid_post": (1, 1, n, info.d_model),
        "z": (1, 1, n, info.n_heads * info.d_head),
        "ln_final_out": (1, 1, n, info.d_model),
        "logits": (1, 1, n, info.d_vocab),
    }

    def fits(place: Place) -> bool:
        node = by_name[place.name]
        if count[place.name] != 1 or node.type != F32 or (place.layer is not None and place.layer >= info.n_layers):
            return False
        if place.site == "attn_pattern":
            return node.shape[:3] == (1, info.n_heads, n) and node.shape[3] >= n
        return node.shape == sizes[place.site]

    return {where: place for where, place in places.items() if fits(place)}


def is_pattern(node: NDArray[np.float32]) -> bool:
    """Whether kq_soft_max (1, head, n, keys) of the first `n` tokens is an attention pattern over those tokens."""
    n = node.shape[2]
    sums = node.sum(axis=-1, dtype=np.float64)
    return bool((node >= 0).all() and not node[..., n:].any() and (sums <= 1 + _ROW_SUM_ERROR).all())

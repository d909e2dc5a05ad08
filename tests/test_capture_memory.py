"""A capture streams: what it holds in memory does not grow with the layers it captures."""

import tracemalloc
from pathlib import Path

import numpy as np

from backend.engines import Piece, Request
from backend.errors import LayerscopeError
from backend.experiments.capture import CaptureSpec, capture
from backend.model_info import ModelInfo
from backend.sites import SITES
from backend.trace import Trace

N_TOKENS = 256
CAPTURED = ("attn_pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


class LayeredEngine:
    """An engine of any depth that computes nothing: it hands out fresh arrays, layer after layer, as a real one does."""

    sites = frozenset((*CAPTURED, "embed", "logits"))
    version, compute, n_ctx, unchecked, on_cpu, n_threads = "none", "float32", 1024, {}, False, 1

    def __init__(self, n_layers: int) -> None:
        self.info = ModelInfo("deep", "", "hf", "llama", n_layers, n_heads=4, n_kv_heads=4, d_model=64, d_head=16, d_mlp=64, d_vocab=50, n_ctx=1024)
        self.places = frozenset((site, layer) for site in self.sites for layer in (range(n_layers) if SITES[site].per_layer else (None,)))

    def token_texts(self, ids: list[int]) -> list[str]:
        return [str(i) for i in ids]

    def detokenize(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def weight(self, name: str, rows: np.ndarray) -> np.ndarray:
        if name.endswith("b_O"):
            raise LayerscopeError(f"There is no {name}.")
        return np.zeros((len(rows), 64), np.float32)

    def unembed(self, resid: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.zeros((*resid.shape[:-1], len(tokens)), np.float32)

    def run(self, ids, request: Request, sink, edits=(), should_stop=None) -> None:
        sizes = {**self.info.dims, "pos": len(ids), "q_pos": len(ids), "k_pos": len(ids)}
        places = [("embed", None), *((site, layer) for layer in range(self.info.n_layers) for site in CAPTURED), ("logits", None)]
        for site, layer in places:
            if request.wants(site, layer):
                sink(Piece(site, layer, 0, np.full([sizes[d] for d in SITES[site].dims], 0.001, np.float32), "made up"))


def peak_bytes(n_layers: int, folder: Path) -> int:
    engine = LayeredEngine(n_layers)
    spec = CaptureSpec(token_ids=tuple(i % 50 for i in range(N_TOKENS)), sites=(*CAPTURED, "embed"), lens=False)
    tracemalloc.start()
    try:
        path = capture(engine, spec, folder)  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with Trace(path) as trace:
        assert trace.stored["attn_pattern"] == list(range(n_layers))
    return peak


def test_thirty_two_layers_need_no_more_memory_than_sixteen(tmp_path):
    peak_bytes(1, tmp_path)  # imports and caches
    sixteen, thirty_two = peak_bytes(16, tmp_path), peak_bytes(32, tmp_path)
    one_layer = 4 * N_TOKENS * (4 * N_TOKENS + 5 * 64)
    assert sixteen > one_layer  # the measure sees the arrays
    assert thirty_two < sixteen + one_layer  # a batch of chunks and the layers that wait for it, however many follow

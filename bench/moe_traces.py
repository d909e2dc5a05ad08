"""A synthetic trace for the MoE page: the four sites of a router whose choices are uneven and drift from token to token, as a real one's do."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from backend.analysis.logits import log_softmax
from backend.engines import Piece
from backend.model_info import ModelInfo
from backend.tracefile.trace_writer import TraceWriter

_VOCABULARY = 1000


def write_trace(folder: Path, trace_id: str, n_layers: int, n_experts: int, k: int, n_tokens: int) -> Path:
    """Its path. Exists already: left as it is."""
    path = folder / f"{trace_id}.h5"
    if path.is_file():
        return path
    info = ModelInfo(name="synthetic-moe", source="synthetic", engine="hf", architecture="olmoe", n_layers=n_layers, n_heads=4, n_kv_heads=4, d_model=64, d_head=16, d_mlp=64,
                     d_vocab=_VOCABULARY, n_ctx=n_tokens, quantization="F32", n_experts=n_experts, n_experts_used=k)  # fmt: skip
    rng = np.random.default_rng(0)
    ids = [int(i) for i in np.minimum(rng.zipf(1.3, n_tokens) + 1, _VOCABULARY - 1)]
    of_tokens = rng.standard_normal((_VOCABULARY, n_experts), np.float32)
    with TraceWriter(folder, info, n_tokens, trace_id=trace_id) as writer:
        for layer in range(n_layers):
            logits = of_tokens[ids] + rng.standard_normal((n_tokens, n_experts), np.float32) + np.roll(rng.standard_normal(n_experts, np.float32), layer)
            probs = np.exp(log_softmax(logits)).astype(np.float32)
            chosen = np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)
            values = {"router_logits": logits, "router_probs": probs, "expert_indices": chosen, "expert_weights": np.take_along_axis(probs, chosen, 1)}
            for site, array in values.items():
                writer.write(Piece(site, layer, 0, array, "synthetic"))
        return _publish(writer, ids)


def _publish(writer: TraceWriter, ids: list[int]) -> Path:
    n = len(ids)
    nothing = np.zeros(n, np.float32)
    writer.logits({"top_ids": np.zeros((n, 1), np.int32), "top_logprobs": nothing[:, None], "logsumexp": nothing, "entropy": nothing + 1, "next_logprobs": nothing - 1,
                   "next_ranks": np.zeros(n, np.int32)})  # fmt: skip
    writer.tokens(ids, [f" t{i}" for i in ids], n, [0])
    writer.vocabulary({i: f" t{i}" for i in {0, *ids}})
    return writer.publish(engine_version="synthetic", prompt="synthetic", response="", integrity={}, timings={})

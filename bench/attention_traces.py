"""Synthetic traces for the Attention page: random patterns written through TraceWriter, with the scores and thumbnails that a capture computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backend.analysis import attention as analysis
from backend.engines import Piece
from backend.model_info import ModelInfo
from backend.tracefile.trace_writer import TraceWriter

_PIECE = 512
_THUMBNAIL = 48
_VOCABULARY = 1000


def write_trace(folder: Path, trace_id: str, n_layers: int, n_heads: int, n_tokens: int, heads: int | None = None) -> Path:
    """A trace of all heads, or of the first `heads` of the first layer alone; its path. Exists already: left as it is."""
    path = folder / f"{trace_id}.h5"
    if path.is_file():
        return path
    info = ModelInfo(name="synthetic", source="synthetic", engine="hf", architecture="llama", n_layers=n_layers, n_heads=n_heads, n_kv_heads=max(1, n_heads // 4), d_model=64,
                     d_head=8, d_mlp=64, d_vocab=_VOCABULARY, n_ctx=n_tokens, quantization="F32")  # fmt: skip
    rng = np.random.default_rng(0)
    ids = [int(i) for i in rng.integers(2, _VOCABULARY, n_tokens)]
    kept = tuple(range(heads)) if heads else None
    layers = list(range(n_layers)) if heads is None else [0]
    with TraceWriter(folder, info, n_tokens, trace_id=trace_id) as writer:
        means = {layer: analysis.RowMeans() for layer in layers}
        side = analysis.thumbnail_side(n_tokens, _THUMBNAIL)
        thumbs = np.zeros((len(layers), n_heads, side, side), np.uint8)
        links = analysis.Links(ids)
        for start in range(0, n_tokens, _PIECE):
            first = _patterns(rng, heads or n_heads, start, min(_PIECE, n_tokens - start))
            for at, layer in enumerate(layers):
                values = np.roll(first, layer, axis=0)  # other heads, not other numbers: making them would take longer than writing
                writer.write(Piece("attn_pattern", layer, start, values, "synthetic", heads=kept))
                means[layer].add(analysis.row_scores(values, ids, start, links))
                analysis.add_to_thumbnails(thumbs[at, : len(values)], values, start, n_tokens, _THUMBNAIL)
        for name in analysis.METRICS:
            scores = np.full((len(layers), n_heads), np.nan, np.float32)
            for at, layer in enumerate(layers):
                found = means[layer].means()[name]
                scores[at, : len(found)] = found
            writer.result(f"attn_{name}", scores, ("layer", "head"), layers=layers)
        writer.result("attn_thumbs", thumbs, ("layer", "head", "t", "t"), layers=layers)
        return _publish(writer, ids)


def _patterns(rng: np.random.Generator, n_heads: int, start: int, n: int) -> NDArray[np.float32]:
    """(head, n, start + n): the softmax of random scores."""
    out = np.empty((n_heads, n, start + n), np.float32)
    masked = np.arange(start + n)[None, :] > (start + np.arange(n))[:, None]
    for head in range(n_heads):
        scores = np.where(masked, -np.inf, 2 * rng.standard_normal((n, start + n), np.float32))
        np.exp(scores - scores.max(axis=-1, keepdims=True), out=scores)
        out[head] = scores / scores.sum(axis=-1, keepdims=True)
    return out


def _publish(writer: TraceWriter, ids: list[int]) -> Path:
    n = len(ids)
    nothing = np.zeros(n, np.float32)
    writer.logits({"top_ids": np.zeros((n, 1), np.int32), "top_logprobs": np.zeros((n, 1), np.float32), "logsumexp": nothing, "entropy": nothing + 1,
                   "next_logprobs": nothing - 1, "next_ranks": np.zeros(n, np.int32)})  # fmt: skip
    writer.tokens(ids, [f" t{i}" for i in ids], n, [0])
    writer.vocabulary({i: f" t{i}" for i in {0, *ids}})
    return writer.publish(engine_version="synthetic", prompt="synthetic", response="", integrity={}, timings={})

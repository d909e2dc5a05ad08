"""Small traces made without a model: random values under the right names, for tests of what handles whole files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from backend.engines import Piece
from backend.model_info import ModelInfo
from backend.tracefile.trace_writer import TraceWriter

INFO = ModelInfo(name="toy", source="toy", engine="hf", architecture="llama", n_layers=2, n_heads=2, n_kv_heads=1, d_model=8, d_head=4, d_mlp=16,
                 d_vocab=50, n_ctx=64, n_params=1000, n_bytes=4000, quantization="F32")  # fmt: skip


def write_trace(folder: Path, prompt: str = "Hello there", category: str = "", tags: tuple[str, ...] = (), n_tokens: int = 4, pause_s: float = 0.0,
                trace_id: str | None = None, **info: Any) -> Path:  # fmt: skip
    """Publish a trace of `n_tokens` with embed and resid_post; its path."""
    model = ModelInfo.from_json({**INFO.to_json(), **info})
    values = np.random.default_rng(0).normal(size=(n_tokens, model.d_model)).astype(np.float32)
    with TraceWriter(folder, model, n_tokens, trace_id=trace_id) as writer:
        writer.write(Piece("embed", None, 0, values, "test"))
        for layer in range(model.n_layers):
            time.sleep(pause_s)
            writer.write(Piece("resid_post", layer, 0, values + layer, "test"))
        writer.tokens(list(range(n_tokens)), [f" t{i}" for i in range(n_tokens)], n_tokens - 1, [0])
        writer.vocabulary({i: f" t{i}" for i in range(n_tokens)})
        return writer.publish(
            engine_version="test",
            category=category,
            tags=tags,
            prompt=prompt,
            response=" t3",
            integrity={"chain": {"ok": True, "max_error": 0.0, "tolerance": 1e-5, "checked": 2, "note": ""}},
            timings={"total_s": 2.0},
        )


def causal_maps(rng: np.random.Generator, layers: int, heads: int, n: int) -> np.ndarray:
    """Random attention patterns, (layer, head, q_pos, k_pos) float32."""
    scores = np.where(np.tril(np.ones((n, n), bool)), 2 * rng.normal(size=(layers, heads, n, n)), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def write_maps(folder: Path, maps: np.ndarray, site: str = "attn_pattern", kept: dict[int, tuple[int, ...]] | None = None, rows: tuple[int, int] | None = None,
               precision: str = "float32", **arrays: np.ndarray) -> Path:  # fmt: skip
    """Publish a trace with attention maps (layer, head, q, k); its path. kept: of each layer, the heads that are stored; rows: of all maps.

    arrays: other sites, (layer, ...).
    """
    n_layers, n_heads, n, _ = maps.shape
    model = ModelInfo.from_json({**INFO.to_json(), "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": max(1, n_heads // 2), "n_ctx": n})
    first, last = rows or (0, n)
    with TraceWriter(folder, model, n, precision, rows=rows) as writer:
        for layer in range(n_layers):
            for name, values in arrays.items():
                writer.write(Piece(name, layer, 0, values[layer], "test"))
            heads = kept.get(layer, ()) if kept is not None else None
            if heads != ():
                values = maps[layer][list(heads) if heads else slice(None), first:last, :last]
                writer.write(Piece(site, layer, first, np.ascontiguousarray(values), "test", heads=heads))
        writer.tokens(list(range(n)), [f" t{i}" for i in range(n)], n, [0])
        writer.vocabulary({i: f" t{i}" for i in range(n)})
        return writer.publish(engine_version="test", prompt="maps", response="", integrity={}, timings={})

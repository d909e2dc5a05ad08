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

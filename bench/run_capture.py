"""A case: this program captures a prompt; when the call returns the trace is on disk under its final name."""

from __future__ import annotations

import json
import sys
from math import prod
from pathlib import Path
from typing import Any

from backend import open_model, open_trace
from backend.experiments.capture import CaptureSpec, capture
from backend.sites import SITES
from bench.measure import serve
from bench.models import FOLDER


def main(path: str, n_threads: int, ids: list[int] | None = None, text: str = "", n_tokens: int = 0, sites: list[str] | None = None, lens: bool | None = None,
         gpu: bool = False) -> None:  # fmt: skip
    """ids, or the first n_tokens of a text. sites None: the standard ones; lens None: as a capture decides. n_threads reaches the engine as LAYERSCOPE_N_THREADS."""
    model = open_model(path, device="cuda" if gpu else "cpu", n_gpu_layers="auto" if gpu else 0)
    prompt = ids if ids is not None else model.engine.tokenize(text)[:n_tokens]

    def trace(tokens: list[int]) -> Path:
        spec = CaptureSpec(token_ids=tuple(tokens), sites=tuple(sites) if sites else None, lens=lens)
        return capture(model.engine, spec, FOLDER / "traces")

    serve(lambda: trace(prompt), lambda: trace(prompt[:4]).unlink(), _read_and_remove)


def _read_and_remove(path: Path) -> dict[str, Any]:
    """The capture's own timings, the size of the file, and the number of values of sites in it, what the causal mask hides included."""
    with open_trace(path) as trace:
        sizes = {**trace.info.dims, **dict.fromkeys(("pos", "q_pos", "k_pos"), trace.n_tokens)}
        n_values = sum(prod(sizes[dim] for dim in SITES[site].dims) for site, _ in trace)
        found = {"timings": trace.metadata["timings"], "file_bytes": path.stat().st_size, "n_values": n_values}
    path.unlink()
    return found


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

"""A case: this program captures a prompt; when the call returns the trace is on disk under its final name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from backend import open_model, open_trace
from backend.experiments.capture import CaptureSpec, capture
from bench.measure import serve
from bench.models import FOLDER


def main(path: str, ids: list[int], sites: list[str] | None, n_threads: int, lens: bool = False, layers: list[int] | None = None, device: str = "auto",
         n_gpu_layers: int | str = "auto") -> None:  # fmt: skip
    model = open_model(path, device=device, n_gpu_layers=n_gpu_layers)  # type: ignore[arg-type]  # threads: LAYERSCOPE_N_THREADS

    def trace(tokens: list[int]) -> Path:
        spec = CaptureSpec(token_ids=tuple(tokens), sites=tuple(sites) if sites else None, layers=tuple(layers) if layers is not None else None, lens=lens)
        return capture(model.engine, spec, FOLDER / "traces")

    serve(lambda: trace(ids), lambda: trace(ids[:4]).unlink(), _read_and_remove)


def _read_and_remove(path: Path) -> dict[str, Any]:
    """The capture's own timings, the size of the file, and the number of values of sites in it."""
    with open_trace(path) as trace:
        n_values = sum(trace[site if layer is None else (site, layer)].size for site, layer in trace)
        found = {"timings": trace.metadata["timings"], "file_bytes": path.stat().st_size, "n_values": n_values}
    path.unlink()
    return found


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

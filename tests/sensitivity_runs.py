"""Folders as a sensitivity run writes them, made of drawn numbers: for tests of what reads them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from backend.experiments.sensitivity import Spec

COMPONENTS = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_gate", "mlp.W_in", "mlp.W_out")
BASELINE = {"nll": 1.5, "perplexity": 4.48, "ci": [4.2, 4.8]}
COLUMNS = ("scope", "rank", "name", "layer", "component", "expert", "row", "column", "value", "score", "percentile")


def write_run(folder: Path, *, metric: str = "grad_x_weight", model: str = "demo-dense", n_layers: int = 4, k: int = 20, seed: int = 0) -> Path:
    """A complete run: every part of sensitivity_stats.json is there. The same seed and metric give the same numbers."""
    rng = np.random.default_rng([seed, sum(metric.encode())])
    folder.mkdir(parents=True)
    spec = Spec(model, metric, topk=k, stability_check=True, prune=(0.1, 0.5), gradient_flow=True, super_weights=True)
    run_id = f"{sum((metric + model + str(seed)).encode()):026d}"
    manifest = {
        "schema": "layerscope.sensitivity/1", "id": run_id, "created": "2026-01-01T00:00:00+00:00", "layerscope": "0.0", "command": ["python", "-m", "backend", "sensitivity"],
        "spec": spec.to_json(), "model": {"name": model, "architecture": "mistral", "n_layers": n_layers, "n_params": 3_000_000, "quantization": "F32", "engine": "hf",
                                          "engine_version": "transformers", "identity": "0" * 16},
        "text": {"name": "bundled", "sha256": "0" * 64, "n_windows": 50, "n_tokens": 6400, "window": 128}, "packages": {"torch": "2.13.0"},
        "seconds": {"ranking": 1.0, "perturbation": 3.0}, "notes": [],
    }  # fmt: skip
    top = [row for layer in range(n_layers) for row in _top(rng, layer, k)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "sensitivity_stats.json").write_text(json.dumps(_stats(rng, spec, run_id, n_layers, top)))
    with open(folder / "top_weights.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(top)
    return folder


def _top(rng: np.random.Generator, layer: int, k: int) -> list[dict[str, Any]]:
    scores = np.sort(rng.lognormal(-6, 1, k))[::-1]
    rows = []
    for rank, score in enumerate(scores, 1):
        component = str(rng.choice(COMPONENTS, p=[0.05, 0.05, 0.2, 0.2, 0.1, 0.1, 0.3]))
        rows.append({"scope": layer, "rank": rank, "name": f"blocks.{layer}.{component}", "layer": layer, "component": component, "expert": "", "row": int(rng.integers(128)),
                     "column": int(rng.integers(128)), "value": float(rng.normal()), "score": float(score), "percentile": 100.0 - rank / 1000})  # fmt: skip
    return rows


def _stats(rng: np.random.Generator, spec: Spec, run_id: str, n_layers: int, top: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = []
    for layer in range(n_layers):
        for component in COMPONENTS:
            name, scores = f"blocks.{layer}.{component}", rng.lognormal(-9 + 0.3 * layer, 1.5, 4096)
            counts, edges = np.histogram(np.log10(scores), bins=40)
            quantiles = dict(zip(("p50", "p90", "p99", "p999"), map(float, np.quantile(scores, (0.5, 0.9, 0.99, 0.999))), strict=True))
            tensors.append({"name": name, "layer": layer, "component": component, "n": 4096, "mean": float(scores.mean()), "std": float(scores.std()), "max": float(scores.max()),
                            **quantiles, "zeros": 0.0, "n_top": sum(row["name"] == name for row in top),
                            "histogram": {"log10_edges": edges.tolist(), "counts": counts.tolist()}})  # fmt: skip
    return {
        "schema": "layerscope.sensitivity/1", "id": run_id, "metric": spec.metric, "mode": spec.mode, "tensors": tensors,
        "perturbation": {"op": "sign_flip", "scale": 1.0, "bit": None, "baseline": BASELINE, "runs": [
            _perturbed("top_k", None, 3.2, spec.topk), *(_perturbed("random_k", s, 1.01 + 0.002 * s, spec.topk) for s in spec.seeds),
            _perturbed("bottom_k", None, 1.0, spec.topk)]},
        "stability": {"ks": [5, 10, 20], "pairs": [_pair(kind, a, b, float(rng.uniform(0.4, 0.7))) for kind, a, b in (
            ("seed", "0", "1"), ("seed", "0", "2"), ("seed", "1", "2"), ("sample", "half 1", "half 2"), ("metric", spec.metric, "magnitude"),
            ("metric", spec.metric, "wanda"))]},
        "pruning": {"metric": spec.metric, "within": "tensor", "baseline": BASELINE, "rows": [
            {"sparsity": s, "zeros": s, "nll": 1.5 * (1 + s), "perplexity": 4.48 * (1 + 3 * s), "ratio": 1 + 3 * s, "ci": [1 + 2.8 * s, 1 + 3.2 * s],
             "divergence": [s * (layer + 1) / n_layers for layer in range(n_layers)]} for s in spec.prune]},
        "gradient_flow": {"layers": list(range(n_layers)), "components": list(COMPONENTS), "norm": rng.lognormal(0, 1, (len(COMPONENTS), n_layers)).tolist(),
                          "n_windows": 50},
        "super_weights": {"threshold": 6.0, "candidates": [
            _candidate(1, 7, 11, -1.92, 1, (88.0, 160.0), 0.9, 40.0, "confirmed"), _candidate(2, 3, 5, 0.4, 30, (9.0, 8.0), 0.0, 1.0, "found"),
        ], "published": [], "random": {"n": 20, "worst_ratio": 1.02}},
    }  # fmt: skip


def _perturbed(selection: str, seed: int | None, ratio: float, n: int) -> dict[str, Any]:
    return {"selection": selection, "seed": seed, "n": n, "nll": 1.5 + float(np.log(ratio)), "perplexity": 4.48 * ratio, "ratio": ratio, "ci": [0.95 * ratio, 1.05 * ratio],
            "changed": n, "not_representable": 0, "worst_representation": 0.0, "n_others": 0, "worst_other": 0.0}  # fmt: skip


def _pair(kind: str, a: str, b: str, jaccard: float) -> dict[str, Any]:
    return {"kind": kind, "a": a, "b": b, "jaccard": {"5": 0.8, "10": 0.7, "20": jaccard}, "spearman": 0.6}


def _candidate(layer: int, row: int, column: int, value: float, rank: int, spikes: tuple[float, float], persistence: float, ratio: float, status: str) -> dict[str, Any]:
    return {"layer": layer, "name": f"blocks.{layer}.mlp.W_out", "expert": None, "row": row, "column": column, "value": value, "magnitude_rank": rank,
            "input_spike": spikes[0], "output_spike": spikes[1], "persistence": persistence, "ratio": ratio, "ci": [0.9 * ratio, 1.1 * ratio], "status": status}  # fmt: skip

"""PyTorch: a capture on disk beside transformers' plain forward pass, and beside TransformerLens and nnsight, which keep it in memory."""

from __future__ import annotations

from typing import Any

from backend.sites import SITES, STANDARD_SITES
from bench.measure import PEERS_PYTHON, Case, in_turn
from bench.models import BASE, describe, hf_folder, random_ids
from bench.report import RESIDUAL_AND_ATTENTION, Section, at_most, at_most_memory, time_table, timings_table

N_TOKENS = 256
OURS, OURS_PART = "all standard sites on disk", "residual stream + attention on disk"
LENS = "TransformerLens, the same sites in memory"


def hooks(sites: tuple[str, ...] | list[str], n_layers: int) -> list[str]:
    """TransformerLens' names of the sites, of every layer."""
    rows = [SITES[site] for site in sites if not SITES[site].moe]
    return [f"blocks.{i}.{row.hook}" for row in rows if row.per_layer for i in range(n_layers)] + [row.hook for row in rows if not row.per_layer]


def section() -> Section:
    if not PEERS_PYTHON.is_file():
        raise SystemExit(f"The peers are not installed: {PEERS_PYTHON.parent.parent.name} is missing. Run make peers-env first.")
    here: dict[str, Any] = {"path": str(hf_folder()), "ids": random_ids(N_TOKENS)}
    peer = {**here, "python": PEERS_PYTHON}
    n_layers = BASE.num_hidden_layers
    runs = in_turn({
        "plain forward, sdpa": Case("run_transformers", **here),
        "plain forward, eager attention": Case("run_transformers", **here, attention="eager"),
        OURS_PART: Case("run_capture", **here, sites=RESIDUAL_AND_ATTENTION),
        OURS: Case("run_capture", **here),
        LENS: Case("run_transformer_lens", **peer, hooks=hooks(STANDARD_SITES, n_layers)),
        "TransformerLens, every hook in memory": Case("run_transformer_lens", **peer),
        "nnsight, the same sites in memory": Case("run_nnsight", **peer, everything=True),
        "nnsight, residual stream + attention in memory": Case("run_nnsight", **peer, everything=False),
    })  # fmt: skip
    text = f"""
{describe(BASE)}, float32, {N_TOKENS} tokens, CPU. Every case gives the logits of every position. TransformerLens runs with unprocessed weights
(no folding, no centering), run_with_cache with the hooks of the standard sites, and once with all hooks, its default; nnsight saves the same sites.
Both keep float32 arrays in memory; Layerscope's trace is on disk when the call returns. The patterns' own arithmetic is what eager attention takes
beyond sdpa, so sdpa plus the patterns is the forward pass with eager attention.

{time_table(runs, "plain forward, sdpa")}

Where a capture's time goes, by its own record in the last round:

{timings_table(runs)}
"""
    goals = [
        at_most(1.00, OURS, LENS, runs),
        at_most(1.10, OURS_PART, "plain forward, eager attention", runs),
        at_most_memory(0.50, OURS, LENS, runs),
    ]
    return Section("PyTorch: a capture beside the plain forward pass, TransformerLens and nnsight", text, goals)

"""Size of a trace on disk against its values as plain float32, for residual stream and attention at 256 tokens."""

from __future__ import annotations

import sys
from typing import Any

from bench.measure import ROOT, Case
from bench.models import BASE, describe, gguf_file, hf_folder, random_ids
from bench.report import RESIDUAL_AND_ATTENTION, Goal, Section, megabytes, table

N_TOKENS, LEAST_SAVED = 256, 0.70
MAIN = "residual stream + attention"
SITES = {MAIN: RESIDUAL_AND_ATTENTION, "resid_post + attention": ["resid_post", "attn_pattern"], "all standard sites": None}


def section() -> Section:
    random: dict[str, Any] = {"ids": random_ids(N_TOKENS)}
    real: dict[str, Any] = {"text": _text(), "n_tokens": N_TOKENS}
    models = {
        "random, Q8_0": {"path": str(gguf_file()), **random},
        "random, PyTorch": {"path": str(hf_folder()), **random},
        "demo-dense, Q8_0, real text": {"path": "demo-dense-q8_0", **real},
        "demo-dense, PyTorch, real text": {"path": "demo-dense", **real},
    }
    rows, goals = [], []
    for model, arguments in models.items():
        for what in SITES if "Q8_0" in model else [MAIN]:
            with Case("run_capture", **arguments, sites=SITES[what]) as case:
                found = case.run()
            raw, stored = 4 * found["n_values"], found["file_bytes"]
            saved = 1 - stored / raw
            rows.append([model, what, megabytes(raw), megabytes(stored), f"{saved:.1%}"])
            if what == MAIN:
                goals.append(Goal(f"{what}, {model}: at least {LEAST_SAVED:.0%} smaller than float32", f"{saved:.1%}", saved >= LEAST_SAVED))
    text = f"""
{N_TOKENS} tokens, all layers. *float32* is 4 bytes for every value of the sites, what the causal mask hides included; *on disk* is the whole
file: activations in float16, compressed without further loss, summaries, thumbnails, tokens and metadata. *random*: {describe(BASE)}.
*demo-dense*: the trained demo model reading text of the kind it was trained on.

{table(["model", "sites", "float32", "on disk", "smaller by"], rows, text_columns=2)}
"""
    return Section("Size of a trace", text, goals, 1)


def _text() -> str:
    """Documents of the kind that the demo models were trained on, from a seed of their own, more than enough for N_TOKENS."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from demo_text import documents

    return "\n".join(text for (_, text), _ in zip(documents(seed=99), range(100), strict=False))

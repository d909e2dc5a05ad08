"""GGUF: what capturing costs beside llama.cpp's own decode of the same prompt, 256 tokens, Q8_0."""

from __future__ import annotations

from bench.measure import Case, in_turn
from bench.models import BASE, describe, gguf_file, random_ids
from bench.report import RESIDUAL_AND_ATTENTION, Section, at_most, time_table, timings_table

N_TOKENS = 256


def section() -> Section:
    path, ids = str(gguf_file()), random_ids(N_TOKENS)
    runs = in_turn({
        "plain llama.cpp": Case("run_llama", path=path, ids=ids),
        "residual stream + attention": Case("run_capture", path=path, ids=ids, sites=RESIDUAL_AND_ATTENTION),
        "all standard sites": Case("run_capture", path=path, ids=ids),
        "all standard sites, with logit lens": Case("run_capture", path=path, ids=ids, lens=True),
        "llama.cpp as it comes": Case("run_llama", path=path, ids=ids, as_it_comes=True),
    })  # fmt: skip
    text = f"""
{describe(BASE)}, Q8_0, {N_TOKENS} tokens, CPU. *plain llama.cpp* decodes the prompt with the logits of every position, no callback, and the settings
of a capture (flash attention off, weights not repacked, pieces of 512 tokens); *as it comes* has llama.cpp's own defaults, which show no attention.
Both of these have libgomp's defaults, a capture on few cores lets waiting threads sleep sooner (`let_waiting_threads_sleep`).
A capture counts from the call until the trace lies on disk under its final name: sites of all layers ({", ".join(RESIDUAL_AND_ATTENTION)}; or the
standard ones), logit summaries, integrity checks, read back once. The logit lens, which a capture adds by itself only where it is cheap, has a row
of its own: unembedding every layer is more arithmetic than running this model.

{time_table(runs, "plain llama.cpp")}

Where a capture's time goes, by its own record in the last round:

{timings_table(runs)}
"""
    goals = [at_most(1.10, "residual stream + attention", "plain llama.cpp", runs), at_most(1.50, "all standard sites", "plain llama.cpp", runs)]
    return Section("GGUF: a capture beside plain llama.cpp", text, goals)

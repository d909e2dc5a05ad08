"""GGUF: what capturing costs beside llama.cpp's own decode of the same prompt, 256 tokens, Q8_0."""

from __future__ import annotations

from bench.measure import Case, in_turn
from bench.models import BASE, describe, gguf_file, random_ids
from bench.report import RESIDUAL_AND_ATTENTION, Goal, time_table, timings_table

N_TOKENS = 256
GOALS = {"residual stream + attention": Goal(1.10, "plain"), "all standard sites": Goal(1.50, "plain")}


def section() -> str:
    """Markdown."""
    path, ids = str(gguf_file()), random_ids(N_TOKENS)
    cases = {
        "plain": Case("run_llama", path=path, ids=ids),
        "residual stream + attention": Case("run_capture", path=path, ids=ids, sites=RESIDUAL_AND_ATTENTION),
        "all standard sites": Case("run_capture", path=path, ids=ids, sites=None),
        "all standard sites + logit lens": Case("run_capture", path=path, ids=ids, sites=None, lens=True),
        "llama.cpp as it comes": Case("run_llama", path=path, ids=ids, as_it_comes=True),
    }
    runs = in_turn(cases)
    return f"""## GGUF: a capture beside plain llama.cpp

{describe(BASE)}, Q8_0, {N_TOKENS} tokens, CPU. *plain* is llama.cpp's decode with the logits of every position, no callback, and the settings of
a capture (flash attention off, weights not repacked, pieces of 512 tokens). A capture counts from the call until the trace lies on disk under
its final name. *as it comes* is llama.cpp with its own defaults, which show no attention. The logit lens, an analysis that the capture adds by
itself when it is cheap, has a row of its own: unembedding every layer is more arithmetic than the model.

{time_table(runs, "plain", GOALS)}

Where a capture's time goes, by its own record (medians are above, this is the last round):

{timings_table(runs)}
"""


if __name__ == "__main__":
    print(section())

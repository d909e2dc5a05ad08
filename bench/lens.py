"""The logit lens of a trace, made when somebody looks at it: 32 layers, 512 positions, a vocabulary of 32,000."""

from __future__ import annotations

from bench.measure import Case, in_turn, n_threads
from bench.models import Sizes, describe, gguf_file, hf_folder, random_ids
from bench.report import Goal, Section, megabytes, table, time_table

# The lens depends on layers, d_model and vocabulary alone, so the rest of the model is small.
SIZES = Sizes(num_hidden_layers=32, hidden_size=1024, intermediate_size=256, num_attention_heads=8, num_key_value_heads=2, vocab_size=32_000)
N_TOKENS, ROUNDS = 512, 3
MOST_SECONDS = 15.0
HF, GGUF = "PyTorch, float32", "GGUF, Q8_0 output matrix"


def section() -> Section:
    ids = random_ids(N_TOKENS, SIZES)
    runs = in_turn({name: Case("run_lens", path=str(path), ids=ids) for name, path in ((HF, hf_folder(SIZES)), (GGUF, gguf_file(SIZES)))}, ROUNDS)
    multiply_adds = SIZES.num_hidden_layers * N_TOKENS * SIZES.hidden_size * SIZES.vocab_size
    rows = [[name, f"{multiply_adds / case.median / 1e9:.0f}", megabytes(case.last["result_bytes"])] for name, case in runs.items()]
    text = f"""
{describe(SIZES)}, {N_TOKENS} tokens; the trace holds embed and resid_post. Every row goes through the final norm and W_U once, {multiply_adds / 1e12:.2f} T
multiply-adds in all; of its {N_TOKENS} x {SIZES.vocab_size:,} logits the top 10, log-prob and rank of the token that follows, entropy and KL to the model are taken.

{time_table(runs, HF)}

{table(["case", "G multiply-adds/s, all counted", "results"], rows)}
"""
    goals = [
        Goal(f"{name}: the lens of 32 layers x 512 positions x 32,000 tokens in under {MOST_SECONDS:.0f} s on {n_threads()} threads",
             f"{case.median:.1f} s ({min(case.seconds):.1f} - {max(case.seconds):.1f})", case.median < MOST_SECONDS)
        for name, case in runs.items()
    ]  # fmt: skip
    return Section("Logit lens: a trace looked at for the first time", text, goals, ROUNDS)

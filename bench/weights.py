"""The weight report: statistics and histograms of every tensor of a Q4_K file, beside gguf's own dequantization of the same tensors."""

from __future__ import annotations

from bench.measure import Case, in_turn, n_threads
from bench.report import Goal, Section, at_most, megabytes, table, time_table
from bench.weight_files import q4_k_file

SMALL_LAYERS, LARGE_LAYERS = 1, 16
LEAST_RATE, MOST_MEMORY = 150e6, 512 << 20
OURS, THEIRS = "weight report", "gguf.quants.dequantize"


def section() -> Section:
    small, large = q4_k_file(SMALL_LAYERS), q4_k_file(LARGE_LAYERS)
    runs = in_turn({OURS: Case("run_weights", path=str(small)), THEIRS: Case("run_weights", path=str(small), plain=True)})
    with Case("run_weights", path=str(large)) as case:
        whole = case.run()
    n_weights = runs[OURS].last["n_weights"]
    rates = [n_weights / seconds for seconds in runs[OURS].seconds]
    undisturbed = n_threads() * n_weights / min(runs[OURS].cpu_seconds)
    size = large.stat().st_size
    rate = f"{whole['n_weights'] / whole['seconds'] / 1e6:,.0f} M"
    memory = [f"{size / 1e9:.2f} GB", f"{whole['n_weights']:,}", f"{whole['seconds']:.1f}", rate, megabytes(whole["extra_bytes"])]
    text = f"""
Random Q4_K blocks in the sizes of Llama 3 8B, cut to {SMALL_LAYERS} layer ({n_weights / 1e6:,.0f} M weights) for the times and to {LARGE_LAYERS} layers
({size / 1e9:.2f} GB, {whole["n_weights"] / 1e9:.2f} G weights) for the memory; the files lie in the page cache. *{OURS}*: two passes over every tensor:
moments; then histogram, outliers, near-zero share and largest weights. *{THEIRS}*: the same tensors as float32 by NumPy on one thread, nothing computed
from them. *At full cores* is what the CPU time amounts to where other programs took the cores: threads x weights / CPU seconds.

{time_table(runs, THEIRS)}

{table(["file", "weights", "seconds", "weights/s", "extra peak memory"], [memory])}
"""
    median = n_weights / runs[OURS].median
    measured = f"{median / 1e6:,.0f} M; best round {max(rates) / 1e6:,.0f} M; at full cores {undisturbed / 1e6:,.0f} M"
    goals = [
        Goal(f"at least {LEAST_RATE / 1e6:.0f} M weights of Q4_K a second, histograms included, on {n_threads()} threads", measured, median >= LEAST_RATE),
        at_most(0.50, OURS, THEIRS, runs),
        Goal(f"at most {MOST_MEMORY >> 20} MiB above the interpreter for a file of {size / 1e9:.1f} GB", megabytes(whole["extra_bytes"]), whole["extra_bytes"] <= MOST_MEMORY),
    ]
    return Section("Weight report: every tensor of a file", text, goals)

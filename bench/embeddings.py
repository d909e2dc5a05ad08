"""Embeddings: PCA and UMAP of a vocabulary of 150,000 tokens, t-SNE of its sample, and what the server needs to show it."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np

from bench.measure import Case, Runs, in_turn
from bench.models import FOLDER
from bench.report import Goal, Section, megabytes, table

N_TOKENS, WIDTH, N_GROUPS = 150_000, 1024, 400
PCA_LIMIT_S, UMAP_LIMIT_S, MOST_MEMORY, MOST_SERVER_MEMORY = 30.0, 600.0, 1024 << 20, 300 << 20
ROUNDS = 1  # UMAP takes minutes


def section() -> Section:
    path = str(vocabulary_file())
    runs = in_turn({what: Case("run_embeddings", path=path, what=what) for what in ("pca", "tsne", "view")}, ROUNDS)
    with Case("run_embeddings", path=path, what="umap") as case:
        answer = case.run()
    runs["umap"] = Runs([answer["seconds"]], [answer["cpu_seconds"]], answer["extra_bytes"], answer)
    names = {"pca": "PCA", "umap": "UMAP", "tsne": "t-SNE of a sample of 10,000", "view": "server, showing all points"}
    rows = [[words, f"{runs[what].median:.1f}", f"{runs[what].cpu_seconds[0]:.1f}", megabytes(runs[what].extra_bytes)] for what, words in names.items()]
    text = f"""
A matrix of {N_TOKENS:,} tokens x {WIDTH:,} dimensions in Q8_0 ({N_GROUPS} groups of random vectors), read in blocks. *PCA*: 50 components of all rows by their covariance, and
all coordinates. *UMAP*: that, then exact nearest neighbours of all pairs in 50 dimensions and 200 epochs. *Server*: places, texts and colours of all points, the histogram and
the variance as they are sent to the browser ({megabytes(runs["view"].last["sent_bytes"])}), in the server's own process.

{table(["case", "seconds", "CPU seconds", "extra peak memory"], rows)}
"""
    goals = [
        Goal(f"PCA of {N_TOKENS:,} x {WIDTH:,} in at most {PCA_LIMIT_S:.0f} s", f"{runs['pca'].median:.1f} s", runs["pca"].median <= PCA_LIMIT_S),
        Goal(f"UMAP of all of them in at most {UMAP_LIMIT_S / 60:.0f} minutes", f"{runs['umap'].median:.0f} s", runs["umap"].median <= UMAP_LIMIT_S),
        Goal(f"at most {MOST_MEMORY >> 20} MiB for either", megabytes(max(runs[what].extra_bytes for what in ("pca", "umap"))),
             max(runs[what].extra_bytes for what in ("pca", "umap")) <= MOST_MEMORY),
        Goal(f"at most {MOST_SERVER_MEMORY >> 20} MiB above idle in the server for the view", megabytes(runs["view"].extra_bytes), runs["view"].extra_bytes <= MOST_SERVER_MEMORY),
    ]  # fmt: skip
    return Section("Embeddings: a vocabulary of 150,000 tokens", text, goals, ROUNDS)


def vocabulary_file(folder: Path = FOLDER) -> Path:
    """A GGUF file that holds the matrix and little else, made on first use and then kept."""
    out = folder / f"vocabulary-{N_TOKENS}x{WIDTH}-q8_0.gguf"
    if out.is_file():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        _write(part)
        part.rename(out)
    finally:
        part.unlink(missing_ok=True)
    return out


def _write(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in ((writer.add_context_length, 1024), (writer.add_embedding_length, WIDTH), (writer.add_block_count, 1), (writer.add_feed_forward_length, WIDTH),
                       (writer.add_head_count, 16), (writer.add_head_count_kv, 16)):  # fmt: skip
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    random = np.random.default_rng(0)
    centres, member = random.standard_normal((N_GROUPS, WIDTH), np.float32), random.integers(0, N_GROUPS, N_TOKENS)
    kind = gguf.GGMLQuantizationType.Q8_0
    groups = np.array_split(member, 30)
    stored = [gguf.quants.quantize(0.6 * centres[of] + random.standard_normal((len(of), WIDTH), np.float32), kind) for of in groups]
    writer.add_tensor("token_embd.weight", np.concatenate(stored), raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""Next-token logits: probabilities, the best tokens, entropy and rank.

Everything takes logits (pos, d_vocab) in any float type, works in float64 and goes through the vocabulary a few rows at a time,
so a matrix of 128,000 columns costs no second copy of itself. Natural logarithms throughout.

Broken models give NaN: a row that holds NaN or +inf has no distribution, so its log-probabilities and entropy are NaN and its tokens have
no rank (-1). Its best tokens are still the largest numbers, NaN last, so that every row names as many.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

_CELLS = 1 << 21  # cells of one float64 working block: 16 MB


def row_blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Slices of rows whose float64 block stays small."""
    step = max(1, _CELLS // max(1, n_columns))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def logsumexp(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """ln sum exp over the last axis, shifted by the row's maximum so that nothing overflows. (pos, d_vocab) -> (pos,)."""
    out = np.empty(len(logits), np.float64)
    for rows in row_blocks(*logits.shape):
        block = np.asarray(logits[rows], np.float64)
        top = block.max(axis=-1)
        with np.errstate(invalid="ignore"):
            out[rows] = top + np.log(np.exp(block - top[:, None]).sum(axis=-1))
    return out


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities, (pos, d_vocab) float64: as large as the vocabulary, so call it on a block of rows."""
    block = np.asarray(logits, np.float64)
    with np.errstate(invalid="ignore"):
        shifted = block - block.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def top_k(logits: NDArray[np.floating], k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The k most probable tokens of each row, best first; equal logits in the order of their ids.

    logits: (pos, d_vocab). Returns ids (pos, k) int32 and log-probabilities (pos, k) float32, k at most d_vocab.
    """
    n_rows, n_vocab = logits.shape
    k = min(k, n_vocab)
    ids = np.empty((n_rows, k), np.int32)
    for i in range(n_rows):
        row = np.asarray(logits[i])
        if (missing := np.isnan(row)).any():
            row = np.where(missing, -np.inf, row)
        threshold = np.partition(row, n_vocab - k)[n_vocab - k]
        candidates = np.flatnonzero(row >= threshold)  # ids ascend, so a stable sort breaks ties by id
        ids[i] = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
    values = np.take_along_axis(np.asarray(logits), ids, axis=-1).astype(np.float64)
    return ids, (values - logsumexp(logits)[:, None]).astype(np.float32)


def entropy(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """Entropy of the next-token distribution, -sum p ln p, in nats. (pos, d_vocab) -> (pos,); at most ln d_vocab."""
    out = np.empty(len(logits), np.float32)
    for rows in row_blocks(*logits.shape):
        logprobs = log_softmax(logits[rows])
        out[rows] = -(np.exp(logprobs) * np.maximum(logprobs, -1e300)).sum(axis=-1)  # p = 0 adds 0, not 0 times infinity
    return out


def next_token_logprobs(logits: NDArray[np.floating], ids: ArrayLike) -> NDArray[np.float32]:
    """Log-probability that each position gives to the token that really follows; NaN at the last, where nothing follows.

    logits: (pos, d_vocab); ids: (pos,) token ids. Returns (pos,) float32, so out[i] belongs to ids[i + 1].
    """
    following = np.asarray(ids)[1:]
    out = np.full(len(logits), np.nan, np.float32)
    values = np.asarray(logits)[np.arange(len(following)), following].astype(np.float64)
    out[:-1] = values - logsumexp(logits)[:-1]
    return out


def rank_of(logits: NDArray[np.floating], ids: ArrayLike) -> NDArray[np.int32]:
    """How many tokens stand before the given one: 0 for the best, -1 in a row that holds NaN. Equal logits stand in the order of their ids, as in `top_k`.

    logits: (pos, d_vocab); ids: (pos,) one token per row, or one id for all rows. Returns (pos,) int32.
    """
    wanted = np.broadcast_to(np.asarray(ids), (len(logits),))
    out = np.empty(len(logits), np.int32)
    columns = np.arange(logits.shape[1])
    for rows in row_blocks(*logits.shape):
        block, column = np.asarray(logits[rows]), wanted[rows, None]
        value = np.take_along_axis(block, column, axis=-1)
        before = (block > value) | ((block == value) & (columns < column))
        out[rows] = np.where(np.isnan(block).any(axis=-1), -1, before.sum(axis=-1))
    return out

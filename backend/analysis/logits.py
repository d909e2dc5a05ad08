"""Next-token logits: probabilities, the best tokens, entropy and rank.

Everything takes logits (pos, d_vocab) in any float type and goes through the vocabulary a few rows at a time, so a matrix of
128,000 columns costs no second copy of itself. The single functions work in float64; `summary`, which every run goes through,
in float32, which errs by about 1e-6. Natural logarithms throughout.

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
    """The k most probable tokens of each row, best first; equal logits in the order of their ids, NaN last.

    logits: (pos, d_vocab). Returns ids (pos, k) int32 and log-probabilities (pos, k) float32, k at most d_vocab.
    """
    ids = top_ids(logits, k)
    values = np.take_along_axis(np.asarray(logits), ids, axis=-1).astype(np.float64)
    return ids, (values - logsumexp(logits)[:, None]).astype(np.float32)


def top_ids(logits: NDArray[np.floating], k: int) -> NDArray[np.int32]:
    """Ids of the k largest logits of each row, best first; equal ones in the order of their ids, NaN last. (pos, d_vocab) -> (pos, k)."""
    n_rows, n_vocab = logits.shape
    k = min(k, n_vocab)
    ids = np.empty((n_rows, k), np.int32)
    # At least k values are no smaller than the k-th largest of the maxima of k or more groups: a few candidates stand for the row.
    width = next((w for w in (64, 16, 4) if n_vocab // w >= 2 * k), 1)
    whole = n_vocab // width * width
    for i in range(n_rows):
        row = np.asarray(logits[i])
        if (missing := np.isnan(row)).any():
            row = np.where(missing, -np.inf, row)
        maxima = row[:whole].reshape(-1, width).max(axis=-1) if width > 1 else row
        threshold = np.partition(maxima, len(maxima) - k)[len(maxima) - k]
        candidates = np.flatnonzero(row >= threshold)  # ids ascend, so a stable sort breaks ties by id
        ids[i] = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
    return ids


def summary(logits: NDArray[np.float32], following: NDArray[np.integer], k: int) -> dict[str, NDArray]:
    """What a trace keeps of every position, in one pass over the vocabulary.

    logits: (pos, d_vocab); following: (pos,) ids of the tokens that really follow.
    Returns top_ids (pos, k) int32 and top_logprobs (pos, k), logsumexp, entropy, next_logprobs (pos,) float32, all in nats, and
    next_ranks (pos,) int32, 0 for the best. Same definitions as the functions of these names.
    """
    ids = top_ids(logits, k)
    out: dict[str, NDArray] = {name: np.empty(len(logits), np.float32) for name in ("logsumexp", "entropy", "next_logprobs")}
    ranks = np.empty(len(logits), np.int32)
    for rows in row_blocks(*logits.shape):
        block = np.asarray(logits[rows], np.float32)
        top = block.max(axis=-1, keepdims=True)
        shifted = block - top
        weights = np.exp(shifted)
        total = weights.sum(axis=-1)
        log_total = np.log(total)
        out["logsumexp"][rows] = top[:, 0] + log_total
        # -sum p ln p with ln p = shifted - ln total, and 0 where p is 0
        out["entropy"][rows] = log_total - np.multiply(weights, np.maximum(shifted, -1e30), out=weights).sum(axis=-1) / total
        value = np.take_along_axis(block, following[rows, None], axis=-1)
        out["next_logprobs"][rows] = value[:, 0] - out["logsumexp"][rows]
        ranks[rows] = _rank(block, value, following[rows])
    values = np.take_along_axis(np.asarray(logits), ids, axis=-1)
    return {"top_ids": ids, "top_logprobs": (values - out["logsumexp"][:, None]).astype(np.float32), **out, "next_ranks": ranks}


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
    for rows in row_blocks(*logits.shape):
        block = np.asarray(logits[rows])
        out[rows] = _rank(block, np.take_along_axis(block, wanted[rows, None], axis=-1), wanted[rows])
    return out


def _rank(block: NDArray[np.floating], value: NDArray[np.floating], token: NDArray[np.integer]) -> NDArray[np.int64]:
    """Columns that stand before the token of each row, whose value is `value` (pos, 1): larger ones, and equal ones with a smaller id.

    -1 in a row that holds NaN.
    """
    before = np.empty(len(block), np.int64)
    for i, row in enumerate(block):  # a row at a time: counting along an axis is several times slower
        equal = row[: token[i]] == value[i]
        before[i] = np.count_nonzero(row > value[i]) + np.count_nonzero(equal)
    return np.where(np.isnan(block.max(axis=-1)), -1, before)

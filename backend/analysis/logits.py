"""Next-token logits: probabilities, the best tokens, entropy and rank.

Everything takes logits (pos, d_vocab) in any float type and goes through the vocabulary a few rows at a time, so a matrix of
128,000 columns costs no second copy of itself. The single functions work in float64; `RowReader`, which every run and every lens
goes through, in float32, which errs by about 1e-6. Natural logarithms throughout.

Broken models give NaN: a row that holds NaN or +inf has no distribution, so its log-probabilities and entropy are NaN and its tokens have
no rank (-1). Its best tokens are still the largest numbers, NaN last, so that every row names as many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from backend.analysis.activations import bucket_edges

_CELLS = 1 << 21  # cells of one float64 working block: 16 MB
_WORTH_COMPILING = 8  # rows; a generation, which has one at a time, need not wait for Numba
_SCALARS = ("logsumexp", "entropy", "next_logprobs")


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
    ids = np.empty((len(logits), min(k, logits.shape[1])), np.int32)
    for i in range(len(logits)):
        row = np.asarray(logits[i])
        if (missing := np.isnan(row)).any():
            row = np.where(missing, -np.inf, row)
        ids[i] = _row_top_ids(row, ids.shape[1])
    return ids


def _row_top_ids(row: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Of one row without NaN: at least k values are no smaller than the k-th largest of the maxima of k or more groups, so few candidates stand for it."""
    groups = _n_groups(len(row), k)
    # Each group takes every `groups`-th column, so that the maxima of all of them are made of long runs at once.
    maxima = row[: len(row) // groups * groups].reshape(-1, groups).max(axis=0) if groups else row
    threshold = np.partition(maxima, len(maxima) - k)[len(maxima) - k]
    candidates = np.flatnonzero(row >= threshold)  # ids ascend, so a stable sort breaks ties by id
    return candidates[np.argsort(-row[candidates], kind="stable")[:k]]


def _n_groups(n: int, k: int) -> int:
    """Of `n` columns, so that their k best are looked for in few of the groups; 0 where that is all of them."""
    return next((groups for groups in (n // width for width in (64, 16, 4)) if groups >= 2 * k), 0)


@dataclass
class RowSums:
    """What is known of one row after `RowReader.read`; logarithms natural, `scalar` as (logsumexp, entropy, log-prob of the token that follows)."""

    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float64]
    scalars: tuple[float, float, float]
    rank: int


class RowReader:
    """Everything a trace or a lens keeps of a row of logits, read while the row lies in the processor's cache.

    Same definitions as the functions of these names, in float32. It holds working rows: one reader for each thread.
    """

    def __init__(self, d_vocab: int, k: int) -> None:
        self.k = min(k, d_vocab)
        self.shifted, self.weights = np.empty(d_vocab, np.float32), np.empty(d_vocab, np.float32)
        self.top = self.total = self.log_total = 0.0

    def take(self, row: NDArray[np.float32]) -> None:
        """Of a row (d_vocab,): `top` its maximum, `shifted` = row - top, `weights` = exp(shifted), `total` their sum and `log_total` its logarithm."""
        top = row.max()
        np.subtract(row, top, out=self.shifted)
        np.exp(self.shifted, out=self.weights)
        self.top, self.total = float(top), float(self.weights.sum())
        self.log_total = math.log(self.total) if self.total > 0 else math.nan  # NaN > 0 is false

    def read(self, row: NDArray[np.float32], following: int) -> RowSums:
        """The whole of one row (d_vocab,), float32; following: the token that really follows."""
        self.take(row)
        log_sum, value = self.top + self.log_total, row[following]
        spread = float(np.dot(self.weights, self.shifted)) / self.total
        own_entropy = self.log_total - spread  # -sum p ln p with ln p = shifted - ln total
        if math.isnan(own_entropy) and not math.isnan(log_sum):  # a logit of -inf, whose p ln p is 0
            own_entropy = float(entropy(row[None])[0])
        best = top_ids(row[None], self.k)[0] if math.isnan(self.top) else _row_top_ids(row, self.k)
        return RowSums(best, row[best] - np.float64(log_sum), (log_sum, own_entropy, float(value) - log_sum), self.rank(row, following))

    def rank(self, row: NDArray[np.float32], token: int) -> int:
        """How many tokens stand before `token` in the row that was taken last, as `rank_of` counts."""
        value = row[token]
        return -1 if math.isnan(self.top) else int(np.count_nonzero(row > value)) + int(np.count_nonzero(row[:token] == value))


def summary(logits: NDArray[np.float32], following: NDArray[np.integer], k: int) -> dict[str, NDArray]:
    """What a trace keeps of every position, in one pass over the vocabulary.

    logits: (pos, d_vocab); following: (pos,) ids of the tokens that really follow.
    Returns top_ids (pos, k) int32 and top_logprobs (pos, k), logsumexp, entropy, next_logprobs (pos,) float32, all in nats, and
    next_ranks (pos,) int32, 0 for the best. Same definitions as the functions of these names.
    """
    if len(logits) >= _WORTH_COMPILING:
        return _summary_of_many(np.ascontiguousarray(logits, np.float32), np.asarray(following, np.int64), min(k, logits.shape[1]))
    reader = RowReader(logits.shape[1], k)
    with np.errstate(invalid="ignore"):
        read = [reader.read(np.asarray(row, np.float32), int(token)) for row, token in zip(logits, following, strict=True)]
    return joined(read)


def _summary_of_many(logits: NDArray[np.float32], following: NDArray[np.int64], k: int) -> dict[str, NDArray]:
    from backend.analysis import compiled_logits

    n = len(logits)
    if len(following) != n or following.min() < 0 or following.max() >= logits.shape[1]:  # a compiled loop would read beyond the array
        raise ValueError(f"{n} rows of {logits.shape[1]:,} logits have {len(following)} next tokens, from {following.min()} to {following.max()}.")
    found: dict[str, NDArray] = {"top_ids": np.empty((n, k), np.int32), "top_logprobs": np.empty((n, k), np.float32)}
    scalars, ranks, odd = np.zeros((n, 3)), np.empty(n, np.int32), np.empty(n, bool)
    compiled_logits.read_rows(logits, following, _n_groups(logits.shape[1], k), *found.values(), scalars, ranks, odd)
    found |= {name: scalars[:, at].astype(np.float32) for at, name in enumerate(_SCALARS)} | {"next_ranks": ranks}
    if odd.any():
        reader = RowReader(logits.shape[1], k)
        with np.errstate(invalid="ignore"):
            others = joined([reader.read(row, int(token)) for row, token in zip(logits[odd], following[odd], strict=True)])
        for name, values in others.items():
            found[name][odd] = values
    return found


def joined(rows: Sequence[RowSums]) -> dict[str, NDArray]:
    """The arrays of `summary` from the sums of its rows."""
    scalars = np.array([row.scalars for row in rows], np.float32)
    return {
        "top_ids": np.array([row.top_ids for row in rows], np.int32),
        "top_logprobs": np.array([row.top_logprobs for row in rows], np.float32),
        **{name: scalars[:, at] for at, name in enumerate(_SCALARS)},
        "next_ranks": np.array([row.rank for row in rows], np.int32),
    }


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


def cumulative_perplexity(next_logprobs: NDArray[np.floating]) -> NDArray[np.float64]:
    """exp of the mean surprise of all tokens up to the one that follows each position: (pos,) -> (pos,), NaN at the last, where nothing follows.

    next_logprobs: (pos,) as `next_token_logprobs` gives them. One NaN, of a broken prediction, makes every later value NaN.
    Source: Jelinek et al. 1977, "Perplexity, a measure of the difficulty of speech recognition tasks".
    """
    surprises = -np.asarray(next_logprobs, np.float64)
    if not len(surprises):
        return surprises
    with np.errstate(over="ignore"):
        means = np.cumsum(surprises[:-1]) / np.arange(1, len(surprises))
        return np.append(np.exp(means), np.nan)


def strongest(values: NDArray[np.floating], most: int) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """At most `most` values that stand for all: the largest of each run of positions. (pos,) -> (cell,), edges (cell + 1,) of the runs.

    NaN only where a whole run is NaN.
    """
    edges = bucket_edges(len(values), min(most, len(values)))
    return np.fmax.reduceat(values, edges[:-1]), edges

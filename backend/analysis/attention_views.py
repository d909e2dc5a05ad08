"""Other ways to look at attention maps: without the first token, weighted by what is read, mixed over heads and layers, counted.

Maps are (q_pos, k_pos); a piece of one holds the rows from position `start` on and the keys from position 0 on, unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.floating]

THRESHOLDS = (0.1, 0.01, 0.001, 0.0001)  # of `count_below`, largest first


def without_first(rows: Map) -> NDArray[np.float32]:
    """Rows as if the first token could not be looked at: its column NaN, the rest of each row divided by its sum.

    (q, k), keys from position 0 -> (q, k). A row with nothing left, such as row 0, is NaN.
    """
    out = np.array(rows, np.float32)
    out[:, 0] = 0
    left = out.sum(axis=-1, keepdims=True)
    out = np.divide(out, left, out=np.full_like(out, np.nan), where=left > 0)
    out[:, 0] = np.nan
    return out


def output_gram(blocks: Iterable[Map], n_heads: int) -> NDArray[np.float64]:
    """W_O^h' W_O^h of each head, (head, d_head, d_head): all that the length of v W_O^h needs of W_O.

    blocks: rows of W_O, (outputs, head * d_head), some at a time, so that the matrix need not be in memory whole.
    """
    gram: NDArray[np.float64] | None = None
    for block in blocks:
        heads = np.asarray(block, np.float64).reshape(len(block), n_heads, -1).swapaxes(0, 1)  # (head, outputs, d_head)
        part = heads.swapaxes(1, 2) @ heads
        gram = part if gram is None else gram + part
    if gram is None:
        raise ValueError("W_O has no rows.")
    return gram


def value_norms(v: Map, gram: NDArray[np.float64]) -> NDArray[np.float32]:
    """||v_j W_O^h||, the length of what head h would write if it looked at token j alone. (pos, kv_head, d_head), `output_gram` -> (head, pos).

    Under grouped-query attention neighbouring heads share a key/value head. Source: f(x) of Kobayashi et al. 2020, "Attention is not only a
    weight: analyzing transformers with vector norms"; v holds the bias of W_V, b_O belongs to no head, and a norm after W_O is not applied.
    """
    values, shared = np.asarray(v, np.float64), len(gram) // v.shape[1]
    squares = [np.einsum("pd,pd->p", values[:, head // shared] @ gram[head], values[:, head // shared]) for head in range(len(gram))]
    return np.sqrt(np.maximum(squares, 0)).astype(np.float32)


def value_weighted(rows: Map, norms: Map, first_key: int = 0) -> NDArray[np.float32]:
    """A[i, j] ||v_j W_O^h||: how long the vector is that head h moves from token j to token i (Kobayashi et al. 2020).

    rows: (q, k), keys from `first_key` on; norms: (pos,) of the head.
    """
    return (rows * norms[first_key : first_key + rows.shape[1]]).astype(np.float32)


def rollout_rows(mean: Map, below: Map, start: int) -> NDArray[np.float32]:
    """Rows `start` to `start + n` of the rollout through one layer more: (A + I, rows made to sum to 1) times the rollout below.

    mean: (n, start + n), the layer's attention averaged over heads; below: (start + n, start + n), the rollout of the layers before it,
    the identity before the first. (n, start + n). Causal: rows need nothing of later rows, so a whole map can be overwritten from its
    last rows up. Source: Abnar & Zuidema 2020, "Quantifying attention flow in transformers" (0.5 A + 0.5 I).
    """
    n = len(mean)
    step = 0.5 * np.asarray(mean, np.float32)
    step[np.arange(n), start + np.arange(n)] += 0.5
    step /= step.sum(axis=-1, keepdims=True)
    return np.asarray(step @ below, np.float32)


def count_below(rows: Map, start: int, thresholds: Sequence[float] = THRESHOLDS) -> NDArray[np.int64]:
    """How many cells that a causal model can fill lie below each threshold, (threshold,). rows: (n, start + n)."""
    masked = rows.size - causal_cells(len(rows), start)
    hidden = [masked if threshold > 0 else 0 for threshold in thresholds]  # cells beyond the diagonal are 0
    return np.array([np.count_nonzero(rows < threshold) for threshold in thresholds], np.int64) - hidden


def causal_cells(n: int, start: int = 0) -> int:
    """Cells on and below the diagonal in `n` rows from `start` on."""
    return n * start + n * (n + 1) // 2


def strongest(values: Map, n: int) -> NDArray[np.int64]:
    """Places of the `n` largest values of (pos,), largest first; NaN and zeros are left out."""
    order = np.argsort(-np.nan_to_num(np.asarray(values), nan=-np.inf), kind="stable")[:n]
    return order[np.nan_to_num(np.asarray(values)[order]) > 0]


def repeat_scores(pattern: Map, period: int) -> dict[str, NDArray[np.float64]]:
    """Induction, previous-token and duplicate-token score of each head on a random block of `period` tokens said several times.

    pattern: (head, q_pos, k_pos) of a prompt that ends with the repeated blocks (a BOS may stand before them). For queries of the second block
    and later ones, mean attention to the token after the earlier copies of the present one (A[i, i - (period - 1)] with two blocks; prefix
    matching of Olsson et al. 2022) and to those copies themselves (A[i, i - period]); of all queries but the first, A[i, i - 1].
    Source: TransformerLens' main demo and head detector. (head,) each.
    """
    n = pattern.shape[1]
    repeats = n // period
    queries = np.arange(n - period * (repeats - 1), n)
    induction, duplicate = (np.zeros((len(pattern), len(queries))) for _ in range(2))
    for block in range(1, repeats):
        keys = queries - block * period
        there = keys >= n - period * repeats  # copies further back than the first block do not exist
        duplicate[:, there] += pattern[:, queries[there], keys[there]]
        induction[:, there] += pattern[:, queries[there], keys[there] + 1]
    after = np.arange(1, n)
    return {"induction": induction.mean(axis=-1), "previous": pattern[:, after, after - 1].astype(np.float64).mean(axis=-1), "duplicate": duplicate.mean(axis=-1)}

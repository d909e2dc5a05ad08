"""Where attention heads look: one score per head for the questions people ask of a head.

Every score is first computed per query row (`row_scores`), where a row that cannot answer (the first token has nobody to look
back to; a token that never occurred has no earlier copy) is NaN; a head's score is the mean over the rows that can answer
(`mean_over_rows`). So a long prompt that arrives in pieces gives the same numbers: concatenate the rows, then take the mean.

Row 0 is left out of every mean: it can only look at itself. Patterns are (head, q_pos, k_pos); a piece of a long prompt that
starts at `start` is (head, n, start + n). Entropy in nats, distance in tokens, all other scores are attention mass in 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from backend.analysis.activations import bucket_edges

Pattern = NDArray[np.floating]

METRICS = ("entropy", "entropy_norm", "sink", "previous", "duplicate", "induction", "distance")


def entropy(pattern: Pattern) -> NDArray[np.float64]:
    """-sum_k A ln A of each row, in nats: 0 looks at one token, ln(i + 1) at all i + 1 alike. (head, q, k) -> (head, q)."""
    return np.stack([entr(np.asarray(head, np.float64)).sum(axis=-1) for head in pattern])


def entropy_normalised(pattern: Pattern, start: int = 0) -> NDArray[np.float64]:
    """Entropy as a share of the most that row can have, ln(i + 1). Row 0 can only look at itself: 0. (head, q, k) -> (head, q)."""
    most = np.log(start + np.arange(pattern.shape[1]) + 1.0)
    return np.divide(entropy(pattern), most, out=np.zeros(pattern.shape[:2]), where=most > 0)


def sink_mass(pattern: Pattern) -> NDArray[np.float64]:
    """Mean attention to position 0 over queries 1, 2, ... (row 0 has no choice). (head, q, k) -> (head,).

    Source: the attention sink of Xiao et al. 2023 (StreamingLLM).
    """
    return pattern[:, 1:, 0].astype(np.float64).mean(axis=-1) if pattern.shape[1] > 1 else np.full(len(pattern), np.nan)


def previous_token_score(pattern: Pattern) -> NDArray[np.float64]:
    """Mean of A[i, i-1] over queries 1, 2, ... (head, q, k) -> (head,). Source: TransformerLens' main demo."""
    return _mean_where_defined(_previous_rows(pattern, 0))


def duplicate_token_score(pattern: Pattern, ids: Sequence[int]) -> NDArray[np.float64]:
    """Mean, over tokens that occurred before, of the attention to their earlier occurrences. (head,); NaN if no token repeats.

    On a random block of T tokens repeated once this is the mean of A[i, i-T] over the second block, the definition of
    TransformerLens' main demo.
    """
    return _mean_where_defined(_masked_rows(pattern, earlier_copies(ids), 0))


def induction_score(pattern: Pattern, ids: Sequence[int]) -> NDArray[np.float64]:
    """Mean, over tokens that occurred before, of the attention to the tokens that came right after their earlier occurrences.

    The token itself is not such a successor: "a a" says nothing about induction. (head,); NaN if no token repeats so.
    On a random block of T tokens repeated once this is the mean of A[i, i-T+1] over the second block: TransformerLens'
    `pattern.diagonal(offset=1-T)` without its first entry, which belongs to the last token of the first block. Source: the
    prefix-matching score of Olsson et al. 2022.
    """
    return _mean_where_defined(_masked_rows(pattern, copy_successors(ids), 0))


def mean_distance(pattern: Pattern) -> NDArray[np.float64]:
    """Mean over queries 1, 2, ... of sum_k A[i, k] (i - k), in tokens. (head, q, k) -> (head,)."""
    return _mean_where_defined(_distance_rows(pattern, 0))


def row_scores(pattern: Pattern, ids: Sequence[int], start: int = 0) -> dict[str, NDArray[np.float64]]:
    """Every metric of `METRICS` for each query row: (head, q) arrays, NaN where a row cannot answer.

    pattern: (head, n, start + n) rows `start` to `start + n` of the prompt; ids: the whole prompt's tokens, or more of them.
    """
    rows = slice(start, start + pattern.shape[1])
    n_keys = pattern.shape[2]
    columns = {
        "entropy": entropy(pattern),
        "entropy_norm": entropy_normalised(pattern, start),
        "sink": pattern[:, :, 0].astype(np.float64),
        "previous": _previous_rows(pattern, start),
        "duplicate": _masked_rows(pattern, earlier_copies(ids)[rows, :n_keys], start),
        "induction": _masked_rows(pattern, copy_successors(ids)[rows, :n_keys], start),
        "distance": _distance_rows(pattern, start),
    }
    if start == 0:
        for values in columns.values():
            values[:, 0] = np.nan
    return columns


def mean_over_rows(rows: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float32]]:
    """The head's score: the mean over the query rows that can answer. dict of (head, q) -> dict of (head,) float32."""
    return {name: _mean_where_defined(values).astype(np.float32) for name, values in rows.items()}


def head_metrics(pattern: Pattern, ids: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """Every metric of `METRICS` for every head of one layer. pattern: (head, q, k) -> dict of (head,) float32."""
    return mean_over_rows(row_scores(pattern, ids))


def earlier_copies(ids: Sequence[int]) -> NDArray[np.bool_]:
    """(q, k), true where the token at k is the token at q and k < q."""
    tokens = np.asarray(ids)
    return np.tril(tokens[:, None] == tokens[None, :], k=-1)


def copy_successors(ids: Sequence[int]) -> NDArray[np.bool_]:
    """(q, k), true where the token before k is an earlier copy of the token at q, and k < q."""
    copies = earlier_copies(ids)
    successors = np.zeros_like(copies)
    successors[:, 1:] = copies[:, :-1]
    return np.tril(successors, k=-1)


def reduce_max(values: Pattern, rows: int, columns: int) -> tuple[NDArray, NDArray[np.int64], NDArray[np.int64]]:
    """Shrink a map (..., q, k) to at most rows x columns, keeping the largest value of each cell: no strong link is lost.

    Returns the map and the edges of its rows and columns: cell (a, b) stands for [row_edges[a]:row_edges[a+1],
    column_edges[b]:column_edges[b+1]].
    """
    row_edges = bucket_edges(values.shape[-2], min(rows, values.shape[-2]))
    column_edges = bucket_edges(values.shape[-1], min(columns, values.shape[-1]))
    reduced = np.maximum.reduceat(np.maximum.reduceat(values, row_edges[:-1], axis=-2), column_edges[:-1], axis=-1)
    return reduced, row_edges, column_edges


def thumbnails(pattern: Pattern, size: int = 48) -> NDArray[np.uint8]:
    """Every head's pattern as a small picture: (head, q, k) -> (head, t, t) uint8, t = min(size, q), 255 = attention 1."""
    out = np.zeros((pattern.shape[0], *2 * (min(size, pattern.shape[2]),)), np.uint8)
    add_to_thumbnails(out, pattern, 0, pattern.shape[2])
    return out


def add_to_thumbnails(out: NDArray[np.uint8], pattern: Pattern, start: int, n_tokens: int) -> None:
    """Paint one piece of a long prompt into `out` (head, t, t), in place; a cell keeps its largest value over all pieces.

    pattern: (head, n, start + n), rows `start` to `start + n` of a prompt of `n_tokens`.
    """
    side = out.shape[-1]
    row_cell = (start + np.arange(pattern.shape[1])) * side // n_tokens
    column_cell = np.arange(pattern.shape[2]) * side // n_tokens
    rows, row_starts = np.unique(row_cell, return_index=True)
    columns, column_starts = np.unique(column_cell, return_index=True)
    cells = np.maximum.reduceat(np.maximum.reduceat(pattern, row_starts, axis=1), column_starts, axis=2)
    painted = np.rint(np.clip(np.nan_to_num(cells), 0.0, 1.0) * 255).astype(np.uint8)
    where = np.ix_(np.arange(len(out)), rows, columns)
    out[where] = np.maximum(out[where], painted)


def _previous_rows(pattern: Pattern, start: int) -> NDArray[np.float64]:
    """A[i, i-1] of each row; NaN for row 0. (head, q)."""
    queries = start + np.arange(pattern.shape[1])
    values = pattern[:, np.arange(len(queries)), np.maximum(queries - 1, 0)].astype(np.float64)
    values[:, queries == 0] = np.nan
    return values


def _distance_rows(pattern: Pattern, start: int) -> NDArray[np.float64]:
    """sum_k A[i, k] (i - k) of each row; NaN for row 0. (head, q)."""
    queries = start + np.arange(pattern.shape[1])
    keys = np.arange(pattern.shape[2])
    mass = pattern.sum(axis=-1, dtype=np.float64)
    moment = np.stack([head.astype(np.float64) @ keys for head in pattern])
    values = mass * queries - moment
    values[:, queries == 0] = np.nan
    return values


def _masked_rows(pattern: Pattern, mask: NDArray[np.bool_], start: int) -> NDArray[np.float64]:
    """Attention mass on the keys of a (q, k) mask; NaN for rows whose mask is empty. (head, q)."""
    values = np.stack([np.where(mask, head, 0).sum(axis=-1, dtype=np.float64) for head in pattern])
    values[:, ~mask.any(axis=-1)] = np.nan
    return values


def _mean_where_defined(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis of the entries that are not NaN; NaN where all are."""
    defined = ~np.isnan(rows)
    count = defined.sum(axis=-1)
    total = np.where(defined, rows, 0.0).sum(axis=-1)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)

"""Where attention heads look: one score per head for the questions people ask of a head.

Every score is first computed per query row (`row_scores`), where a row that cannot answer (the first token has nobody to look
back to; a token that never occurred has no earlier copy) is NaN; a head's score is the mean over the rows that can answer
(`RowMeans`). So a long prompt that arrives in pieces gives the same numbers.

Row 0 is left out of every mean: it can only look at itself. Patterns are (head, q_pos, k_pos); a piece of a long prompt that
starts at `start` is (head, n, start + n). Entropy in nats, distance in tokens, all other scores are attention mass in 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.activations import bucket_edges

Pattern = NDArray[np.floating]

METRICS = ("entropy", "entropy_norm", "sink", "previous", "duplicate", "induction", "distance")


def entropy(pattern: Pattern) -> NDArray[np.float64]:
    """-sum_k A ln A of each row, in nats: 0 looks at one token, ln(i + 1) at all i + 1 alike. (head, q, k) -> (head, q)."""
    return _row_entropy(pattern)


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
    return _mean_where_defined(row_scores(pattern, ids)["duplicate"])


def induction_score(pattern: Pattern, ids: Sequence[int]) -> NDArray[np.float64]:
    """Mean, over tokens that occurred before, of the attention to the tokens that came right after their earlier occurrences.

    The token itself is not such a successor: "a a" says nothing about induction. (head,); NaN if no token repeats so.
    On a random block of T tokens repeated once this is the mean of A[i, i-T+1] over the second block: TransformerLens'
    `pattern.diagonal(offset=1-T)` without its first entry, which belongs to the last token of the first block. Source: the
    prefix-matching score of Olsson et al. 2022.
    """
    return _mean_where_defined(row_scores(pattern, ids)["induction"])


def mean_distance(pattern: Pattern) -> NDArray[np.float64]:
    """Mean over queries 1, 2, ... of sum_k A[i, k] (i - k), in tokens. (head, q, k) -> (head,)."""
    return _mean_where_defined(row_scores(pattern, range(pattern.shape[2]))["distance"])


def row_scores(pattern: Pattern, ids: Sequence[int], start: int = 0, links: Links | None = None) -> dict[str, NDArray[np.float64]]:
    """Every metric of `METRICS` for each query row: (head, q) arrays, NaN where a row cannot answer.

    pattern: (head, n, start + n) rows `start` to `start + n` of the prompt; ids: the whole prompt's tokens, or more of them.
    links: `Links(ids)`, when many patterns of one prompt are scored.
    """
    links = links or Links(ids)
    n_heads, n, n_keys = pattern.shape
    rows = {name: np.empty((n_heads, n)) for name in METRICS}
    copies, successors = links.between(start, n, n_keys)
    most = np.log(start + np.arange(n) + 1.0)
    for h, head in enumerate(pattern):
        rows["duplicate"][h] = copies.mass(head)
        rows["induction"][h] = successors.mass(head)
    rows["entropy"] = _row_entropy(pattern, start)
    rows["distance"] = _row_distance(pattern, start)
    rows["entropy_norm"] = np.divide(rows["entropy"], most, out=np.zeros((n_heads, n)), where=most > 0)
    rows["sink"] = pattern[:, :, 0].astype(np.float64)
    rows["previous"] = _previous_rows(pattern, start)
    if start == 0:
        for values in rows.values():
            values[:, 0] = np.nan
    return rows


class RowMeans:
    """Means over query rows that arrive in pieces: sums and counts, so that a long prompt needs no more memory than a short one."""

    def __init__(self) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    def add(self, rows: dict[str, NDArray[np.float64]]) -> None:
        """rows: metric -> (head, q), NaN where a row cannot answer."""
        for name, values in rows.items():
            defined = ~np.isnan(values)
            self._sums[name] = self._sums.get(name, 0.0) + np.where(defined, values, 0.0).sum(axis=-1)
            self._counts[name] = self._counts.get(name, 0) + defined.sum(axis=-1)

    def means(self) -> dict[str, NDArray[np.float32]]:
        """metric -> (head,): the mean over the rows that can answer, NaN where none can."""
        nothing = {name: np.full(count.shape, np.nan) for name, count in self._counts.items()}
        return {name: np.divide(self._sums[name], count, out=nothing[name], where=count > 0).astype(np.float32) for name, count in self._counts.items()}


def head_metrics(pattern: Pattern, ids: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """Every metric of `METRICS` for every head of one layer. pattern: (head, q, k) -> dict of (head,) float32."""
    means = RowMeans()
    means.add(row_scores(pattern, ids))
    return means.means()


class Links:
    """Which earlier tokens a token is linked to, for a prompt of ids (n_tokens,): its copies, and what came right after them.

    As lists of pairs, found a piece at a time: a mask over a long prompt would be larger than the pattern that it selects from.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        tokens = np.asarray(ids)
        self._order = np.argsort(tokens, kind="stable")  # positions, those of one token together and ascending
        _, first, count = np.unique(tokens, return_index=True, return_counts=True)
        self._group_start = np.empty(len(tokens), np.int64)  # where the positions of the token at i begin in _order
        self._n_before = np.empty(len(tokens), np.int64)  # how many copies the token at i has before it
        begin = np.cumsum(count) - count
        self._group_start[self._order] = np.repeat(begin, count)
        self._n_before[self._order] = np.arange(len(tokens)) - np.repeat(begin, count)
        self._last: tuple[tuple[int, int, int], tuple[Pairs, Pairs]] | None = None

    def between(self, start: int, n: int, n_keys: int) -> tuple[Pairs, Pairs]:
        """(copies, successors) of the queries `start` to `start + n`, keys before `n_keys`; both in rows counted from `start`.

        A successor lies before the query: in "a a" the second token is no successor of the first for itself.
        """
        key = (start, n, n_keys)
        if self._last is None or self._last[0] != key:
            n_before = self._n_before[start : start + n]
            rows = np.repeat(np.arange(n), n_before)
            within = np.arange(len(rows)) - np.repeat(np.cumsum(n_before) - n_before, n_before)
            columns = self._order[np.repeat(self._group_start[start : start + n], n_before) + within]
            follows = columns + 1 < start + rows
            self._last = key, (Pairs(rows, columns, n, n_keys), Pairs(rows[follows], columns[follows] + 1, n, n_keys))
        return self._last[1]


class Pairs:
    """Cells (row, column) of a map of n x n_keys, sorted by row."""

    def __init__(self, rows: NDArray[np.int64], columns: NDArray[np.int64], n: int, n_keys: int) -> None:
        self.rows, self.columns, self.n, self.n_keys = rows, columns, n, n_keys
        self._lacking = np.bincount(rows, minlength=n) == 0

    def mass(self, head: NDArray[np.floating]) -> NDArray[np.float64]:
        """Sum of the cells of each row of a map (n, n_keys); NaN for a row without cells. (n,)."""
        sums = np.bincount(self.rows, weights=head[self.rows, self.columns], minlength=self.n).astype(np.float64)  # integers where there is no pair
        sums[self._lacking] = np.nan
        return sums


def reduce_max(values: Pattern, rows: int, columns: int) -> tuple[NDArray, NDArray[np.int64], NDArray[np.int64]]:
    """Shrink a map (..., q, k) to at most rows x columns, keeping the largest value of each cell: no strong link is lost.

    NaN marks rows that were not captured: a cell is NaN where all of it is.

    Returns the map and the edges of its rows and columns: cell (a, b) stands for [row_edges[a]:row_edges[a+1],
    column_edges[b]:column_edges[b+1]].
    """
    row_edges = bucket_edges(values.shape[-2], min(rows, values.shape[-2]))
    column_edges = bucket_edges(values.shape[-1], min(columns, values.shape[-1]))
    reduced = np.fmax.reduceat(np.fmax.reduceat(values, row_edges[:-1], axis=-2), column_edges[:-1], axis=-1)
    return reduced, row_edges, column_edges


def thumbnail_side(n_tokens: int, size: int = 48) -> int:
    """Cells along each side of a head's small picture: every cell stands for the same number of tokens, and there are at most `size`."""
    return -(-n_tokens // _cell_tokens(n_tokens, size))


def _cell_tokens(n_tokens: int, size: int) -> int:
    return max(1, -(-n_tokens // size))


def thumbnails(pattern: Pattern, size: int = 48) -> NDArray[np.uint8]:
    """Every head's pattern as a small picture: (head, q, k) -> (head, t, t) uint8, t = thumbnail_side(q, size), 255 = attention 1."""
    out = np.zeros((pattern.shape[0], *2 * (thumbnail_side(pattern.shape[2], size),)), np.uint8)
    add_to_thumbnails(out, pattern, 0, pattern.shape[2], size)
    return out


def add_to_thumbnails(out: NDArray[np.uint8], pattern: Pattern, start: int, n_tokens: int, size: int = 48) -> None:
    """Paint one piece of a long prompt into `out` (head, t, t), in place; a cell keeps its largest value over all pieces.

    pattern: (head, n, start + n), rows `start` to `start + n` of a prompt of `n_tokens`; float16 is fastest, and tells 255 from 254.
    """
    cell = _cell_tokens(n_tokens, size)
    # Half-precision numbers that are not negative are in the order of their bits, and whole numbers are compared several times faster.
    first, cells = _max_of_cells(pattern.view(np.uint16) if pattern.dtype == np.float16 else pattern, start, cell)
    if cells.dtype == np.uint16:
        cells = cells.view(np.float16).astype(np.float32)
        if np.signbit(cells).any() or np.isnan(cells).any():
            first, cells = _max_of_cells(pattern.astype(np.float32), start, cell)
    painted = np.rint(np.clip(np.nan_to_num(cells), 0.0, 1.0) * 255).astype(np.uint8)
    where = out[:, first : first + painted.shape[1], : painted.shape[2]]
    np.maximum(where, painted, out=where)


def _max_of_cells(pattern: NDArray[Any], start: int, cell: int) -> tuple[int, NDArray[Any]]:
    """The first row of cells that a piece touches, and the largest value of each cell: (head, n, m) -> (head, c, d)."""
    first, by_row = _max_by_cell(pattern, start, cell)
    return first, _max_by_cell(by_row.swapaxes(1, 2), 0, cell)[1].swapaxes(1, 2)


def _max_by_cell(values: NDArray[Any], start: int, cell: int) -> tuple[int, NDArray[Any]]:
    """The first cell, and the largest values of each cell of `cell` places that axis 1 falls into; its first place is `start`.

    (head, n, m) -> (head, c, m). Whole cells in one call on a reshaped array; the first and last may be cut.
    """
    n = values.shape[1]
    first, last = start // cell, (start + n - 1) // cell
    begin, end = min(-start % cell, n), n - (start + n) % cell if (start + n) % cell <= n else 0
    out = np.empty((values.shape[0], last - first + 1, values.shape[2]), values.dtype)
    if begin:
        np.max(values[:, :begin], axis=1, out=out[:, 0])
    if end > begin:
        whole = np.ascontiguousarray(values[:, begin:end])
        at = (start + begin) // cell - first
        np.max(whole.reshape(whole.shape[0], -1, cell, whole.shape[2]), axis=2, out=out[:, at : at + whole.shape[1] // cell])
    if n > max(end, begin):
        np.max(values[:, max(end, begin) :], axis=1, out=out[:, -1])
    return first, out


def _previous_rows(pattern: Pattern, start: int) -> NDArray[np.float64]:
    """A[i, i-1] of each row; NaN for row 0. (head, q)."""
    queries = start + np.arange(pattern.shape[1])
    values = pattern[:, np.arange(len(queries)), np.maximum(queries - 1, 0)].astype(np.float64)
    values[:, queries == 0] = np.nan
    return values


_BLOCK_ROWS, _BLOCK_VALUES = 32, 1 << 17  # of a block that stays in the processor's cache
_TINY = np.float32(1e-37)  # 0 ln 0 is 0: the logarithm of a zero is taken of this instead and multiplied with the zero


def _row_entropy(pattern: Pattern, start: int | None = None) -> NDArray[np.float64]:
    """-sum_k A ln A of each row, (head, q, k) -> (head, q). In the pattern's own precision, which errs by about 1e-6.

    start: position of the first row, where the keys after each row's own are known to be 0 and need not be looked at.
    """
    n_heads, n, n_keys = pattern.shape
    step = min(max(_BLOCK_VALUES // max(n_heads * n_keys, 1), 1), _BLOCK_ROWS)
    out = np.empty((n_heads, n))
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        part = pattern[:, rows] if start is None else pattern[:, rows, : start + rows.stop]
        logs = np.maximum(part, _TINY)
        np.log(logs, out=logs)
        np.einsum("hqk,hqk->hq", logs, part, out=out[:, rows], casting="same_kind")
    return 0.0 - out  # no negative zero


def _row_distance(pattern: Pattern, start: int) -> NDArray[np.float64]:
    """sum_k A[i, k] (i - k) of each row; NaN for row 0 of the prompt. (head, q, k) -> (head, q)."""
    n, n_keys = pattern.shape[1:]
    # How far each key lies behind the last one, and 1: what is added up is small where attention is local, so float32 is enough.
    behind = np.stack([np.ones(n_keys), np.arange(n_keys - 1, -1, -1)], axis=-1).astype(pattern.dtype)
    queries = start + np.arange(n)
    mass, moment = np.moveaxis((pattern @ behind).astype(np.float64), -1, 0)
    values = moment - mass * (n_keys - 1 - queries)
    values[:, queries == 0] = np.nan
    return values


def _mean_where_defined(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis of the entries that are not NaN; NaN where all are."""
    means = RowMeans()
    means.add({"mean": rows})
    return means.means()["mean"].astype(np.float64)

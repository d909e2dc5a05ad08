"""Where attention heads look: one score per head for the questions people ask of a head.

Every score is first computed per query row (`row_scores`), where a row that cannot answer (the first token has nobody to look
back to; a token that never occurred has no earlier copy) is NaN; a head's score is the mean over the rows that can answer
(`RowMeans`). So a long prompt that arrives in pieces gives the same numbers.

Row 0 is left out of every mean: it can only look at itself. Patterns are (head, q_pos, k_pos); a piece of a long prompt that
starts at `start` is (head, n, start + n). Entropy in nats, distance in tokens, all other scores are attention mass in 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend.analysis.activations import bucket_edges
from backend.compute.flat_maps import flat_maps
from backend.compute.halves import in_halves

Pattern = NDArray[np.floating]

_WORTH_TWO_THREADS = 1 << 18  # cells of a pattern: a tenth of a millisecond
METRICS = ("entropy", "entropy_norm", "sink", "previous", "duplicate", "induction", "distance")


@dataclass(frozen=True)
class PatternRows:
    """What one pass over a pattern finds (`read_pattern`); float32 sums, which err by about 1e-6.

    mass: (head, q) sum_k A[i, k] of each row. entropy, distance: (head, q) -sum_k A ln A in nats, sum_k A[i, k] (i - k) in tokens, k up to the diagonal.
    least: (head,) the smallest value, 0 if none is negative. beyond: (head,) the largest |value| after the diagonal, NaN counting as infinite.
    peaks: (head, c, d) the largest value of every cell of a thumbnail that the rows touch, NaN left out; `cell`: tokens along each side of one.
    """

    start: int
    cell: int
    mass: NDArray[np.float32]
    entropy: NDArray[np.float32]
    distance: NDArray[np.float32]
    least: NDArray[np.float32]
    beyond: NDArray[np.float32]
    peaks: NDArray[np.float32]

    @property
    def finite(self) -> bool:
        """True only if no value of the pattern is NaN or infinite."""
        return bool(np.isfinite(self.mass.sum()) and np.isfinite(self.beyond.sum()))


def read_pattern(pattern: Pattern, start: int = 0, cell: int = 1) -> PatternRows:
    """Rows `start` to `start + n` of a prompt's pattern (head, n, start + n), read once. Compiled at first use, which takes a second on a new machine.

    Raises ValueError for another number of keys: compiled loops would read beyond the array.
    """
    from backend.analysis import compiled

    n_heads, n, n_keys = pattern.shape
    if n_keys != start + n:
        raise ValueError(f"A pattern whose rows {start} to {start + n} are given has {start + n} keys, not {n_keys}.")
    flat, head_step, row_step = flat_maps(pattern)
    mass, entropies, distances = (np.empty((n_heads, n), np.float32) for _ in range(3))
    least, beyond = np.empty(n_heads, np.float32), np.empty(n_heads, np.float32)
    peaks = np.zeros((n_heads, -(-(start + n) // cell) - start // cell, -(-n_keys // cell)), np.float32)

    def read(heads: slice) -> None:
        filled = [values[heads] for values in (mass, entropies, distances, least, beyond, peaks)]
        compiled.read_rows(flat[heads.start * head_step :], head_step, row_step, start, cell, *filled, np.empty(n_keys, np.float32))

    if pattern.size >= _WORTH_TWO_THREADS:
        in_halves(read, n_heads)
    else:
        read(slice(0, n_heads))
    return PatternRows(start, cell, mass, entropies, distances, least, beyond, peaks)


def entropy(pattern: Pattern) -> NDArray[np.float64]:
    """-sum_k A ln A of each row, in nats: 0 looks at one token, ln(i + 1) at all i + 1 alike. (head, q, k) -> (head, q); the last rows, if q < k."""
    return read_pattern(pattern, pattern.shape[2] - pattern.shape[1]).entropy.astype(np.float64)


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


def row_scores(pattern: Pattern, ids: Sequence[int], start: int = 0, links: Links | None = None,
               read: PatternRows | None = None) -> dict[str, NDArray[np.float64]]:  # fmt: skip
    """Every metric of `METRICS` for each query row: (head, q) arrays, NaN where a row cannot answer.

    pattern: (head, n, start + n) rows `start` to `start + n` of the prompt; ids: the whole prompt's tokens, or more of them.
    links: `Links(ids)`, when many patterns of one prompt are scored. read: what `read_pattern` said of it, where it has been asked.
    """
    links, read = links or Links(ids), read or read_pattern(pattern, start)
    n_heads, n, n_keys = pattern.shape
    rows = {name: np.empty((n_heads, n)) for name in METRICS}
    copies, successors = links.between(start, n, n_keys)
    most = np.log(start + np.arange(n) + 1.0)
    rows["duplicate"], rows["induction"] = copies.mass(pattern), successors.mass(pattern)
    rows["entropy"], rows["distance"] = read.entropy.astype(np.float64), read.distance.astype(np.float64)
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

    def mass(self, pattern: Pattern) -> NDArray[np.float64]:
        """Sum of the cells of each row of every map (head, n, n_keys); NaN for a row without cells. (head, n)."""
        from backend.analysis import compiled

        flat, head_step, row_step = flat_maps(pattern)
        sums = np.zeros((len(pattern), self.n))
        compiled.pair_mass(flat, head_step, row_step, self.rows, self.columns, sums)
        sums[:, self._lacking] = np.nan
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
    return -(-n_tokens // thumbnail_cell(n_tokens, size))


def thumbnail_cell(n_tokens: int, size: int = 48) -> int:
    """Tokens along each side of one cell of a thumbnail."""
    return max(1, -(-n_tokens // size))


def thumbnails(pattern: Pattern, size: int = 48) -> NDArray[np.uint8]:
    """Every head's pattern as a small picture: (head, q, k) -> (head, t, t) uint8, t = thumbnail_side(q, size), 255 = attention 1."""
    out = np.zeros((pattern.shape[0], *2 * (thumbnail_side(pattern.shape[2], size),)), np.uint8)
    add_to_thumbnails(out, pattern, 0, pattern.shape[2], size)
    return out


def add_to_thumbnails(out: NDArray[np.uint8], pattern: Pattern, start: int, n_tokens: int, size: int = 48, read: PatternRows | None = None) -> None:
    """Paint one piece of a long prompt into `out` (head, t, t), in place; a cell keeps its largest value over all pieces.

    pattern: (head, n, start + n), rows `start` to `start + n` of a prompt of `n_tokens`. read: what `read_pattern` said of it with `thumbnail_cell`, where it has been asked.
    """
    cell = thumbnail_cell(n_tokens, size)
    peaks = (read or read_pattern(pattern, start, cell)).peaks
    painted = np.rint(np.minimum(peaks, 1.0) * 255).astype(np.uint8)
    first = start // cell
    where = out[:, first : first + painted.shape[1], : painted.shape[2]]
    np.maximum(where, painted, out=where)


def _previous_rows(pattern: Pattern, start: int) -> NDArray[np.float64]:
    """A[i, i-1] of each row; NaN for row 0. (head, q)."""
    queries = start + np.arange(pattern.shape[1])
    values = pattern[:, np.arange(len(queries)), np.maximum(queries - 1, 0)].astype(np.float64)
    values[:, queries == 0] = np.nan
    return values


def _mean_where_defined(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis of the entries that are not NaN; NaN where all are."""
    means = RowMeans()
    means.add({"mean": rows})
    return means.means()["mean"].astype(np.float64)

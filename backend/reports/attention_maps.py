"""Attention maps of a trace as a page shows them: any range of one, read strip by strip and made small; means over heads and layers; rollout.

    tile(trace, shown, rows, columns, side, norms)   what `shown` names, of those positions, at most `side` cells a side
    summarise(trace, ...)                            one reading of every head: the mean of each layer and of all, rollout, counts of each head
    Summary.load(derived, trace)                     what that left in the cache

Memory is a strip of rows of one head, whatever the prompt's length; while summarising, two maps of one layer in a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from backend.analysis.activations import bucket_edges
from backend.analysis.attention_views import THRESHOLDS, causal_cells, count_below, rollout_rows, value_weighted, without_first
from backend.derived import Derived
from backend.errors import Cancelled, LayerscopeError
from backend.trace import Trace

STRIP = 512  # rows read at once: those of a chunk in the file
_KEPT_BYTES = 96 << 20  # of the cache, for the means of one trace, and as much for its rollout
_MEMORY = 64 << 20  # a map of a layer that is larger lies in a file while it is made
_VERSION = 1  # of what is cached

Of = Literal["head", "mean", "all", "rollout"]
View = Literal["pattern", "weighted", "scores"]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Shown:
    """A map: of one head, the mean of a layer's heads, the mean of all layers' or rollout up to a layer; and which values of it."""

    of: Of
    layer: int
    head: int = 0
    view: View = "pattern"
    hide_first: bool = False

    @property
    def site(self) -> str:
        return "attn_scores" if self.view == "scores" else "attn_pattern"


@dataclass(frozen=True)
class Tile:
    """A range of a map. values: (row, column), NaN where nothing is or nothing was captured; cell (a, b) stands for the positions
    [rows[a]:rows[a+1], columns[b]:columns[b+1]] and is their largest value. n_broken: NaN and infinite values among what was captured."""

    values: Values
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    n_broken: int = 0

    @property
    def is_exact(self) -> bool:
        return len(self.rows) - 1 == self.rows[-1] - self.rows[0] and len(self.columns) - 1 == self.columns[-1] - self.columns[0]


def tile(trace: Trace, shown: Shown, rows: range, columns: range, side: int, norms: Values | None = None, summary: Summary | None = None) -> Tile:
    """Rows and columns of a map at most `side` cells a side. norms: (pos,) `value_norms` of the head, for the weighted view;
    summary: for maps that were made before.

    Raises LayerscopeError for a head that was not captured, and for rollout without a summary.
    """
    kept = summary.map(shown.of, shown.layer) if summary is not None and shown.of in ("rollout", "all") else None
    if kept is not None and len(kept) < trace.n_tokens:
        return _kept_tile(kept, trace.n_tokens, shown, rows, columns)
    row_edges, column_edges = (at.start + bucket_edges(len(at), min(side, len(at))) for at in (rows, columns))
    out = np.full((len(row_edges) - 1, len(column_edges) - 1), np.nan, np.float32)
    n_broken = 0
    for first, last in _strips(row_edges):
        start, stop = int(row_edges[first]), int(row_edges[last])
        keys = range(columns.start, min(columns.stop, stop))  # a causal model looks no further ahead
        if not keys:
            continue
        values, broken = _strip(trace, shown, start, stop, keys, norms, summary)
        n_broken += broken
        edges = column_edges[column_edges < keys.stop] - columns.start
        out[first:last, : len(edges)] = _largest(values, row_edges[first : last + 1] - start, edges)
    return Tile(out, row_edges, column_edges, n_broken)


def _kept_tile(kept: NDArray[Any], n_tokens: int, shown: Shown, rows: range, columns: range) -> Tile:
    """The cells of a map that was kept smaller than the prompt, where they meet the range."""
    if shown.hide_first:
        raise LayerscopeError(f"Of this long prompt the map is kept at {len(kept):,} cells a side, so the first token cannot be taken out of it.")
    edges = bucket_edges(n_tokens, len(kept))
    spans = [(int(np.searchsorted(edges, at.start, side="right")) - 1, int(np.searchsorted(edges, at.stop, side="left"))) for at in (rows, columns)]
    (top, bottom), (left, right) = spans
    values = kept[top:bottom, left:right].astype(np.float32)
    np.copyto(values, np.nan, where=edges[left:right][None, :] > edges[top + 1 : bottom + 1][:, None] - 1)
    return Tile(values, edges[top : bottom + 1], edges[left : right + 1])


def _largest(values: Values, row_edges: NDArray[np.int64], columns: NDArray[np.int64]) -> Values:
    """The largest value of each cell, NaN where all of it is NaN. Rows first and one run of them a call: `reduceat` down a column is ten times slower."""
    by_row = np.stack([np.fmax.reduce(values[first:last], axis=0) for first, last in zip(row_edges[:-1], row_edges[1:], strict=True)])
    return np.fmax.reduceat(by_row, columns, axis=1)


def _strips(edges: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of cells that together hold at most STRIP rows, or one cell that holds more."""
    first = 0
    while first < len(edges) - 1:
        last = max(first + 1, int(np.searchsorted(edges, edges[first] + STRIP, side="right")) - 1)
        yield first, last
        first = last


def _strip(trace: Trace, shown: Shown, start: int, stop: int, keys: range, norms: Values | None, summary: Summary | None) -> tuple[Values, int]:
    """Rows `start` to `stop` of a map at `keys`, what the mask hides NaN; how many values are broken."""
    whole_rows = shown.hide_first and shown.view == "pattern"  # what is left of a row is divided by its sum
    read = range(0, stop) if whole_rows else keys
    raw = _raw(trace, shown, start, stop, read, summary)
    masked = np.arange(read.start, read.stop)[None, :] > np.arange(start, stop)[:, None]
    first_row, last_row = trace.kept(shown.site, shown.layer)[1] if shown.of == "head" else (0, trace.n_tokens)
    captured = raw[max(first_row - start, 0) : max(last_row - start, 0)]
    with np.errstate(invalid="ignore"):
        n_broken = int(np.count_nonzero(~np.isfinite(captured) & ~masked[max(first_row - start, 0) : max(last_row - start, 0)]))
    if whole_rows:
        raw, masked = without_first(raw)[:, keys.start : keys.stop], masked[:, keys.start : keys.stop]
    elif shown.hide_first and keys.start == 0:
        raw[:, 0] = np.nan
    if shown.view == "weighted" and norms is not None:
        raw = value_weighted(raw, norms, keys.start)
    np.copyto(raw, np.nan, where=masked)
    return raw, n_broken


def _raw(trace: Trace, shown: Shown, start: int, stop: int, keys: range, summary: Summary | None) -> Values:
    q, k = slice(start, stop), slice(keys.start, keys.stop)
    if shown.of == "head":
        return trace.head(shown.site, shown.layer, shown.head, q, k)
    if summary is not None:
        kept = summary.map(shown.of, shown.layer)
        if kept is not None and len(kept) == trace.n_tokens:
            return kept[q, k].astype(np.float32)
    if shown.of == "mean":
        return _mean_rows(trace, shown.layer, q, k)
    raise LayerscopeError("This map is made from every head; compute it first.")


def _mean_rows(trace: Trace, layer: int, q: slice, k: slice) -> Values:
    """The mean of the captured heads of a layer."""
    heads = trace.kept("attn_pattern", layer)[0]
    total = trace.head("attn_pattern", layer, heads[0], q, k)
    for head in heads[1:]:
        total += trace.head("attn_pattern", layer, head, q, k)
    return total / np.float32(len(heads))


# -- one token --------------------------------------------------------------------------------------------------------------------


def looks_at(trace: Trace, shown: Shown, position: int, summary: Summary | None = None) -> tuple[Values, Values]:
    """Where a token looks and who looks at it, in one map: (key position,) up to itself, and (query position,) from itself on.

    `of` "all" without a summary reads every head. Raises LayerscopeError as `tile` does.
    """
    end, here = trace.n_tokens, (position, position + 1)
    if shown.of == "all" and (summary is None or summary.map("all", None) is None or summary.side < end):
        parts = [looks_at(trace, Shown("mean", layer), position, summary) for layer in trace.layers("attn_pattern")]
        return (sum(row for row, _ in parts) / np.float32(len(parts)), sum(column for _, column in parts) / np.float32(len(parts)))  # type: ignore[return-value]
    row, _ = _strip(trace, shown, *here, range(0, position + 1), None, summary)
    columns = [_strip(trace, shown, start, min(start + STRIP, end), range(*here), None, summary)[0][:, 0] for start in range(position, end, STRIP)]
    return row[0], np.concatenate(columns)


# -- one reading of every head ------------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What one reading of every head left. side: cells a side of the kept maps, the prompt's tokens unless it is long.

    counts: (layer, head, 2 + threshold): cells, their sum, and those below each of THRESHOLDS; NaN for a head that was not captured.
    """

    layers: list[int]
    side: int
    counts: NDArray[np.float64]
    rollout_lacks: str  # why there is no rollout, "" where there is
    get: Callable[[str, int | None], NDArray[Any] | None] = field(repr=False)

    def map(self, of: str, layer: int | None) -> NDArray[Any] | None:
        """(side, side) float16 of "mean" or "rollout" of a layer, or of "all"; None where it was not made."""
        return self.get(of, None if of == "all" else layer)

    def below(self, threshold: int) -> NDArray[np.float64]:
        """Share of the cells of each head that lie below THRESHOLDS[threshold], (layer, head)."""
        return self.counts[:, :, 2 + threshold] / self.counts[:, :, 0]

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean attention of the cells of each head, (layer, head). Where rows sum to 1 it is 2 / (n + 1)."""
        return self.counts[:, :, 1] / self.counts[:, :, 0]

    @classmethod
    def load(cls, derived: Derived, trace: Trace) -> Summary | None:
        head = derived.get_json(("attn_summary", _VERSION, trace.id))
        counts = derived.get_array(("attn_counts", _VERSION, trace.id))
        if head is None or counts is None:
            return None
        found = cls(head["layers"], head["side"], counts, head["rollout_lacks"], lambda of, layer: derived.get_array(("attn_map", _VERSION, trace.id, of, layer)))
        return found if found.map("all", None) is not None else None  # the cache drops what is old


def n_cells(trace: Trace) -> int:
    """Cells that `summarise` reads."""
    heads = sum(len(trace.kept("attn_pattern", layer)[0]) for layer in trace.layers("attn_pattern"))
    first, last = trace.kept("attn_pattern", trace.layers("attn_pattern")[0])[1] if heads else (0, 0)
    return heads * (last - first) * trace.n_tokens


def kept_side(n_tokens: int, n_layers: int) -> int:
    """Cells a side at which the maps of all layers fit into what the cache gives them."""
    return min(n_tokens, int((_KEPT_BYTES / (2 * max(n_layers, 1))) ** 0.5))


def summarise(trace: Trace, derived: Derived, progress: Callable[[str, int, int], None] = lambda *_: None, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Read every captured head once and put means, rollout and counts into the cache. Raises Cancelled."""
    layers, n = trace.layers("attn_pattern"), trace.n_tokens
    side, lacks = kept_side(n, len(layers)), _rollout_lacks(trace, layers)
    counts = np.full((len(layers), trace.info.n_heads, 2 + len(THRESHOLDS)), np.nan)

    def put(of: str, layer: int | None, values: Values) -> None:
        derived.put_array(("attn_map", _VERSION, trace.id, of, layer), _shrunk(values, side).astype(np.float16))

    with _maps(n, trace.path.parent) as (total, mean, rolled):
        if not lacks:
            np.fill_diagonal(rolled, 1)
        for at, layer in enumerate(layers):
            for start in range((n - 1) // STRIP * STRIP, -1, -STRIP):  # from the last rows up: rollout is overwritten in place
                if should_stop():
                    raise Cancelled
                stop = min(start + STRIP, n)
                mean[start:stop, :stop] = _counted_mean(trace, layer, start, stop, counts[at])
                total[start:stop, :stop] += mean[start:stop, :stop] / np.float32(len(layers))
                if not lacks:
                    rolled[start:stop, :stop] = rollout_rows(mean[start:stop, :stop], rolled[:stop, :stop], start)
            put("mean", layer, mean)
            if not lacks:
                put("rollout", layer, rolled)
            progress("reading heads, layers", at + 1, len(layers))
        put("all", None, total)
    derived.put_array(("attn_counts", _VERSION, trace.id), counts)
    derived.put_json(("attn_summary", _VERSION, trace.id), {"layers": layers, "side": side, "rollout_lacks": lacks})


def _counted_mean(trace: Trace, layer: int, start: int, stop: int, counts: NDArray[np.float64]) -> Values:
    """Rows of the mean of a layer's heads; the cells of each head are added to `counts` (head, 2 + threshold)."""
    heads, (first, last) = trace.kept("attn_pattern", layer)
    first, last = max(first, start), min(last, stop)
    total = np.zeros((stop - start, stop), np.float32)
    for head in heads:
        rows = trace.head("attn_pattern", layer, head, slice(start, stop), slice(0, stop))
        total += rows
        if first >= last:
            continue
        kept = rows[first - start : last - start, :last]
        found = [causal_cells(last - first, first), float(kept.sum(dtype=np.float64)), *count_below(kept, first)]
        counts[head] = np.nan_to_num(counts[head]) + found
    return total / np.float32(len(heads))


def _rollout_lacks(trace: Trace, layers: list[int]) -> str:
    """Why there is no rollout of this trace, in a sentence; "" where there is."""
    absent = sorted(set(range(trace.info.n_layers)) - set(layers))
    if absent:
        return f"Rollout goes through the attention of every layer, and layer {absent[0]} was not captured."
    if any(trace.kept("attn_pattern", layer)[1] != (0, trace.n_tokens) for layer in layers):
        return "Rollout needs every row of the attention maps, and only some were captured."
    return ""


def _shrunk(values: Values, side: int) -> Values:
    """A whole map at most `side` cells a side, the largest value of each cell."""
    if len(values) <= side:
        return np.asarray(values)
    edges = bucket_edges(len(values), side)
    return _largest(values, edges, edges[:-1])


class _maps:
    """Three zeroed maps (n, n): in memory, or in an unlinked file where they are large."""

    def __init__(self, n: int, folder: Path) -> None:
        self._shape, self._folder = (3, n, n), folder

    def __enter__(self) -> tuple[Values, Values, Values]:
        large = 4 * self._shape[1] ** 2 > _MEMORY
        self._file = tempfile.TemporaryFile(dir=self._folder) if large else None
        maps = np.memmap(self._file, np.float32, "w+", shape=self._shape) if self._file else np.zeros(self._shape, np.float32)
        return maps[0], maps[1], maps[2]

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

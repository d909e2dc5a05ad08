"""Unstructured pruning in place: shares of every matrix set to zero by their scores, and what that does to perplexity and to the residual stream.

Which weights go is kept as one bit a weight and sparsity. While a sparsity is measured the engine holds what it needs to put the model
back; a run that would not fit in the free memory is refused before anything is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis import divergence
from backend.analysis.logits import row_blocks
from backend.engines import Engine, Piece, ShouldStop, never_stop
from backend.engines.weight_edits import WeightChange
from backend.errors import Cancelled, LayerscopeError
from backend.estimate import available_memory, in_bytes
from backend.experiments import Progress, no_progress
from backend.experiments.activation_store import ActivationStore
from backend.experiments.sensitivity.contracts import Losses
from backend.experiments.sensitivity.perplexity import compared, described, evaluate, finite

WITHIN = {"wanda": "row"}  # what the weights of are compared with each other: Wanda's paper compares within an output; all others, a tensor
MAX_STREAM_BYTES = 1 << 30  # of the unpruned model's residual streams, kept on disk
_BYTES_A_WEIGHT = 32  # of a pruned weight while it is zero: where it lies, here and in the file, before, wanted and after, and what is put back


@dataclass(frozen=True)
class Masks:
    """The weights that go. bits: sparsity -> tensor -> packed bits over its flat entries, 1 goes; shapes: of the tensors."""

    within: str
    shapes: dict[str, tuple[int, ...]]
    bits: dict[float, dict[str, NDArray[np.uint8]]]

    @property
    def n_weights(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def places(self, sparsity: float, name: str) -> NDArray[np.int64]:
        """Flat places of the weights of a tensor that go at a sparsity."""
        return np.flatnonzero(np.unpackbits(self.bits[sparsity][name], count=math.prod(self.shapes[name])))


def masks(scored: Iterable[tuple[str, NDArray[np.float32], NDArray[np.float32]]], metric: str, sparsities: Sequence[float], should_stop: ShouldStop = never_stop) -> Masks:
    """Choose the lowest-scoring weights of every tensor; scored: (name, scores, weights). Raises LayerscopeError for scores that are not finite."""
    within, shapes = WITHIN.get(metric, "tensor"), dict[str, tuple[int, ...]]()
    bits: dict[float, dict[str, NDArray[np.uint8]]] = {sparsity: {} for sparsity in sparsities}
    for name, values, _ in scored:
        if should_stop():
            raise Cancelled
        shapes[name] = values.shape
        rows = values.reshape(-1, values.shape[-1]) if within == "row" else values.reshape(1, -1)
        if not np.isfinite(rows).all():
            raise LayerscopeError(f"{name} has scores of {metric} that are not finite, so its weights cannot be pruned by them.")
        for sparsity in sparsities:
            bits[sparsity][name] = np.packbits(lowest(rows, sparsity))
    return Masks(within, shapes, bits)


def lowest(rows: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """Which scores are the lowest `share` of their row: (row, column) -> the same; the number is rounded to the nearest."""
    n, chosen = round(share * rows.shape[1]), np.zeros(rows.shape, bool)
    if n:
        for row, out in zip(rows, chosen, strict=True):
            out[np.argpartition(row, n - 1)[:n]] = True
    return chosen


def prune(engine: Engine, found: Masks, metric: str, windows: Sequence[Sequence[int]], baseline: Losses, folder: Path, *, progress: Progress = no_progress,
          should_stop: ShouldStop = never_stop) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """`pruning` of sensitivity_stats.json, and sentences for the notes. `folder` takes the unpruned model's residual streams meanwhile.

    Raises LayerscopeError where what is set to zero would not fit in the free memory. The model is as it was afterwards, to the bit.
    """
    most = max(found.bits)
    need = int(_BYTES_A_WEIGHT * most * found.n_weights)
    if need > available_memory():
        raise LayerscopeError(f"Pruning {most:.0%} of {found.n_weights:,} weights in place needs about {in_bytes(need)}, and {in_bytes(available_memory())} are free; "
                              "choose fewer layers or components, or a lower sparsity.")  # fmt: skip
    with ActivationStore(folder) as store:
        streams = _Streams(engine, windows, store)
        evaluate(engine, windows[: streams.n_windows], sites=streams.sites, sink=streams.keep, stage="unpruned streams", progress=progress,
                 should_stop=should_stop, on_window=streams.begin)  # fmt: skip
        rows = [_row(engine, found, sparsity, windows, baseline, streams, progress, should_stop) for sparsity in found.bits]
    notes = []
    if streams.sites and streams.n_windows < len(windows):
        notes.append(f"Divergence of pruned activations is measured on the first {streams.n_windows:,} of {len(windows):,} windows: as many as {in_bytes(MAX_STREAM_BYTES)} hold.")
    if not streams.sites:
        notes.append(f"{engine.info.name} ({engine.info.architecture}) has no site resid_post, so pruning says nothing of its activations.")
    notes += [f"The loss is not finite at a sparsity of {row['sparsity']:g}: the model is broken, and there is no ratio." for row in rows if row["nll"] is None]
    return {"metric": metric, "within": found.within, "baseline": described(baseline), "rows": rows}, notes


def _row(engine: Engine, found: Masks, sparsity: float, windows: Sequence[Sequence[int]], baseline: Losses, streams: _Streams, progress: Progress,
         should_stop: ShouldStop) -> dict[str, Any]:  # fmt: skip
    reached = 0
    streams.forget()
    with ExitStack() as stack:
        for name in found.shapes:
            at = found.places(sparsity, name)
            if not at.size:
                continue
            if should_stop():
                raise Cancelled
            (written,) = stack.enter_context(engine.perturbed([WeightChange(name, at, np.zeros(at.size, np.float32))]))
            reached += int(np.count_nonzero(written.after == 0))
            del written
        losses = evaluate(engine, windows, sites=streams.sites, sink=streams.compare, stage=f"pruned to {sparsity:.0%}", progress=progress, should_stop=should_stop,
                          on_window=streams.begin)  # fmt: skip
    return {"sparsity": sparsity, "zeros": reached / found.n_weights, **compared(losses, baseline), "divergence": streams.divergence()}


class _Streams:
    """resid_post of the unpruned model, of as many windows as MAX_STREAM_BYTES hold and one at least, and how far a pruned one lies from it."""

    def __init__(self, engine: Engine, windows: Sequence[Sequence[int]], store: ActivationStore) -> None:
        self._store, self._window, self._n_layers = store, 0, engine.info.n_layers
        self._lengths = [len(ids) for ids in windows]
        self.sites: tuple[str, ...] = ("resid_post",) if "resid_post" in engine.sites else ()
        sizes = np.cumsum([4 * len(ids) * engine.info.d_model * engine.info.n_layers for ids in windows])
        self.n_windows = max(1, int(np.searchsorted(sizes, MAX_STREAM_BYTES, "right")))
        self.forget()

    def begin(self, window: int) -> None:
        self._window = window

    def forget(self) -> None:
        self._sums, self._counts = np.zeros(self._n_layers), np.zeros(self._n_layers, np.int64)

    def keep(self, piece: Piece) -> None:
        self._store.put((self._window, piece.site, piece.layer), piece.start, piece.values, self._lengths[self._window])

    def compare(self, piece: Piece) -> None:
        key = (self._window, piece.site, piece.layer)
        if piece.layer is None or key not in self._store:
            return
        reference = self._store.rows(key)[piece.start : piece.start + len(piece.values)]
        for rows in row_blocks(*piece.values.shape):
            found = divergence.relative_l2(reference[rows], piece.values[rows])
            kept = np.isfinite(found)
            self._sums[piece.layer] += found[kept].sum()
            self._counts[piece.layer] += np.count_nonzero(kept)

    def divergence(self) -> list[float | None]:
        """Of each layer, the mean over positions; None where there is none."""
        return [finite(total / n) if n else None for total, n in zip(self._sums, self._counts, strict=True)]

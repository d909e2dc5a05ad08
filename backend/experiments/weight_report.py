"""Weight report: the statistics of every tensor of a model, read in pieces on all cores; and one matrix looked at closely.

Memory does not grow with the file: each thread holds one piece of a tensor. Threads work on runs of pieces; reading, dequantizing
(ggml's to_float) and NumPy's loops leave the interpreter to the others meanwhile. Small tensors are a task each, so that a model of
thousands of experts keeps all cores busy; a large one is shared out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from backend.analysis import weights as analysis
from backend.analysis.spectrum import spectrum
from backend.analysis.weights import Counts, Moments, Norms, SignedMap
from backend.engines import ShouldStop, default_threads, never_stop
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Context, Progress, no_progress
from backend.model_files import identity as identity_of
from backend.reports.weight_matrix import Matrix
from backend.reports.weight_results import MAP_SIDE, TensorDetail, WeightReport
from backend.weights import PIECE, Weight, Weights, open_weights

SHARE = 32 * PIECE  # weights of a task
_MEGA = 1_000_000

Found = tuple[Moments, Counts] | LayerscopeError
T = TypeVar("T")
R = TypeVar("R")


def weight_report(weights: Weights, progress: Progress = no_progress, should_stop: ShouldStop = never_stop, n_threads: int | None = None) -> WeightReport:
    """The report of every stored tensor; raises LayerscopeError where the file ends too early. Progress counts megabytes."""
    tensors = {name: weights.stored(name) for name in weights.native_names}
    canonical = weights.canonical_names()
    total = sum(tensor.nbytes for tensor in tensors.values())
    read = 0

    def advance(n_bytes: int) -> None:
        nonlocal read
        read += n_bytes
        progress("weights read, in megabytes", read // _MEGA, max(total // _MEGA, 1))

    found = dict(_each(tensors, n_threads or default_threads(), advance, should_stop))
    rows = [_row(tensor, canonical[name], found[name]) for name, tensor in tensors.items()]
    counted = [result[1].bins if isinstance(result, tuple) else np.zeros(analysis.N_BINS, np.int64) for result in (found[name] for name in tensors)]
    bins = np.array(counted, np.uint64).reshape(len(rows), analysis.N_BINS)
    return WeightReport(rows, bins)


def _each(tensors: dict[str, Weight], n_threads: int, advance: Callable[[int], None], should_stop: ShouldStop) -> Iterator[tuple[str, Found]]:
    """(name, what the two passes found, or why the tensor cannot be read), small tensors first. advance: told the bytes that were read."""
    readable = {name: tensor for name, tensor in tensors.items() if tensor.why_unreadable is None}
    for name, tensor in tensors.items():
        if tensor.why_unreadable is not None:
            yield name, LayerscopeError(tensor.why_unreadable)
    small = [name for name, tensor in readable.items() if tensor.size <= SHARE]
    # The pieces' scalar products must not start threads of their own.
    with threadpool_limits(1, user_api="blas"), _Pool(n_threads, should_stop) as pool:
        for name, found in zip(small, pool.map(lambda name: _whole(readable[name]), small), strict=True):
            advance(readable[name].nbytes)
            yield name, found
        for name, tensor in readable.items():
            if tensor.size > SHARE:
                yield name, _shared_out(tensor, pool, advance)


def tensor_report(tensor: Weight, canonical: list[str]) -> tuple[dict[str, Any], np.ndarray]:
    """One row of the report and its histogram, (N_BINS,)."""
    if tensor.why_unreadable is not None:
        return _row(tensor, canonical, LayerscopeError(tensor.why_unreadable)), np.zeros(analysis.N_BINS, np.int64)
    found = next(result for _, result in _each({tensor.name: tensor}, default_threads(), lambda n_bytes: None, never_stop))
    assert isinstance(found, tuple), "a readable tensor has numbers"
    return _row(tensor, canonical, found), found[1].bins


class _Pool:
    """Threads that stop early: between two results `should_stop` is asked, and what has not begun is dropped."""

    def __init__(self, n_threads: int, should_stop: ShouldStop) -> None:
        self._executor, self._should_stop = ThreadPoolExecutor(n_threads, "weights"), should_stop

    def map(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        for result in self._executor.map(work, items):
            if self._should_stop():
                raise Cancelled
            yield result

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def _whole(tensor: Weight) -> tuple[Moments, Counts]:
    moments, peaks = analysis.moments(tensor.pieces())
    return moments, analysis.counts(tensor.pieces(), moments, analysis.largest_floor(peaks))


def _shared_out(tensor: Weight, pool: _Pool, advance: Callable[[int], None]) -> tuple[Moments, Counts]:
    starts = range(0, tensor.size, SHARE)
    half = tensor.nbytes // (2 * len(starts))  # of a share's bytes, since both passes read it
    moments, peaks = Moments(), []
    for part, part_peaks in pool.map(lambda start: analysis.moments(tensor.pieces(start, min(start + SHARE, tensor.size))), starts):
        moments = moments.merged(part)
        peaks += part_peaks
        advance(half)
    floor, counts = analysis.largest_floor(peaks), Counts()
    for counted in pool.map(lambda start: analysis.counts(tensor.pieces(start, min(start + SHARE, tensor.size)), moments, floor, start), starts):
        counts = counts.merged(counted)
        advance(half)
    return moments, counts


def _row(tensor: Weight, canonical: list[str], result: Found) -> dict[str, Any]:
    moments, counts = result if isinstance(result, tuple) else (Moments(), Counts())
    layer, component = analysis.place(tensor.name, canonical)
    return {
        "name": tensor.name, "canonical": canonical, "layer": layer, "component": component, "shape": list(tensor.shape), "dtype": tensor.dtype,
        "size": tensor.size, "nbytes": tensor.nbytes, "bits": 8 * tensor.nbytes / tensor.size if tensor.size else math.nan,
        **analysis.statistics(moments, counts), "moments": moments.to_json(), "exponent": analysis.histogram_exponent(moments.abs_max),
        "largest": [[[int(i) for i in np.unravel_index(at, tensor.shape)], value] for at, value in counts.largest],
        "note": str(result) if isinstance(result, LayerscopeError) else "",
    }  # fmt: skip


def tensor_detail(matrix: Matrix, progress: Progress = no_progress, should_stop: ShouldStop = never_stop) -> TensorDetail:
    """One matrix: its norms and map in one reading, then its singular values."""

    def blocks(stage: str) -> Iterator[tuple[int, np.ndarray]]:
        for first, block in matrix.blocks():
            if should_stop():
                raise Cancelled
            yield first, block
            progress(stage, first + len(block), matrix.shape[0])

    norms, seen = Norms(matrix.shape), SignedMap(matrix.shape, MAP_SIDE, MAP_SIDE)
    for first, block in blocks("norms, rows"):
        norms.add(first, block)
        seen.add(first, block)
    finite = bool(np.isfinite(norms.rows).all())
    with threadpool_limits(1, user_api="blas"):  # the QR of a tall thin matrix is thirty times slower where two threads wait for each other
        found = spectrum(functools.partial(blocks, "singular values, rows"), matrix.shape) if finite else None
    return TensorDetail(norms.rows, norms.columns, seen.cells, found)


# -- jobs -------------------------------------------------------------------------------------------------------------------------


def _open(context: Context, name: str) -> tuple[Path, Weights]:
    """A model of the shelf by name, its file made first where it is a variant."""
    context.progress("opening", 0, 1)
    shelf = context.library.shelf
    path = shelf.ready(shelf.resolve(name))
    return path, open_weights(path)


def weight_report_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {"model": name} -> {"identity": of its files}; the report lies in the cache under that."""
    path, weights = _open(context, params["model"])
    identity = identity_of(path)
    if WeightReport.load(context.derived, identity) is None:
        weight_report(weights, context.progress, context.should_stop).save(context.derived, identity)
    return {"identity": identity}


def weight_tensor_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {"model": name, "tensor": native name, "index": which matrix of a stack} -> {"identity"}; the detail lies in the cache."""
    path, weights = _open(context, params["model"])
    identity, name, index = identity_of(path), str(params["tensor"]), int(params.get("index", 0))
    if TensorDetail.load(context.derived, identity, name, index) is None:
        tensor_detail(Matrix(weights.stored(name), index), context.progress, context.should_stop).save(context.derived, identity, name, index)
    return {"identity": identity}

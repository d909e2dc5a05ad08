"""Embeddings: project the rows of W_E or W_U, or the states of a site in traces, to two or three dimensions; find nearest vectors by cosine.

The vectors are read in blocks, a few times over: once for their lengths, for the principal components and for the coordinates. UMAP and t-SNE go
on from the leading principal components. UMAP and t-SNE say how far they are and are asked to stop between their epochs and steps, but not inside them:
a cancelled job that does not notice in time is ended with its process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from backend.analysis.embeddings import N_COMPONENTS, all_scores, fit_pca, sample, tsne_layout, umap_layout
from backend.analysis.token_classes import token_classes
from backend.engines import ShouldStop, default_threads, never_stop
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Context, Progress, no_progress
from backend.model_files import identity as identity_of
from backend.reports.embedding_neighbours import matrices, neighbours, neighbours_key
from backend.reports.projection import LIMITS, Projection, ProjectionSpec, VocabularyTexts
from backend.reports.vectors import Vectors, open_vectors
from backend.weights import Weights, open_weights

_LAYOUTS = {"umap": umap_layout, "tsne": tsne_layout}
LEAST_POINTS = 5  # fewer have no neighbours to speak of


def project(vectors: Vectors, spec: ProjectionSpec, progress: Progress = no_progress, should_stop: ShouldStop = never_stop, limit: int | None = None) -> Projection:
    """The projection of `vectors`; raises LayerscopeError where fewer than LEAST_POINTS of them are finite (and, at length 1, not 0).

    limit: rows that are projected at most, a seeded random sample of them where there are more; None: the method's of LIMITS.
    """
    begun = time.perf_counter()
    n, d = vectors.shape

    def report(stage: str, done: int, total: int) -> None:
        if should_stop():
            raise Cancelled
        progress(stage, done, total)

    norms = _norms(vectors, report)
    usable = np.isfinite(norms) & ((norms > 0) if spec.scale == "unit" else True)
    if usable.sum() < LEAST_POINTS:
        raise LayerscopeError(f"{int(usable.sum())} of {n:,} vectors can be projected, and at least {LEAST_POINTS} are needed; the others hold NaN or infinite values or are 0.")
    kept = np.flatnonzero(usable)
    include = np.flatnonzero(np.isin(kept, np.array(spec.include, np.int64)))
    rows = kept[sample(vectors.groups[kept], limit or LIMITS[spec.method], include, spec.seed)]
    chosen = np.zeros(n, bool)
    chosen[rows] = True
    scale = norms if spec.scale == "unit" else None
    with threadpool_limits(default_threads(), user_api="blas"):
        pca = fit_pca(_selected(vectors, chosen, scale, report, "principal components, rows"), (len(rows), d), N_COMPONENTS, spec.seed)
        scores = all_scores(pca, _selected(vectors, chosen, scale, report, "coordinates, rows"), len(rows))
        coords = scores[:, :3] if spec.method == "pca" else _LAYOUTS[spec.method](scores, spec.dims, spec.seed, report)
    facts = {"n": n, "d": d, "n_left_out": int(np.sum(~np.isfinite(norms))), "n_zero": int(np.sum(norms == 0)), "n_sampled_from": len(kept) if len(rows) < len(kept) else 0,
             "seconds": time.perf_counter() - begun}  # fmt: skip
    return Projection(rows.astype(np.int32), np.ascontiguousarray(coords), norms, pca.ratio, facts)


def _norms(vectors: Vectors, report: Callable[[str, int, int], None]) -> NDArray[np.float32]:
    """(row,) Euclidean lengths, NaN where a value is NaN or infinite."""
    norms = np.empty(vectors.shape[0], np.float32)
    for first, block in vectors.blocks():
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
        norms[first : first + len(block)] = np.where(np.isfinite(lengths), lengths, np.nan)
        report("lengths, rows", first + len(block), vectors.shape[0])
    return norms


def _selected(vectors: Vectors, chosen: NDArray[np.bool_], scale: NDArray[np.float32] | None, report: Callable[[str, int, int], None],
              stage: str) -> Callable[[], Iterator[tuple[int, NDArray[np.float32]]]]:  # fmt: skip
    """The chosen rows in blocks, divided by `scale`, numbered without the others."""

    def blocks() -> Iterator[tuple[int, NDArray[np.float32]]]:
        at = 0
        for first, block in vectors.blocks():
            mine = chosen[first : first + len(block)]
            rows = block if mine.all() else block[mine]
            if len(rows):
                yield at, rows if scale is None else rows / scale[first : first + len(block)][mine][:, None]
            at += len(rows)
            report(stage, first + len(block), vectors.shape[0])

    return blocks


# -- jobs -------------------------------------------------------------------------------------------------------------------------


class _Model:
    """A model of the shelf, opened when first asked for."""

    def __init__(self, context: Context, name: str) -> None:
        self._shelf, self._name = context.library.shelf, name
        self._weights: Weights | None = None
        self.path = self._shelf.ready(self._shelf.resolve(name))

    @property
    def identity(self) -> str:
        return identity_of(self.path)

    def weights(self) -> Weights:
        if self._weights is None:
            self._weights = open_weights(self.path)
        return self._weights


def vocabulary_of(model: _Model, context: Context) -> VocabularyTexts:
    """Texts and classes of the model's tokens, from the cache if they are there."""
    known = VocabularyTexts.load(context.derived, model.identity)
    if known is not None:
        return known
    from backend.engines.vocabulary import token_texts

    context.progress("tokens of the vocabulary", 0, 1)
    found = token_texts(model.path, model.weights().info.d_vocab)
    texts = VocabularyTexts(found.texts, token_classes(found.texts, found.special, found.unused), frozenset(found.special))
    texts.save(context.derived, model.identity)
    return texts


def embeddings_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: a ProjectionSpec as JSON -> {"key"}; the projection lies in the cache under that, the vocabulary's texts under the model's identity."""
    spec = ProjectionSpec.from_json(params)
    context.progress("opening", 0, 1)
    if spec.choice.is_matrix:
        model = _Model(context, spec.choice.model)
        vocabulary_of(model, context)
        vectors, key = open_vectors(spec.choice, model.weights, context.library.open), spec.key(model.identity)
    else:
        vectors, key = open_vectors(spec.choice, _no_weights, context.library.open), spec.key("")
    if Projection.load(context.derived, key) is None:
        project(vectors, spec, context.progress, context.should_stop).save(context.derived, key)
    return {"key": key}


def _no_weights() -> Weights:
    raise AssertionError("the vectors of traces are read from traces")


def neighbours_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {"spec": ..., "row", "k"} -> {"key"}; the neighbours lie in the cache under `neighbours_key`, and the vocabulary's texts beside them.

    A trace whose model is gone has neighbours among its own states alone, and the answer says why ("note").
    """
    spec, row, k = ProjectionSpec.from_json(params["spec"]), int(params["row"]), int(params["k"])
    model = among = None
    note = ""
    try:
        model = _Model(context, spec.choice.model)
        vocabulary_of(model, context)
        among = matrices(model.weights())
    except LayerscopeError as problem:
        if spec.choice.is_matrix:
            raise
        note = str(problem)
    vectors = open_vectors(spec.choice, model.weights if model else _no_weights, context.library.open)
    if not 0 <= row < vectors.shape[0]:
        raise LayerscopeError(f"There is no vector {row:,}; there are {vectors.shape[0]:,}.")
    key = spec.key(model.identity if model and spec.choice.is_matrix else "")
    read, total = 0, vectors.shape[0] + sum(matrix.shape[0] for matrix in (among or {}).values())

    def advance(n: int) -> None:
        nonlocal read
        if context.should_stop():
            raise Cancelled
        read += n
        context.progress("vectors compared", read, total)

    context.derived.put_json(neighbours_key(key, row, k), neighbours(vectors, row, among or {}, k, advance) | {"note": note})
    return {"key": key}

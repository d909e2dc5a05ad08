"""Projections of many vectors to two or three dimensions: PCA over blocks, UMAP and t-SNE on the leading principal components.

The vectors are a function that gives their blocks, as in `backend.analysis.spectrum`: `blocks()` yields (first row, (n, dimension)
float32), each call anew. So the rows of a vocabulary's matrix never lie in memory together, in float64 least of all.
scikit-learn and umap are imported when first used: they take seconds to load.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from backend.analysis.neighbours import nearest_neighbours
from backend.analysis.spectrum import Blocks

FULL_SIDE = 1536  # PCA by the whole covariance (or Gram matrix) up to this many dimensions (or rows); beyond by a randomized SVD
N_COMPONENTS = 50  # principal components that UMAP and t-SNE start from, as their authors advise
N_NEIGHBOURS, MIN_DIST = 15, 0.1  # UMAP's defaults
PERPLEXITY = 30.0  # t-SNE's default in scikit-learn
TSNE_STEPS, _TSNE_SAID_EVERY = 1000, 50
_OVERSAMPLE, _POWER_ITERATIONS = 14, 4

Report = Callable[[str, int, int], None]  # stage, done, total; may raise to stop the computation


@dataclass(frozen=True)
class Pca:
    """mean: (dimension,); components: (k, dimension), orthonormal rows, the largest loading of each positive; variance: (k,), descending; total: of all dimensions."""

    mean: NDArray[np.float64]
    components: NDArray[np.float32]
    variance: NDArray[np.float64]
    total: float

    @property
    def ratio(self) -> NDArray[np.float64]:
        """Share of the total variance that each component explains, (k,)."""
        return self.variance / self.total if self.total > 0 else np.zeros_like(self.variance)

    def scores(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        """(row, k) coordinates of (row, dimension) vectors."""
        return (block - self.mean.astype(np.float32)) @ self.components.T


def fit_pca(blocks: Blocks, shape: tuple[int, int], k: int = N_COMPONENTS, seed: int = 0) -> Pca:
    """The k leading principal components of finite vectors, the eigenvectors of their covariance (divided by n - 1).

    shape: (row, dimension). By the covariance or, where there are fewer rows than dimensions, by the Gram matrix, exactly; where both sides exceed FULL_SIDE
    by a randomized SVD of the centred rows (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), which reads them 11 times.
    """
    n, d = shape
    k = min(k, d, n - 1)
    mean, total = _mean_and_variance(blocks, shape)

    def centred() -> Iterator[tuple[int, NDArray[np.float32]]]:
        shift = mean.astype(np.float32)
        for first, block in blocks():
            yield first, block - shift

    if d <= FULL_SIDE:
        covariance = np.zeros((d, d))
        for _, block in centred():
            covariance += block.T @ block
        values, vectors = scipy.linalg.eigh(covariance, subset_by_index=[d - k, d - 1], check_finite=False)
        components = vectors.T[::-1]
        variance = values[::-1]
    elif n <= FULL_SIDE:
        components, variance = _by_gram_matrix(centred, shape, k)
    else:
        components, variance = _randomized(centred, shape, k, seed)
    largest = np.abs(components).argmax(axis=1)
    signs = np.sign(components[np.arange(k), largest])
    return Pca(mean, (components * np.where(signs, signs, 1.0)[:, None]).astype(np.float32), np.clip(variance, 0, None) / (n - 1), total)


def _mean_and_variance(blocks: Blocks, shape: tuple[int, int]) -> tuple[NDArray[np.float64], float]:
    """The mean, (dimension,), and the total variance: in one reading, about the first block's mean, so that little cancels."""
    shift = sums = squares = None
    for _, block in blocks():
        if shift is None or sums is None or squares is None:
            shift = block.mean(axis=0, dtype=np.float64)
            sums, squares = np.zeros(shape[1]), np.zeros(shape[1])
        off = block - shift.astype(np.float32)
        sums += off.sum(axis=0, dtype=np.float64)
        squares += np.einsum("nd,nd->d", off, off, dtype=np.float64)
    assert shift is not None and sums is not None and squares is not None, "there is at least one row"
    around = sums / shape[0]
    variance = float(np.clip(squares - shape[0] * around**2, 0, None).sum() / (shape[0] - 1))
    return shift.astype(np.float32).astype(np.float64) + around, variance


def _by_gram_matrix(centred: Blocks, shape: tuple[int, int], k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows = np.empty(shape, np.float32)
    for first, block in centred():
        rows[first : first + len(block)] = block
    gram = np.zeros((shape[0], shape[0]))
    for start in range(0, shape[1], 4096):
        part = rows[:, start : start + 4096]
        gram += part @ part.T
    values, vectors = scipy.linalg.eigh(gram, subset_by_index=[shape[0] - k, shape[0] - 1], check_finite=False)
    return _orthonormal((rows.T @ vectors[:, ::-1].astype(np.float32)).T.astype(np.float64)), values[::-1]


def _randomized(centred: Blocks, shape: tuple[int, int], k: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    width = min(k + _OVERSAMPLE, *shape)
    right = np.random.default_rng(seed).standard_normal((shape[1], width), np.float32)
    for step in range(_POWER_ITERATIONS + 1):
        left = np.empty((shape[0], width), np.float32)
        for first, block in centred():
            left[first : first + len(block)] = block @ right
        left = scipy.linalg.qr(left, mode="economic", overwrite_a=True, check_finite=False)[0]
        right = np.zeros((shape[1], width), np.float32)
        for first, block in centred():
            right += block.T @ left[first : first + len(block)]
        if step < _POWER_ITERATIONS:
            right = scipy.linalg.qr(right, mode="economic", overwrite_a=True, check_finite=False)[0]
    vectors, values, _ = scipy.linalg.svd(right.astype(np.float64), full_matrices=False, check_finite=False)
    return vectors.T[:k], values[:k] ** 2


def _orthonormal(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows at length 1; one that is nothing but rounding stays 0."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 1e-6 * max(float(lengths.max(initial=0.0)), 1e-30), lengths, np.inf)


def all_scores(pca: Pca, blocks: Blocks, n: int) -> NDArray[np.float32]:
    """(row, k) of every row."""
    out = np.empty((n, len(pca.components)), np.float32)
    for first, block in blocks():
        out[first : first + len(block)] = pca.scores(block)
    return out


# -- which rows ------------------------------------------------------------------------------------------------------------------------


def sample(groups: NDArray[np.integer], limit: int, include: NDArray[np.integer], seed: int = 0) -> NDArray[np.int64]:
    """Numbers of at most about `limit` rows, ascending: whole groups drawn at random, after those of the rows in `include`, which are all taken.

    groups: (row,) the group of each row. All states of one token are one group, so that its way through the layers stays whole.
    """
    if len(groups) <= limit:
        return np.arange(len(groups), dtype=np.int64)
    numbers, counts = np.unique(groups, return_counts=True)
    first = np.unique(groups[include]) if len(include) else numbers[:0]
    rest = np.random.default_rng(seed).permutation(np.setdiff1d(numbers, first))
    order = np.concatenate([first, rest])
    sizes = np.cumsum(counts[np.searchsorted(numbers, order)])
    chosen = order[: max(int(np.searchsorted(sizes, limit, side="right")), len(first), 1)]
    return np.flatnonzero(np.isin(groups, chosen))


# -- UMAP and t-SNE --------------------------------------------------------------------------------------------------------------------


def umap_layout(scores: NDArray[np.float32], dims: int, seed: int = 0, report: Report = lambda stage, done, total: None) -> NDArray[np.float32]:
    """UMAP (McInnes, Healy and Melville 2018) of principal components, (row, dims): N_NEIGHBOURS exact nearest neighbours, min_dist MIN_DIST, started from the
    first components (Kobak and Linderman 2021), so that the same seed gives the same picture. report is told every epoch.
    """
    from umap.umap_ import find_ab_params, fuzzy_simplicial_set, simplicial_set_embedding

    n = len(scores)
    k = min(N_NEIGHBOURS, n - 1)
    n_epochs = 500 if n <= 10_000 else 200  # UMAP's own choice
    found, distances = nearest_neighbours(scores, k, lambda done, total: report("nearest neighbours, rows", done, total))
    report("UMAP, graph of neighbours", 0, 1)
    random = np.random.RandomState(seed)
    graph, _, _ = fuzzy_simplicial_set(scores, k, random, "euclidean", knn_indices=found, knn_dists=distances)
    a, b = find_ab_params(1.0, MIN_DIST)
    start = _start(scores, dims, 10.0)
    with contextlib.redirect_stdout(io.StringIO()), _tqdm_released():
        layout, _ = simplicial_set_embedding(
            scores, graph, dims, 1.0, a, b, 1.0, 5, n_epochs, start, random, "euclidean", {}, False, {}, False, parallel=False, verbose=False,
            tqdm_kwds={"disable": False, "file": _Listener(r"\|\s*(\d+)/", lambda done: report("UMAP, epochs", done, n_epochs)), "mininterval": 0.1},
        )  # fmt: skip
    return np.ascontiguousarray(layout, np.float32)


@contextlib.contextmanager
def _tqdm_released() -> Iterator[None]:
    """tqdm holds its lock while it writes, and keeps it for ever where writing raises: every later progress bar of the process would wait."""
    try:
        yield
    except BaseException:
        from umap.layouts import tqdm  # the bar that it draws with

        with contextlib.suppress(RuntimeError, AssertionError, ValueError):  # this thread does not hold it
            tqdm.get_lock().release()
        raise


def tsne_layout(scores: NDArray[np.float32], dims: int, seed: int = 0, report: Report = lambda stage, done, total: None) -> NDArray[np.float32]:
    """t-SNE (van der Maaten 2014, Barnes-Hut) of principal components, (row, dims), by scikit-learn: started from the first components with
    the learning rate of Belkina et al. 2019, so that nothing in it is random. report is told every 50 of its steps.
    """
    from sklearn.manifold import TSNE

    n = len(scores)
    start = _start(scores, dims, 1e-4)
    model = TSNE(dims, perplexity=min(PERPLEXITY, (n - 1) / 3), init=start, learning_rate="auto", max_iter=TSNE_STEPS, random_state=seed, verbose=2)
    report("t-SNE, nearest neighbours", 0, 1)
    # What it prints is the only word it gives before it ends.
    with contextlib.redirect_stdout(_Listener(r"Iteration (\d+)", lambda done: report("t-SNE, steps", done, TSNE_STEPS))):
        layout = model.fit_transform(scores)
    return np.ascontiguousarray(layout, np.float32)


def _start(scores: NDArray[np.float32], dims: int, size: float) -> NDArray[np.float32]:
    """The first components with the first one's standard deviation (t-SNE) or reach (UMAP) set to `size`; axes that are not there are 0."""
    start = np.zeros((len(scores), dims), np.float32)
    start[:, : scores.shape[1]] = scores[:, :dims]
    spread = float(start[:, 0].std()) if size < 1 else float(np.abs(start).max())
    return np.ascontiguousarray(start * (size / spread if spread > 0 else 1.0), np.float32)


class _Listener(io.StringIO):
    """Where a library writes its progress: each number that `pattern` finds is told. What `tell` raises ends the computation."""

    def __init__(self, pattern: str, tell: Callable[[int], None]) -> None:
        super().__init__()
        self._pattern, self._tell, self._over = re.compile(pattern), tell, False

    def write(self, text: Any) -> int:
        found = self._pattern.search(str(text))
        if found and not self._over:
            try:
                self._tell(int(found[1]))
            except BaseException:
                self._over = True  # a progress bar that is closed writes once more
                raise
        return len(text)

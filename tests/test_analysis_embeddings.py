"""Projections, neighbours and token classes against scikit-learn, brute force and tables written by hand."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors

from backend.analysis import embeddings, neighbours
from backend.analysis.embeddings import all_scores, fit_pca, sample, tsne_layout, umap_layout
from backend.analysis.neighbours import cosine_neighbours, nearest_neighbours
from backend.analysis.token_classes import CLASSES, token_class, token_classes

Blocks = Callable[[], Iterator[tuple[int, NDArray[np.float32]]]]


def in_blocks(x: NDArray[np.float32], step: int = 173) -> Blocks:
    return lambda: ((first, x[first : first + step]) for first in range(0, len(x), step))


def correlated(n: int, d: int, offset: float = 3.0, seed: int = 0) -> NDArray[np.float32]:
    """Variances that fall by a fifth from axis to axis, so that every component is its own, and some noise."""
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(n, 12)) * 0.8 ** np.arange(12) * 4
    return (hidden @ np.linalg.qr(random.normal(size=(d, 12)))[0].T + 0.05 * random.normal(size=(n, d)) + offset).astype(np.float32)


# (more rows than dimensions: covariance), (fewer: Gram matrix), (both sides beyond FULL_SIDE, made smaller here: randomized)
@pytest.mark.parametrize(("shape", "full_side"), [((900, 60), 1536), ((150, 1700), 1536), ((700, 400), 100)])
def test_pca_is_scikit_learns_signs_included(shape, full_side, monkeypatch):
    monkeypatch.setattr(embeddings, "FULL_SIDE", full_side)
    x = correlated(*shape)
    found, wanted = fit_pca(in_blocks(x), shape, 8), PCA(8, svd_solver="full").fit(x.astype(np.float64))
    np.testing.assert_allclose(found.mean, wanted.mean_, atol=1e-5)
    np.testing.assert_allclose(found.ratio, wanted.explained_variance_ratio_, rtol=2e-5)
    np.testing.assert_allclose(found.components, wanted.components_, atol=2e-4)
    np.testing.assert_allclose(found.total, x.astype(np.float64).var(axis=0, ddof=1).sum(), rtol=1e-5)
    np.testing.assert_allclose(all_scores(found, in_blocks(x), len(x)), wanted.transform(x.astype(np.float64)), atol=5e-3)


def test_pca_survives_a_mean_that_dwarfs_the_spread():
    x = correlated(800, 40, offset=2000.0)
    wanted = PCA(5, svd_solver="full").fit(x.astype(np.float64))
    np.testing.assert_allclose(fit_pca(in_blocks(x), x.shape, 5).ratio, wanted.explained_variance_ratio_, rtol=1e-3)


def test_pca_by_hand():
    x = np.array([[1, 0, 5], [-1, 0, 5], [0, 2, 5], [0, -2, 5]], np.float32)  # variances 2/3 and 8/3 along the first two axes, none along the third
    found = fit_pca(in_blocks(x), x.shape, 3)
    np.testing.assert_allclose(found.variance, [8 / 3, 2 / 3, 0], atol=1e-6)
    np.testing.assert_allclose(found.ratio, [0.8, 0.2, 0], atol=1e-6)
    np.testing.assert_allclose(found.components[:2], [[0, 1, 0], [1, 0, 0]], atol=1e-6)


def test_pca_of_equal_vectors_explains_nothing():
    x = np.ones((6, 4), np.float32)
    found = fit_pca(in_blocks(x), x.shape, 3)
    assert not found.ratio.any() and not all_scores(found, in_blocks(x), 6).any()


def test_pca_never_holds_the_matrix():
    n, d = 30_000, 1024  # 123 MB in float32

    def blocks() -> Iterator[tuple[int, NDArray[np.float32]]]:
        for first in range(0, n, 1000):
            yield first, np.random.default_rng(first).standard_normal((1000, d), np.float32)

    tracemalloc.start()
    try:
        all_scores(fit_pca(blocks, (n, d), 10), blocks, n)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 << 20


# -- neighbours -----------------------------------------------------------------------------------------------------------------------


def test_cosine_neighbours_are_scikit_learns():
    x = np.random.default_rng(1).normal(size=(1000, 24)).astype(np.float32)
    wanted = NearestNeighbors(n_neighbors=8, metric="cosine").fit(x)
    distances, numbers = wanted.kneighbors(x[:20])
    at, cosines = cosine_neighbours(in_blocks(x, 97), x[:20], 8)
    assert np.array_equal(at, numbers)
    np.testing.assert_allclose(cosines, 1 - distances, atol=1e-6)
    without, _ = cosine_neighbours(in_blocks(x, 97), x[:20], 7, exclude=np.arange(20))
    assert np.array_equal(without, numbers[:, 1:])


def test_rows_without_a_direction_are_nobodys_neighbours():
    x = np.array([[1, 0], [0, 0], [np.nan, 1], [np.inf, 0], [0, 1], [-2, 0]], np.float32)
    at, cosines = cosine_neighbours(in_blocks(x, 4), np.array([[3.0, 0.0]]), 5)
    assert at.tolist() == [[0, 4, 5, -1, -1]]
    np.testing.assert_allclose(cosines[0, :3], [1, 0, -1])
    assert np.isnan(cosines[0, 3:]).all()


def test_nearest_points_are_those_of_all_distances_across_tiles(monkeypatch):
    monkeypatch.setattr(neighbours, "_TILE_ROWS", 200)
    monkeypatch.setattr(neighbours, "_TILE_COLUMNS", 1900)  # 29 groups and 44 columns over: groups, rest and merging all take part
    x = np.random.default_rng(2).normal(size=(4300, 6)).astype(np.float32) + 7
    told: list[tuple[int, int]] = []
    at, distances = nearest_neighbours(x, 10, lambda done, total: told.append((done, total)))
    everyone = cdist(x.astype(np.float64), x.astype(np.float64))
    wanted = np.sort(everyone, axis=1)[:, :10]
    np.testing.assert_allclose(distances, wanted, atol=2e-5)
    np.testing.assert_allclose(np.take_along_axis(everyone, at, axis=1), wanted, atol=2e-5)
    assert np.array_equal(at[:, 0], np.arange(4300)) and told[-1] == (4300, 4300)


def test_a_point_is_its_own_first_neighbour_among_equals():
    x = np.repeat(np.arange(3, dtype=np.float32)[:, None], 5, axis=0)
    at, distances = nearest_neighbours(x, 5)
    assert np.array_equal(at[:, 0], np.arange(15)) and not distances.any()
    assert all(set(row) == set(range(5 * (i // 5), 5 * (i // 5) + 5)) for i, row in enumerate(at))


# -- UMAP and t-SNE ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clusters() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    random = np.random.default_rng(3)
    member = random.integers(0, 6, 420)
    return (random.normal(size=(6, 30))[member] * 4 + random.normal(size=(420, 30))).astype(np.float32), member


@pytest.mark.parametrize("layout", [umap_layout, tsne_layout])
@pytest.mark.parametrize("dims", [2, 3])
def test_layouts_repeat_and_keep_neighbourhoods(layout, dims, clusters):
    x, member = clusters
    stages: list[tuple[str, int, int]] = []
    first = layout(x, dims, 5, lambda *said: stages.append(said))
    assert first.shape == (420, dims) and first.dtype == np.float32 and np.isfinite(first).all()
    assert np.array_equal(first, layout(x, dims, 5))
    assert np.array_equal(first, layout(x, dims, 6)) == (layout is tsne_layout)  # started from the components, nothing in t-SNE is random
    assert trustworthiness(x, first, n_neighbors=12) > 0.9
    at, _ = nearest_neighbours(first, 6)
    assert (member[at[:, 1:]] == member[:, None]).mean() > 0.98
    name = {umap_layout: "UMAP, epochs", tsne_layout: "t-SNE, steps"}[layout]
    steps = [done for stage, done, total in stages if stage == name]
    assert len(steps) > 4 and steps == sorted(steps) and steps[-1] >= stages[-1][2] // 2  # t-SNE ends once nothing improves


@pytest.mark.parametrize(("layout", "stage"), [(umap_layout, "UMAP, epochs"), (tsne_layout, "t-SNE, steps")])
def test_a_layout_stops_between_its_steps(layout, stage, clusters):
    class Stop(Exception):
        pass

    said: list[int] = []

    def report(name: str, done: int, total: int) -> None:
        if name == stage:
            said.append(done)
            if done > total / 4:
                raise Stop

    with pytest.raises(Stop):
        layout(clusters[0], 2, 0, report)
    assert len(said) < 200 and said[-1] < 500


# -- which rows, which class ------------------------------------------------------------------------------------------------------------


def test_a_sample_takes_whole_groups_and_what_must_be_in_it():
    groups = np.tile(np.arange(100), 7)  # 7 layers of 100 tokens
    found = sample(groups, 70, np.array([42, 142, 99]), seed=1)
    assert len(found) == 70 and np.array_equal(found, np.unique(found))
    assert set(np.bincount(groups[found], minlength=100).tolist()) == {0, 7} and {42, 99} <= set(groups[found].tolist())
    assert np.array_equal(found, sample(groups, 70, np.array([42, 142, 99]), seed=1)) and not np.array_equal(found, sample(groups, 70, np.array([42, 99]), seed=2))
    assert np.array_equal(sample(groups, 700, np.array([], np.int64)), np.arange(700))
    assert set(groups[sample(groups, 7, np.arange(5))].tolist()) == set(range(5))  # more than the limit, if they must be in it


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cat", "lower"), (" the", "lower"), ("don't", "lower"), ("é", "lower"), ("x86", "lower"), (" Paris", "capitalised"), ("A", "capitalised"), (" I'm", "capitalised"),
        ("NASA", "upper"), ("USA1", "upper"), ("getElement", "mixed"), ("McD", "mixed"), ("1984", "digit"), (" 7", "digit"), ("½", "digit"), ("3.5", "digit"),
        ("...", "punctuation"), (" +=", "punctuation"), ("€", "punctuation"), ("🙂", "punctuation"),
        (" ", "whitespace"), ("\n\n", "whitespace"), ("\t", "whitespace"), ("\u3000", "whitespace"),
        ("猫", "other script"), (" кот", "other script"), ("שלום", "other script"), ("aб", "other script"), ("<0xE2>", "byte"), ("<0xF0><0x9F>", "byte"), ("<s>", "lower"),
    ],
)  # fmt: skip
def test_classes_by_hand(text, wanted):
    assert token_class(text) == wanted


def test_special_and_unused_come_from_the_tokenizer_not_from_the_spelling():
    found = token_classes(["<s>", "cat", "[pad]", "9"], special=[0], unused=[2])
    assert [list(CLASSES)[number] for number in found] == ["special", "lower", "unused", "digit"]

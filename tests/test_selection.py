"""Claims about selection from a stream: whatever arrays pass by, in whatever pieces, it is what sorting all of them at once would choose."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from backend.analysis import selection
from backend.analysis.selection import Selected, TopAndBottom, TopK

Streams = list[NDArray[np.float32]]


def stream(rng: np.random.Generator) -> Streams:
    """Arrays of odd sizes and shapes. Few distinct scores make ties; some are not finite, some are both zeros."""
    arrays = []
    for _ in range(int(rng.integers(1, 7))):
        shape = tuple(int(n) for n in rng.integers(1, 12, int(rng.integers(1, 4))))
        scores = _drawn(rng, shape)
        scores[rng.random(shape) < 0.1] = rng.choice([np.nan, np.inf, -np.inf])
        scores[rng.random(shape) < 0.05] = -0.0
        arrays.append(scores.astype(np.float32))
    return arrays


def _drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    kind = rng.integers(3)
    return rng.normal(size=shape) if kind == 0 else rng.integers(0, 4, shape).astype(float) if kind == 1 else np.zeros(shape)


def sorted_whole(arrays: Streams, k: int, sign: int) -> list[tuple[int, int]]:
    """(array, place) of the k best of every finite score, by Python's own stable sort."""
    places = [(i, at) for i, array in enumerate(arrays) for at in range(array.size) if np.isfinite(array.reshape(-1)[at])]
    return sorted(places, key=lambda place: -sign * float(arrays[place[0]].reshape(-1)[place[1]]))[:k]


def places(found: Selected) -> list[tuple[int, int]]:
    return list(zip(found.tensor.tolist(), found.at.tolist(), strict=True))


@pytest.fixture(params=range(60))
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Streams, int]:
    """A stream and a k, with blocks small enough that most arrays have several."""
    rng = np.random.default_rng(request.param)
    monkeypatch.setattr(selection, "BLOCK", int(rng.integers(1, 40)))
    return stream(rng), int(rng.integers(1, 60))


@pytest.mark.parametrize("largest", [True, False])
def test_top_k_is_that_of_a_full_sort(case: tuple[Streams, int], largest: bool) -> None:
    arrays, k = case
    top = TopK(k, largest=largest)
    for i, scores in enumerate(arrays):
        top.add(i, scores, scores * 2)
    found = top.best()
    assert places(found) == sorted_whole(arrays, k, 1 if largest else -1)
    scores = [arrays[i].reshape(-1)[at] for i, at in places(found)]
    assert found.score.tolist() == scores
    assert found.value.tolist() == [2 * score for score in scores]
    assert top.per_tensor() == {i: n for i in range(len(arrays)) if (n := [of for of, _ in places(found)].count(i))}


def test_bottom_has_each_arrays_least_as_many_as_its_top(case: tuple[Streams, int]) -> None:
    arrays, k = case
    both = TopAndBottom(k)
    for i, scores in enumerate(arrays):
        both.add(i, scores, scores)
    assert places(both.top()) == sorted_whole(arrays, k, 1)
    share = [[of for of, _ in places(both.top())].count(i) for i in range(len(arrays))]
    expected = {(i, at) for i, n in enumerate(share) for _, at in sorted_whole([arrays[i]], n, -1)}
    assert set(places(both.bottom())) == expected and len(both.bottom()) == len(both.top())
    assert (np.diff(both.bottom().score) >= 0).all()


def test_memory_does_not_grow_with_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever larger scores: each of them enters the selection, and pushes another out."""
    monkeypatch.setattr(selection, "BLOCK", 64)
    both, k = TopAndBottom(10), 10
    for i in range(200):
        scores = np.arange(i * 500, (i + 1) * 500, dtype=np.float32)
        both.add(i, scores, scores)
        assert both._top._n <= 2 * k + selection.BLOCK
        assert sum(map(len, both._bottom.values())) <= k
    assert both.top().score.tolist() == list(range(99_999, 99_989, -1))
    assert both.bottom().score.tolist() == list(range(99_500, 99_510))


def test_arrays_out_of_order_are_refused_since_ties_go_by_their_order() -> None:
    top = TopK(3)
    top.add(1, np.ones(4, np.float32), np.ones(4, np.float32))
    with pytest.raises(ValueError, match="array 0 is added after array 1"):
        top.add(0, np.ones(4, np.float32), np.ones(4, np.float32))

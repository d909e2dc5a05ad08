"""What is done with an engine's values happens beside it: in order, on values of its own, never far behind, and its failures come back."""

import threading

import numpy as np
import pytest

from backend.engines import Piece
from backend.experiments.aside import LAYERS_HELD, Aside


def piece(layer: int, values: np.ndarray) -> Piece:
    return Piece("resid_post", layer, 0, values, "made up")


def test_pieces_arrive_in_order_with_the_values_they_had_when_they_were_put():
    seen: list[tuple[int | None, float]] = []
    buffer = np.empty((3, 2), np.float32)
    with Aside(lambda p: seen.append((p.layer, float(p.values[0, 0])))) as aside:
        for layer in range(20):
            buffer[...] = layer  # an engine may use its buffers again
            aside.put(piece(layer, buffer))
    assert seen == [(layer, float(layer)) for layer in range(20)]


def test_the_engine_is_never_more_than_a_few_layers_ahead():
    go, put, seen = threading.Semaphore(0), [], []

    def work(p: Piece) -> None:
        go.acquire()
        seen.append(len(put) - p.layer)

    def engine() -> None:
        for layer in range(8):
            aside.put(piece(layer, np.zeros(1, np.float32)))
            put.append(layer)

    with Aside(work) as aside:
        thread = threading.Thread(target=engine)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and len(put) == LAYERS_HELD  # it waits for room
        for _ in range(8):
            go.release()
        thread.join()
    assert len(seen) == 8 and max(seen) <= LAYERS_HELD


def test_large_pieces_wait_for_each_other(monkeypatch):
    monkeypatch.setattr("backend.experiments.aside.BYTES_HELD", 1000)
    held: list[int] = []
    with Aside(lambda p: held.append(aside._n_bytes)) as aside:
        for _ in range(6):
            aside.put(piece(0, np.zeros(200, np.float32)))  # 800 bytes each
    assert held == [800] * 6


def test_a_failure_beside_the_engine_stops_the_engine_and_is_its_own_error():
    class Full(Exception):
        pass

    def work(p: Piece) -> None:
        raise Full(f"no space at layer {p.layer}")

    with pytest.raises(Full, match="layer 0"), Aside(work) as aside:
        for layer in range(100):
            aside.put(piece(layer, np.zeros(4, np.float32)))


def test_a_failure_at_the_very_last_piece_is_raised_too():
    with pytest.raises(ValueError, match="late"), Aside(lambda p: (_ for _ in ()).throw(ValueError("late"))) as aside:
        aside.put(piece(0, np.zeros(4, np.float32)))


def test_an_engine_that_fails_ends_the_thread_and_keeps_its_own_error():
    before = threading.active_count()
    with pytest.raises(KeyError), Aside(lambda p: None) as aside:
        aside.put(piece(0, np.zeros(4, np.float32)))
        raise KeyError("engine")
    assert threading.active_count() == before

"""Where cores are few, what is done with an engine's values is done between its steps: at once, on its thread, with nothing left at work when it goes on."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from backend.engines import Piece
from backend.engines import threads as engine_threads_module
from backend.experiments import between
from backend.experiments.aside import Aside
from backend.experiments.between import Between, sink_for


def piece(layer: int) -> Piece:
    return Piece("resid_post", layer, 0, np.full((2, 2), layer, np.float32), "made up")


def test_a_piece_is_done_with_when_put_returns_and_its_values_are_not_copied():
    seen: list[tuple[Piece, int]] = []
    with Between(lambda p: seen.append((p, threading.get_ident()))) as sink:
        for layer in range(3):
            given = piece(layer)
            sink.put(given)
            assert seen[-1][0] is given and seen[-1][1] == threading.get_ident()


def test_a_failure_is_raised_where_the_engine_is():
    with pytest.raises(KeyError), Between(lambda p: {}[p.layer]) as sink:
        sink.put(piece(0))


@pytest.mark.parametrize(
    ("on_cpu", "cores", "threads", "kind"),
    [(True, 2, 2, Between), (True, 4, 4, Between), (True, 2, 1, Aside), (True, 8, 8, Aside), (False, 2, 2, Aside)],
)
def test_an_engine_that_fills_few_cores_is_waited_for_and_any_other_goes_on(monkeypatch, on_cpu, cores, threads, kind):
    monkeypatch.setattr(between, "n_cores", lambda: cores)
    monkeypatch.setattr(engine_threads_module, "n_cores", lambda: cores)
    assert type(sink_for(SimpleNamespace(on_cpu=on_cpu, n_threads=threads), lambda p: None)) is kind

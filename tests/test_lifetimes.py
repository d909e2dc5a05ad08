"""Claims about reading several nodes of llama.cpp's graph at one stop: every value is what it is when each is read at its own, to the bit, in every architecture."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backend.engines import OpenOptions, Piece, Request
from backend.engines.ggml import Tensor
from backend.engines.gguf import GgufEngine
from backend.engines.gguf_graph import Watch
from backend.engines.gguf_lifetimes import Lifetimes
from backend.errors import LayerscopeError
from backend.sites import SITES
from tests.test_engines_agree import KINDS
from tests.test_graph_engines import Made
from tests.tiny_models import TinyModel

Found = dict[tuple[str, int | None, int], NDArray[Any]]

LENGTHS = (2, 14, 61)  # the last in two pieces of 32 tokens


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> Iterator[GgufEngine]:
    engine = GgufEngine(tiny_model(request.param).gguf, OpenOptions(device="cpu", n_gpu_layers=0, n_threads=1), n_ubatch=32)
    yield engine
    engine.close()


def run(engine: GgufEngine, n: int, sites: tuple[str, ...] | None = None) -> tuple[Found, list[tuple[str, int | None, int]]]:
    """Copies of what a run hands out, and the order."""
    found: Found = {}
    order: list[tuple[str, int | None, int]] = []

    def take(piece: Piece) -> None:
        where = piece.site, piece.layer, piece.start
        order.append(where)
        found[where] = np.array(piece.values)

    ids = [(7 * i + 3) % engine.info.d_vocab for i in range(n)]
    engine.run(ids, Request(sites or tuple(site for site in SITES if site in engine.sites)), take)
    return found, order


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop at every node that is wanted."""
    want = Watch.want
    monkeypatch.setattr(Watch, "want", lambda self, places, visit, lifetimes=None: want(self, places, visit))


def same(actual: tuple[Found, list[Any]], expected: tuple[Found, list[Any]]) -> None:
    assert actual[1] == expected[1]
    for where, values in expected[0].items():
        assert values.dtype == actual[0][where].dtype and values.tobytes() == actual[0][where].tobytes(), where


@pytest.mark.parametrize("n", LENGTHS)
def test_what_is_read_together_is_what_is_read_apart_to_the_bit(engine: GgufEngine, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    known: list[bool] = []
    has = Lifetimes.has
    monkeypatch.setattr(Lifetimes, "has", lambda self, at, key: known.append(has(self, at, key)) or known[-1])
    together = run(engine, n)
    assert known and all(known)  # a prompt of any length, and its second piece, has the graph of the three tokens that the model was opened with
    apart(monkeypatch)
    same(together, run(engine, n))


@pytest.mark.parametrize("sites", [("resid_post",), ("embed", "attn_pattern", "resid_mid", "resid_post"), ("z", "mlp_out", "logits"), ("q", "rot_k", "v")])
def test_so_it_is_for_a_few_sites(engine: GgufEngine, monkeypatch: pytest.MonkeyPatch, sites: tuple[str, ...]) -> None:
    sites = tuple(site for site in sites if site in engine.sites)
    together = run(engine, 14, sites)
    apart(monkeypatch)
    same(together, run(engine, 14, sites))


def test_fewer_stops_are_made(tiny_llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    on_node = Watch._on_node
    monkeypatch.setattr(Watch, "_on_node", lambda self, address, ask, data: (ask or made.append(address), on_node(self, address, ask, data))[1])
    engine = GgufEngine(tiny_llama.gguf, OpenOptions(device="cpu", n_gpu_layers=0))
    sites = ("attn_pattern", "resid_mid", "resid_post")
    made.clear()
    run(engine, 14, sites)
    together = len(made)
    apart(monkeypatch)
    made.clear()
    run(engine, 14, sites)
    engine.close()
    assert (together, len(made)) == (2 * engine.info.n_layers + 1, 3 * engine.info.n_layers)


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 1])
def test_a_graph_that_becomes_another_is_stopped_at_every_wanted_node_from_there(tiny_llama: TinyModel, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    engine = GgufEngine(tiny_llama.gguf, OpenOptions(device="cpu", n_gpu_layers=0))
    expected = run(engine, 14)
    other = round(share * (len(engine._lifetimes.keys) - 1))
    monkeypatch.setattr(Lifetimes, "has", lambda self, at, key: at < other)
    same(run(engine, 14), expected)
    engine.close()


def test_memory_that_would_be_written_over_before_it_is_read_is_an_error_and_no_wrong_value(tiny_llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the graph of the pass had kept everything for ever, and the real one then turned out to be another."""
    engine = GgufEngine(tiny_llama.gguf, OpenOptions(device="cpu", n_gpu_layers=0))
    expected = run(engine, 14)
    names = [name for name, _ in engine._lifetimes.keys]
    with monkeypatch.context() as patched:
        patched.setattr(Lifetimes, "until", lambda self, at: len(self.keys))
        patched.setattr(Lifetimes, "has", lambda self, at, key: at < names.index(b"l_out-0"))  # the sum takes the place of what it adds
        with pytest.raises(LayerscopeError, match="takes memory that is not read yet"):
            run(engine, 14, ("mlp_out",))
    same(run(engine, 14), expected)
    engine.close()


# Lifetimes alone, on tensors made here


def noted(*nodes: Tensor) -> Lifetimes:
    lifetimes = Lifetimes()
    for node in nodes:
        lifetimes.note(ctypes.addressof(node))
    return lifetimes


def test_a_value_lives_until_the_node_before_the_last_that_takes_it_and_through_a_product() -> None:
    made = Made()
    x = made.tensor("x", "ADD", made.tensor("a"), made.tensor("b"))
    norm = made.tensor("norm", "RMS_NORM", x)
    product = made.tensor("product", "MUL_MAT", made.tensor("w"), norm)
    total = made.tensor("total", "ADD", product, x)
    last = made.tensor("last", "SCALE", total)
    lifetimes = noted(x, norm, product, total, last)
    assert [lifetimes.until(at) for at in range(5)] == [2, 2, 2, 3, 4]
    assert lifetimes.stops([0, 1, 2]) == {2} and lifetimes.stops([0, 3, 4]) == {0, 3, 4} and lifetimes.stops([]) == set()


def test_views_keep_what_they_show_and_writing_through_one_ends_it() -> None:
    made = Made()
    x = made.tensor("x", "MUL_MAT", made.tensor("w"), made.tensor("a"))
    shown = made.tensor("x (reshaped)", "RESHAPE", x, view_of=x)
    other = made.tensor("other", "MUL_MAT", made.tensor("w2"), made.tensor("a2"))
    user = made.tensor("user", "MUL_MAT", shown, other)
    lifetimes = noted(x, shown, other, user)
    assert lifetimes.until(0) == lifetimes.until(1) == 3
    written = made.tensor("x (written)", "SCALE", shown, view_of=x)
    lifetimes = noted(x, shown, other, written, made.tensor("user", "MUL_MAT", written, other))
    assert lifetimes.until(0) == lifetimes.until(1) == 2 and lifetimes.until(3) == 4

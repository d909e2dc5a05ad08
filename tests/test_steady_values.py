"""Claims about values that a PyTorch model hands out without a copy: it writes into none of them afterwards, in any architecture of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from backend.engines import OpenOptions, Piece, Request, hf, hf_taps
from backend.engines.hf import HfEngine
from backend.experiments.aside import Aside
from backend.intervention import Intervention
from backend.sites import SITES
from tests.test_engines_agree import IDS, KINDS
from tests.tiny_models import TinyModel


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> Iterator[HfEngine]:
    engine = HfEngine(tiny_model(request.param).hf, OpenOptions(device="cpu", n_threads=1))
    yield engine
    engine.close()


def every_site(engine: HfEngine) -> Request:
    return Request(tuple(site for site in SITES if site in engine.sites))


def written_to(engine: HfEngine, monkeypatch: pytest.MonkeyPatch, edits: tuple[Intervention, ...] = ()) -> set[tuple[str, int | None]]:
    """Where something was written into what had been handed out: PyTorch counts the writes of a tensor and its views."""
    handed: list[tuple[Any, int, str, int | None]] = []
    to_numpy = hf_taps.to_numpy
    now: list[Any] = []

    def noted(tensor: Any) -> Any:
        now[:] = [tensor]
        return to_numpy(tensor)

    def sink(piece: Piece) -> None:
        if piece.steady and not piece.owned:
            handed.append((now[0], now[0]._version, piece.site, piece.layer))

    with monkeypatch.context() as patched:
        patched.setattr(hf_taps, "to_numpy", noted)
        engine.run(IDS, every_site(engine), sink, edits)
    assert edits or {site for *_, site, _ in handed} == engine.sites - {"expert_indices"}  # which is converted, and so copied
    return {(site, layer) for tensor, version, site, layer in handed if tensor._version != version}


@pytest.mark.parametrize("piece", [512, 5])
def test_a_model_of_the_table_writes_into_nothing_that_it_handed_out(engine: HfEngine, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(hf, "PIECE", piece)
    assert written_to(engine, monkeypatch) == set()


def test_a_model_that_does_would_be_found(tiny_llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = HfEngine(tiny_llama.hf, OpenOptions(device="cpu", n_threads=1))
    handle = engine._model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(lambda module, args: (args[0].add_(1.0), None)[1])
    assert written_to(engine, monkeypatch) == {("ln2_out", 1)}
    handle.remove()
    engine.close()


def test_with_edits_every_value_is_copied(tiny_llama: TinyModel) -> None:
    engine = HfEngine(tiny_llama.hf, OpenOptions(device="cpu", n_threads=1))
    seen: list[bool] = []
    engine.run(IDS, every_site(engine), lambda piece: seen.append(piece.steady), (Intervention("z", 1, "zero", head=2),))
    assert seen and not any(seen)
    engine.close()


def test_what_is_worked_on_beside_the_model_is_what_it_handed_out(engine: HfEngine) -> None:
    """To the bit, although nothing is copied and the model may be layers ahead."""
    handed: dict[tuple[str, int | None, int], Any] = {}
    engine.run(IDS, every_site(engine), lambda piece: handed.update({(piece.site, piece.layer, piece.start): np.array(piece.values)}))
    beside: dict[tuple[str, int | None, int], Any] = {}
    with Aside(lambda piece: beside.update({(piece.site, piece.layer, piece.start): np.array(piece.values)})) as aside:
        engine.run(IDS, every_site(engine), aside.put)
    assert handed.keys() == beside.keys()
    for where, values in handed.items():
        assert values.tobytes() == beside[where].tobytes(), where

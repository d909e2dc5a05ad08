"""Claims about what an engine says of each token as it writes it: held against the same tokens without a listener and against their replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backend.analysis.activations import l2_norms
from backend.engines import Engine, OpenOptions, Piece, Request, Sampling, Step, open_engine
from backend.files.demo import ensure_demo_variants
from backend.intervention import Intervention
from tests.tiny_models import TinyModel

MODELS = Path(__file__).resolve().parents[1] / "models"
DEMOS = ("demo-dense", "demo-moe", "demo-dense-q4_k_m", "demo-moe-q8_0")
IDS = [0, 77, 104, 105, 40, 200, 201, 9, 77, 104]
SAMPLED = Sampling(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01, seed=5)


@pytest.fixture(scope="module", params=[(kind, engine) for kind in ("llama", "mixtral", "gemma2") for engine in ("hf", "gguf")], ids="-".join)
def engine(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> Iterator[Engine]:
    kind, name = request.param
    tiny = tiny_model(kind)
    opened = open_engine(tiny.hf if name == "hf" else tiny.gguf, OpenOptions(kv_cache="f32"))
    yield opened
    opened.close()


def heard(engine: Engine, n: int, sampling: Sampling, edits: tuple[Intervention, ...] = ()) -> list[Step]:
    steps: list[Step] = []
    engine.generate(IDS, n, sampling, lambda step: steps.append(replace(step, logits=step.logits.copy(), resid_norms=step.resid_norms.copy())), edits)
    return steps


def replayed(engine: Engine, steps: list[Step], edits: tuple[Intervention, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Logits (step, d_vocab) and norms of resid_post (layer, step) of one pass over the prompt and what was written."""
    pieces: list[Piece] = []
    ids = [*IDS, *(step.token for step in steps)]
    engine.run(ids, Request(("resid_post", "logits")), lambda piece: pieces.append(replace(piece, values=piece.values.copy())), edits)
    at = slice(len(IDS) - 1, len(ids) - 1)  # the position that each token was chosen at
    logits = next(piece.values for piece in pieces if piece.site == "logits")
    return logits[at], np.stack([l2_norms(piece.values)[at] for piece in pieces if piece.site == "resid_post"])


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_listening_changes_no_token_and_the_same_seed_repeats(engine: Engine, sampling: Sampling) -> None:
    silent = engine.generate(IDS, 9, sampling)
    assert [step.token for step in heard(engine, 9, sampling)] == silent == engine.generate(IDS, 9, sampling)


@pytest.mark.parametrize("edits", [(), (Intervention("resid_post", 1, "scale", 1.7),)], ids=["plain", "edited"])
def test_logits_and_norms_of_every_step_are_those_of_the_replayed_trace(engine: Engine, edits: tuple[Intervention, ...]) -> None:
    steps = heard(engine, 9, SAMPLED, edits)
    logits, norms = replayed(engine, steps, edits)
    np.testing.assert_allclose(np.stack([step.logits for step in steps]), logits, rtol=1e-3, atol=1e-3)
    live = np.stack([step.resid_norms for step in steps], axis=1)
    assert live.shape == (engine.info.n_layers, len(steps))
    np.testing.assert_allclose(live, norms, rtol=1e-4)


def test_the_sampler_s_probability_is_that_of_its_cuts_and_temperature(engine: Engine) -> None:
    for step in heard(engine, 6, Sampling(temperature=2.0, top_k=3, seed=1)):
        best = np.argsort(-step.logits, kind="stable")[:3]
        weights = np.exp(step.logits[best].astype(np.float64) / 2)
        assert step.token in best
        assert step.sampler_probability == pytest.approx(weights[list(best).index(step.token)] / weights.sum(), rel=1e-6)
    assert {step.sampler_probability for step in heard(engine, 6, Sampling())} == {1.0}


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = ensure_demo_variants(MODELS, tmp_path_factory.mktemp("variants"), [name for name in DEMOS if "-q" in name])
    return {name: made.get(name, MODELS / name) for name in DEMOS}


@pytest.mark.parametrize("name", DEMOS)
def test_the_demo_models_write_the_same_with_a_listener_and_their_norms_are_the_trace_s(name: str, demos: dict[str, Path]) -> None:
    engine = open_engine(demos[name], OpenOptions(device="cpu", n_gpu_layers=0))
    prompt = engine.tokenize("The capital of France is")
    steps: list[Step] = []
    written = engine.generate(prompt, 12, SAMPLED, lambda step: steps.append(replace(step, resid_norms=step.resid_norms.copy())))
    assert [step.token for step in steps] == written == engine.generate(prompt, 12, SAMPLED)
    pieces: list[np.ndarray] = []
    engine.run([*prompt, *written], Request(("resid_post",)), lambda piece: pieces.append(l2_norms(piece.values)))
    engine.close()
    # Quantized kernels round each row's activations to 8 bits, and the cache is f16: one token at a time and all at once differ by that.
    np.testing.assert_allclose(np.stack([step.resid_norms for step in steps], axis=1), np.stack(pieces)[:, len(prompt) - 1 : -1], rtol=1e-4 if "-q" not in name else 2e-2)

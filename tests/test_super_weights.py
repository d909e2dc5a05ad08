"""Super weights: spikes by hand, the published places, and a planted one found first in HF, F16 and Q8_0, its ablation against random weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from backend.analysis.super_weights import Candidate, LayerPeaks, candidates, in_order, magnitude_ranks, persistence, spikes
from backend.engines import Engine, OpenOptions, Request, open_engine
from backend.errors import Cancelled, LayerscopeError
from backend.experiments.sensitivity import perplexity
from backend.experiments.sensitivity.contracts import Losses
from backend.experiments.sensitivity.super_weights import BEYOND_RANDOM, _Matrix, confirmed, search, unsearched
from backend.experiments.sensitivity.texts import read_text
from backend.files.hf_config import model_info
from backend.model_info import ModelInfo
from backend.reports import known_super_weights
from backend.reports.known_super_weights import MODELS, KnownModel, Published, recognise
from tests.planted import ROOT, Planted, evaluation_text, plant, rotation

OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1, editable_weights=True)
FORMATS = ("HF", "F16", "Q8_0")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(ROOT / "models" / "demo-dense", tmp_path_factory.mktemp("planted") / "planted")


@pytest.fixture(scope="module")
def windows(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(evaluation_text())
    return with_engine(planted.hf, lambda engine: read_text(engine, str(text), 50, 128).windows)


def with_engine(path: Path, use: Any) -> Any:
    engine = open_engine(path, OPTIONS)
    try:
        return use(engine)
    finally:
        engine.close()


def file_of(planted: Planted, form: str) -> Path:
    return planted.hf if form == "HF" else planted.gguf(form)


# -- spikes, by hand ---------------------------------------------------------------------------------------------------------------------


def peaks_of(inputs: list[list[float]], outputs: list[list[float]], top_j: int = 2, at: int | None = None) -> LayerPeaks:
    """The peaks of a layer whose positions come in one piece, or in two that are cut before position `at`."""
    peaks, cut = LayerPeaks(top_j), at or len(inputs)
    for piece in (slice(0, cut), slice(cut, None)):
        if inputs[piece]:
            peaks.add(np.array(inputs[piece], np.float32), np.array(outputs[piece], np.float32))
    return peaks


INPUTS = [[1, -2, 1, 0.5], [-1, 30, 1, 20], [2, 1, -1, 1]]
OUTPUTS = [[1, 2, -1], [1, -60, 1], [-2, 2, 2]]


@pytest.mark.parametrize("at", [None, 1, 2])
def test_peaks_are_absolute_and_do_not_depend_on_how_the_text_is_cut(at: int | None) -> None:
    peaks = peaks_of(INPUTS, OUTPUTS, at=at)
    assert_array_equal(peaks.inputs, [2, 30, 1, 20])
    assert_array_equal(peaks.outputs, [2, 60, 2])
    assert set(peaks.input_at) == {0, 1}  # of equal outputs the first
    assert_array_equal(peaks.input_at[1], INPUTS[1])
    assert_array_equal(peaks.input_at[0], INPUTS[2])
    assert_allclose(spikes(peaks.inputs), np.array([2, 30, 1, 20]) / 11)
    assert_allclose(spikes(peaks.outputs), [1, 30, 1])


def test_a_channel_that_is_always_zero_is_no_part_of_the_median_and_what_is_not_finite_no_peak() -> None:
    assert_allclose(spikes(np.array([0, 0, 0, 2, 4, 12], np.float32)), [0, 0, 0, 0.5, 1, 3])
    assert_array_equal(spikes(np.zeros(3, np.float32)), np.zeros(3))
    assert_array_equal(peaks_of([[np.nan, 3]], [[np.inf, -2]]).outputs, [0, 2])


def test_an_input_spike_that_does_not_make_the_output_is_no_candidate() -> None:
    """At the output's peak W_out[1] gives 2 * 30 - 0.01 * 20 + 1 = 60.8: column 1 carries 60/60.8 of it, column 3, as large a spike, nothing."""
    weights = np.array([[1, 0, 0, 0], [-1, 2, 0, -0.01], [0, 0, 1, 0]], np.float32)
    inputs = [[1.0, -2, 1, 0.5, 1], [-1, 30, 1, 20, 1], [2, 1, -1, 1, 1]]
    peaks = peaks_of(inputs, OUTPUTS)
    assert_allclose(spikes(peaks.inputs), [1, 15, 0.5, 10, 0.5])
    found = candidates(4, peaks, lambda rows: np.pad(weights, ((0, 0), (0, 1)))[rows], threshold=5.0)
    assert [(each.layer, each.row, each.column, each.value) for each in found] == [(4, 1, 1, 2.0)]
    assert_allclose([found[0].input_spike, found[0].output_spike, found[0].carried, found[0].score], [15, 30, 60 / 60.8, math.sqrt(450)], rtol=1e-6)
    assert candidates(4, peaks, lambda rows: np.pad(weights, ((0, 0), (0, 1)))[rows], threshold=16.0) == []


def test_two_columns_may_share_an_output_and_one_column_may_make_several() -> None:
    """Both were published: two weights of LLaMA 30B write to channel 5633, three of Llama 3 8B read channel 2427. A single arg-max has one of each."""
    inputs = [[1.0, 1, 1, 1, 40, 30], [1, 1, 1, 1, 1, 1]]
    weights = np.zeros((5, 6), np.float32)
    weights[0, [4, 5]], weights[1, 4] = [1, 1], 2
    outputs = [[70.0, 80, 1, 1, 1], [1, 1, 1, 1, 1]]
    found = candidates(0, peaks_of(inputs, outputs), lambda rows: weights[rows], threshold=5.0)
    assert [(each.row, each.column, round(each.carried, 3)) for each in found] == [(1, 4, 1.0), (0, 4, round(4 / 7, 3)), (0, 5, round(3 / 7, 3))]


def test_candidates_of_the_last_layer_come_last() -> None:
    far, near, last = (Candidate(layer, 0, 0, 1.0, spike, spike, 1.0) for layer, spike in ((1, 9.0), (0, 4.0), (3, 100.0)))
    assert in_order([last, near, far], n_layers=4) == [far, near, last]


def test_persistence_is_the_share_of_later_layers_that_the_channel_leads() -> None:
    leaders = [5, 7, 7, None, 7, 3]
    assert persistence(leaders, 1, 7) == (0.5, 1)
    assert persistence(leaders, 0, 7) == (0.6, 1)
    assert persistence(leaders, 2, 3) == (1 / 3, 5)
    assert persistence(leaders, 5, 3) == (None, 5) and persistence(leaders, 4, 9) == (0.0, None)


def test_ranks_of_magnitude() -> None:
    blocks = [np.array([[1, -5, 2]], np.float32), np.array([[3, -3, 0]], np.float32)]
    assert magnitude_ranks(blocks, [-5.0, 3.0, -3.0, 2.0, 0.0]) == [1, 2, 2, 4, 6]


# -- what is published -------------------------------------------------------------------------------------------------------------------


def info_of(model: KnownModel, name: str) -> ModelInfo:
    facts = {"source": "", "engine": "hf", "architecture": "llama", "n_heads": 32, "d_head": 128, "n_ctx": 4096}
    return ModelInfo(name=name, **facts, **model.sizes)  # type: ignore[arg-type]


def known(name: str) -> KnownModel:
    return next(model for model in MODELS if model.name == name)


@pytest.mark.parametrize(
    ("sizes", "name", "models", "by_name"),
    [
        ("LLaMA 7B", "llama-7b", ["LLaMA 7B"], True),
        ("LLaMA 7B", "Llama-2-7b-hf", ["Llama 2 7B"], True),
        ("LLaMA 7B", "open_llama_7b", ["LLaMA 7B", "Llama 2 7B", "LLaVA 1.5 7B"], False),
        ("LLaMA 7B", "llava-v1.5-7b-Q4_K", ["LLaVA 1.5 7B"], True),
        ("LLaMA 30B", "llama-33b.Q4_K_M", ["LLaMA 30B"], True),
        ("Llama 3 8B", "Meta-Llama-3-8B-Instruct.Q4_K_M", ["Llama 3 8B"], True),
        ("Llama 3 8B", "Meta-Llama-3.1-8B", ["Llama 3 8B"], False),
        ("Llama 3.2 1B", "Llama-3.2-1B-Instruct", ["Llama 3.2 1B"], True),
        ("Mistral 7B v0.1", "mistral-7b-instruct-v0.1.Q8_0", ["Mistral 7B v0.1"], True),
        ("Mistral 7B v0.1", "Mistral-7B-v0.3", ["Mistral 7B v0.1"], False),
        ("OLMo 1B 0724", "OLMo-1B-0724-hf", ["OLMo 1B 0724"], True),
        ("Phi-3 mini 4k", "Phi-3-mini-4k-instruct-q4", ["Phi-3 mini 4k"], True),
        ("Qwen3 30B A3B", "Qwen3-30B-A3B-Q4_K_M", ["Qwen3 30B A3B"], True),
    ],
)
def test_models_are_recognised_by_their_sizes_and_told_apart_by_name(sizes: str, name: str, models: list[str], by_name: bool) -> None:
    matches = recognise(info_of(known(sizes), name))
    assert list(dict.fromkeys(match.model for match in matches)) == models
    assert {match.by_name for match in matches} == {by_name}


def test_a_name_without_the_sizes_is_not_recognised() -> None:
    assert recognise(replace(info_of(known("LLaMA 7B"), "llama-7b"), d_vocab=32016)) == []


def test_every_published_place_lies_in_its_model() -> None:
    for model in MODELS:
        for place in model.weights:
            assert place.layer < model.sizes["n_layers"] and place.row < model.sizes["d_model"] and place.column < model.sizes["d_mlp"], (model.name, place)
            assert (place.expert is None) == (model.sizes["n_experts"] == 0) and (place.expert or 0) < max(model.sizes["n_experts"], 1)


def test_the_sentence_says_when_only_the_shape_fits_and_what_the_file_has_there() -> None:
    named, guessed = recognise(info_of(known("LLaMA 7B"), "llama-7b"))[0], recognise(info_of(known("LLaMA 7B"), "vicuna"))[0]
    assert "x 181" in named.sentence(-1.9268, 1) and "here w = -1.927, number 1 of its matrix" in named.sentence(-1.9268, 1)
    assert guessed.fits(6) and not guessed.fits(900_000) and named.fits(900_000)
    assert "only the shape fits" in guessed.sentence(-1.9, 1) and "probably another model" in guessed.sentence(0.001, 900_000)


# -- the search --------------------------------------------------------------------------------------------------------------------------


def test_a_rotation_turns_the_direction_into_the_channel() -> None:
    direction = np.array([3.0, 0, -4, 0, 0])
    turn = rotation(direction, 2)
    assert_allclose(turn @ turn.T, np.eye(5), atol=1e-12)
    assert_allclose(turn @ direction, [0, 0, 5, 0, 0], atol=1e-12)


def test_planting_preserves_what_the_model_computes(planted: Planted, windows: list[list[int]]) -> None:
    def logits(engine: Engine) -> np.ndarray:
        pieces: list[np.ndarray] = []
        engine.run(windows[0], Request(("logits",)), lambda piece: pieces.append(np.array(piece.values)))
        return np.concatenate(pieces)

    before = with_engine(ROOT / "models" / "demo-dense", logits)
    assert_allclose(with_engine(planted.hf, logits), before, atol=2e-4)  # of logits up to 24
    column = load_file(planted.hf / "model.safetensors")[f"model.layers.{planted.layer}.mlp.down_proj.weight"][:, planted.column]
    assert abs(column[planted.row]) > 1e5 * np.abs(np.delete(column, planted.row)).max()


def log_ratios(found: dict[str, Any]) -> tuple[float, float]:
    """Change of the loss, nats a token: of the first candidate, and of the random weight that changed it most."""
    return math.log(found["candidates"][0]["ratio"]), abs(math.log(found["random"]["worst_ratio"]))


def check_first(found: dict[str, Any], planted: Planted) -> None:
    first = found["candidates"][0]
    assert (first["layer"], first["row"], first["column"], first["name"]) == (planted.layer, planted.row, planted.column, f"blocks.{planted.layer}.mlp.W_out")
    effect, worst = log_ratios(found)
    assert first["status"] == "confirmed"
    assert effect >= BEYOND_RANDOM * worst, (effect, worst)
    low, high = first["ci"]
    assert 1 < low < first["ratio"] < high


@pytest.mark.parametrize("form", FORMATS)
def test_the_planted_weight_is_found_first_and_does_twenty_times_what_the_worst_of_200_random_ones_does(planted: Planted, windows: list[list[int]], form: str) -> None:
    check_first(with_engine(file_of(planted, form), lambda engine: search(engine, windows, n_random=200, most=1)), planted)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("form", FORMATS)
def test_so_it_does_whichever_200_are_drawn(planted: Planted, windows: list[list[int]], form: str, seed: int) -> None:
    """The effects of random weights have a heavy tail: a rare one decides the ratio."""
    check_first(with_engine(file_of(planted, form), lambda engine: search(engine, windows, n_random=200, seed=seed, most=1)), planted)


def zeroed(folder: Path, out: Path, tensor: str, at: tuple[int, int]) -> Path:
    """The checkpoint with one weight that is zero in the file."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = {name: np.array(values) for name, values in load_file(folder / "model.safetensors").items()}
    tensors[tensor][at] = 0
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_the_ratio_is_that_of_a_model_whose_file_has_a_zero_there(planted: Planted, windows: list[list[int]], tmp_path: Path) -> None:
    few = windows[:3]
    found = with_engine(planted.hf, lambda engine: search(engine, few, n_random=0, most=3))
    base = with_engine(planted.hf, lambda engine: perplexity.evaluate(engine, few)).mean
    assert found["random"] == {"n": 0, "worst_ratio": None} and found["published"] == []
    for i, each in enumerate(found["candidates"]):
        folder = zeroed(planted.hf, tmp_path / str(i), f"model.layers.{each['layer']}.mlp.down_proj.weight", (each["row"], each["column"]))
        assert_allclose(each["ratio"], math.exp(with_engine(folder, lambda engine: perplexity.evaluate(engine, few)).mean - base), rtol=1e-6)
        assert each["status"] == "found" and each["persistence"] is not None or each["layer"] == 3


class Counted:
    """An `evaluate` that answers from the weights: 1 nat a token, `effect` more where the planted entry is zero, `elsewhere` more where another of its matrix is."""

    def __init__(self, planted: Planted, effect: float, elsewhere: float) -> None:
        self.planted, self.effect, self.elsewhere = planted, effect, elsewhere

    def __call__(self, engine: Engine, windows: Any) -> Losses:
        zeros = {(int(row), int(column)) for row, column in np.argwhere(engine.weight(f"blocks.{self.planted.layer}.mlp.W_out") == 0)}
        here = (self.planted.row, self.planted.column)
        nll = 1 + np.linspace(-0.1, 0.1, 40) + self.effect * (here in zeros) + self.elsewhere * bool(zeros - {here})
        return Losses(nll, np.repeat(np.arange(4), 10))


def table_of(monkeypatch: pytest.MonkeyPatch, folder: Path, *places: Published) -> None:
    """A table of known super weights that has one model, the sizes of which are those of `folder`."""
    info = model_info(folder)
    sizes = {name: getattr(info, name) for name in MODELS[0].sizes}
    monkeypatch.setattr(known_super_weights, "MODELS", (KnownModel("Planted 3M", "another-name", sizes, places),))


@pytest.mark.parametrize(("effect", "status"), [(0.0101, "confirmed"), (0.0099, "published")])
def test_a_published_place_is_recognised_and_one_of_another_model_is_not_ablated(
    planted: Planted, windows: list[list[int]], monkeypatch: pytest.MonkeyPatch, effect: float, status: str
) -> None:
    """Random weights do 0.0005 nats each, so 20 times that is where confirmation begins."""
    table_of(monkeypatch, planted.hf, Published(planted.layer, planted.row, planted.column, "a test"), Published(planted.layer, 0, 0, "a test"))

    def use(engine: Engine) -> dict[str, Any]:
        before = engine.weight(f"blocks.{planted.layer}.mlp.W_out")
        found = search(engine, windows[:2], n_random=2, most=1, evaluate=Counted(planted, effect, 0.0005))
        assert_array_equal(engine.weight(f"blocks.{planted.layer}.mlp.W_out"), before)
        return found

    found = with_engine(planted.hf, use)
    candidate, (there, other) = found["candidates"][0], found["published"]
    assert candidate["status"] == status and candidate["magnitude_rank"] <= 10
    assert_allclose([candidate["ratio"], *candidate["ci"], there["ratio"], found["random"]["worst_ratio"]], [*np.exp([effect] * 4), math.exp(0.0005)], rtol=1e-9)
    assert found["random"]["n"] == 2 and there["found"] and "only the shape fits" in there["source"]
    assert not other["found"] and other["ratio"] is None and "probably another model" in other["source"]


def test_without_a_table_a_candidate_is_found_and_only_beyond_random_weights_confirmed(planted: Planted, windows: list[list[int]]) -> None:
    def use(engine: Engine) -> list[str]:
        return [search(engine, windows[:2], n_random=2, most=1, evaluate=Counted(planted, effect, 0.0005))["candidates"][0]["status"] for effect in (0.0099, 0.0101, -0.5)]

    assert with_engine(planted.hf, use) == ["found", "confirmed", "found"]


def test_experts_are_not_searched_but_a_published_place_in_one_is_measured(windows: list[list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, tensor, few = ROOT / "models" / "demo-moe", "model.layers.1.block_sparse_moe.experts.3.w2.weight", windows[:2]
    weight = np.abs(load_file(folder / "model.safetensors")[tensor].astype(np.float32))
    row, column = (int(i) for i in np.unravel_index(weight.argmax(), weight.shape))
    table_of(monkeypatch, folder, Published(1, row, column, "a test", expert=3))
    found, notes, base = with_engine(folder, lambda engine: (search(engine, few, n_random=2), unsearched(engine), perplexity.evaluate(engine, few).mean))
    assert found["candidates"] == [] and found["random"] == {"n": 0, "worst_ratio": None}
    assert len(notes) == 1 and "single experts" in notes[0]
    there = found["published"][0]
    assert (there["layer"], there["expert"], there["row"], there["column"], there["found"]) == (1, 3, row, column, False) and "number 1 of" in there["source"]
    without = zeroed(folder, tmp_path / "without", tensor, (row, column))
    assert_allclose(there["ratio"], math.exp(with_engine(without, lambda engine: perplexity.evaluate(engine, few)).mean - base), rtol=1e-6)
    assert there["ratio"] != 1


def test_a_search_can_be_cancelled_between_two_weights(planted: Planted, windows: list[list[int]]) -> None:
    def stop(engine: Engine) -> None:
        stages: list[str] = []
        search(engine, windows[:1], n_random=5, most=1, evaluate=Counted(planted, 0, 0), progress=lambda stage, done, total: stages.append(stage),
               should_stop=lambda: stages.count("zeroing single weights") == 2)  # fmt: skip

    with pytest.raises(Cancelled):
        with_engine(planted.hf, stop)


def test_confirmed_is_beyond_random_weights_by_hand() -> None:
    assert confirmed([math.exp(0.0201), 2.0], [math.exp(0.001), math.exp(-0.0005), None])
    assert not confirmed([math.exp(0.0199), 2.0], [math.exp(-0.001)])  # as far below 1 as above
    assert not confirmed([0.99, 2.0], [1.0]) and not confirmed(None, [1.0]) and not confirmed([1.5, 2.0], [])


def test_random_places_are_drawn_once_and_never_taken() -> None:
    matrix = _Matrix(2, shape=(3, 4))
    taken = [(2, 0, 1), (2, 2, 3), (1, 0, 0)]
    drawn = matrix.random(100, 0, taken)
    assert len(drawn) == len(set(drawn)) == 10 and not {(0, 1), (2, 3)} & set(drawn) and (0, 0) in drawn
    assert matrix.random(4, 0, taken) == matrix.random(4, 0, taken) != matrix.random(4, 1, taken)


@pytest.mark.parametrize("changes", [{"top_j": 0}, {"threshold": 0.5}, {"threshold": math.inf}, {"n_random": -1}, {"most": 0}])
def test_limits_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LayerscopeError, match="must be"):
        search(None, [], **changes)  # type: ignore[arg-type]

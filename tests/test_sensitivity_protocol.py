"""Claims about a sensitivity run: what its folder says is true of the model, the model is as it was, and what cannot be done is refused in a sentence."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from backend.__main__ import main
from backend.engines import Engine, OpenOptions, open_engine
from backend.engines.weight_edits import WeightChange, Written
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import KINDS, Context
from backend.experiments.sensitivity import Spec, perturbation, pruning, texts
from backend.experiments.sensitivity.contracts import Chosen
from backend.experiments.sensitivity.perplexity import evaluate
from backend.experiments.sensitivity.protocol import run
from backend.files.demo import ensure_demo_variants
from backend.reports.sensitivity_check import checked
from backend.reports.sensitivity_run import SensitivityRun, open_run
from tests.tiny_models import TinyModel

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1, editable_weights=True)
SMALL = Spec("demo-dense", topk=20, seeds=(0, 1), max_samples=4, max_length=48)
WIDE = dataclasses.replace(SMALL, topk=100, seeds=(0,), max_samples=16, max_length=256)

Opened = Callable[[str], Engine]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory):
    """The demo-dense model of a name, opened once."""
    folder, engines = tmp_path_factory.mktemp("variants"), dict[str, Engine]()

    def of(name: str) -> Engine:
        if name not in engines:
            path = MODELS / name if name == "demo-dense" else ensure_demo_variants(MODELS, folder, [name])[name]
            engines[name] = open_engine(path, OPTIONS)
        return engines[name]

    yield of
    for engine in engines.values():
        engine.close()


@pytest.fixture(scope="module")
def hf(opened: Opened) -> Engine:
    return opened("demo-dense")


def effects(found: SensitivityRun) -> dict[str, list[float]]:
    ratios: dict[str, list[float]] = {}
    for row in found.stats["perturbation"]["runs"]:
        ratios.setdefault(row["selection"], []).append(row["ratio"])
    return ratios


# -- text and losses -------------------------------------------------------------------------------------------------------------------------


def test_windows_are_the_text_from_its_beginning_each_with_a_start_token(hf: Engine, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The capital of France is Paris. " * 40)
    ids = hf.tokenize(file.read_text(), add_bos=False)
    text = texts.read_text(hf, str(file), 5, 32)
    assert [window[0] for window in text.windows] == [hf.info.bos_id] * 5 and {len(window) for window in text.windows} == {32} and text.window == 32
    assert [token for window in text.windows for token in window[1:]] == ids[: 5 * 31]
    few = texts.read_text(hf, str(file), 50, 32)
    assert len(few.windows) == len(ids) // 31 and f"its last {len(ids) % 31} tokens" in few.notes[0]
    short = texts.read_text(SimpleNamespace(info=hf.info, n_ctx=16, tokenize=hf.tokenize), str(file), 2, 32)  # type: ignore[arg-type]
    assert short.window == 16 and "A window has 16 tokens, the model's context" in short.notes[0]


def test_a_form_feed_ends_a_document_as_the_model_knows_it(hf: Engine, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Serve warm.\fServe warm.")
    one = hf.tokenize("Serve warm.", add_bos=False)
    assert texts.read_text(hf, str(file), 1, 2 * len(one) + 3).windows == [[hf.info.bos_id, *one, hf.info.eos_id, hf.info.bos_id, *one]]


def test_no_document_of_the_bundled_text_was_trained_on() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    from demo_text import documents

    found = set(texts.BUNDLED.read_text(encoding="utf-8").split("\f"))
    assert len(found) > 400
    trained = {text for _, text in itertools.islice(documents(1), 150_000)}  # 1,100 steps of 3,072 tokens, 22 to a document
    assert not found & trained


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"Paris \0 " * 90, "is no text: byte 6 is 0"),
        (b"Paris \xff" * 90, "is not UTF-8 text: byte 6 cannot be read"),
        (b"Paris.", "has 2 tokens, a text shorter than one window of 64"),
        (b"", "has 0 tokens, a text shorter than one window of 64"),
        (b"x" * 2000, "and the limit of a text is"),
        (None, "There is no text file"),
    ],
)
def test_what_is_no_text_is_said(hf: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | None, says: str) -> None:
    monkeypatch.setattr(texts, "MAX_TEXT_BYTES", 1500)
    if data is not None:
        (tmp_path / "text.txt").write_bytes(data)
    with pytest.raises(LayerscopeError, match=says):
        texts.read_text(hf, str(tmp_path / "text.txt"), 4, 64)


def test_losses_are_those_of_torch(hf: Engine) -> None:
    windows = texts.read_text(hf, "", 3, 48).windows
    found = evaluate(hf, windows)
    model: Any = hf._model  # type: ignore[attr-defined]
    for i, ids in enumerate(windows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()
        np.testing.assert_allclose(found.nll[found.window == i], expected, atol=2e-5)
    assert found.nll.shape == (3 * 47,)


def test_a_window_longer_than_a_piece_loses_no_token(opened: Opened, hf: Engine) -> None:
    window = texts.read_text(hf, "", 1, 600).windows
    np.testing.assert_allclose(evaluate(opened("demo-dense-f16"), window).nll, evaluate(hf, window).nll, atol=0.05)


# -- perturbation ----------------------------------------------------------------------------------------------------------------------------


def chosen_of(hf: Engine, at: list[int]) -> Chosen:
    names, places = ("blocks.0.attn.W_V", "blocks.1.mlp.W_out"), np.array(at)
    tensor = np.arange(len(at)) % 2
    value = np.array([hf.weight(names[t]).reshape(-1)[i] for t, i in zip(tensor, at, strict=True)], np.float32)
    return Chosen(names, tensor, places, value, value, np.zeros(len(at), np.int64))


@pytest.mark.parametrize(("op", "expected"), [("sign_flip", lambda w: -w), ("zero", lambda w: 0 * w), ("scale", lambda w: np.float32(2.5) * w)])
def test_operations_make_of_a_weight_what_they_say(hf: Engine, op: str, expected: Callable[[Any], Any]) -> None:
    chosen = chosen_of(hf, [900, 5, 7, 30, 11, 2])
    made = perturbation.changes(hf, chosen, Spec("m", perturb=op, perturb_scale=2.5), seed=0)
    assert [change.name for change in made] == list(chosen.names) and [change.at.tolist() for change in made] == [[7, 11, 900], [2, 5, 30]]
    for change in made:
        np.testing.assert_array_equal(change.values, expected(hf.weight(change.name).reshape(-1)[change.at]))


def test_gaussian_noise_has_the_asked_share_of_the_tensors_deviation(hf: Engine) -> None:
    name = "blocks.1.mlp.W_out"
    weight = hf.weight(name).reshape(-1)
    n = 50_000
    chosen = Chosen((name,), np.zeros(n, np.int64), np.arange(n), weight[:n], weight[:n], np.zeros(n, np.int64))
    spec = Spec("m", perturb="gaussian", perturb_scale=0.5)
    (change,), (same,), (other,) = (perturbation.changes(hf, chosen, spec, seed) for seed in (3, 3, 4))
    noise = np.asarray(change.values) - weight[:n]
    assert noise.std() == pytest.approx(0.5 * weight.std(), rel=0.02) and abs(noise.mean()) < 0.02 * noise.std()
    np.testing.assert_array_equal(change.values, same.values)
    assert not np.array_equal(np.asarray(change.values), np.asarray(other.values))


def test_the_most_significant_bit_of_a_float_is_its_sign(opened: Opened, hf: Engine) -> None:
    chosen = chosen_of(hf, [900, 5])
    for engine in (hf, opened("demo-dense-f16")):
        with engine.perturbed(perturbation.changes(engine, chosen, Spec("m", perturb="bit_flip"), 0)) as written:
            assert all(np.array_equal(each.after, -each.before) for each in written)


def test_an_outcome_counts_what_the_format_made_of_the_changes() -> None:
    def written(before: list[float], wanted: list[float], after: list[float], n_others: int, worst: float) -> Written:
        return Written("w", *(np.array(values, np.float32) for values in (before, wanted, after)), n_others, worst, "Q4_K")

    # Asked for changes of 2, 2 and 1; missed by 0.1 (a twentieth), 0.5 (a quarter), 1 (all of it: nothing changed).
    found = perturbation.outcome([written([1, 1, 1], [-1, -1, 0], [-0.9, -0.5, 1], 3, 0.25), written([4], [-4], [-4], 2, 0.5)])
    assert found == {"changed": 3, "not_representable": 2, "worst_representation": 1.0, "n_others": 5, "worst_other": 0.5}
    broken = perturbation.outcome([written([1], [np.inf], [np.inf], 0, 0.0)])
    assert broken["changed"] == 1 and broken["not_representable"] == 0 and broken["worst_representation"] == 0


# Measured with these windows, top | random | bottom: hf 1.208 | 0.9998, 0.9995 | 1.0000, q4_k_m 1.2 | 1.003 | 1.0000.
@pytest.mark.parametrize(("name", "metric"), [("demo-dense", "grad_x_weight"), ("demo-dense-q4_k_m", "magnitude")])
def test_the_best_weights_hurt_far_more_than_random_ones_and_the_least_do_not_at_all(opened: Opened, tmp_path: Path, name: str, metric: str) -> None:
    engine = opened(name)
    windows = texts.read_text(engine, "", 2, 64).windows
    before = evaluate(engine, windows).nll
    found = run(engine, dataclasses.replace(WIDE, model=name, metric=metric), tmp_path / "run")
    ratios = effects(found)
    assert ratios["top_k"][0] > 1.1 > 1.01 > max(ratios["random_k"]) and min(ratios["random_k"]) > 0.995
    # Random weights and the least do next to nothing: which of two such numbers is the larger is chance.
    assert abs(ratios["bottom_k"][0] - 1) < 5e-4 and np.mean(ratios["random_k"]) > ratios["bottom_k"][0] - 1e-3
    low, high = found.stats["perturbation"]["runs"][0]["ci"]
    assert 1.03 < low < ratios["top_k"][0] < high
    assert {row["n"] for row in found.stats["perturbation"]["runs"]} == {400}
    np.testing.assert_array_equal(evaluate(engine, windows).nll, before)


def test_the_same_weights_in_two_formats_give_the_same_run(opened: Opened, tmp_path: Path) -> None:
    a, b = (run(opened(name), dataclasses.replace(SMALL, metric="magnitude"), tmp_path / name) for name in ("demo-dense", "demo-dense-f16"))
    columns = ("scope", "rank", "name", "row", "column", "value", "score")
    assert [[row[column] for column in columns] for row in a.top] == [[row[column] for column in columns] for row in b.top]
    assert b.stats["perturbation"]["baseline"]["perplexity"] == pytest.approx(a.stats["perturbation"]["baseline"]["perplexity"], rel=1e-3)
    for ours, theirs in zip(a.stats["perturbation"]["runs"], b.stats["perturbation"]["runs"], strict=True):
        assert theirs["ratio"] == pytest.approx(ours["ratio"], rel=2e-3) and (ours["selection"], ours["seed"]) == (theirs["selection"], theirs["seed"])


# -- pruning and stability -------------------------------------------------------------------------------------------------------------------


def test_the_lowest_of_each_row_or_of_the_whole_tensor_go() -> None:
    scores = np.array([[4, 1, 3, 2], [40, 30, 20, 10]], np.float32)
    stream = [("w", scores, scores)]
    by_row, by_tensor = (pruning.masks(stream, metric, (0.25, 0.5)) for metric in ("wanda", "magnitude"))
    assert (by_row.within, by_tensor.within) == ("row", "tensor")
    assert [by_row.places(share, "w").tolist() for share in (0.25, 0.5)] == [[1, 7], [1, 3, 6, 7]]
    assert [by_tensor.places(share, "w").tolist() for share in (0.25, 0.5)] == [[1, 3], [0, 1, 2, 3]]


def test_pruning_in_place_is_the_model_with_zeros_in_its_file(hf: Engine, tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, metric="magnitude", components=("mlp.W_out",), prune=(0.3, 0.6))
    found = run(hf, spec, tmp_path / "run").stats["pruning"]
    copy = tmp_path / "pruned"
    copy.mkdir()
    for file in (MODELS / "demo-dense").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    for layer in range(4):
        weight = tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
        flat = weight.reshape(-1)
        flat[np.argsort(np.abs(flat), kind="stable")[: round(0.6 * flat.size)]] = 0
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    other, windows = open_engine(copy, OPTIONS), texts.read_text(hf, "", spec.max_samples, spec.max_length).windows
    row = found["rows"][1]
    # Of equal magnitudes either may go, which is why the two agree to a few parts in a thousand.
    assert row["nll"] == pytest.approx(evaluate(other, windows).mean, rel=3e-3) and row["zeros"] == pytest.approx(0.6, abs=1e-5)
    other.close()
    assert [row["sparsity"] for row in found["rows"]] == [0.3, 0.6] and found["within"] == "tensor"
    assert found["rows"][0]["ratio"] < found["rows"][1]["ratio"] > 1
    assert all(0 < a < b < 1 for a, b in zip(found["rows"][0]["divergence"], found["rows"][1]["divergence"], strict=True))


def test_a_quantized_model_is_pruned_in_place_and_put_back(opened: Opened, tmp_path: Path) -> None:
    engine = opened("demo-dense-q4_k_m")
    windows = texts.read_text(engine, "", 2, 64).windows
    before = evaluate(engine, windows).nll
    found = run(engine, dataclasses.replace(SMALL, metric="wanda", max_samples=3, prune=(0.8,)), tmp_path / "run").stats["pruning"]
    assert found["within"] == "row" and found["rows"][0]["ratio"] > 1.5 and len(found["rows"][0]["divergence"]) == 4
    # Q4_K stores no exact zero where a block's least value is not one of its steps, so fewer are 0 than were asked for.
    assert 0.1 < found["rows"][0]["zeros"] <= 0.8
    np.testing.assert_array_equal(evaluate(engine, windows).nll, before)


def test_pruning_that_would_not_fit_is_refused_before_anything_is_changed(hf: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "available_memory", lambda: 1 << 20)
    with pytest.raises(LayerscopeError, match="Pruning 50% of .* weights in place needs about"):
        run(hf, dataclasses.replace(SMALL, metric="magnitude", prune=(0.5,)), tmp_path / "run")


def test_divergence_is_measured_on_as_many_windows_as_may_be_kept(hf: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "MAX_STREAM_BYTES", 3 * 4 * 48 * 256 * 4)
    found = run(hf, dataclasses.replace(SMALL, metric="magnitude", prune=(0.5,)), tmp_path / "run")
    assert any("first 3 of 4 windows" in note for note in found.manifest["notes"]) and all(found.stats["pruning"]["rows"][0]["divergence"])


def test_stability_compares_seeds_halves_and_metrics(hf: Engine, tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, metric="wanda", stability_check=True, components=("attn.W_O",))
    found = run(hf, spec, tmp_path / "run").stats["stability"]
    assert found["ks"] == [2, 5, 10, 20]
    kinds = [(pair["kind"], pair["a"], pair["b"]) for pair in found["pairs"]]
    assert kinds == [("seed", "0", "1"), ("sample", "half 1", "half 2"), *(("metric", "wanda", other) for other in ("magnitude", "grad_x_weight", "grad_squared"))]
    assert all(0 <= value <= 1 for pair in found["pairs"] for value in pair["jaccard"].values())
    # Norms of the inputs differ little between halves of one text: that agrees far better than another metric does.
    assert found["pairs"][1]["jaccard"]["20"] > 0.5 > found["pairs"][4]["jaccard"]["20"]


def test_magnitude_has_no_seed_and_says_so(opened: Opened, tmp_path: Path) -> None:
    found = run(opened("demo-dense-f16"), dataclasses.replace(SMALL, metric="magnitude", stability_check=True), tmp_path / "run")
    assert [(pair["kind"], pair["b"]) for pair in found.stats["stability"]["pairs"]] == [("metric", "wanda")]
    assert any(note.startswith("Magnitude reads no text and has no seed") for note in found.manifest["notes"])


# -- the folder ------------------------------------------------------------------------------------------------------------------------------


def test_the_folder_is_what_the_format_says_and_repeats_to_the_byte(hf: Engine, tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, gradient_flow=True, layers=(1, 2), components=("attn.W_V", "mlp.W_out"))
    found, again = (run(hf, spec, tmp_path / name, run_id="0" * 26, command=["python", "-m", "backend"]) for name in ("a", "b"))
    assert sorted(path.name for path in found.folder.iterdir()) == ["manifest.json", "sensitivity_stats.json", "top_weights.csv"]
    for name in ("sensitivity_stats.json", "top_weights.csv"):
        assert (found.folder / name).read_bytes() == (again.folder / name).read_bytes()
    assert checked(open_run(found.folder)).id == "0" * 26 and found.manifest["command"] == ["python", "-m", "backend"]
    assert json.loads(json.dumps(spec.to_json())) == found.manifest["spec"]
    assert {"numpy", "torch", "transformers"} <= found.manifest["packages"].keys() and {"baseline", "ranking", "perturbation"} <= found.manifest["seconds"].keys()
    assert found.manifest["text"] == {"name": "bundled", "sha256": found.manifest["text"]["sha256"], "n_windows": 4, "n_tokens": 192, "window": 48}
    assert [row["name"] for row in found.stats["tensors"]] == [f"blocks.{layer}.{component}" for layer in (1, 2) for component in ("attn.W_V", "mlp.W_out")]
    flow = found.stats["gradient_flow"]
    assert (flow["layers"], flow["components"], np.shape(flow["norm"])) == ([1, 2], ["attn.W_V", "mlp.W_out"], (2, 2))
    assert found.stats["stability"] is None and found.stats["pruning"] is None


def test_rows_of_top_weights_lie_where_they_say(hf: Engine, tmp_path: Path) -> None:
    found = run(hf, dataclasses.replace(SMALL, metric="magnitude", mode="global", controls=()), tmp_path / "run")
    every = np.sort(np.concatenate([np.abs(hf.weight(row["name"])).reshape(-1) for row in found.stats["tensors"]]))[::-1]
    assert [row["rank"] for row in found.top] == list(range(1, 21)) and {row["scope"] for row in found.top} == {"global"}
    for row in found.top:
        assert hf.weight(row["name"])[row["row"], row["column"]] == np.float32(row["value"]) and abs(row["value"]) == row["score"]
        assert row["score"] == every[row["rank"] - 1] and row["percentile"] == pytest.approx(100 * (1 - row["rank"] / every.size))
        assert row["name"] == f"blocks.{row['layer']}.{row['component']}" and row["expert"] is None
    assert [row["selection"] for row in found.stats["perturbation"]["runs"]] == ["top_k"]
    with open(found.folder / "top_weights.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 20


def test_weights_of_experts_name_their_expert(tmp_path: Path) -> None:
    engine = open_engine(MODELS / "demo-moe", OPTIONS)
    try:
        found = run(engine, dataclasses.replace(SMALL, model="demo-moe", metric="magnitude", components=("mlp.experts.W_out",), layers=(0,), max_samples=2), tmp_path / "run")
        for row in found.top:
            assert engine.weight(row["name"])[row["expert"], row["row"], row["column"]] == np.float32(row["value"])
        assert len({row["expert"] for row in found.top}) > 1
    finally:
        engine.close()


# -- what is refused -------------------------------------------------------------------------------------------------------------------------


def test_matrices_that_a_metric_cannot_score_are_left_out_in_a_sentence(tiny_model: Callable[[str], TinyModel], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 100)
    engine, spec = open_engine(tiny_model("qwen2_moe").hf, OPTIONS), Spec("tiny", "wanda", topk=3, seeds=(0,), text=str(text), max_samples=2, max_length=24, stability_check=True)
    found = run(engine, spec, tmp_path / "run")
    assert any("mlp.shared.W_out is not ranked" in note for note in found.manifest["notes"])
    assert {row["component"] for row in found.stats["tensors"]} >= {"mlp.experts.W_out", "mlp.shared.W_in"}
    assert "mlp.shared.W_out" not in {row["component"] for row in found.stats["tensors"]}
    assert {pair["b"] for pair in found.stats["stability"]["pairs"] if pair["kind"] == "metric"} == {"magnitude", "grad_x_weight", "grad_squared"}
    with pytest.raises(LayerscopeError, match=r"input of blocks.0.mlp.shared.W_out is no site"):
        run(engine, dataclasses.replace(spec, components=("mlp.shared.W_out",)), tmp_path / "named")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric": "taylor"}, "There is no metric 'taylor'; metrics are magnitude, grad_x_weight"),
        ({"mode": "row"}, "There is no mode 'row'; modes are global, per_layer"),
        ({"perturb": "invert"}, "There is no perturbation 'invert'; perturbations are sign_flip, zero"),
        ({"controls": ("median_k",)}, "There is no control 'median_k'; controls are random_k, bottom_k"),
        ({"topk": 0}, "The number of top weights is 0; it must be between 1 and 1,000,000"),
        ({"topk": 900_000}, "The top 900,000 are asked for, and the chosen matrices of layer 0 have"),
        ({"perturb_scale": float("nan")}, "The scale of the perturbation is nan; it must be a finite number"),
        ({"perturb": "gaussian", "perturb_scale": 1e39}, "cannot be set to"),
        ({"seeds": ()}, "There is no seed; name one at least"),
        ({"seeds": (1, 1)}, "The seed 1 is named more than once"),
        ({"seeds": tuple(range(30))}, "There are 30 values of seed, and 20 is the limit"),
        ({"seeds": (-1,)}, "The seed -1 is not a whole number from 0"),
        ({"prune": (1.5,)}, "The sparsity 1.5 is not a share between 0 and 1"),
        ({"probes": 0}, "The number of probes is 0"),
        ({"bit": 3}, "Bit 3 is named, and sign_flip flips none"),
        ({"perturb": "bit_flip", "bit": 40}, "There is no bit 40 to flip in blocks.0.attn.W_Q: an entry of it has bits 0-31"),
        ({"layers": (9,)}, "Layer 9 is outside 0-3"),
        ({"components": ("mlp.W_nope",)}, "has no component 'mlp.W_nope'; it has"),
        ({"max_length": 4}, "The number of tokens of a window is 4; it must be between 8 and"),
        ({"max_samples": 0}, "The number of windows is 0; it must be between 1 and"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_no_folder(hf: Engine, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(LayerscopeError, match=says) as error:
        run(hf, dataclasses.replace(SMALL, **changes), tmp_path / "run")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "llama.cpp gives no gradients for grad_x_weight; metrics that it can give are magnitude, wanda, obs"),
        ({"metric": "magnitude", "gradient_flow": True}, "llama.cpp gives no gradients; leave out the gradient flow"),
        ({"metric": "magnitude", "perturb": "bit_flip", "bit": 5}, "There is no bit 5 to flip in .*: an entry of it has bits 0-3"),
    ],
)
def test_what_gguf_cannot_do_is_said_with_what_it_can(opened: Opened, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(LayerscopeError, match=says):
        run(opened("demo-dense-q4_k_m"), dataclasses.replace(SMALL, **changes), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_file_opened_as_usual_cannot_be_perturbed(tmp_path: Path) -> None:
    engine = open_engine(ensure_demo_variants(MODELS, tmp_path / "v", ["demo-dense-f16"])["demo-dense-f16"], dataclasses.replace(OPTIONS, editable_weights=False))
    try:
        with pytest.raises(LayerscopeError, match="editable_weights"):
            run(engine, dataclasses.replace(SMALL, metric="magnitude"), tmp_path / "run")
    finally:
        engine.close()


def test_a_folder_is_never_written_over(hf: Engine, tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, metric="magnitude", controls=(), max_samples=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(LayerscopeError, match=f"{name} exists and is not an empty folder; a run never overwrites"):
            run(hf, spec, tmp_path / name)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine" and [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    run(hf, spec, tmp_path / "empty")
    with pytest.raises(LayerscopeError, match="never overwrites"):
        run(hf, spec, tmp_path / "empty")


@pytest.mark.parametrize("stage", ["baseline", "perturbing top_k", "unpruned streams", "pruned to 50%"])
@pytest.mark.parametrize("name", ["demo-dense", "demo-dense-q4_k_m"])
def test_a_cancelled_run_leaves_the_model_as_it_was_and_nothing_on_disk(opened: Opened, tmp_path: Path, name: str, stage: str) -> None:
    engine, reached = opened(name), list[str]()
    windows = texts.read_text(engine, "", 1, 64).windows
    before = evaluate(engine, windows).nll
    spec = dataclasses.replace(SMALL, metric="magnitude", controls=(), prune=(0.5,), max_samples=2)
    with pytest.raises(Cancelled):
        run(engine, spec, tmp_path / "run", progress=lambda now, done, total: reached.append(now), should_stop=lambda: stage in reached)
    assert stage in reached and not list(tmp_path.iterdir())
    np.testing.assert_array_equal(evaluate(engine, windows).nll, before)


def test_a_model_that_is_broken_from_the_start_is_refused(hf: Engine, tmp_path: Path) -> None:
    broken = WeightChange("blocks.0.mlp.W_out", np.arange(256), np.full(256, 3e38, np.float32))
    with hf.perturbed([broken]), pytest.raises(LayerscopeError, match="in window 1 of the text, before anything is changed"):
        run(hf, SMALL, tmp_path / "run")


def test_a_model_that_a_perturbation_breaks_has_no_ratio_and_a_note(hf: Engine, tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, metric="magnitude", perturb="scale", perturb_scale=1e38, controls=("bottom_k",), max_samples=2, prune=())
    found = run(hf, spec, tmp_path / "run")
    top, _ = found.stats["perturbation"]["runs"]
    assert (top["nll"], top["perplexity"], top["ratio"], top["ci"]) == (None,) * 4
    assert any("not finite after scale of top_k" in note for note in found.manifest["notes"])


# -- the job and the command -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def context(hf: Engine, tmp_path: Path) -> Context:
    library = SimpleNamespace(resolve_model=lambda name: SimpleNamespace(kind="hf"))
    return Context(engine=lambda model, options: hf, traces_dir=tmp_path / "traces", library=library, derived=None)


def test_the_job_puts_its_run_among_the_pages(context: Context, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "mine.txt").write_text("The capital of France is Paris. " * 40)
    (tmp_path / "sensitivity" / ".dead.1999999999.part").mkdir(parents=True)
    params = {**SMALL.to_json(), "metric": "magnitude", "text": "mine.txt", "max_samples": 2}
    found = KINDS["sensitivity"](context, json.loads(json.dumps(params)))
    done = open_run(tmp_path / "sensitivity" / found["run"])
    assert done.id == found["run"] and len(done.id) == 26 and done.manifest["text"]["name"] == "mine.txt" and done.manifest["spec"]["text"] == "mine.txt"
    assert [path.name for path in (tmp_path / "sensitivity").iterdir()] == [done.id]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"model": "m", "text": "../secret.txt"}, "does not lie in the folder texts"),
        ({"model": "m", "text": "a\0b"}, "does not lie in the folder texts"),
        ({"model": "m", "colour": "red"}, "has no setting 'colour'; it has model, metric"),
        ({"metric": "magnitude"}, "needs the name of a model"),
        ({"model": "m", "topk": "many"}, "The setting topk of a sensitivity run is 'many', not of type int"),
        ({"model": "m", "seeds": 3}, "The setting seeds of a sensitivity run is '3', not a list"),
        ({"model": "m", "layers": ["x"]}, "The setting layers of a sensitivity run is 'x', not of type int"),
        ({"model": "m", "topk": True}, "The setting topk of a sensitivity run is 'True'"),
        ({"model": "m", "metric": "taylor"}, "There is no metric 'taylor'"),
    ],
)
def test_the_job_refuses_what_a_page_would_not_send(context: Context, params: dict[str, Any], says: str) -> None:
    with pytest.raises(LayerscopeError, match=says):
        KINDS["sensitivity"](context, params)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("LAYERSCOPE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("LAYERSCOPE_USE_HF_CACHE", "false")

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["backend", "sensitivity", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_of_the_protocol_runs_and_prints_what_it_found(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    line = ("--model demo-dense --metric grad_x_weight --topk 100 --mode per_layer --perturb sign_flip --perturb-scale 1.0 --controls random_k,bottom_k --seeds 0,1,2 "
            "--stability-check --device cpu --max-samples 3 --max-length 64 --prune 0.3 --layers 1-2 --components attn.W_V,mlp.W_out").split()  # fmt: skip
    code, out, err = command(*line, "--out-dir", str(tmp_path / "run"))
    assert code == 0 and "perturbing top_k" in err
    found = open_run(tmp_path / "run")
    assert found.manifest["command"] == ["python", "-m", "backend", "sensitivity", *line, "--out-dir", str(tmp_path / "run")]
    assert found.manifest["spec"] == json.loads(json.dumps(
        Spec("demo-dense", topk=100, seeds=(0, 1, 2), stability_check=True, device="cpu", max_samples=3, max_length=64, prune=(0.3,), layers=(1, 2),
             components=("attn.W_V", "mlp.W_out")).to_json()))  # fmt: skip
    for said in (found.id, "top_k", "random_k", "bottom_k", "seed 0 | 1", "sample half 1 | half 2", "pruned by grad_x_weight", "3 windows of 64 tokens"):
        assert said in out
    code, out, _ = command("--model", "demo-dense-f16", "--metric", "magnitude", "--topk", "5", "--controls", "none", "--max-samples", "2", "--max-length", "32",
                           "--device", "cpu", "--out-dir", str(tmp_path / "gguf"), "--json")  # fmt: skip
    data = json.loads(out)
    assert code == 0 and data["manifest"]["model"]["engine"] == "gguf" and [row["selection"] for row in data["stats"]["perturbation"]["runs"]] == ["top_k"]


def test_figures_are_drawn_beside_the_files_and_read_as_a_run(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    line = "--model demo-dense-f16 --metric wanda --topk 5 --device cpu --max-samples 2 --max-length 16 --super-weights --stability-check --seeds 0,1 --save-plots"
    code, out, _ = command(*line.split(), "--formats", "svg", "--out-dir", str(tmp_path / "run"))
    assert code == 0
    drawn = {path.name for path in (tmp_path / "run").iterdir()}
    names = ("sensitivity_distribution", "layer_comparison", "sensitivity_heatmap", "perturbation_effects", "stability_analysis")
    assert {f"{name}.svg" for name in names} <= drawn and all(f"{name}.svg" in out for name in names)
    found = checked(open_run(tmp_path / "run"))
    assert found.stats["super_weights"]["random"]["n"] > 0 and "super weights: " in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--out-dir x", "Name a model with --model"),
        ("--model demo-dense", "Name a new folder with --out-dir"),
        ("--model demo-dense --out-dir {} --metric taylor", "There is no metric 'taylor'"),
        ("--model demo-dense --out-dir {} --seeds a,b", "The seed list 'a,b' is not numbers"),
        ("--model demo-dense --out-dir {} --prune half", "The sparsity list 'half' is not numbers"),
        ("--model demo-dense --out-dir {} --save-plots --formats bmp", "There is no figure format 'bmp'; formats are png, pdf, svg"),
        ("--model nope --out-dir {}", "nope"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(command: Callable[..., tuple[int, str, str]], tmp_path: Path, words: str, says: str) -> None:
    code, out, err = command(*words.format(tmp_path / "run").split())
    assert code == 2 and says in err and "Traceback" not in err and not out and not (tmp_path / "run").exists()

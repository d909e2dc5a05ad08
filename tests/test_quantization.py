"""Claims about the comparison of a quantized model with its reference: what is equal has no error, what was changed is found where it was changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backend.analysis import divergence, logits
from backend.derived import Derived
from backend.engines import Engine, OpenOptions, open_engine
from backend.errors import Cancelled, LayerscopeError
from backend.experiments.quantization import Side, check_same_model, compare, compare_weights
from backend.files.quantizer import quantize
from backend.model_files import describe
from backend.reports.quantization_report import QuantizationReport, report_key
from backend.sites import SITES
from backend.weights import open_weights
from tests.test_hf_engine import capture
from tests.tiny_models import TinyModel, save_tiny, save_tokenizer

OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=2)
PROMPTS = ["The capital of France is", "Mary gave the book to John"]
# Architectures whose converters change the numbers: rows of W_Q and W_K reordered, gains as 1 + w, fused and transposed matrices, experts stacked.
KINDS = ("llama", "mixtral", "gemma2", "gemma3_text", "gpt2", "phi3", "granite", "qwen3_moe")


def side(path: Path, opened: list[str] | None = None) -> Side:
    """A model, and in `opened` a line whenever it is opened or closed."""

    @contextmanager
    def engine() -> Iterator[Engine]:
        found = open_engine(path, OPTIONS)
        if opened is not None:
            opened.append(f"open {path.name}")
        yield found
        found.close()
        if opened is not None:
            opened.append(f"close {path.name}")

    return Side(describe(path), path, engine)


def changed_copy(tiny: TinyModel, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The checkpoint with `change` applied to its tensors."""
    shutil.copytree(tiny.hf, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def q4(tiny_llama: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "tiny-q4_0.gguf"
    quantize(tiny_llama.gguf, out, "Q4_0")
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights_in_two_formats_have_no_error_at_all(tiny_model: Callable[[str], TinyModel], kind: str) -> None:
    tiny = tiny_model(kind)
    rows, total = compare_weights(open_weights(tiny.gguf), open_weights(tiny.hf))
    assert len(rows) >= 3 + 8 * 2 and {row["rmse"] for row in rows} == {0.0} and {row["max_error"] for row in rows} == {0.0}
    assert total["rmse"] == 0 and total["sqnr_db"] == np.inf and total["cosine"] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma2"])
def test_the_same_model_in_two_formats_hardly_diverges_anywhere(tiny_model: Callable[[str], TinyModel], tmp_path: Path, kind: str) -> None:
    tiny = tiny_model(kind)
    report = compare(side(tiny.gguf), side(tiny.hf), PROMPTS, tmp_path)
    assert set(report.sites) == set(open_sites(tiny.hf)) - {"logits"}
    assert np.nanmax(report.relative_l2) < 2e-3 and np.nanmin(report.cosine) > 1 - 2e-6 and np.nanmin(report.cka) > 1 - 1e-5
    assert report.predictions["kl_max"] < 1e-5 and report.predictions["top1_agreement"] == 1


def open_sites(path: Path) -> frozenset[str]:
    engine = open_engine(path, OPTIONS)
    try:
        return engine.sites
    finally:
        engine.close()


@pytest.mark.parametrize("fmt", ["hf", "gguf"])
def test_a_model_against_itself_is_the_same_at_every_site(tiny_mixtral: TinyModel, tmp_path: Path, fmt: str) -> None:
    path = getattr(tiny_mixtral, fmt)
    report = compare(side(path), side(path), PROMPTS, tmp_path)
    assert not report.relative_l2.any() and report.cosine == pytest.approx(1) and report.cka == pytest.approx(1)
    assert {row["rmse"] for row in report.weights} == {0.0}
    assert report.predictions["kl_max"] == 0 and report.predictions["top1_agreement"] == 1 and report.predictions["next_logprob_change"] == 0
    assert not list(tmp_path.iterdir())


def test_one_matrix_that_grew_by_a_percent_is_found_where_it_is_and_its_effect_only_after_it(tiny_llama: TinyModel, tmp_path: Path) -> None:
    def grow(tensors: dict[str, Any]) -> None:
        for kind in ("weight", "bias"):
            tensors[f"model.layers.1.self_attn.v_proj.{kind}"] *= np.float32(1.01)

    report = compare(side(changed_copy(tiny_llama, tmp_path / "grown", grow)), side(tiny_llama.hf), PROMPTS, tmp_path / "work")
    wrong = {row["name"]: row["relative_rmse"] for row in report.weights if row["rmse"]}
    assert wrong == pytest.approx({"blocks.1.attn.W_V": 0.01, "blocks.1.attn.b_V": 0.01}, rel=1e-4)
    order = list(SITES)
    at = {place: value for place, value in zip(report.places, report.relative_l2, strict=True)}
    before = [place for place in at if place[1] == 0 or place[0] == "embed" or (place[1] == 1 and order.index(place[0]) < order.index("v"))]
    assert len(before) > 12 and {at[place] for place in before} == {0.0}
    for site in ("v", "z"):  # both are proportional to W_V
        assert at[site, 1] == pytest.approx(0.01, rel=1e-3) and report.by_layer("cosine", site)[1] == pytest.approx(1) and report.by_layer("cka", site)[1] == pytest.approx(1)
    assert at["attn_pattern", 1] == 0 and at["resid_post", 1] > 1e-4 and at["attn_pattern", 2] > 0 and report.predictions["kl_mean"] > 0


def test_every_number_is_that_of_two_plain_captures(tiny_llama: TinyModel, q4: Path, tmp_path: Path) -> None:
    report = compare(side(q4), side(tiny_llama.gguf), PROMPTS, tmp_path)
    sums: dict[Any, Any] = {}
    for number, prompt in enumerate(PROMPTS):
        values = []
        for path in (tiny_llama.gguf, q4):
            engine = open_engine(path, OPTIONS)
            ids = engine.tokenize(prompt)
            values.append(capture(engine, ids))
            engine.close()
        assert report.prompts[number].ids == ids and len(report.prompts[number].tokens) == len(ids)
        for at, (site, layer) in enumerate(report.places):
            p, q = (v[site, layer] for v in values)
            if SITES[site].is_attention_map:
                p, q = (np.moveaxis(np.where(np.isneginf(v), 0, v), 1, 0) for v in (p, q))
            p, q = (v.reshape(len(ids), -1).astype(np.float64) for v in (p, q))
            expected = np.linalg.norm(q - p, axis=1) / np.linalg.norm(p, axis=1)
            assert report.prompts[number].relative_l2[at] == pytest.approx(expected, rel=1e-4, abs=1e-7), (site, layer)
            sums.setdefault((site, layer), []).append((p, q))
        logp, logq = (logits.log_softmax(v["logits", None]) for v in values)
        assert report.prompts[number].shift["kl"] == pytest.approx((np.exp(logp) * (logp - logq)).sum(-1), abs=1e-9)
    for at, place in enumerate(report.places):
        pairs = sums[place]
        assert report.cka[at] == pytest.approx(divergence.cka_of_hsic(sum(divergence.linear_hsic(p, q) for p, q in pairs)), rel=1e-5)
        assert report.relative_l2[at] == pytest.approx(np.concatenate([np.linalg.norm(q - p, axis=1) / np.linalg.norm(p, axis=1) for p, q in pairs]).mean(), rel=1e-4, abs=1e-7)


def test_a_prompt_that_runs_in_pieces_gives_what_it_gives_whole(tiny_llama: TinyModel, q4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backend.engines import gguf

    text = " ".join(["Mary gave the book to John."] * 5)
    whole = compare(side(q4), side(tiny_llama.gguf), [text], tmp_path)
    genuine = gguf.GgufEngine.__init__
    monkeypatch.setattr(gguf.GgufEngine, "__init__", lambda self, path, options: genuine(self, path, options, n_ubatch=8))
    pieces = compare(side(q4), side(tiny_llama.gguf), [text], tmp_path)
    assert len(whole.prompts[0].ids) > 24 and pieces.places == whole.places
    np.testing.assert_allclose(pieces.prompts[0].relative_l2, whole.prompts[0].relative_l2, rtol=1e-2, atol=1e-5)
    np.testing.assert_allclose(pieces.prompts[0].shift["kl"], whole.prompts[0].shift["kl"], rtol=1e-2, atol=1e-7)


def test_the_two_models_are_never_open_together(tiny_llama: TinyModel, q4: Path, tmp_path: Path) -> None:
    opened: list[str] = []
    compare(side(q4, opened), side(tiny_llama.gguf, opened), PROMPTS, tmp_path)
    assert opened == [f"{word} {path.name}" for path in (tiny_llama.gguf, q4) for word in ("open", "close")]


def test_chosen_sites_are_the_only_ones_and_progress_runs_to_its_end(tiny_llama: TinyModel, q4: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    report = compare(side(q4), side(tiny_llama.gguf), PROMPTS, tmp_path, sites=["blocks.1.hook_resid_post"], progress=lambda *step: told.append(step))
    assert report.places == [("resid_post", layer) for layer in range(3)]
    for stage in ("comparing weights", "running the reference", "running the model"):
        steps = [(done, total) for name, done, total in told if name == stage]
        assert steps == sorted(steps) and steps[-1][0] == steps[-1][1] and len(steps) >= 6


@pytest.mark.parametrize("stage", ["comparing weights", "running the reference", "running the model"])
def test_cancelling_stops_it_anywhere_and_leaves_nothing_on_disk(tiny_llama: TinyModel, q4: Path, tmp_path: Path, stage: str) -> None:
    reached: list[str] = []
    with pytest.raises(Cancelled):
        compare(side(q4), side(tiny_llama.gguf), PROMPTS, tmp_path, progress=lambda name, *_: reached.append(name), should_stop=lambda: stage in reached)
    assert not list(tmp_path.iterdir())


def test_experts_that_were_chosen_differently_count_as_far_as_they_differ(tiny_mixtral: TinyModel, tmp_path: Path) -> None:
    def swap(tensors: dict[str, Any]) -> None:
        """The router of layer 0 names its experts in another order: no token keeps both of its experts' numbers unless they map to themselves."""
        tensors["model.layers.0.block_sparse_moe.gate.weight"] = np.roll(tensors["model.layers.0.block_sparse_moe.gate.weight"], 1, axis=0)

    report = compare(side(changed_copy(tiny_mixtral, tmp_path / "rolled", swap)), side(tiny_mixtral.hf), PROMPTS[:1], tmp_path / "work")
    engine = open_engine(tiny_mixtral.hf, OPTIONS)
    chosen = capture(engine, engine.tokenize(PROMPTS[0]))["expert_indices", 0]
    engine.close()
    kept = np.array([len({*row} & {*((row + 1) % 5)}) / 2 for row in chosen])
    assert report.at_position(0, "cosine", "expert_indices")[0] == pytest.approx(kept)
    assert report.at_position(0, "relative_l2", "expert_indices")[0] == pytest.approx(np.sqrt(2 * (1 - kept)))


def test_a_report_is_the_same_after_the_cache_and_is_plain_json(tiny_llama: TinyModel, q4: Path, tmp_path: Path) -> None:
    report = compare(side(q4), side(tiny_llama.gguf), PROMPTS, tmp_path / "work")
    derived = Derived(tmp_path / "cache")
    key = report_key("a", "b", PROMPTS, [1, ["x", 2]])
    assert QuantizationReport.load(derived, key) is None
    report.save(derived, key)
    again = QuantizationReport.load(derived, key)
    assert again is not None and again.to_json() == report.to_json() and again.places == report.places
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["sentence"].startswith("Q4_0 against F32: weights ") and data["prompts"][1]["next_logprob_change"][-1] is None
    norms = [row for row in data["weights"]["tensors"] if row["component"] == "ln1.w"]
    assert norms[0]["rmse"] == 0 and norms[0]["sqnr_db"] is None
    assert report_key("a", "b", PROMPTS, [1, ["x", 3]]) != key


def test_a_tied_matrix_counts_once(tmp_path: Path) -> None:
    tied = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    names = [row["name"] for row in compare_weights(open_weights(tied.gguf), open_weights(tied.hf))[0]]
    assert "embed.W_E" in names and "unembed.W_U" not in names


def test_another_model_is_refused_by_its_first_difference(tiny_llama: TinyModel, tiny_mistral: TinyModel, tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(LayerscopeError, match=r"tiny-qwen2 is qwen2 and tiny-llama-f32 is llama; only one model"):
        compare(side(tiny_model("qwen2").hf), side(tiny_llama.gguf), PROMPTS, tmp_path)
    with pytest.raises(LayerscopeError, match=r"d_head 24 and tiny-llama has 16"):
        check_same_model(describe(tiny_mistral.gguf), describe(tiny_llama.hf))
    plain = save_tiny("llama", tmp_path / "plain", attention_bias=False)
    with pytest.raises(LayerscopeError, match=r"plain has no weight blocks.0.attn.b_Q, which tiny-llama has"):
        compare(side(plain.hf), side(tiny_llama.hf), PROMPTS, tmp_path / "work")


def test_other_tokenizers_and_prompts_that_do_not_run_are_refused(tiny_llama: TinyModel, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama.hf, other)
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(LayerscopeError, match=r"other and tiny-llama have different tokenizers: they read the prompt 'The capital of France is' alike only up to token 1"):
        compare(side(other), side(tiny_llama.hf), PROMPTS, tmp_path / "work")
    save_tokenizer(other)
    for prompts, message in (([], "empty"), (["x", ""], "empty"), (["x" * 5000], "of the context"), (["x"] * 300, "the limit is 256")):
        with pytest.raises(LayerscopeError, match=message):
            compare(side(other), side(tiny_llama.hf), prompts, tmp_path / "work")
    with pytest.raises(LayerscopeError, match="has no site 'router_probs'"):
        compare(side(other), side(tiny_llama.hf), PROMPTS, tmp_path / "work", sites=["router_probs"])


def test_a_full_disk_is_a_sentence_before_the_run_and_during_it(tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backend.experiments import activation_store, quantization

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(activation_store.os, "pwrite", full)
        with pytest.raises(LayerscopeError, match="No space left on device"):
            compare(side(tiny_llama.gguf), side(tiny_llama.gguf), PROMPTS, tmp_path)
    monkeypatch.setattr(quantization.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1 << 20))
    with pytest.raises(LayerscopeError, match="choose fewer sites or shorter prompts"):
        compare(side(tiny_llama.gguf), side(tiny_llama.gguf), PROMPTS, tmp_path)

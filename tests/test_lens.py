"""Lenses of every site against the engine's own norm and W_U; tuned lenses against what they are trained for, in both engines."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backend.analysis import lens as lens_analysis
from backend.engines import Engine, OpenOptions, open_engine
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Context
from backend.experiments.capture import CaptureSpec, capture
from backend.experiments.logit_lens import lens_of_trace, lens_target
from backend.experiments.tuned_lens import TorchUnembed, TrainSpec, train, tuned_lens_job
from backend.reports.lens_results import LensChoice, lens_sites
from backend.trace import Trace
from backend.tuned_lens import open_tuned_lens, tuned_lenses, write_tuned_lens

ROOT = Path(__file__).parent.parent
PROMPT = "Mary gave the book to John, John gave the key to"
NO_STOP = {"progress": lambda *_: None, "should_stop": lambda: False}


@pytest.fixture(scope="module", params=["hf", "gguf"])
def engine(request, tiny_mistral):
    opened = open_engine(tiny_mistral.hf if request.param == "hf" else tiny_mistral.gguf, OpenOptions(kv_cache="f32"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def trace(engine, tmp_path_factory):
    with Trace(capture(engine, CaptureSpec(PROMPT, max_new_tokens=3, precision="float32", lens=False), tmp_path_factory.mktemp("traces"))) as opened:
        yield opened


def expected(engine: Engine, trace: Trace, stream: np.ndarray) -> dict[str, np.ndarray]:
    final = engine.unembed(trace["resid_post", trace.info.n_layers - 1])
    return lens_analysis.lens_row(engine.unembed(stream), final, trace.token_ids)


def assert_row(found: dict[str, np.ndarray], row: int, wanted: dict[str, np.ndarray]) -> None:
    for name, values in wanted.items():
        np.testing.assert_allclose(found[f"lens_{name}"][row], values, rtol=2e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_a_lens_of_a_site_reads_that_site_and_ends_in_the_model(engine, trace, site):
    rows, found = lens_of_trace(engine, trace, LensChoice(site), **NO_STOP)
    assert rows == ["0", "1", "2", "model"] and site in lens_sites(trace)
    for layer in range(3):
        assert_row(found, layer, expected(engine, trace, trace[site, layer]))
    np.testing.assert_array_equal(found["lens_top_ids"][-1], trace.top_ids[:, :10])
    np.testing.assert_array_equal(found["lens_entropy"][-1], trace.entropy)
    assert (found["lens_kl"][-1] == 0).all() and (found["lens_kl"][:-1].max(axis=-1) > 0.01).all()


def test_a_lens_of_heads_reads_what_each_writes_alone(engine, trace):
    rows, found = lens_of_trace(engine, trace, LensChoice("result", 1), **NO_STOP)
    assert rows == ["1.0", "1.1", "1.2", "1.3", "model"]
    for head in range(4):
        assert_row(found, head, expected(engine, trace, trace["result", 1][:, head]))


def test_the_stream_before_a_layer_is_the_one_after_the_layer_before(engine, trace):
    before, after = (lens_of_trace(engine, trace, LensChoice(site), **NO_STOP) for site in ("resid_pre", "resid_post"))
    assert after[0] == ["embed", "0", "1", "2"]
    np.testing.assert_allclose(before[1]["lens_kl"][:3], after[1]["lens_kl"][:3], rtol=1e-5)
    np.testing.assert_array_equal(before[1]["lens_top_ids"], after[1]["lens_top_ids"])


def test_a_followed_token_has_its_rank_and_probability_in_every_lens(engine, trace):
    token = int(trace.top_ids[5, 1])
    values = lens_target(engine, trace, token, LensChoice("mlp_out"), **NO_STOP)
    assert values.shape == (2, 4, trace.n_tokens)
    logprobs, ranks = lens_analysis.target_row(engine.unembed(trace["mlp_out", 1]), token)
    np.testing.assert_allclose(values[0, 1], logprobs, atol=1e-5)
    np.testing.assert_array_equal(values[1, 1], ranks)
    assert values[1, 3, 5] == 1  # the model's second choice


def test_choices_keep_their_own_keys_and_the_first_lens_its_old_ones():
    assert LensChoice().key("lens_kl", "abcdefgh") == ("lens_kl", "abcdefgh") and LensChoice().key("lens_target", "abcdefgh", 7) == ("lens_target", "abcdefgh", 7)
    others = [LensChoice("resid_mid"), LensChoice("result", 0), LensChoice("result", 1), LensChoice(tuned="a:1"), LensChoice(tuned="b:1"), LensChoice()]
    assert len({choice.key("lens_kl", "abcdefgh") for choice in others}) == len(others)
    assert all(LensChoice.from_json(choice.to_json()) == choice for choice in others)
    for bad in ({"site": "z"}, {"site": "result"}, {"site": "resid_mid", "layer": 1}, {"site": "attn_out", "tuned": "a"}):
        with pytest.raises(LayerscopeError):
            LensChoice.from_json(bad)


def test_a_trace_without_the_site_says_what_is_missing(engine, tmp_path):
    with Trace(capture(engine, CaptureSpec(PROMPT, sites=("resid_post",), lens=False), tmp_path)) as bare:
        assert lens_sites(bare) == ["resid_pre", "resid_post"]
        with pytest.raises(LayerscopeError, match="needs attn_out"):
            lens_of_trace(engine, bare, LensChoice("attn_out"), **NO_STOP)
        with pytest.raises(LayerscopeError, match="needs z"):
            lens_of_trace(engine, bare, LensChoice("result", 1), **NO_STOP)


# -- tuned lenses ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder of the demo models' own text, from a seed of its own."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from demo_text import documents
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    folder = tmp_path_factory.mktemp("text")
    written = [document for _, document in itertools.islice(documents(77), 600)]
    (folder / "a.txt").write_text("\n\n".join(written[:300]))
    (folder / "b.md").write_text("\n\n".join(written[300:]))
    return folder


SHORT = TrainSpec(steps=30, tokens_per_step=256, chunk=64, learning_rate=3e-3)


def test_a_lens_trained_on_the_demo_model_s_text_is_nearer_to_the_model_at_every_layer(text, tmp_path):
    opened = open_engine(ROOT / "models" / "demo-dense", OpenOptions())
    lens = train(opened, text, tmp_path / "demo", SHORT)
    kl = lens.made["held_out_kl"]
    assert list(kl) == ["embed", "0", "1", "2"] and lens.made["n_tokens_held_out"] > 500
    for row, (before, after) in kl.items():
        assert after < before, (row, before, after)
    assert kl["1"][1] < 0.75 * kl["1"][0]
    with Trace(capture(opened, CaptureSpec("The capital of France is", precision="float32", lens=True), tmp_path)) as demo:
        rows, found = lens_of_trace(opened, demo, tuned=lens, **NO_STOP)
        a, b = lens.translator("1")
        stream = demo["resid_post", 1]
        assert_row(found, rows.index("1"), expected(opened, demo, stream + stream @ a.T + b))
        for name in ("top_ids", "entropy", "next_logprob"):  # the last layer needs no translator
            np.testing.assert_array_equal(found[f"lens_{name}"][-1], demo.result(f"lens_{name}")[-1])
    opened.close()


def test_a_translator_at_the_identity_is_the_logit_lens_to_the_bit(engine, trace, tmp_path):
    d_model = engine.info.d_model
    made = {"model": "x", "n_layers": 3, "d_model": d_model, "d_vocab": engine.info.d_vocab}
    still = {row: (np.zeros((d_model, d_model), np.float32), np.zeros(d_model, np.float32)) for row in ("embed", "0", "1")}
    lens = write_tuned_lens(tmp_path / "still", still, made)
    (_, plain), (_, tuned) = (lens_of_trace(engine, trace, tuned=each, **NO_STOP) for each in (None, lens))
    for name, values in plain.items():
        np.testing.assert_array_equal(tuned[name], values)


def test_both_engines_train_the_same_lens(tiny_mistral, text, tmp_path):
    found = {}
    for name, path in (("hf", tiny_mistral.hf), ("gguf", tiny_mistral.gguf)):
        opened = open_engine(path, OpenOptions(kv_cache="f32"))
        found[name] = train(opened, text, tmp_path / name, TrainSpec(steps=12, tokens_per_step=128, chunk=64)).made
        opened.close()
    for row, (before, after) in found["hf"]["held_out_kl"].items():
        assert found["gguf"]["held_out_kl"][row] == pytest.approx([before, after], rel=2e-3)
        assert after < before
    assert found["hf"]["text_sha256"] == found["gguf"]["text_sha256"] and found["hf"]["n_tokens"] == found["gguf"]["n_tokens"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "granite"])
def test_the_last_step_that_is_trained_through_is_the_engine_s(tiny_model, kind):
    import torch

    model = tiny_model(kind)
    for path in (model.hf, model.gguf):
        opened = open_engine(path, OpenOptions())
        stream = np.random.default_rng(3).normal(size=(5, opened.info.d_model)).astype(np.float32) * 2
        np.testing.assert_allclose(TorchUnembed(opened)(torch.from_numpy(stream)).numpy(), opened.unembed(stream), rtol=1e-4, atol=1e-4)
        opened.close()


def test_what_cannot_be_trained_on_is_said_and_nothing_is_left(tiny_mistral, text, tmp_path):
    opened = open_engine(tiny_mistral.hf, OpenOptions())
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe broken")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "lens"
    for path, words in (("short.txt", "at least two chunks"), ("bytes.txt", "not UTF-8"), ("empty", "holds no text"), ("absent.txt", "no file or folder")):
        with pytest.raises(LayerscopeError, match=words):
            train(opened, tmp_path / path, out, SHORT)
    with pytest.raises(LayerscopeError, match="steps is 0"):
        train(opened, text, out, TrainSpec(steps=0))
    with pytest.raises(LayerscopeError, match="name '.hidden'"):
        train(opened, text, tmp_path / ".hidden", SHORT)
    stages: list[str] = []
    with pytest.raises(Cancelled):
        train(opened, text, out, SHORT, progress=lambda stage, *_: stages.append(stage), should_stop=lambda: "training" in stages)
    assert not out.exists() and not list(tmp_path.glob(".*part"))
    opened.close()


def test_a_lens_is_found_by_the_models_it_fits_and_refused_by_others(tmp_path, engine):
    info = engine.info
    made = {"model": "other", "n_layers": info.n_layers, "d_model": info.d_model, "d_vocab": info.d_vocab}
    pair = {"0": (np.zeros((info.d_model, info.d_model), np.float32), np.zeros(info.d_model, np.float32))}
    lens = write_tuned_lens(tmp_path / "b", pair, made)
    write_tuned_lens(tmp_path / "c", pair, {**made, "model": info.name})
    write_tuned_lens(tmp_path / "d", pair, {**made, "d_vocab": 7})
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "tuned_lens.json").write_text("{}")
    assert [found.name for found in tuned_lenses(tmp_path, info)] == ["c", "b"]
    assert open_tuned_lens(tmp_path, lens.tag, info).made["rows"] == ["0"]
    for tag, words in (("b:00000000", "made anew"), ("d", "for d_vocab 7"), ("e", "does not say"), ("absent", "no tuned lens"), ("../b", "name")):
        with pytest.raises(LayerscopeError, match=words):
            open_tuned_lens(tmp_path, tag, info)
    with pytest.raises(LayerscopeError, match="exists already"):
        write_tuned_lens(tmp_path / "b", pair, made)


def test_the_job_reads_text_from_its_folder_alone(tmp_path):
    context = Context(engine=None, traces_dir=tmp_path / "traces", library=None, derived=None)  # type: ignore[arg-type]
    with pytest.raises(LayerscopeError, match="does not lie in the folder texts"):
        tuned_lens_job(context, {"model": "m", "text": "../secret.txt", "name": "x"})


def test_the_command_trains_and_says_what_each_layer_gained(tiny_mistral, text, tmp_path):
    words = ["tuned-lens", "train", "--model", str(tiny_mistral.hf), "--text", str(text), "--out", str(tmp_path / "lens")]
    words += ["--steps", "3", "--tokens-per-step", "128", "--chunk", "64"]
    run = subprocess.run([sys.executable, "-m", "backend", *words, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    said = json.loads(run.stdout)
    assert set(said["held_out_kl"]) == {"embed", "0", "1"} and (tmp_path / "lens" / "translators.safetensors").is_file()
    again = subprocess.run([sys.executable, "-m", "backend", *words], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr

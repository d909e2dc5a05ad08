"""Direct logit attribution: by hand, and against the engines: the parts of the residual stream sum to the model's own logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backend.analysis import attribution
from backend.analysis.attribution import Direction, Ending
from backend.engines import OpenOptions, open_engine
from backend.errors import LayerscopeError, SiteNotCaptured
from backend.experiments.capture import CaptureSpec, capture
from backend.intervention import Intervention
from backend.readout import open_readout
from backend.reports.attribution import Attribution, attribute
from backend.sites import STANDARD_SITES
from backend.trace import Trace, open_trace
from tests.tiny_models import TinyModel

IDS = (0, 290, 284, 280, 306, 275, 31, 290, 77, 12)
KINDS = (
    "llama", "gpt2", "gemma2", "gemma3_text", "olmo2", "phi3", "stablelm", "stablelm, parallel", "mixtral", "granite", "granitemoe", "starcoder2", "qwen2_moe", "gpt_oss",
    "deepseek_v3",
)  # fmt: skip
LIMIT = 1e-3  # of a logit, on float32 captures
OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1)


# -- by hand --------------------------------------------------------------------------------------------------------------------------


def test_a_logit_of_an_rms_norm_by_hand():
    """x = (3, 4): mean square 12.5, eps 3.75 makes the scale 4.0312...; with eps such that the scale is 5 the logit is a plain sum."""
    ending = Ending("rms", 12.5, np.array([2.0, 1.0]))  # sqrt(12.5 + 12.5) = 5
    found = attribution.logit_direction(ending, np.array([3.0, 4.0]), np.array([1.0, 10.0]))
    np.testing.assert_allclose(found.vector, [0.4, 2.0])
    assert found.constant == 0
    assert found.of(np.array([3.0, 4.0])) == pytest.approx(3 / 5 * 2 * 1 + 4 / 5 * 1 * 10)


def test_a_difference_of_logits_of_a_layer_norm_by_hand():
    """x = (1, 2, 6), mean 3, centred (-2, -1, 3), variance 14/3; gain 1, bias (1, 0, 0); rows (1, 0, 0) against (0, 0, 1)."""
    ending = Ending("layer", 0.0, np.ones(3), np.array([1.0, 0, 0]), multiplier=0.5)
    found = attribution.logit_direction(ending, np.array([1.0, 2, 6]), np.array([1.0, 0, 0]), np.array([0, 0, 1.0]))
    scale = np.sqrt(14 / 3)
    assert found.of(np.array([1.0, 2, 6])) + found.constant == pytest.approx(0.5 * ((-2 - 3) / scale + 1))
    assert found.of(np.full(3, 7.0)) == pytest.approx(0)  # a constant shift of the stream is nothing to a LayerNorm


def test_heads_by_hand():
    """Two heads of width 1 over d_model 2: W_O = [[1, 2], [3, 4]], z = (10, 100), direction (1, 1): 10 * (1 + 3) and 100 * (2 + 4)."""
    direction = Direction(np.array([1.0, 1.0]), 0.0)
    found = attribution.attention_parts(np.array([[10.0], [100.0]]), np.array([[1.0, 2], [3, 4]]), direction, np.array([5.0, 7]), multiplier=2)
    np.testing.assert_allclose(found.heads, [80, 1200])
    assert found.bias == 24
    whole = np.array([10 * 1 + 100 * 2, 10 * 3 + 100 * 4], float)  # the norm after W_O, gain (2, 3)
    scale = np.sqrt((whole**2).mean())
    normed = attribution.attention_parts(np.array([[10.0], [100.0]]), np.array([[1.0, 2], [3, 4]]), direction, post_gain=np.array([2.0, 3.0]))
    np.testing.assert_allclose(normed.heads, [10 * (2 * 1 + 3 * 3) / scale, 100 * (2 * 2 + 3 * 4) / scale])


def test_a_softcap_is_undone():
    assert attribution.before_softcap(30 * np.tanh(12 / 30), 30) == pytest.approx(12)
    assert attribution.before_softcap(-7.0, 0) == -7
    assert attribution.before_softcap(30.0, 30) == np.inf


# -- against the engines ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(kind, engine) for kind in KINDS for engine in ("hf", "gguf")], ids=lambda pair: "-".join(pair))
def captured(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel], tmp_path_factory: pytest.TempPathFactory) -> tuple[Trace, Path]:
    kind, which = request.param
    path = getattr(tiny_model(kind), which)
    return trace_of(path, tmp_path_factory.mktemp("traces")), path


def trace_of(path: Path, folder: Path, **spec: object) -> Trace:
    engine = open_engine(path, OPTIONS)
    try:
        asked = {"token_ids": IDS, "precision": "float32", "lens": False, "sites": (*STANDARD_SITES, "logits"), **spec}
        return open_trace(capture(engine, CaptureSpec(**{**asked, "sites": tuple(s for s in asked["sites"] if s in engine.sites)}), folder))
    finally:
        engine.close()


def test_the_parts_sum_to_the_logit_of_every_position(captured):
    trace, path = captured
    readout = open_readout(path)
    for position in range(trace.n_tokens):
        best, second = (int(i) for i in trace.top_ids[position, :2])
        alone, difference = attribute(trace, readout, position, best), attribute(trace, readout, position, best, second)
        worst = int(np.argmin(trace["logits"][position]))
        for found in (alone, difference, attribute(trace, readout, position, worst)):
            assert found.logit is not None
            assert abs(found.total - found.logit) < LIMIT, (position, found.total, found.logit)
            assert abs(found.total - found.readout) < LIMIT
        assert alone.logit - attribute(trace, readout, position, second).logit == pytest.approx(difference.logit, abs=1e-4)
        assert max(abs(part.value) for part in alone.parts if part.kind == "rest") < LIMIT


def test_every_head_and_mlp_is_there_once_and_a_head_has_the_value_of_its_own_output(captured):
    """The oracle of a head: its result z W_O, which the trace makes by itself, through norm and W_U by plain matrix products."""
    trace, path = captured
    readout, info = open_readout(path), trace.info
    found = attribute(trace, readout, -1, 17)
    assert [part.name for part in found.parts if part.kind == "head"] == [f"{layer}.{head}" for layer in range(info.n_layers) for head in range(info.n_heads)]
    assert [part.layer for part in found.parts if part.kind == "mlp"] == list(range(info.n_layers))
    ending, resid = readout.ending, trace["resid_post", info.n_layers - 1][-1].astype(np.float64)
    centre = resid.mean() if ending.norm == "layer" else 0.0
    scale = np.sqrt(((resid - centre) ** 2).mean() + ending.eps)
    results = trace["result", 1][-1].astype(np.float64)  # (head, d_model)
    if "blocks.1.ln1_post.w" in readout.weights:
        whole = results.sum(0)
        results = results * readout.weights["blocks.1.ln1_post.w"] / np.sqrt((whole**2).mean() + info.norm_eps)
    results = results * readout.attn_multiplier
    centred = results - results.mean(-1, keepdims=True) if ending.norm == "layer" else results
    expected = (centred / scale * ending.gain) @ readout.weights["unembed.W_U"][17].astype(np.float64) * ending.multiplier
    np.testing.assert_allclose(found.heads(info.n_layers, info.n_heads)[1], expected, atol=1e-5)


def test_the_line_through_layers_ends_at_the_sum(captured):
    trace, path = captured
    found = attribute(trace, open_readout(path), 3, 42)
    middle, after = found.through_layers(trace.info.n_layers)
    assert after[-1] == pytest.approx(found.total)
    assert after[0] - middle[0] == pytest.approx(next(part.value for part in found.parts if part.kind == "mlp"))
    assert Attribution.from_json(found.to_json()) == found


# -- what is missing or wrong ------------------------------------------------------------------------------------------------------------


def test_without_z_attention_is_one_part_and_it_is_said(tiny_llama, tmp_path):
    trace = trace_of(tiny_llama.hf, tmp_path, sites=("embed", "attn_out", "mlp_out", "resid_post", "logits"))
    found = attribute(trace, open_readout(tiny_llama.hf), -1, 5)
    assert [part.kind for part in found.parts].count("attn") == trace.info.n_layers and not any(part.kind == "head" for part in found.parts)
    assert abs(found.total - found.logit) < LIMIT
    assert "3 of 3 layers" in found.notes[0]


def test_gpt2_s_position_embedding_is_a_part_of_its_own(tiny_model, tmp_path):
    tiny = tiny_model("gpt2")
    trace, readout = trace_of(tiny.gguf, tmp_path), open_readout(tiny.gguf)
    found = {part.kind: part.value for part in attribute(trace, readout, 4, 9).parts if part.layer is None}
    direction = attribution.logit_direction(readout.ending, trace["resid_post", 2][4], readout.weights["unembed.W_U"][9])
    assert found["position"] == pytest.approx(float(direction.of(readout.weights["pos_embed.W_pos"][4])), abs=1e-6)
    assert found["embed"] == pytest.approx(float(direction.of(readout.weights["embed.W_E"][IDS[4]])), abs=1e-4)
    assert found["constant"] == direction.constant != 0


def test_an_edit_of_the_residual_stream_is_a_gap_that_is_said(tiny_llama, tmp_path):
    trace = trace_of(tiny_llama.hf, tmp_path, interventions=(Intervention("resid_post", 0, "scale", 2.0),))
    found = attribute(trace, open_readout(tiny_llama.hf), -1, 5)
    assert abs(found.total - found.logit) > 10 * LIMIT
    assert abs(found.readout - found.logit) < LIMIT
    assert any("edited" in note for note in found.notes)


def test_nan_parts_are_counted(tiny_llama, tmp_path):
    trace = trace_of(tiny_llama.hf, tmp_path, interventions=(Intervention("mlp_out", 1, "set", 1e39, pos=-1),))
    found = attribute(trace, open_readout(tiny_llama.hf), -1, 5)
    assert not np.isfinite(found.total) and any("NaN" in note for note in found.notes)


def test_a_logit_outside_the_stored_top_tokens_is_unknown_rather_than_guessed(tiny_llama, tmp_path):
    trace = trace_of(tiny_llama.hf, tmp_path, sites=STANDARD_SITES)
    top, readout = trace.top_ids[2], open_readout(tiny_llama.hf)
    outside = next(i for i in range(trace.info.d_vocab) if i not in top and i != trace.token_ids[3])
    found = attribute(trace, readout, 2, outside)
    assert found.logit is None and abs(found.total - found.readout) < LIMIT
    follows = attribute(trace, readout, 2, trace.token_ids[3])
    assert follows.logit == pytest.approx(follows.total, abs=LIMIT)


OUTSIDE = [(10, 5, "Position 10 is outside the 10 tokens"), (-11, 5, "Position -11"), (0, 320, "Token id 320 is outside the vocabulary of 320")]


@pytest.mark.parametrize(("position", "token", "words"), OUTSIDE)
def test_what_lies_outside_is_refused_with_the_limit(tiny_llama, tmp_path, position, token, words):
    trace = trace_of(tiny_llama.hf, tmp_path)
    with pytest.raises(LayerscopeError, match=words):
        attribute(trace, open_readout(tiny_llama.hf), position, token)


def test_a_missing_site_and_another_model_of_the_same_name_are_refused(tiny_llama, tiny_model, tmp_path):
    trace = trace_of(tiny_llama.hf, tmp_path, sites=("embed", "z", "resid_post"))
    with pytest.raises(SiteNotCaptured, match="mlp_out"):
        attribute(trace, open_readout(tiny_llama.hf), 0, 5)
    with pytest.raises(LayerscopeError, match="its sizes differ"):
        attribute(trace, open_readout(tiny_model("smollm3").hf), 0, 5)


def test_an_architecture_without_a_row_is_refused(tiny_llama, monkeypatch):
    import backend.readout as readout

    weights = readout.open_weights(tiny_llama.hf)
    unknown = type(weights)(replace(weights.info, architecture="unheard"), {}, {})
    monkeypatch.setattr(readout, "open_weights", lambda path: unknown)
    with pytest.raises(LayerscopeError, match="unheard.*no row"):
        readout.open_readout(tiny_llama.hf)


# -- the demo model, and the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "precision", "limit"), [("demo-dense", "float32", 1e-3), ("demo-dense", "float16", 0.05), ("demo-dense-q4_k_m", "float32", 1.0)])
def test_the_demo_model_s_paris_is_the_sum_of_its_parts(tmp_path, name, precision, limit):
    """In half precision and on quantized kernels the two sums differ by rounding, which is reported and not hidden."""
    from backend.files.demo import ensure_demo_variants

    models = Path(__file__).resolve().parents[1] / "models"
    path = models / name if name == "demo-dense" else ensure_demo_variants(models, tmp_path, [name])[name]
    engine = open_engine(path, OPTIONS)
    trace = open_trace(capture(engine, CaptureSpec("The capital of France is", precision=precision), tmp_path))
    paris, rome = (engine.tokenize(text, add_bos=False)[0] for text in (" Paris", " Rome"))
    engine.close()
    assert trace.top_ids[-1, 0] == paris
    found = attribute(trace, open_readout(path), -1, paris, rome)
    assert found.total > 1 and abs(found.total - found.readout) < limit
    if found.logit is not None:
        assert abs(found.total - found.logit) < limit


# TransformerLens 4.3.0 (TransformerBridge, weights not processed) on the same weights and tokens: decompose_resid and stack_head_results
# through apply_ln_to_stack, times the final gain, along W_U[" Paris"] - W_U[" Rome"].
TRANSFORMER_LENS = {
    "embed": 0.01805, "mlp 0": 0.65286, "mlp 1": 0.07301, "mlp 2": 3.03215, "mlp 3": 2.48337,
    "2.2": 1.06576, "2.3": 1.05263, "3.4": -0.31565, "1.0": -0.19559, "1.1": -0.18787, "2.1": -0.17559,
}  # fmt: skip


def test_the_demo_model_s_parts_are_those_of_transformer_lens(tmp_path):
    path = Path(__file__).resolve().parents[1] / "models" / "demo-dense"
    engine = open_engine(path, OPTIONS)
    paris, rome = (engine.tokenize(text, add_bos=False)[0] for text in (" Paris", " Rome"))
    trace = open_trace(capture(engine, CaptureSpec("The capital of France is", precision="float32", lens=False), tmp_path))
    engine.close()
    found = attribute(trace, open_readout(path), -1, paris, rome)
    assert {part.name: part.value for part in found.parts if part.name in TRANSFORMER_LENS} == pytest.approx(TRANSFORMER_LENS, abs=2e-5)
    assert found.logit == pytest.approx(7.82137, abs=2e-5)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, tiny_llama):
    """Run one command line in this process: (exit code, stdout, stderr)."""
    import json
    import sys

    from backend.__main__ import main

    monkeypatch.setenv("LAYERSCOPE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("LAYERSCOPE_MODELS_DIRS", json.dumps([str(tiny_llama.hf.parent)]))
    monkeypatch.setenv("LAYERSCOPE_USE_HF_CACHE", "false")

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["backend", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_line_prints_the_parts_and_both_sums(run, tiny_llama, tmp_path):
    import json

    trace = trace_of(tiny_llama.hf, tmp_path)
    best = int(trace.top_ids[-2, 0])
    code, out, _ = run("attribute", "--trace", str(trace.path), "--position", "-2", "--against", "T", "--json")
    data = json.loads(out)
    assert code == 0 and data["position"] == trace.n_tokens - 2
    assert data["token"] == {"id": best, "text": trace.token_text(best)} and data["against"]["text"] == "T"
    expected = attribute(trace, open_readout(tiny_llama.hf), -2, best, data["against"]["id"])
    assert [part["value"] for part in data["parts"]] == [part.value for part in expected.parts]
    assert (data["sum"], data["logit"]) == (pytest.approx(expected.total), pytest.approx(expected.logit))
    shown = run("attribute", "--trace", str(trace.path), "--token", "T", "--top", "3")[1]
    assert "parts sum to" in shown and "more parts" in shown


def test_the_command_line_refuses_a_text_of_several_tokens_and_a_position_outside(run, tiny_llama, tmp_path):
    trace = trace_of(tiny_llama.hf, tmp_path)
    code, _, problem = run("attribute", "--trace", str(trace.path), "--token", "zebra crossing")
    assert code == 2 and "tokens in this model" in problem
    code, _, problem = run("attribute", "--trace", str(trace.path), "--position", "99")
    assert code == 2 and "Position 99 is outside the 10 tokens" in problem

"""A captured trace says what the model did: both engines, every result, and nothing left behind when it fails."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

from backend.analysis import attention
from backend.engines import OpenOptions, Piece, Request, open_engine
from backend.errors import Cancelled, LayerscopeError
from backend.experiments.aside import Aside
from backend.experiments.between import Between
from backend.experiments.capture import CaptureSpec, capture
from backend.experiments.logit_lens import lens_of_trace, lens_target
from backend.intervention import Intervention
from backend.trace import Trace

PROMPT = "Mary gave the key to John and the book to"
OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=2)


@pytest.fixture(scope="module", params=["tiny_llama/hf", "tiny_llama/gguf", "tiny_mixtral/hf", "tiny_mixtral/gguf"])
def engine(request):
    name, kind = request.param.split("/")
    engine = open_engine(getattr(request.getfixturevalue(name), kind), OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def trace(engine, tmp_path_factory):
    spec = CaptureSpec(PROMPT, max_new_tokens=3, precision="float32", category="test", tags=("a",), sites=tuple(s for s in engine.sites))
    with Trace(capture(engine, spec, tmp_path_factory.mktemp("traces"))) as opened:
        yield opened


def direct(engine, ids, *places):
    """What the engine says of some places, asked directly."""
    found = {}

    def sink(piece: Piece) -> None:
        found[piece.site, piece.layer] = piece.values.copy()

    engine.run(list(ids), Request(tuple({site for site, _ in places})), sink)
    return [found[place] for place in places]


def test_what_is_stored_is_what_the_engine_computed(engine, trace):
    places = [("resid_post", 1), ("attn_pattern", 2), ("z", 0), ("embed", None), ("logits", None)]
    for (site, layer), values in zip(places, direct(engine, trace.token_ids, *places), strict=True):
        np.testing.assert_array_equal(trace[site if layer is None else (site, layer)], values)


def test_every_identity_holds_and_most_were_checked(trace):
    failed = {name: item for name, item in trace.integrity.items() if not item["ok"]}
    assert not failed
    checked = {name for name, item in trace.integrity.items() if item["checked"]}
    assert {"attn_sum", "mlp_sum", "pattern_rows", "pattern_causal", "attn_projection", "unembed", "finite"} <= checked
    assert trace.info.is_moe == ("router_top_k" in checked)


def test_the_trace_records_the_command_that_makes_it_again(trace):
    command = trace.metadata["command"]
    assert command[:8] == ["python", "-m", "backend", "trace", "--model", trace.info.name, "--prompt", PROMPT]
    assert command[command.index("--max-new-tokens") + 1] == "3" and command[-2:] == ["--tag", "a"]
    assert "--temperature" not in command


def test_generated_tokens_are_the_models_own_greedy_choice(trace):
    assert trace.n_tokens > trace.n_prompt
    np.testing.assert_array_equal(trace.top_ids[trace.n_prompt - 1 : -1, 0], trace.token_ids[trace.n_prompt :])
    assert trace.metadata["generation"]["max_new_tokens"] == 3 and trace.category == "test" and trace.tags == ["a"]


def test_logit_summaries_against_scipy(trace):
    from scipy.special import log_softmax
    from scipy.stats import entropy

    log_probs = log_softmax(trace["logits"].astype(np.float64), axis=-1)
    np.testing.assert_allclose(trace.entropy, entropy(np.exp(log_probs), axis=-1), rtol=1e-4)
    expected = log_probs[np.arange(trace.n_tokens - 1), trace.token_ids[1:]]
    np.testing.assert_allclose(trace.next_logprobs[:-1], expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(trace.next_logprobs[-1]) and trace.next_ranks[-1] == -1
    np.testing.assert_array_equal(trace.top_ids, np.argsort(-trace["logits"], axis=-1, kind="stable")[:, : trace.top_ids.shape[1]])


def test_the_lens_ends_in_the_models_own_output(trace):
    assert trace.result_attrs("lens_kl")["rows"] == ["embed", "0", "1", "2"]
    np.testing.assert_array_equal(trace.result("lens_top_ids")[-1], trace.top_ids[:, : trace.result("lens_top_ids").shape[-1]])
    assert np.all(trace.result("lens_kl")[-1] == 0)
    assert np.all(trace.result("lens_kl")[:-1] > 0)
    np.testing.assert_allclose(trace.result("lens_next_logprob")[-1], trace.next_logprobs, rtol=1e-5)


def test_a_target_in_the_lens_is_its_logprob_at_every_row(engine, trace):
    target = int(trace.top_ids[4, 0])
    values = lens_target(engine, trace, target, progress=lambda *_: None, should_stop=lambda: False)
    assert values.shape == (2, 4, trace.n_tokens)
    assert values[1, -1, 4] == 0
    np.testing.assert_allclose(values[0, -1, 4], trace.top_logprobs[4, 0], atol=1e-4)
    lens_row = list(trace.result("lens_top_ids")[1, 4])
    if target in lens_row:
        assert values[1, 1, 4] == lens_row.index(target)


def test_head_metrics_are_those_of_the_stored_pattern(trace):
    for layer in range(3):
        expected = attention.head_metrics(trace["attn_pattern", layer], trace.token_ids)
        for name, values in expected.items():
            np.testing.assert_allclose(trace.result(f"attn_{name}")[layer], values, rtol=1e-5, equal_nan=True)
    assert trace.result("attn_thumbs").shape == (3, 4, trace.n_tokens, trace.n_tokens)


def test_per_head_results_sum_to_the_attention_output(trace):
    from backend.weights import open_weights

    total = trace["result", 1].sum(axis=1)
    weights = open_weights(Path(trace.info.source))
    if "blocks.1.attn.b_O" in weights:
        total = total + weights["blocks.1.attn.b_O"]
    np.testing.assert_allclose(total, trace["attn_out", 1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["granite", "olmo2", "gemma2"])
def test_per_head_results_are_taken_before_what_follows_w_o(kind, tiny_model, tmp_path):
    """Their sum, multiplied (granite) or normed with a gain (olmo2, gemma2), is the attention output."""
    from backend.weights import open_weights

    engine = open_engine(tiny_model(kind).hf, OPTIONS)
    with Trace(capture(engine, CaptureSpec(PROMPT, precision="float32"), tmp_path)) as trace:
        total, attn_out = trace["result", 1].sum(axis=1), trace["attn_out", 1]
    engine.close()
    if kind == "granite":
        follows = 0.6 * total  # the fixture's residual_multiplier
    else:
        follows = total / np.sqrt((total**2).mean(-1, keepdims=True) + engine.info.norm_eps) * open_weights(tiny_model(kind).hf)["blocks.1.ln1_post.w"]
    np.testing.assert_allclose(follows, attn_out, rtol=1e-3, atol=1e-4)
    assert np.abs(total - attn_out).max() > 0.1


def test_only_the_layers_asked_for_are_stored(engine, tmp_path):
    spec = CaptureSpec(PROMPT, sites=("attn_pattern", "resid_post"), layers=(1,))
    with Trace(capture(engine, spec, tmp_path)) as trace:
        assert trace.stored == {"attn_pattern": [1], "resid_post": [1]}
        assert trace.integrity["mlp_sum"]["checked"] == 0 and "not captured" in trace.integrity["mlp_sum"]["note"]


def test_progress_only_grows_and_ends_complete(engine, tmp_path):
    told: list[tuple[str, int, int]] = []
    spec = CaptureSpec(token_ids=tuple(i % 300 for i in range(600)), sites=("resid_post",), lens=False)
    capture(engine, spec, tmp_path, progress=lambda *step: told.append(step))
    running = [(done, total) for stage, done, total in told if stage == "running"]
    assert running == [(done, 6) for done in range(1, 7)]  # three layers, two pieces of at most 512 positions


def test_an_edit_is_recorded_and_changes_the_predictions(engine, tmp_path):
    edit = Intervention("resid_post", 0, "zero")
    with Trace(capture(engine, CaptureSpec(PROMPT), tmp_path)) as plain, Trace(capture(engine, CaptureSpec(PROMPT, interventions=(edit,)), tmp_path)) as edited:
        assert edited.metadata["interventions"] == [{"site": "resid_post", "layer": 0, "op": "zero", "seed": 0}]
        assert np.all(edited["resid_post", 0] == 0)
        assert not np.allclose(edited.top_logprobs, plain.top_logprobs)
        assert all(item["ok"] for item in edited.integrity.values())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (CaptureSpec(""), "The prompt is empty"),
        (CaptureSpec("x" * 9000), "more than the"),
        (CaptureSpec(PROMPT, sites=("nonsense",)), "There is no site 'nonsense'"),
        (CaptureSpec(PROMPT, layers=(7,)), "Layer 7 is outside 0-2"),
        (CaptureSpec(PROMPT, interventions=(Intervention("z", 0, "zero", head=9),)), "Head 9 of an edit is outside 0-3"),
        (CaptureSpec(PROMPT, max_new_tokens=-1), "-1; it must be 0 or more"),
        (CaptureSpec(PROMPT, precision="int4"), "neither float16 nor float32"),
    ],
)
def test_a_run_that_cannot_be_is_one_sentence_and_leaves_nothing(engine, tmp_path, spec, message):
    with pytest.raises(LayerscopeError, match=message):
        capture(engine, spec, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_site_the_architecture_lacks_is_refused_by_name(engine, tmp_path):
    if engine.info.is_moe:
        pytest.skip("this model has experts")
    with pytest.raises(LayerscopeError, match="no site 'router_probs'"):
        capture(engine, CaptureSpec(PROMPT, sites=("router_probs",)), tmp_path)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(engine, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(LayerscopeError, match="MB left"):
        capture(engine, CaptureSpec(PROMPT), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cancelling_stops_within_a_layer_and_leaves_the_engine_as_it_was(engine, tmp_path):
    before = direct(engine, [0, 5, 9], ("logits", None))[0]
    asked = []

    def stop_after_some() -> bool:
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(Cancelled):
        capture(engine, CaptureSpec(PROMPT), tmp_path, should_stop=stop_after_some)
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(direct(engine, [0, 5, 9], ("logits", None))[0], before)


def test_only_the_heads_and_rows_asked_for_are_kept_of_attention_maps(engine, tmp_path):
    ids = tuple(i * 7 % 300 for i in range(600))  # two pieces
    spec = CaptureSpec(token_ids=ids, sites=("attn_pattern", "attn_scores", "resid_post"), precision="float32", lens=False)
    part = dataclasses.replace(spec, heads=((2, 3), (0, 1)), rows=(500, 520))
    with Trace(capture(engine, spec, tmp_path)) as whole, Trace(capture(engine, part, tmp_path)) as trace:
        assert trace.stored == {"attn_scores": [0, 2], "attn_pattern": [0, 2], "resid_post": [0, 1, 2]}
        assert trace.kept("attn_pattern", 2) == ([3], (500, 520))
        for site in ("attn_pattern", "attn_scores"):
            got, expected = trace.head(site, 2, 3), whole.head(site, 2, 3)
            # PyTorch's fused kernel runs where no map is wanted, and rounds otherwise than the maps' own arithmetic.
            np.testing.assert_allclose(got[500:520], expected[500:520], rtol=1e-4, atol=1e-5)
            assert np.isnan(got[:500]).all() and np.isnan(got[520:]).all()
            np.testing.assert_array_equal(trace.head(site, 2, 3, q=slice(510, 512), k=slice(3, 9)), got[510:512, 3:9])
            np.testing.assert_array_equal(np.isfinite(trace[site, 2]).any(axis=(1, 2)), [False, False, False, True])
        with pytest.raises(LayerscopeError, match=r"Head 2\.0 was not captured; of layer 2 the trace holds 2\.3"):
            trace.head("attn_pattern", 2, 0)
        means = attention.RowMeans()
        means.add(attention.row_scores(whole.head("attn_pattern", 2, 3)[None, 500:520, :520], ids, 500))
        for name, value in means.means().items():
            np.testing.assert_allclose(trace.result(f"attn_{name}")[1], [np.nan] * 3 + [value[0]], rtol=1e-4)
        assert trace.integrity["pattern_rows"]["ok"] and trace.integrity["pattern_rows"]["checked"] == 4
        assert trace.path.stat().st_size < 0.5 * whole.path.stat().st_size


@pytest.mark.parametrize(
    ("heads", "rows", "sentence"),
    [(((9, 0),), None, "Layer 9 is outside 0-2"), (((0, 4),), None, r"Head 0\.4 is outside heads 0-3"), (None, (3, 99), "Attention rows 3-98 are not inside the")],
)
def test_heads_and_rows_that_are_not_there_are_refused(engine, tmp_path, heads, rows, sentence):
    with pytest.raises(LayerscopeError, match=sentence):
        capture(engine, CaptureSpec(PROMPT, heads=heads, rows=rows), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lens_made_later_is_the_lens_that_the_capture_makes(engine, tmp_path):
    with Trace(capture(engine, CaptureSpec(PROMPT, precision="float32", lens=True), tmp_path)) as with_lens, \
         Trace(capture(engine, CaptureSpec(PROMPT, precision="float32", lens=False), tmp_path)) as without:  # fmt: skip
        assert "lens_kl" not in without.results
        rows, later = lens_of_trace(engine, without, progress=lambda *_: None, should_stop=lambda: False)
        assert rows == with_lens.result_attrs("lens_kl")["rows"]
        for name, values in later.items():
            expected = with_lens.result(name)
            assert values.dtype == expected.dtype, name
            np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("way", [Aside, Between])
def test_checking_the_logits_while_the_run_is_still_on_hands_nothing_out_again(engine, tmp_path, monkeypatch, way):
    """The check runs beside the engine, or between its steps, and goes through the final norm and W_U, where the run's own hooks may still hang."""
    seen: list[tuple[str, int]] = []
    real = way.put

    def slow(self: Aside | Between, piece: Piece) -> None:
        seen.append((piece.site, piece.start))
        real(self, piece)
        if piece.site == "logits":
            time.sleep(0.3)  # the engine is held here, inside its run, while the piece is checked

    monkeypatch.setattr(way, "put", slow)
    monkeypatch.setattr("backend.experiments.capture.sink_for", lambda engine, work: way(work))
    ids = tuple(i * 7 % 300 for i in range(600))  # two pieces
    spec = CaptureSpec(token_ids=ids, sites=("resid_post", "ln_final_out"), precision="float32", lens=False)
    with Trace(capture(engine, spec, tmp_path)) as trace:
        assert trace.integrity["unembed"]["checked"] == 2 and trace.integrity["unembed"]["ok"]
        assert seen.count(("ln_final_out", 0)) == seen.count(("ln_final_out", 512)) == 1 and len(seen) == len(set(seen)) + 2 * (engine.info.n_layers - 1)
        whole = {}
        engine.run(list(ids), Request(("ln_final_out",)), lambda piece: whole.update({piece.start: np.array(piece.values)}))
        np.testing.assert_array_equal(trace["ln_final_out"], np.concatenate([whole[0], whole[512]]))


def test_beside_the_engine_and_between_its_steps_the_same_trace_is_made(engine, tmp_path, monkeypatch):
    spec = CaptureSpec(prompt="The quick brown fox", lens=False)
    traces = []
    for way in (Aside, Between):
        monkeypatch.setattr("backend.experiments.capture.sink_for", lambda engine, work, way=way: way(work))
        traces.append(Trace(capture(engine, spec, tmp_path)))
    beside, between = traces
    assert list(beside) == list(between) and beside.integrity == between.integrity
    for site, layer in beside:
        key = site if layer is None else (site, layer)
        np.testing.assert_array_equal(beside[key], between[key])
    for name in beside.results:
        np.testing.assert_array_equal(beside.result(name), between.result(name))
    for trace in traces:
        trace.close()

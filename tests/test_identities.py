"""The identities hold on a transformer written out in numpy, whole or in pieces, and fail on captures that are wrong on purpose."""

from __future__ import annotations

import json

import numpy as np
import pytest

from backend.analysis.held_copies import HeldCopies, measured
from backend.analysis.identities import Identities, relative_error, sum_error, tolerances
from backend.model_info import ModelInfo

N_LAYERS, N_HEADS, D_HEAD, D_MODEL, D_VOCAB, EXPERTS, CHOSEN, N_TOKENS = 3, 2, 4, 8, 20, 4, 2, 7
INFO = ModelInfo("toy", "toy", "hf", "mixtral", N_LAYERS, N_HEADS, N_HEADS, D_MODEL, D_HEAD, 16, D_VOCAB, 64,
                 n_experts=EXPERTS, n_experts_used=CHOSEN, quantization="float32")  # fmt: skip
RNG = np.random.default_rng(0)
W_O = [RNG.normal(size=(D_MODEL, N_HEADS * D_HEAD)).astype(np.float32) for _ in range(N_LAYERS)]
W_U = RNG.normal(size=(D_VOCAB, D_MODEL)).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True))


def weight(name: str, rows):
    _, layer, _, tensor = name.split(".")
    return W_O[int(layer)][rows] if tensor == "W_O" else None


def unembed(resid, tokens=None):
    return rms(resid) @ (W_U if tokens is None else W_U[tokens]).T


def run(renormalise: bool = True) -> list[tuple[str, int | None, np.ndarray]]:
    """Every site of a tiny MoE transformer in the order of computation."""
    rng = np.random.default_rng(1)
    resid = rng.normal(size=(N_TOKENS, D_MODEL)).astype(np.float32)
    out = [("embed", None, resid)]
    causal = np.tril(np.ones((N_TOKENS, N_TOKENS), bool))
    for layer in range(N_LAYERS):
        pattern = softmax(np.where(causal, rng.normal(size=(N_HEADS, N_TOKENS, N_TOKENS)), -np.inf)).astype(np.float32)
        values = rng.normal(size=(N_TOKENS, N_HEADS, D_HEAD))
        z = np.einsum("hqk,khd->qhd", pattern, values).astype(np.float32)
        attn_out = z.reshape(N_TOKENS, -1) @ W_O[layer].T
        mid = resid + attn_out
        probs = softmax(rng.normal(size=(N_TOKENS, EXPERTS))).astype(np.float32)
        indices = np.argsort(-probs, axis=-1)[:, :CHOSEN].astype(np.int32)
        weights = np.take_along_axis(probs, indices, -1)
        if renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        mlp_out = rng.normal(size=mid.shape).astype(np.float32)
        resid = mid + mlp_out
        out += [(site, layer, array) for site, array in (
            ("attn_pattern", pattern), ("z", z), ("attn_out", attn_out), ("resid_mid", mid), ("router_probs", probs), ("expert_indices", indices),
            ("expert_weights", weights), ("mlp_out", mlp_out), ("resid_post", resid))]  # fmt: skip
    return [*out, ("logits", None, unembed(resid))]


def check(stream, **options):
    checks = Identities(options.pop("info", INFO), options.pop("weight", weight), options.pop("unembed", unembed), **options)
    for site, layer, values in stream:
        checks.add(site, layer, values)
    return checks.report()


def swap(stream, site, change):
    return [(s, layer, change(layer, values) if s == site else values) for s, layer, values in stream]


def failing(report):
    return {name for name, entry in report.items() if not entry["ok"]}


def test_every_identity_holds_on_a_right_capture_and_every_layer_was_compared():
    report = check(run())
    assert failing(report) == set()
    assert {name: entry["checked"] for name, entry in report.items() if name != "finite"} == {
        "attn_sum": 3, "mlp_sum": 3, "pattern_rows": 3, "pattern_causal": 3, "attn_projection": 3, "router_top_k": 3, "expert_weights": 3,
        "unembed": 1}  # fmt: skip
    assert max(entry["max_error"] for entry in report.values()) < 1e-6


def test_the_report_is_plain_json():
    assert json.loads(json.dumps(check(run()), allow_nan=False))["attn_sum"]["ok"] is True


@pytest.mark.parametrize("size", [1, 3, 6])
def test_a_prompt_in_pieces_passes_and_a_wrong_piece_fails(size):
    def feed(spoil: bool):
        checks = Identities(INFO, weight, unembed)
        for start in range(0, N_TOKENS, size):
            rows = slice(start, start + size)
            for site, layer, values in run():
                piece = values[:, rows, : start + size] if site == "attn_pattern" else values[rows].copy()
                if spoil and site == "resid_mid" and layer == 1 and start:
                    piece[0, 0] += 1
                checks.add(site, layer, piece, start)
        return checks.report()

    assert failing(feed(spoil=False)) == set()
    assert failing(feed(spoil=True)) == {"attn_sum", "mlp_sum"}


@pytest.mark.parametrize("site, breaks", [("resid_mid", {"attn_sum", "mlp_sum"}), ("z", {"attn_projection"}), ("mlp_out", {"mlp_sum"})])
def test_a_site_that_is_off_by_one_layer_fails(site, breaks):
    stream = run()
    by_layer = [values for s, _, values in stream if s == site]
    assert failing(check(swap(stream, site, lambda layer, _: by_layer[(layer + 1) % N_LAYERS]))) == breaks


def test_the_residual_stream_that_is_off_by_one_layer_fails():
    stream = run()
    by_layer = [values for s, _, values in stream if s == "resid_post"]
    late = swap(stream, "resid_post", lambda layer, _: by_layer[max(layer - 1, 0)])
    assert failing(check(late)) == {"attn_sum", "mlp_sum", "unembed"}


def test_an_unmasked_pattern_fails():
    def unmask(layer, pattern):
        spread = pattern + np.float32(0.01)
        return spread / spread.sum(-1, keepdims=True)

    assert failing(check(swap(run(), "attn_pattern", unmask))) == {"pattern_causal"}


def test_transposed_heads_fail():
    def transpose(layer, z):
        return z.reshape(N_TOKENS, -1).reshape(N_TOKENS, D_HEAD, N_HEADS).transpose(0, 2, 1)

    assert failing(check(swap(run(), "z", transpose))) == {"attn_projection"}
    assert failing(check(swap(run(), "z", lambda layer, z: z[:, ::-1]))) == {"attn_projection"}


def test_a_pattern_with_queries_and_keys_exchanged_fails():
    assert failing(check(swap(run(), "attn_pattern", lambda layer, p: p.transpose(0, 2, 1)))) == {"pattern_rows", "pattern_causal"}


def test_rows_that_do_not_sum_to_one_fail_and_the_layer_is_named():
    report = check(swap(run(), "attn_pattern", lambda layer, p: p * np.float32(1.01) if layer == 2 else p))
    assert failing(report) == {"pattern_rows"}
    assert report["pattern_rows"]["max_error"] == pytest.approx(0.01, rel=1e-3)
    assert "layer 2" in report["pattern_rows"]["note"]


def test_attention_sinks_may_take_mass_out_of_the_rows_but_not_add_any():
    sinks = ModelInfo(**{**INFO.to_json(), "architecture": "gpt-oss"})
    less, more = (swap(run(), "attn_pattern", lambda layer, p, c=c: p * np.float32(c)) for c in (0.7, 1.1))
    assert check(less, info=sinks)["pattern_rows"]["ok"]
    assert not check(more, info=sinks)["pattern_rows"]["ok"]


def test_wrong_experts_fail():
    assert failing(check(swap(run(), "expert_indices", lambda layer, i: (i + 1) % EXPERTS))) >= {"router_top_k"}
    assert "router_top_k" in failing(check(swap(run(), "expert_indices", lambda layer, i: np.repeat(i[:, :1], CHOSEN, axis=1))))
    assert "router_top_k" in failing(check(swap(run(), "expert_indices", lambda layer, i: i[:, ::-1])))


@pytest.mark.parametrize("renormalise, said", [(True, "renormalised over the chosen experts"), (False, "not renormalised")])
def test_expert_weights_may_or_may_not_be_renormalised_and_the_report_says_which(renormalise, said):
    entry = check(run(renormalise))["expert_weights"]
    assert entry["ok"] and entry["note"] == said


def test_wrong_expert_weights_fail():
    assert failing(check(swap(run(), "expert_weights", lambda layer, w: w[:, ::-1]))) == {"expert_weights"}


def test_logits_of_another_position_fail():
    assert failing(check(swap(run(), "logits", lambda layer, values: np.roll(values, 1, axis=0)))) == {"unembed"}


def test_a_planted_nan_is_named():
    def plant(layer, values):
        values = values.copy()
        values[1, 1] = np.nan if layer == 1 else values[1, 1]
        return values

    report = check(swap(run(), "mlp_out", plant))
    assert not report["finite"]["ok"] and "mlp_out of layer 1" in report["finite"]["note"]
    assert not report["mlp_sum"]["ok"]
    json.dumps(report, allow_nan=False)


def test_masked_scores_are_allowed_to_be_infinite():
    assert check([("attn_scores", 0, np.full((2, 3, 3), -np.inf))])["finite"]["ok"]


def test_what_was_not_captured_is_said_not_to_be_checked():
    report = check([piece for piece in run() if piece[0] not in ("resid_mid", "logits")])
    assert report["attn_sum"]["checked"] == 0 and "resid_mid" in report["attn_sum"]["note"]
    assert report["unembed"]["checked"] == 0 and "logits" in report["unembed"]["note"]
    assert report["attn_projection"]["checked"] == N_LAYERS


def test_layers_left_out_break_the_chain_without_a_false_alarm():
    report = check([piece for piece in run() if piece[1] in (0, 2)])
    assert failing(report) == set()
    assert report["attn_sum"]["checked"] == 0  # neither embed nor layer 1's resid_post was there to start from
    assert report["mlp_sum"]["checked"] == 2


def test_without_weights_the_products_are_not_checked():
    report = check(run(), weight=None, unembed=None)
    assert report["attn_projection"]["checked"] == report["unembed"]["checked"] == 0
    assert "weights" in report["attn_projection"]["note"]


def test_an_edited_site_is_left_out_and_everything_else_still_checked():
    edited = swap(run(), "attn_pattern", lambda layer, p: p * 0 if layer == 1 else p)
    assert not check(edited)["pattern_rows"]["ok"]
    report = check(edited, edited={("attn_pattern", 1)})
    assert failing(report) == set()
    assert report["pattern_rows"]["checked"] == 2 and "layer 1 was edited" in report["pattern_rows"]["note"]


def test_a_dense_model_has_no_router_identities():
    dense = ModelInfo(**{**INFO.to_json(), "n_experts": 0, "architecture": "mistral"})
    assert not set(check(run(), info=dense)) & {"router_top_k", "expert_weights"}


def test_an_architecture_that_norms_after_w_o_is_not_held_to_the_product():
    gemma = ModelInfo(**{**INFO.to_json(), "architecture": "gemma2"})
    assert check(run(), info=gemma)["attn_projection"]["checked"] == 0


def test_tolerances_widen_with_the_arithmetic_and_never_for_sums_in_llama_cpp():
    assert tolerances("hf", "float32").matmul < tolerances("gguf", "F16").matmul < tolerances("gguf", "Q4_K_M").matmul
    assert tolerances("gguf", "Q4_K_M").sums == tolerances("hf", "torch.float32").sums < tolerances("hf", "bfloat16").sums


def test_relative_error_is_measured_against_the_captured_value():
    assert relative_error(np.array([1.0, 2.2]), np.array([1.0, 2.0])) == pytest.approx(0.1)
    assert relative_error(np.zeros(3), np.zeros(3)) == 0
    assert relative_error(np.ones(3), np.zeros(3)) == float("inf")
    assert relative_error(np.ones((2, 3)), np.ones((3, 2))) == float("inf")


@pytest.mark.parametrize("spoilt", [None, np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_error_of_a_sum_without_a_copy_is_that_of_the_sum(spoilt, which):
    rng = np.random.default_rng(which)
    arrays = [rng.normal(size=(7, 33)).astype(np.float32) for _ in range(3)]
    if spoilt is not None:
        arrays[which][3, 5] = spoilt
    a, b, total = arrays
    with np.errstate(invalid="ignore", over="ignore"):
        expected = relative_error(a + b, total)
    assert sum_error(a, b, total) == pytest.approx(expected, rel=1e-6)
    assert sum_error(a, b, total[:6]) == np.inf
    assert sum_error(a, b, a + b) == (0 if spoilt is None or which == 2 or spoilt == 1e30 else np.inf)


@pytest.mark.parametrize("copies", [None, HeldCopies()])
def test_values_are_measured_and_copied_in_one_pass(copies):
    copy_to = copies and copies.of("z", 0)
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    values[2, 3] = -40
    kept, largest = measured(values, copy_to)
    np.testing.assert_array_equal(kept, values)
    assert largest == 40 and np.shares_memory(kept, values) is (copies is None)
    for spoilt in (np.nan, np.inf, -np.inf):
        values[4, 6] = spoilt
        assert measured(values, copy_to)[1] == np.inf
    columns, whole = measured(values[:, ::2], copy_to), measured(np.ones((2, 2), np.int32), copy_to)
    assert columns[1] is None and whole[1] is None and np.shares_memory(columns[0], values) is (copies is None)
    assert measured(np.zeros((0, 4), np.float32), copy_to)[1] == 0


def test_a_layer_writes_over_the_copies_of_the_last_but_not_over_the_stream_it_adds_to():
    copies = HeldCopies()
    layers = [{site: measured(np.full((2, 3), layer + 1, np.float32), copies.of(site, layer))[0] for site in ("z", "resid_post")} for layer in range(3)]
    assert (layers[0]["z"] == 3).all() and (layers[1]["resid_post"] == 2).all() and (layers[2]["resid_post"] == 3).all()
    longer, _ = measured(np.zeros((4, 3), np.float32), copies.of("z", 3))
    assert longer.shape == (4, 3) and (layers[2]["z"] == 3).all()

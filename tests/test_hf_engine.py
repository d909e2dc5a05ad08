"""Claims about the PyTorch engine: it shows exactly what transformers computes, its edits are what plain torch hooks would do,
and a run leaves nothing behind. Every architecture with a row is asked the same."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backend.engines import Engine, OpenOptions, Piece, Request, Sampling
from backend.engines import hf as hf_module
from backend.engines.hf import HfEngine
from backend.engines.hf_taps import TAP
from backend.errors import Cancelled, LayerscopeError
from backend.intervention import Intervention
from tests.tiny_models import TinyModel, save_tiny

torch.set_num_threads(2)
KINDS = ("llama", "mistral", "mixtral")
IDS = [0, 290, 284, 280, 306, 275, 31, 290, 284, 77, 255, 12]
Values = dict[tuple[str, int | None], NDArray[Any]]


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[HfEngine]:
    engine = HfEngine(tiny.hf)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(tiny: TinyModel) -> Any:
    return eager_model(tiny.hf)


@pytest.fixture(scope="module")
def values(engine: HfEngine) -> Values:
    return capture(engine, IDS)


@pytest.fixture(scope="module")
def mixtral(tiny_mixtral: TinyModel) -> HfEngine:
    return HfEngine(tiny_mixtral.hf)


@pytest.fixture(scope="module")
def llama(tiny_llama: TinyModel) -> HfEngine:
    return HfEngine(tiny_llama.hf)


def eager_model(folder: Path) -> Any:
    """transformers' own model with its own eager attention: the oracle."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def capture(engine: Engine, ids: list[int], sites: tuple[str, ...] | None = None, edits: tuple[Intervention, ...] = ()) -> Values:
    """Everything a run hands out, pieces joined along positions; attention maps padded with 0 (-inf for scores) to all keys."""
    pieces: dict[tuple[str, int | None], list[NDArray[Any]]] = {}

    def sink(piece: Piece) -> None:
        array = piece.values.copy()
        if piece.site in ("attn_scores", "attn_pattern"):
            fill = -np.inf if piece.site == "attn_scores" else 0.0
            array = np.pad(array, ((0, 0), (0, 0), (0, len(ids) - array.shape[-1])), constant_values=fill).swapaxes(0, 1)
        assert piece.start == sum(len(part) for part in pieces.get((piece.site, piece.layer), []))
        pieces.setdefault((piece.site, piece.layer), []).append(array)

    engine.run(ids, Request(sites or tuple(engine.sites)), sink, edits)
    joined = {key: np.concatenate(parts) for key, parts in pieces.items()}
    return {key: v.swapaxes(0, 1) if key[0] in ("attn_scores", "attn_pattern") else v for key, v in joined.items()}


def logits_with(engine: Engine, *edits: Intervention, ids: list[int] = IDS) -> NDArray[np.float32]:
    return capture(engine, ids, ("logits",), edits)["logits", None]


def hooked_logits(model: Any, **hooks: Callable[..., Any]) -> NDArray[np.float32]:
    """The oracle's logits while plain torch forward hooks are in place; keys are module paths with / for dots."""
    handles = [model.get_submodule(path.replace("/", ".")).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        with torch.no_grad():
            return model(torch.tensor([IDS])).logits[0].numpy()
    finally:
        for handle in handles:
            handle.remove()


def batch_noise(engine: HfEngine) -> float:
    """How much a token may change with the tokens after it: nothing in a dense model; with experts, the batch that an expert
    sees changes its size with the routing of later tokens, and with it the last bits of the matrix product."""
    return 2e-5 if engine.info.is_moe else 0.0


def no_hooks(engine: HfEngine) -> bool:
    modules = engine._model.modules()
    return not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, TAP) for m in modules)


# What transformers computes


def test_residual_stream_pattern_and_logits_are_those_of_transformers_to_the_bit(engine: HfEngine, values: Values, reference: Any) -> None:
    with torch.no_grad():
        output = reference(torch.tensor([IDS]), output_hidden_states=True, output_attentions=True)
    last = engine.info.n_layers - 1
    for layer in range(engine.info.n_layers):
        assert np.array_equal(values["attn_pattern", layer], output.attentions[layer][0].numpy())
        if layer < last:
            assert np.array_equal(values["resid_post", layer], output.hidden_states[layer + 1][0].numpy())
    assert np.array_equal(values["embed", None], output.hidden_states[0][0].numpy())
    assert np.array_equal(values["ln_final_out", None], output.hidden_states[-1][0].numpy())
    assert np.array_equal(values["logits", None], output.logits[0].numpy())
    assert not np.array_equal(values["resid_post", last], values["ln_final_out", None])


def test_the_fused_kernel_and_the_pattern_that_is_shown_give_the_same_logits(engine: HfEngine, values: Values) -> None:
    fused = logits_with(engine)
    assert np.abs(fused - values["logits", None]).max() < 1e-5 * np.abs(fused).max()


@pytest.mark.parametrize(
    "kind, changes",
    [("gpt_oss", {}), ("granitemoe", {}), ("phimoe", {}), ("deepseek_v3", {}), ("deepseek_v2", {}),
     ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2})],
    ids=["sinks", "softmax over the chosen", "sparsemixer", "sigmoid and groups", "greedy", "groups"],
)
def test_sinks_latent_attention_and_every_kind_of_router_leave_what_transformers_computes_to_the_bit(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    tiny = save_tiny(kind, tmp_path / kind, **changes)
    engine = HfEngine(tiny.hf)
    values = capture(engine, IDS)
    with torch.no_grad():
        output = eager_model(tiny.hf)(torch.tensor([IDS]), output_hidden_states=True, output_attentions=True)
    for layer in range(engine.info.n_layers):
        assert np.array_equal(values["attn_pattern", layer], output.attentions[layer][0].numpy())
    assert np.array_equal(values["logits", None], output.logits[0].numpy())
    # What is not edited was chosen by the router's own module; what is edited, by ours: an edit that changes nothing chooses the same.
    same = capture(engine, IDS, edits=(Intervention("router_logits", 1, "add", 0.0),))
    assert np.array_equal(same["expert_indices", 1], values["expert_indices", 1])
    assert np.allclose(same["expert_weights", 1], values["expert_weights", 1], rtol=1e-6, atol=0)


def test_each_site_follows_from_the_ones_before_it(engine: HfEngine, values: Values) -> None:
    """The equations of the block, in NumPy, from the engine's own weights: they hold the weights' names and orientation too."""
    info = engine.info

    def linear(x: NDArray[Any], name: str) -> NDArray[Any]:
        bias = engine.weight(name.replace("W_", "b_")) if info.architecture == "llama" and ".attn." in name else 0.0
        return x @ engine.weight(name).T + bias

    def norm(x: NDArray[Any], name: str) -> NDArray[Any]:
        return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + info.norm_eps) * engine.weight(name)

    def same(site: str, layer: int | None, expected: NDArray[Any]) -> None:
        actual = values[site, layer]
        assert actual.shape == expected.shape, site
        assert np.abs(actual - expected).max() < 2e-6 * max(1.0, np.abs(expected).max()), site

    same("embed", None, engine.weight("embed.W_E")[IDS])
    for layer in range(info.n_layers):
        block = f"blocks.{layer}"
        resid_pre = values["resid_post", layer - 1] if layer else values["embed", None]
        same("ln1_out", layer, norm(resid_pre, f"{block}.ln1.w"))
        for site, n_heads in (("q", info.n_heads), ("k", info.n_kv_heads), ("v", info.n_kv_heads)):
            same(site, layer, linear(values["ln1_out", layer], f"{block}.attn.W_{site.upper()}").reshape(len(IDS), n_heads, info.d_head))
        same("rot_q", layer, rotate(values["q", layer], info.rope_theta))
        same("rot_k", layer, rotate(values["k", layer], info.rope_theta))
        groups = info.n_heads // info.n_kv_heads
        key, value = (values[site, layer].repeat(groups, axis=1) for site in ("rot_k", "v"))
        scores = np.einsum("qhd,khd->hqk", values["rot_q", layer], key) / np.sqrt(info.d_head)
        future = np.triu(np.ones(scores.shape[1:], dtype=bool), 1)
        assert np.isneginf(values["attn_scores", layer][:, future]).all()
        assert np.abs(values["attn_scores", layer] - scores)[:, ~future].max() < 1e-5
        same("z", layer, np.einsum("hqk,khd->qhd", values["attn_pattern", layer], value))
        same("attn_out", layer, linear(values["z", layer].reshape(len(IDS), -1), f"{block}.attn.W_O"))
        assert np.array_equal(values["resid_mid", layer], resid_pre + values["attn_out", layer])
        same("ln2_out", layer, norm(values["resid_mid", layer], f"{block}.ln2.w"))
        if info.is_moe:
            same("mlp_out", layer, experts_by_hand(engine, values, layer))
        else:
            same("mlp_pre", layer, values["ln2_out", layer] @ engine.weight(f"{block}.mlp.W_gate").T)
            same("mlp_pre_linear", layer, values["ln2_out", layer] @ engine.weight(f"{block}.mlp.W_in").T)
            same("mlp_post", layer, silu(values["mlp_pre", layer]) * values["mlp_pre_linear", layer])
            same("mlp_out", layer, values["mlp_post", layer] @ engine.weight(f"{block}.mlp.W_out").T)
        assert np.array_equal(values["resid_post", layer], values["resid_mid", layer] + values["mlp_out", layer])
    same("ln_final_out", None, norm(values["resid_post", info.n_layers - 1], "ln_final.w"))
    same("logits", None, values["ln_final_out", None] @ engine.weight("unembed.W_U").T)
    assert np.array_equal(engine.unembed(values["resid_post", info.n_layers - 1]), values["logits", None])


def rotate(x: NDArray[Any], theta: float) -> NDArray[Any]:
    """Rotary embedding of (pos, head, d_head), dimension i paired with i + d_head / 2 (Su et al., arXiv:2104.09864)."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def silu(x: NDArray[Any]) -> NDArray[Any]:
    return x / (1 + np.exp(-x.astype(np.float64)))


def experts_by_hand(engine: HfEngine, values: Values, layer: int) -> NDArray[Any]:
    """Route and run the experts token by token, checking the router's sites on the way (Mixtral, arXiv:2401.04088, 2.1)."""
    x, k = values["ln2_out", layer], engine.info.n_experts_used
    logits = x @ engine.weight(f"blocks.{layer}.mlp.W_router").T
    assert np.abs(values["router_logits", layer] - logits).max() < 1e-5
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert np.abs(values["router_probs", layer] - probs).max() < 1e-6
    chosen = np.argsort(-probs, axis=-1)[:, :k]
    assert np.array_equal(values["expert_indices", layer], chosen) and values["expert_indices", layer].dtype == np.int32
    best = np.take_along_axis(probs, chosen, -1)
    assert np.abs(values["expert_weights", layer] - best / best.sum(-1, keepdims=True)).max() < 1e-6
    w_gate, w_in, w_out = (engine.weight(f"blocks.{layer}.mlp.experts.W_{name}") for name in ("gate", "in", "out"))
    out = np.zeros_like(x)
    for pos in range(len(x)):
        for expert, weight in zip(chosen[pos], values["expert_weights", layer][pos], strict=True):
            out[pos] += weight * (w_out[expert] @ (silu(w_gate[expert] @ x[pos]) * (w_in[expert] @ x[pos])))
    return out


def test_sites_arrive_in_the_order_of_the_computation(engine: HfEngine) -> None:
    order: list[tuple[str, int | None]] = []
    engine.run(IDS, Request(tuple(engine.sites)), lambda piece: order.append((piece.site, piece.layer)))
    attention = "ln1_out q k v rot_q rot_k attn_scores attn_pattern z attn_out resid_mid ln2_out"
    mlp = "router_logits router_probs expert_indices expert_weights expert_out" if engine.info.is_moe else "mlp_pre mlp_pre_linear mlp_post"
    block = f"{attention} {mlp} mlp_out resid_post".split()
    expected = [(site, layer) for layer in range(engine.info.n_layers) for site in block]
    assert order == [("embed", None), *expected, ("ln_final_out", None), ("logits", None)]


def test_only_what_is_asked_for_is_handed_out(engine: HfEngine) -> None:
    got: list[tuple[str, int | None]] = []
    engine.run(IDS, Request(("z", "logits"), layers=(1,)), lambda piece: got.append((piece.site, piece.layer)))
    assert got == [("z", 1), ("logits", None)]


# A run leaves nothing behind and changes nothing


def test_capturing_does_not_change_the_answer(engine: HfEngine, values: Values) -> None:
    """Bit for bit, on the same attention path: with the pattern shown, and with the fused kernel."""
    shown = capture(engine, IDS, ("attn_pattern", "logits"))["logits", None]
    assert np.array_equal(shown, values["logits", None])
    fused = tuple(site for site in engine.sites if site not in ("attn_scores", "attn_pattern"))
    assert np.array_equal(capture(engine, IDS, fused)["logits", None], logits_with(engine))


def test_a_sink_that_fails_is_heard_and_leaves_no_hook(engine: HfEngine) -> None:
    before = logits_with(engine)

    def full_disk(piece: Piece) -> None:
        if piece.layer == 1:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        engine.run(IDS, Request(tuple(engine.sites)), full_disk, (Intervention("z", 0, "zero"),))
    assert no_hooks(engine)
    assert np.array_equal(logits_with(engine), before)


def test_a_run_stops_at_the_next_layer_when_asked(engine: HfEngine) -> None:
    seen: set[int | None] = set()
    with pytest.raises(Cancelled):
        engine.run(IDS, Request(("resid_post",)), lambda piece: seen.add(piece.layer), should_stop=lambda: 0 in seen)
    assert seen == {0}
    assert no_hooks(engine)
    with pytest.raises(Cancelled):
        engine.generate(IDS, 3, Sampling(), should_stop=lambda: True)


def test_the_receiver_cannot_write_into_the_running_model(llama: HfEngine) -> None:
    def vandal(piece: Piece) -> None:
        piece.values[:] = 0

    with pytest.raises(ValueError, match="read-only"):
        llama.run(IDS, Request(("resid_post",)), vandal)


def test_a_run_inside_another_engines_run_does_not_mix_with_it(llama: HfEngine, mixtral: HfEngine) -> None:
    alone = capture(llama, IDS, ("attn_pattern",)), capture(mixtral, IDS, ("attn_pattern",))
    inner: list[Values] = []
    outer: Values = {}

    def sink(piece: Piece) -> None:
        outer[piece.site, piece.layer] = piece.values.copy()
        inner.append(capture(mixtral, IDS, ("attn_pattern",)))

    llama.run(IDS, Request(("attn_pattern",)), sink)
    for layer in range(3):
        assert np.array_equal(outer["attn_pattern", layer], alone[0]["attn_pattern", layer])
        assert np.array_equal(inner[-1]["attn_pattern", layer], alone[1]["attn_pattern", layer])


def test_a_later_token_changes_nothing_before_it(engine: HfEngine, values: Values) -> None:
    other = capture(engine, [*IDS[:-1], IDS[-1] + 1])
    for key in (("logits", None), ("resid_post", 2), ("z", 1)):
        assert np.abs(other[key][:-1] - values[key][:-1]).max() <= batch_noise(engine)
        assert np.abs(other[key][-1] - values[key][-1]).max() > 1e-3


# Edits are what plain torch hooks would do


def close(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return bool(np.abs(a - b).max() <= 3e-6 * np.abs(b).max())


def test_zeroing_a_head_is_zeroing_its_slice_before_w_o(engine: HfEngine, reference: Any) -> None:
    d = engine.info.d_head

    def hook(module: Any, args: Any, output: Any) -> Any:
        z = args[0].clone()
        z[..., 2 * d : 3 * d] = 0
        return torch.nn.functional.linear(z, module.weight, module.bias)

    expected = hooked_logits(reference, **{"model/layers/1/self_attn/o_proj": hook})
    edited = logits_with(engine, Intervention("z", 1, "zero", head=2))
    assert close(edited, expected)
    assert close(logits_with(engine, Intervention("attn_pattern", 1, "zero", head=2)), expected)
    assert not close(edited, logits_with(engine))


def test_steering_and_patching_the_residual_stream_match_plain_hooks(engine: HfEngine, reference: Any) -> None:
    vector = np.random.default_rng(0).standard_normal(engine.info.d_model).astype(np.float32)

    def steer(module: Any, args: Any, output: Any) -> Any:
        return output + 3 * torch.from_numpy(vector)

    def patch(module: Any, args: Any, output: Any) -> Any:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        hidden = hidden.clone()
        hidden[0, [2, 5]] = torch.from_numpy(vector)
        return (hidden, *rest) if isinstance(output, tuple) else hidden

    steered = hooked_logits(reference, **{"model/layers/0": steer})
    assert close(logits_with(engine, Intervention("resid_post", 0, "add", 3 * vector)), steered)
    assert close(logits_with(engine, Intervention("resid_pre", 1, "add", 3 * vector)), steered)
    patched = Intervention("mlp_out", 2, "set", vector, pos=(2, 5))
    assert close(logits_with(engine, patched), hooked_logits(reference, **{"model/layers/2/mlp": patch}))
    patched = Intervention("attn_out", 1, "set", vector, pos=(2, 5))
    assert close(logits_with(engine, patched), hooked_logits(reference, **{"model/layers/1/self_attn": patch}))


def test_an_edit_of_resid_mid_goes_on_in_the_stream_and_not_only_into_the_norm(engine: HfEngine) -> None:
    vector = np.random.default_rng(1).standard_normal(engine.info.d_model).astype(np.float32)
    through_attention = capture(engine, IDS, edits=(Intervention("attn_out", 1, "add", vector, pos=3),))
    direct = capture(engine, IDS, edits=(Intervention("resid_mid", 1, "add", vector, pos=3),))
    assert close(direct["resid_post", 1], through_attention["resid_post", 1])
    assert close(direct["logits", None], through_attention["logits", None])


@pytest.mark.parametrize("site", ["ln1_out", "q", "k", "v", "rot_q", "rot_k", "z", "attn_out", "resid_mid", "ln2_out", "mlp_out", "resid_post"])
def test_an_edit_is_seen_in_the_value_handed_out_and_in_all_that_follows_but_nothing_before(engine: HfEngine, values: Values, site: str) -> None:
    edited = capture(engine, IDS, edits=(Intervention(site, 1, "scale", 1.5, pos=(4, 5)),))
    keys = list(values)
    at = keys.index((site, 1))
    expected = values[site, 1].copy()
    expected[[4, 5]] *= np.float32(1.5)
    assert np.array_equal(edited[site, 1], expected)
    independent = {"q": ("k", "v"), "k": ("v", "rot_q"), "rot_q": ("rot_k",)}  # computed later, but not from it
    assert all(np.array_equal(edited[key], values[key]) for key in keys[:at])
    assert all(np.array_equal(edited[other, 1], values[other, 1]) for other in independent.get(site, ()))
    change = np.abs(edited["logits", None] - values["logits", None]).max(-1)
    assert change[:4].max() <= batch_noise(engine) < 1e-3 < change[4:].max()


@pytest.mark.parametrize("site", ["mlp_pre", "mlp_pre_linear", "mlp_post"])
def test_zeroing_the_hidden_values_of_a_gated_mlp_silences_it(llama: HfEngine, site: str) -> None:
    edited = capture(llama, IDS, ("mlp_out", "resid_mid", "resid_post"), (Intervention(site, 1, "zero"),))
    assert not edited["mlp_out", 1].any()
    assert np.array_equal(edited["resid_post", 1], edited["resid_mid", 1])


def test_a_head_whose_scores_are_all_zero_attends_evenly_to_the_past_and_never_to_the_future(engine: HfEngine) -> None:
    expected = np.tril(np.ones((len(IDS), len(IDS)))) / np.arange(1, len(IDS) + 1)[:, None]
    for edit in (Intervention("attn_scores", 1, "zero", head=1), Intervention("rot_q", 1, "zero", head=1)):
        edited = capture(engine, IDS, ("attn_scores", "attn_pattern"), (edit,))
        assert np.abs(edited["attn_pattern", 1][1] - expected).max() < 1e-7
        assert np.isneginf(edited["attn_scores", 1][:, np.triu(np.ones_like(expected, dtype=bool), 1)]).all()


def test_silencing_everything_leaves_the_unembedded_token(engine: HfEngine, values: Values) -> None:
    edits = [Intervention(site, layer, "zero") for layer in range(engine.info.n_layers) for site in ("attn_out", "mlp_out")]
    assert np.array_equal(logits_with(engine, *edits), engine.unembed(values["embed", None]))


def test_edits_that_change_nothing_change_nothing(engine: HfEngine, values: Values) -> None:
    own = Intervention("resid_post", 0, "set", values["resid_post", 0])
    one = np.zeros(engine.info.d_model, dtype=np.float32)
    for edit in (own, Intervention("resid_mid", 1, "add", one), Intervention("attn_pattern", 2, "scale", 1.0)):
        assert np.array_equal(capture(engine, IDS, edits=(edit,))["logits", None], values["logits", None])


def test_a_clean_residual_stream_put_back_restores_the_clean_answer(engine: HfEngine) -> None:
    clean, corrupt = IDS, [*IDS[:3], 99, *IDS[4:]]
    saved = capture(engine, clean, ("resid_post", "logits"))
    restored = logits_with(engine, Intervention("resid_post", 1, "set", saved["resid_post", 1]), ids=corrupt)
    assert np.array_equal(restored, saved["logits", None])


def test_logits_can_be_edited_and_choose_the_generated_token(engine: HfEngine) -> None:
    edits = (Intervention("logits", None, "add", 1e4, dim=42),)
    assert engine.generate(IDS, 3, Sampling(), edits=edits) == [42, 42, 42]


# The router


def test_an_expert_switched_off_in_the_router_is_never_chosen(mixtral: HfEngine) -> None:
    edited = capture(mixtral, IDS, edits=(Intervention("router_logits", 1, "set", -np.inf, dim=0),))
    plain = capture(mixtral, IDS)
    assert (plain["expert_indices", 1] == 0).any() and not (edited["expert_indices", 1] == 0).any()
    assert not edited["router_probs", 1][:, 0].any()
    assert np.abs(edited["expert_weights", 1].sum(-1) - 1).max() < 1e-6
    probs = plain["router_probs", 1].copy()
    probs[:, 0] = 0
    assert np.array_equal(edited["expert_indices", 1], np.argsort(-probs, axis=-1, kind="stable")[:, :2])
    assert close(edited["mlp_out", 1], experts_from(mixtral, edited, 1))
    by_probs = capture(mixtral, IDS, edits=(Intervention("router_probs", 1, "zero", dim=0),))
    assert close(by_probs["logits", None], edited["logits", None])


def test_expert_weights_are_what_the_experts_answers_are_summed_with(mixtral: HfEngine) -> None:
    silent = capture(mixtral, IDS, edits=(Intervention("expert_weights", 1, "zero"),))
    assert not silent["mlp_out", 1].any()
    plain = capture(mixtral, IDS)
    doubled = capture(mixtral, IDS, edits=(Intervention("expert_weights", 1, "scale", 2.0, pos=4),))
    assert close(doubled["mlp_out", 1][4], 2 * plain["mlp_out", 1][4])
    assert np.abs(doubled["mlp_out", 1][5] - plain["mlp_out", 1][5]).max() < 1e-5


def experts_from(engine: HfEngine, values: Values, layer: int) -> NDArray[Any]:
    """The experts' sum for the indices and weights that were handed out."""
    x = values["ln2_out", layer]
    w_gate, w_in, w_out = (engine.weight(f"blocks.{layer}.mlp.experts.W_{name}") for name in ("gate", "in", "out"))
    rows = zip(x, values["expert_indices", layer], values["expert_weights", layer], strict=True)
    return np.array([sum(w * (w_out[e] @ (silu(w_gate[e] @ row) * (w_in[e] @ row))) for e, w in zip(es, ws, strict=True)) for row, es, ws in rows])


# Generation and long prompts


def greedy_by_full_passes(engine: HfEngine, n: int, *edits: Intervention) -> list[int]:
    ids = list(IDS)
    for _ in range(n):
        ids.append(int(logits_with(engine, *edits, ids=ids)[-1].argmax()))
    return ids[len(IDS) :]


@pytest.mark.parametrize("site", [None, "rot_k", "v", "attn_scores", "attn_pattern", "resid_post", "z"])
def test_generating_over_the_cache_is_the_same_as_running_everything_again(engine: HfEngine, site: str | None) -> None:
    """With edits at absolute positions too: an edited key must stay edited in the cache."""
    edits = () if site is None else (Intervention(site, 1, "scale", -2.0, pos=(3, 7)),)
    heard: list[int] = []
    new = engine.generate(IDS, 6, Sampling(), lambda step: heard.append(step.token), edits)
    assert new == heard == greedy_by_full_passes(engine, len(new), *edits)
    assert len(new) == 6 or new[-1] == engine.info.eos_id
    assert no_hooks(engine)


def test_a_sliding_window_hides_the_far_past_in_one_pass_in_pieces_and_in_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = save_tiny("mistral", tmp_path / "window", sliding_window=4)
    engine, reference = HfEngine(tiny.hf), eager_model(tiny.hf)
    values = capture(engine, IDS)
    with torch.no_grad():
        attentions = reference(torch.tensor([IDS]), output_attentions=True).attentions
    too_far = np.subtract.outer(np.arange(len(IDS)), np.arange(len(IDS))) >= 4
    for layer in range(3):
        assert np.array_equal(values["attn_pattern", layer], attentions[layer][0].numpy())
        assert not values["attn_pattern", layer][:, too_far].any()
    assert engine.generate(IDS, 6, Sampling()) == greedy_by_full_passes(engine, 6)
    monkeypatch.setattr(hf_module, "PIECE", 5)
    pieces = capture(engine, IDS)
    assert close(pieces["logits", None], values["logits", None])
    assert np.abs(pieces["attn_pattern", 2] - values["attn_pattern", 2]).max() < 1e-5


def test_a_prompt_in_pieces_gives_the_values_of_one_pass(engine: HfEngine, values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_module, "PIECE", 5)
    shapes: list[tuple[int, ...]] = []
    engine.run(IDS, Request(("attn_pattern",), layers=(0,)), lambda piece: shapes.append((piece.start, *piece.values.shape)))
    assert shapes == [(0, 4, 5, 5), (5, 4, 5, 10), (10, 4, 2, 12)]
    pieces = capture(engine, IDS)
    for key, whole in values.items():
        finite = np.isfinite(whole)
        assert np.array_equal(finite, np.isfinite(pieces[key])), key
        assert close(pieces[key][finite], whole[finite]), key
    edit = Intervention("k", 1, "scale", -2.0, pos=(1, 8))
    assert close(logits_with(engine, edit), capture(engine, IDS, ("logits", "attn_pattern"), (edit,))["logits", None])


@pytest.mark.parametrize(
    "edit",
    [
        Intervention("resid_post", 0, "mean"),
        Intervention("z", 2, "set", np.linspace(-1, 1, len(IDS))[:, None, None]),
        Intervention("attn_pattern", 1, "zero", dim=len(IDS) - 1),
    ],
    ids=lambda edit: edit.op,
)
def test_an_edit_over_all_positions_sees_the_whole_prompt_though_it_is_longer_than_a_piece(
    llama: HfEngine, monkeypatch: pytest.MonkeyPatch, edit: Intervention
) -> None:
    whole = logits_with(llama, edit)
    monkeypatch.setattr(hf_module, "PIECE", 5)
    assert np.array_equal(logits_with(llama, edit), whole)


def test_noise_is_the_same_however_the_prompt_is_cut(llama: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = Intervention("v", 1, "noise", 0.1, seed=2)
    whole = logits_with(llama, edit)
    monkeypatch.setattr(hf_module, "PIECE", 5)
    assert close(logits_with(llama, edit), whole)
    assert not close(logits_with(llama, Intervention("v", 1, "noise", 0.1, seed=3)), whole)


def test_generation_stops_after_the_end_of_sequence_token(llama: HfEngine) -> None:
    eos = llama.info.eos_id
    assert eos is not None
    assert llama.generate(IDS, 5, Sampling(), edits=(Intervention("logits", None, "add", 1e4, dim=eos),)) == [eos]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(llama: HfEngine) -> None:
    def sample(seed: int) -> list[int]:
        return llama.generate(IDS, 12, Sampling(temperature=3.0, seed=seed))

    assert sample(1) == sample(1) != sample(2)


# Numbers narrower than float32


def test_half_precision_is_handed_out_as_float32_of_what_the_model_saw(tiny_llama: TinyModel, llama: HfEngine) -> None:
    engine = HfEngine(tiny_llama.hf, OpenOptions(dtype="bfloat16"))
    values, full = capture(engine, IDS), capture(llama, IDS)
    for key, array in values.items():
        assert array.dtype == np.float32
        exact = torch.from_numpy(array.copy())
        assert torch.equal(exact, exact.bfloat16().float()), key
    error = ((values["resid_post", 2] - full["resid_post", 2]) ** 2).mean() / (full["resid_post", 2] ** 2).mean()
    assert 1e-9 < error < 1e-3
    assert "bfloat16" in engine.version


# Text


def test_what_looks_like_a_special_token_in_a_prompt_is_plain_text(llama: HfEngine) -> None:
    ids = llama.tokenize("a</s>b")
    assert ids[0] == llama.info.bos_id and llama.info.eos_id not in ids
    assert "".join(llama.token_texts(ids[1:])) == llama.detokenize(ids) == "a</s>b"


def test_the_beginning_token_is_added_as_the_model_asks_unless_told_otherwise(llama: HfEngine) -> None:
    without = llama.tokenize("Mary", add_bos=False)
    assert llama.info.add_bos and 0 not in without
    assert llama.tokenize("Mary") == llama.tokenize("Mary", add_bos=True) == [0, *without]
    assert llama.tokenize("") == [0] and llama.tokenize("", add_bos=False) == []


def test_a_token_that_is_half_a_character_shows_its_bytes(llama: HfEngine) -> None:
    ids = llama.tokenize("\u20ac\n", add_bos=False)
    assert llama.token_texts(ids) == ["<0xE2>", "<0x82>", "<0xAC>", "\n"]
    assert llama.detokenize(ids) == "\u20ac\n"
    assert llama.token_texts([0, 1, 284]) == ["<s>", "</s>", " capital"]


def test_a_folder_without_a_tokenizer_still_runs_on_ids(tiny_llama: TinyModel, llama: HfEngine, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama.hf, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    engine = HfEngine(bare)
    assert np.array_equal(logits_with(engine), logits_with(llama))
    assert engine.token_texts([5, 7]) == ["[5]", "[7]"] and engine.info.bos_id == 0
    with pytest.raises(LayerscopeError, match="no tokenizer.json"):
        engine.tokenize("Mary")


# Refusals: one sentence with the value and the limit


@pytest.mark.parametrize(
    ("ids", "request_", "edits", "sentence"),
    [
        ([], Request(("z",)), (), "empty"),
        ([0] * 1025, Request(("z",)), (), "1,025 tokens.* 1,024"),
        ([0, 320], Request(("z",)), (), "Token id 320 .* 320"),
        (IDS, Request(("router_logits",)), (), "no site 'router_logits'"),
        (IDS, Request(("z",), layers=(3,)), (), "Layer 3 .* 0-2"),
        (IDS, Request(()), (Intervention("z", 3, "zero"),), "Layer 3 .* 0-2"),
        (IDS, Request(()), (Intervention("z", 0, "zero", head=4),), "Head 4 .* 0-3"),
        (IDS, Request(()), (Intervention("k", 0, "zero", head=2),), "Head 2 .* 0-1"),
        (IDS, Request(()), (Intervention("z", 0, "zero", pos=12),), "Position 12 .* 0-11"),
        (IDS, Request(()), (Intervention("expert_weights", 0, "zero"),), "no site 'expert_weights'"),
        (IDS, Request(()), (Intervention("z", 0, "set", np.zeros(5)),), r"shape \(5,\)"),
    ],
)
def test_what_the_model_cannot_do_is_refused_in_one_sentence(
    llama: HfEngine, ids: list[int], request_: Request, edits: tuple[Intervention, ...], sentence: str
) -> None:
    with pytest.raises(LayerscopeError, match=sentence):
        llama.run(ids, request_, lambda piece: None, edits)
    assert no_hooks(llama)


def test_generation_beyond_the_context_is_refused_before_it_starts(llama: HfEngine) -> None:
    with pytest.raises(LayerscopeError, match="12 tokens and 1,013 new ones .* 1,024"):
        llama.generate(IDS, 1013, Sampling())


def test_the_context_can_be_shortened_but_not_made_longer_than_the_models(tiny_llama: TinyModel) -> None:
    assert HfEngine(tiny_llama.hf, OpenOptions(n_ctx=100)).n_ctx == 100
    assert HfEngine(tiny_llama.hf, OpenOptions(n_ctx=9999)).n_ctx == 1024


@pytest.mark.parametrize("name", ["blocks.3.ln1.w", "blocks.0.mlp.W_router", "blocks.0.mlp.b_in", "blocks.x.ln1.w", "W_E", "blocks.0"])
def test_a_weight_that_does_not_exist_is_refused_by_name(llama: HfEngine, name: str) -> None:
    with pytest.raises(LayerscopeError, match=f"has no weight '{name}'"):
        llama.weight(name)


def test_an_absent_device_is_refused_by_name(tiny_llama: TinyModel) -> None:
    for device in ("cuda:99", "teapot"):
        with pytest.raises(LayerscopeError, match=f"no device '{device}'"):
            HfEngine(tiny_llama.hf, OpenOptions(device=device))


def test_weights_that_do_not_fit_the_config_are_refused_and_not_filled_with_random_numbers(tiny_llama: TinyModel, tmp_path: Path) -> None:
    for change, sentence in (
        ({"num_hidden_layers": 4}, "num_hidden_layers = 4, and the tensors of layer 3 are missing"),
        ({"num_hidden_layers": 2}, "unexpected tensors, the first model.layers.2."),
        ({"intermediate_size": 97}, "9 mismatched tensors, the first model.layers.0.mlp.down_proj.weight"),
        ({"attention_bias": False}, "12 unexpected tensors, the first model.layers.0.self_attn.k_proj.bias"),
        ({"mlp_bias": True}, "9 missing tensors, the first model.layers.0.mlp.down_proj.bias"),
    ):
        folder = tmp_path / f"{change}"
        shutil.copytree(tiny_llama.hf, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(LayerscopeError, match=sentence):
            HfEngine(folder)


def test_a_tied_unembedding_is_the_embedding(tmp_path: Path) -> None:
    engine = HfEngine(save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True).hf)
    assert np.array_equal(engine.weight("unembed.W_U"), engine.weight("embed.W_E"))
    values = capture(engine, IDS, ("resid_post", "logits"))
    assert np.array_equal(engine.unembed(values["resid_post", 2]), values["logits", None])


def test_info_is_what_the_headers_say_except_what_only_the_tokenizer_knows(tiny: TinyModel, engine: HfEngine) -> None:
    from backend.files.hf_config import model_info

    assert engine.info == dataclasses.replace(model_info(tiny.hf), add_bos=True)
    assert engine.info.n_params == sum(parameter.numel() for parameter in engine._model.parameters())


def test_a_sentencepiece_tokenizer_shows_its_spaces_and_bytes(tmp_path: Path) -> None:
    """A vocabulary spelled as SentencePiece does, where the decoder would drop a leading space and hide lone bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from backend.engines.hf_tokenizer import HfTokenizer

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 3, "<0xE2>": 4, "\u2581Paris": 5, "is": 6}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    read = HfTokenizer(tmp_path)
    assert read.token_texts([1, 5, 6, 3, 4, 7]) == ["<s>", " Paris", "is", "\n", "<0xE2>", "<tool>"]
    assert not read.adds_bos

"""Claims about the GGUF engine: run by llama.cpp, the same float32 weights give what transformers gives, at every site and under
every edit; the callback changes nothing that it is not told to; and nothing that goes wrong inside it reaches C."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backend.engines import OpenOptions, Piece, Request, Sampling
from backend.engines.ggml import Tensor, dequantize, op_name, open_llama, row_size, type_traits
from backend.engines.gguf import GgufEngine
from backend.engines.gguf_graph import SeenNode, find_places
from backend.engines.gguf_sites import Architecture, Node
from backend.engines.hf import HfEngine
from backend.errors import Cancelled, LayerscopeError
from backend.files.ggml_types import GGML_TYPES
from backend.intervention import Intervention
from backend.sites import SITES
from tests import gguf_fixtures
from tests.test_hf_engine import Values, capture, eager_model, logits_with
from tests.tiny_models import TinyModel, save_tiny

torch.set_num_threads(2)
KINDS = ("llama", "mistral", "mixtral")
IDS = [0, 290, 284, 280, 306, 275, 31, 290, 284, 77, 255, 12]
EXACT = OpenOptions(kv_cache="f32", n_threads=1)  # one thread: no waiting for the other on a busy machine


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module")
def engine(tiny: TinyModel) -> Iterator[GgufEngine]:
    engine = GgufEngine(tiny.gguf, EXACT)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def pytorch(tiny: TinyModel) -> Iterator[HfEngine]:
    engine = HfEngine(tiny.hf)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def values(engine: GgufEngine) -> Values:
    return capture(engine, IDS)


@pytest.fixture(scope="module")
def llama(tiny_llama: TinyModel) -> Iterator[GgufEngine]:
    engine = GgufEngine(tiny_llama.gguf, EXACT)
    yield engine
    engine.close()


def nmse(got: NDArray[Any], want: NDArray[Any]) -> float:
    """Squared error relative to the squared size of `want`; entries that are -inf in both agree."""
    finite = np.isfinite(want)
    assert np.array_equal(np.isfinite(got), finite)
    return float(np.square(got[finite] - want[finite], dtype=np.float64).sum() / np.square(want[finite], dtype=np.float64).sum())


def hooked_values(folder: Path, info: Any) -> Values:
    """What plain hooks on transformers' own modules see, with transformers' own eager attention: the oracle."""
    model, seen = eager_model(folder), {}

    def keep(site: str, layer: int | None, *shape: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen[site, layer] = first.detach().reshape(len(IDS), *shape).numpy()

        return hook

    def keep_input(site: str, layer: int, *shape: int) -> Any:
        return lambda _module, inputs: seen.__setitem__((site, layer), inputs[0].detach().reshape(len(IDS), *shape).numpy())

    base = model.model
    base.embed_tokens.register_forward_hook(keep("embed", None, -1))
    base.norm.register_forward_hook(keep("ln_final_out", None, -1))
    model.lm_head.register_forward_hook(keep("logits", None, -1))
    for i, block in enumerate(base.layers):
        attention, mlp = block.self_attn, block.mlp
        block.register_forward_hook(keep("resid_post", i, -1))
        block.input_layernorm.register_forward_hook(keep("ln1_out", i, -1))
        block.post_attention_layernorm.register_forward_pre_hook(keep_input("resid_mid", i, -1))
        block.post_attention_layernorm.register_forward_hook(keep("ln2_out", i, -1))
        attention.q_proj.register_forward_hook(keep("q", i, info.n_heads, info.d_head))
        attention.k_proj.register_forward_hook(keep("k", i, info.n_kv_heads, info.d_head))
        attention.v_proj.register_forward_hook(keep("v", i, info.n_kv_heads, info.d_head))
        attention.o_proj.register_forward_pre_hook(keep_input("z", i, info.n_heads, info.d_head))
        attention.register_forward_hook(keep("attn_out", i, -1))
        mlp.register_forward_hook(keep("mlp_out", i, -1))
        if not info.is_moe:
            mlp.gate_proj.register_forward_hook(keep("mlp_pre", i, -1))
            mlp.up_proj.register_forward_hook(keep("mlp_pre_linear", i, -1))
            mlp.down_proj.register_forward_pre_hook(keep_input("mlp_post", i, -1))
    with torch.no_grad():
        output = model(torch.tensor([IDS]), output_attentions=True)
    return seen | {("attn_pattern", i): pattern[0].numpy() for i, pattern in enumerate(output.attentions)}


# The same numbers as transformers


def test_every_site_that_a_plain_hook_can_see_has_the_values_of_transformers(tiny: TinyModel, engine: GgufEngine, values: Values) -> None:
    oracle = hooked_values(tiny.hf, engine.info)
    assert len(oracle) >= 3 + 3 * 11
    worst = {key: error for key, want in oracle.items() if (error := nmse(values[key], want)) > 1e-6}
    assert not worst
    assert np.array_equal(values["logits", None].argmax(-1), oracle["logits", None].argmax(-1))


def test_both_engines_offer_the_same_sites_with_the_same_values(engine: GgufEngine, pytorch: HfEngine, values: Values) -> None:
    """Scores before and after masking, queries after RoPE head by head, router weights: what hooks cannot see."""
    assert engine.sites == pytorch.sites
    other = capture(pytorch, IDS)
    assert values.keys() == other.keys()
    worst = {key: error for key, want in other.items() if (error := nmse(values[key], want)) > 1e-6}
    assert not worst
    for (site, _), array in values.items():
        assert array.dtype == (np.int32 if SITES[site].dtype == "int" else np.float32)


def test_heads_in_ggmls_order_would_fail_the_comparison(engine: GgufEngine, pytorch: HfEngine, values: Values) -> None:
    """Negative control: the order that the GGUF converter leaves in W_Q is another one, and the bound above sees it."""
    q = values["q", 1]
    as_stored = q.reshape(*q.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(q.shape)
    assert nmse(as_stored, capture(pytorch, IDS, ("q",))["q", 1]) > 0.1
    assert nmse(values["resid_post", 0], values["resid_post", 1]) > 1e-2


def test_the_kv_cache_in_half_precision_costs_little_and_is_what_the_options_say(tiny_llama: TinyModel, llama: GgufEngine) -> None:
    half = GgufEngine(tiny_llama.gguf, OpenOptions(n_threads=1))
    try:
        error = nmse(logits_with(half, ids=IDS), logits_with(llama, ids=IDS))
        assert 0 < error < 1e-4
        assert "f16" in half.version and "f32" in llama.version
    finally:
        half.close()


# The identities


def test_the_residual_stream_is_the_sum_of_what_is_added_to_it(engine: GgufEngine, values: Values) -> None:
    before = values["embed", None]
    for layer in range(engine.info.n_layers):
        assert np.array_equal(before + values["attn_out", layer], values["resid_mid", layer])
        assert np.array_equal(values["resid_mid", layer] + values["mlp_out", layer], values["resid_post", layer])
        before = values["resid_post", layer]


def test_attention_rows_sum_to_one_hide_the_future_and_are_the_softmax_of_the_scores(engine: GgufEngine, values: Values) -> None:
    future = np.triu(np.ones((len(IDS), len(IDS)), bool), 1)
    for layer in range(engine.info.n_layers):
        pattern, scores = values["attn_pattern", layer], values["attn_scores", layer]
        assert np.abs(pattern.sum(-1) - 1).max() < 1e-5
        assert not pattern[:, future].any() and np.isneginf(scores[:, future]).all()
        e = np.exp(scores - scores.max(-1, keepdims=True))
        assert np.abs(e / e.sum(-1, keepdims=True) - pattern).max() < 1e-6


def test_attention_output_is_z_through_w_o_and_logits_are_the_unembedded_stream(engine: GgufEngine, values: Values) -> None:
    for layer in range(engine.info.n_layers):
        z = values["z", layer].reshape(len(IDS), -1)
        bias = engine.weight(f"blocks.{layer}.attn.b_O") if engine.info.name.startswith("tiny-llama") else np.float32(0)
        assert nmse(z @ engine.weight(f"blocks.{layer}.attn.W_O").T + bias, values["attn_out", layer]) < 1e-10
        for site, weight, b in (("q", "W_Q", "b_Q"), ("k", "W_K", "b_K")):
            bias = engine.weight(f"blocks.{layer}.attn.{b}") if engine.info.name.startswith("tiny-llama") else np.float32(0)
            got = values["ln1_out", layer] @ engine.weight(f"blocks.{layer}.attn.{weight}").T + bias
            assert nmse(got.reshape(values[site, layer].shape), values[site, layer]) < 1e-10
    last = values["resid_post", engine.info.n_layers - 1]
    assert nmse(engine.unembed(last), values["logits", None]) < 1e-10


def test_chosen_experts_are_the_routers_best_and_their_weights_sum_to_one(tiny_mixtral: TinyModel) -> None:
    engine = GgufEngine(tiny_mixtral.gguf, EXACT)
    values = capture(engine, IDS)
    engine.close()
    for layer in range(engine.info.n_layers):
        probs, chosen, weights = (values[site, layer] for site in ("router_probs", "expert_indices", "expert_weights"))
        assert np.array_equal(chosen, np.argsort(-probs, axis=-1)[:, :2])
        best = np.take_along_axis(probs, chosen, -1)
        assert np.abs(weights - best / best.sum(-1, keepdims=True)).max() < 1e-6


# Edits inside llama.cpp's graph


def test_zeroing_a_head_gives_the_logits_of_the_same_ablation_in_transformers(tiny: TinyModel, engine: GgufEngine) -> None:
    model, d = eager_model(tiny.hf), engine.info.d_head

    def ablate(_module: Any, inputs: Any) -> Any:
        z = inputs[0].clone()
        z[..., 2 * d : 3 * d] = 0
        return (z,)

    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(ablate)
    with torch.no_grad():
        want = model(torch.tensor([IDS])).logits[0].numpy()
    got = logits_with(engine, Intervention("z", 1, "zero", head=2), ids=IDS)
    assert nmse(got, want) < 1e-6
    assert nmse(logits_with(engine, ids=IDS), want) > 1e-4


def test_steering_and_patching_the_stream_give_the_logits_of_plain_torch_hooks(tiny: TinyModel, engine: GgufEngine) -> None:
    rng = np.random.default_rng(0)
    steer, patch = rng.standard_normal((2, engine.info.d_model), dtype=np.float32)
    model = eager_model(tiny.hf)

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        return first + torch.from_numpy(steer)

    def put(_module: Any, inputs: Any) -> Any:
        stream = inputs[0].clone()
        stream[0, 4] = torch.from_numpy(patch)
        return (stream, *inputs[1:])

    model.model.layers[0].register_forward_hook(add)
    model.model.layers[2].register_forward_pre_hook(put)
    with torch.no_grad():
        want = model(torch.tensor([IDS])).logits[0].numpy()
    edits = (Intervention("resid_post", 0, "add", steer), Intervention("resid_pre", 2, "set", patch, pos=4))
    assert nmse(logits_with(engine, *edits, ids=IDS), want) < 1e-6


def test_an_edit_of_any_site_has_the_same_effect_in_both_engines(engine: GgufEngine, pytorch: HfEngine) -> None:
    """Noise on part of a site: the order of heads and of rotary pairs, scaling and masking are all undone and done again."""
    clean = logits_with(engine, ids=IDS)
    for site in sorted(engine.sites - {"expert_indices", "router_logits", "router_probs", "logits"}):
        layer = 1 if SITES[site].per_layer else None
        head = 1 if any("head" in dim for dim in SITES[site].dims) else None
        edit = Intervention(site, layer, "noise", 0.1, head=head, pos=(3, 5, -1), seed=3)
        got, want = (logits_with(one, edit, ids=IDS) for one in (engine, pytorch))
        assert nmse(got, want) < 1e-5, site
        assert nmse(got, clean) > 100 * nmse(got, want), site


def test_what_is_handed_out_is_what_stands_in_the_graph_after_the_edit(engine: GgufEngine, values: Values) -> None:
    for site in sorted(engine.sites - {"expert_indices"}):
        layer = 1 if SITES[site].per_layer else None
        edited = capture(engine, IDS, edits=(Intervention(site, layer, "scale", 0.5),))
        finite = np.isfinite(values[site, layer])
        assert np.array_equal(edited[site, layer][finite], values[site, layer][finite] * np.float32(0.5)), site
        if layer is not None:
            assert np.array_equal(edited["resid_post", 0], values["resid_post", 0]), site


def test_the_future_stays_masked_whatever_the_scores_are_set_to(engine: GgufEngine) -> None:
    zeroed = capture(engine, IDS, ("attn_scores", "attn_pattern"), (Intervention("attn_scores", 1, "zero", head=0),))
    even = np.tril(np.ones((len(IDS), len(IDS)))) / np.arange(1, len(IDS) + 1)[:, None]
    assert np.abs(zeroed["attn_pattern", 1][0] - even).max() < 1e-6
    assert np.isneginf(zeroed["attn_scores", 1][:, np.triu(np.ones_like(even, bool), 1)]).all()


def test_with_every_head_and_mlp_silent_the_model_unembeds_its_tokens(engine: GgufEngine, values: Values) -> None:
    silence = [Intervention(site, layer, "zero") for layer in range(engine.info.n_layers) for site in ("attn_out", "mlp_out")]
    assert nmse(logits_with(engine, *silence, ids=IDS), engine.unembed(values["embed", None])) < 1e-10


def test_a_run_leaves_nothing_behind_even_after_nan(engine: GgufEngine, values: Values) -> None:
    poisoned = logits_with(engine, Intervention("v", 0, "set", np.nan), ids=IDS)
    assert np.isnan(poisoned).all()
    again = capture(engine, IDS)
    assert all(np.array_equal(again[key], values[key]) for key in values)


def test_capturing_does_not_change_the_answer(engine: GgufEngine, values: Values) -> None:
    assert np.array_equal(logits_with(engine, ids=IDS), values["logits", None])


def test_a_later_token_changes_nothing_before_it(engine: GgufEngine, values: Values) -> None:
    other = capture(engine, [*IDS[:-1], 200])
    for (site, layer), before in values.items():
        axis = 1 if SITES[site].is_attention_map else 0
        kept = [np.take(v, range(len(IDS) - 1), axis) for v in (before, other[site, layer])]
        assert np.array_equal(*kept), site


# Long prompts, generation


def test_a_prompt_in_pieces_gives_the_values_of_one_pass(tiny: TinyModel, values: Values) -> None:
    for size in (1, 5):
        engine = GgufEngine(tiny.gguf, EXACT, n_ubatch=size)
        pieces = capture(engine, IDS)
        engine.close()
        assert pieces.keys() == values.keys()
        assert max(nmse(pieces[key], values[key]) for key in values) < 1e-9


def test_a_prompt_longer_than_the_first_context_gets_a_longer_one(llama: GgufEngine) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(2, llama.info.d_vocab, 700).tolist()
    sites = ("attn_pattern", "resid_post", "logits")
    long, short = capture(llama, ids, sites), capture(llama, ids[:600], sites)
    assert long["attn_pattern", 2].shape == (4, 700, 700)
    assert nmse(long["resid_post", 2][:600], short["resid_post", 2]) < 1e-9
    assert np.abs(long["attn_pattern", 2].sum(-1) - 1).max() < 1e-5


def test_an_edit_over_all_positions_sees_the_whole_prompt_though_it_is_longer_than_a_piece(tiny_llama: TinyModel, llama: GgufEngine) -> None:
    small = GgufEngine(tiny_llama.gguf, EXACT, n_ubatch=4)
    for edit in (Intervention("resid_post", 1, "mean"), Intervention("z", 0, "noise", 1.0), Intervention("attn_pattern", 1, "zero", dim=9)):
        assert nmse(logits_with(small, edit, ids=IDS), logits_with(llama, edit, ids=IDS)) < 1e-9
    small.close()


@pytest.mark.parametrize("edits", [(), (Intervention("z", 1, "zero", head=2),), (Intervention("resid_post", 2, "scale", 0.3, pos=-1),)])
def test_generating_over_the_cache_chooses_what_full_passes_choose(engine: GgufEngine, edits: tuple[Intervention, ...]) -> None:
    ids, expected = list(IDS), []
    while len(expected) < 6:
        fixed = tuple(Intervention(e.site, e.layer, e.op, e.value, e.head, len(IDS) - 1 if e.pos == -1 else e.pos) for e in edits)
        expected.append(int(logits_with(engine, *fixed, ids=ids)[-1].argmax()))
        ids.append(expected[-1])
        if expected[-1] == engine.info.eos_id:
            break
    heard: list[int] = []
    assert engine.generate(IDS, 6, Sampling(), lambda step: heard.append(step.token), edits) == expected == heard


def test_generation_stops_after_the_end_of_sequence_token(llama: GgufEngine) -> None:
    towards_end = Intervention("logits", None, "add", np.eye(llama.info.d_vocab, dtype=np.float32)[1] * 1e6)
    assert llama.info.eos_id == 1
    assert llama.generate(IDS, 5, Sampling(), edits=(towards_end,)) == [1]
    assert llama.generate(IDS, 0, Sampling()) == []


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(llama: GgufEngine) -> None:
    warm = [llama.generate(IDS, 8, Sampling(temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


# Stopping, and errors inside the callback


def test_a_run_stops_at_the_next_layer_when_asked_and_the_engine_stays_usable(engine: GgufEngine, values: Values) -> None:
    layers: list[int | None] = []

    def stop_after_first() -> bool:
        return 0 in layers

    with pytest.raises(Cancelled):
        engine.run(IDS, Request(("resid_post",)), lambda piece: layers.append(piece.layer), should_stop=stop_after_first)
    assert layers == [0]
    asked: list[int] = []
    with pytest.raises(Cancelled):
        engine.generate(IDS, 50, Sampling(), lambda step: asked.append(step.token), should_stop=lambda: len(asked) == 3)
    assert len(asked) == 3
    assert np.array_equal(logits_with(engine, ids=IDS), values["logits", None])


def test_a_sink_that_fails_is_heard_and_leaves_the_engine_usable(engine: GgufEngine, values: Values) -> None:
    calls: list[Piece] = []

    def full_disk(piece: Piece) -> None:
        calls.append(piece)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        engine.run(IDS, Request(("attn_pattern",)), full_disk)
    assert len(calls) == 1
    assert np.array_equal(logits_with(engine, ids=IDS), values["logits", None])


def test_sites_arrive_in_the_order_of_the_computation_and_only_those_asked_for(engine: GgufEngine) -> None:
    order: list[tuple[str, int | None]] = []
    engine.run(IDS, Request(("resid_post", "z", "embed", "logits"), (0, 2)), lambda piece: order.append((piece.site, piece.layer)))
    assert order == [("embed", None), ("z", 0), ("resid_post", 0), ("z", 2), ("resid_post", 2), ("logits", None)]


# Refusals


@pytest.mark.parametrize(
    ("ids", "request_", "edits", "words"),
    [
        ([], Request(("z",)), (), ("0 tokens",)),
        ([0] * 1025, Request(("z",)), (), ("1,025", "1,024")),
        ([320], Request(("z",)), (), ("320",)),
        ([0], Request(("router_probs",)), (), ("router_probs",)),
        ([0], Request(("z",), (3,)), (), ("Layer 3", "0-2")),
        ([0], Request(()), (Intervention("z", 7, "zero"),), ("Layer 7", "0-2")),
        ([0], Request(()), (Intervention("z", 0, "zero", head=4),), ("Head 4", "0-3")),
        ([0], Request(()), (Intervention("router_probs", 0, "zero"),), ("router_probs",)),
    ],
)
def test_what_the_model_cannot_do_is_refused_in_one_sentence(llama: GgufEngine, ids: list[int], request_: Request, edits: tuple[Intervention, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(LayerscopeError) as refusal:
        llama.run(ids, request_, lambda piece: None, edits)
    assert all(word in str(refusal.value) for word in words)


def test_generation_beyond_the_context_is_refused_before_it_starts(llama: GgufEngine) -> None:
    with pytest.raises(LayerscopeError, match=r"12 tokens and 1,013 new ones are more than the 1,024"):
        llama.generate(IDS, 1013, Sampling())


def test_a_file_that_llama_cpp_cannot_load_gives_its_reason_and_no_crash(tiny_llama: TinyModel, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(tiny_llama.gguf.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(LayerscopeError, match=r"renamed\.gguf.*blk\.1\.ffn_up\.weight"):
        GgufEngine(renamed, EXACT)
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny_llama.gguf.read_bytes()[:-100])
    with pytest.raises(LayerscopeError, match="short.gguf is truncated"):
        GgufEngine(short, EXACT)
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_llama.gguf.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(LayerscopeError, match="llama.cpp cannot load other.gguf|does not describe a model"):
        GgufEngine(other, EXACT)


def test_a_closed_engine_refuses_instead_of_reaching_into_freed_memory(tiny_llama: TinyModel) -> None:
    engine = GgufEngine(tiny_llama.gguf, EXACT)
    engine.close()
    engine.close()
    for use in (lambda: engine.tokenize("a"), lambda: engine.token_texts([5]), lambda: logits_with(engine, ids=IDS)):
        with pytest.raises(LayerscopeError, match="is closed"):
            use()


def test_more_gpu_layers_than_this_build_can_place_are_refused(tiny_llama: TinyModel) -> None:
    if open_llama().llama_supports_gpu_offload():
        pytest.skip("this llama-cpp-python was built with GPU support")
    with pytest.raises(LayerscopeError, match="3 layers"):
        GgufEngine(tiny_llama.gguf, OpenOptions(n_gpu_layers=3))


# Text


def test_text_and_ids_agree_with_the_tokenizer_of_the_checkpoint(engine: GgufEngine, pytorch: HfEngine) -> None:
    for text in ("The capital of France is Paris.", "Mary gave €5 to  John\n", "naïve 你好 🙂", ""):
        ids = engine.tokenize(text)
        assert ids == pytorch.tokenize(text)
        assert engine.token_texts(ids) == pytorch.token_texts(ids)
        assert engine.detokenize(ids) == pytorch.detokenize(ids) == text


def test_special_tokens_half_characters_and_bos(llama: GgufEngine) -> None:
    plain = llama.tokenize("<s>", add_bos=False)
    assert 0 not in plain and llama.detokenize(plain) == "<s>"
    assert llama.tokenize("a")[0] == 0 and llama.tokenize("a", add_bos=False) == llama.tokenize("a")[1:]
    assert llama.token_texts([0]) == ["<s>"]
    assert llama.token_texts(llama.tokenize("€", add_bos=False)) == ["<0xE2>", "<0x82>", "<0xAC>"]
    with pytest.raises(LayerscopeError, match="320 is outside the vocabulary of 320"):
        llama.token_texts([320])
    with pytest.raises(LayerscopeError, match="half a character"):
        llama.tokenize("\ud800")


def test_scores_are_masked_where_llama_cpps_own_window_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Olmo 3 files carry the name olmo2 and a window in three of four layers; transformers has no such olmo2, so llama.cpp's pattern is the oracle."""
    row = gguf_fixtures.ROWS["olmo2"]
    monkeypatch.setattr(gguf_fixtures, "ROWS", {"olmo2": replace(row, keys={**row.keys, "attention.sliding_window": 5})})
    engine = GgufEngine(save_tiny("olmo2", tmp_path / "olmo", num_hidden_layers=4).gguf, OpenOptions(n_gpu_layers=0))
    values = capture(engine, IDS, ("attn_scores", "attn_pattern"))
    for layer in range(4):
        assert np.array_equal(np.isneginf(values["attn_scores", layer]), values["attn_pattern", layer] == 0)
        assert (values["attn_pattern", layer][:, 11, :6] > 0).any() == (layer == 3)


# ggml


def test_gelu_comes_from_a_float16_table(tiny_model: Callable[[str], TinyModel]) -> None:
    """Why architectures with GELU agree less closely with PyTorch: each hidden value is float16 GELU of the float16 input, to the bit."""
    engine = GgufEngine(tiny_model("gpt2").gguf, OpenOptions(n_gpu_layers=0))
    values = capture(engine, IDS, ("mlp_pre", "mlp_post"))
    for layer in range(engine.info.n_layers):
        x = torch.from_numpy(values["mlp_pre", layer].copy()).half().float()
        assert np.array_equal(values["mlp_post", layer], torch.nn.functional.gelu(x, approximate="tanh").half().float().numpy())


def test_dequantizing_is_bit_equal_to_gguf_py_for_every_type_it_knows() -> None:
    rng = np.random.default_rng(0)
    checked = []
    for type_id, (name, block, n_bytes) in GGML_TYPES.items():
        if name[0] not in "QIBTM" or name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64"):
            continue
        raw = rng.integers(0, 256, (4, n_bytes), np.uint8)
        raw &= 0xBF if name == "BF16" else 0xFF
        try:
            with np.errstate(invalid="ignore"):
                want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(type_id)).reshape(-1)
        except NotImplementedError:
            continue
        got = dequantize(type_id, raw.tobytes(), 4 * block)
        assert np.array_equal(got, want, equal_nan=True), name
        checked.append(name)
    assert {"Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "BF16"} <= set(checked)


def test_mxfp4_weights_are_scaled_e2m1_values() -> None:
    """One block of 32 values as gpt-oss files hold its experts: a power of two and 4-bit floats (OCP Microscaling v1.0, 5.3.3), low nibbles first."""
    e2m1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    codes = np.arange(32) % 16
    block = bytes([127 + 2, *(codes[:16] | codes[16:][::-1] << 4)])
    assert np.array_equal(dequantize(39, block, 32), 4 * e2m1[np.concatenate([codes[:16], codes[16:][::-1]])])


def test_our_table_of_types_is_ggmls_own() -> None:
    for type_id, (name, block, n_bytes) in GGML_TYPES.items():
        traits = type_traits(type_id)
        assert (traits[0].upper(), *traits[1:]) == (name, block, n_bytes)
    assert row_size(12, 512) == 288
    with pytest.raises(LayerscopeError, match="500 values does not fill whole blocks of 256"):
        row_size(12, 500)
    with pytest.raises(LayerscopeError, match="take 34 bytes, not 33"):
        dequantize(8, b"\0" * 33, 32)


def test_an_unnamed_product_is_found_by_its_weight(tiny_llama: TinyModel, llama: GgufEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """qwen and phi leave attention's output without a name: a table with only the weight gives the same values as the name."""
    from backend.engines import gguf_sites

    llama_row = gguf_sites.ARCHITECTURES["llama"]
    by_weight = Architecture(tuple(node for node in llama_row.nodes if node.name != "attn_out"))
    monkeypatch.setattr(gguf_sites, "ARCHITECTURES", {"llama": by_weight})
    engine = GgufEngine(tiny_llama.gguf, EXACT)
    edit = Intervention("z", 0, "zero", head=1)
    got, want = capture(engine, IDS, ("attn_out",), (edit,)), capture(llama, IDS, ("attn_out",), (edit,))
    engine.close()
    # With a bias in W_O the product with the weight is not yet attention's output, so the bias is what is missing.
    bias = llama.weight("blocks.1.attn.b_O")
    assert nmse(got["attn_out", 1] + bias, want["attn_out", 1]) < 1e-12


def test_the_last_node_that_fits_holds_the_site() -> None:
    ops = {op_name(op): op for op in range(90)}
    nodes = [
        SeenNode("ffn_moe_weights-2", ops["GET_ROWS"], (), 1.0),
        SeenNode("Qcur-2", ops["MUL_MAT"], ("blk.2.attn_q.weight",), 1.0),
        SeenNode("Qcur-2", ops["RESHAPE"], ("Qcur-2",), 1.0),
        SeenNode("Qcur-2", ops["ROPE"], ("Qcur-2",), 1.0),
        SeenNode("ffn_moe_weights_norm-2", ops["DIV"], (), 1.0),
    ]
    table = Architecture((Node("q", "Qcur", "RESHAPE"), Node("rot_q", "Qcur", "ROPE"), Node("expert_weights", "ffn_moe_weights"), Node("expert_weights", "ffn_moe_weights_norm")))
    places = find_places(table, nodes)
    assert {where: place.name for where, place in places.items()} == {("q", 2): "Qcur-2", ("rot_q", 2): "Qcur-2", ("expert_weights", 2): "ffn_moe_weights_norm-2"}
    assert [places[site, 2].op for site in ("q", "rot_q")] == [ops["RESHAPE"], ops["ROPE"]]


def test_the_tensor_struct_is_as_large_as_ggmls() -> None:
    assert ctypes.sizeof(Tensor) == 336 and Tensor.name.offset == 256


def test_quantized_weights_run_and_are_read_as_the_kernels_see_them(tiny_llama: TinyModel, llama: GgufEngine, tmp_path: Path) -> None:
    out, api = tmp_path / "tiny-q8_0.gguf", open_llama()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = 7, 2
    assert api.llama_model_quantize(str(tiny_llama.gguf).encode(), str(out).encode(), ctypes.byref(params)) == 0
    for plain in (False, True):
        engine = GgufEngine(out, replace(EXACT, editable_weights=plain))
        assert engine.info.quantization == "Q8_0" and engine.info.weight_types["Q8_0"] > 10
        # Q8_0 rounds weights and activations to 8 bits; random weights have no margin to absorb it, trained ones do ten times better.
        assert 0 < nmse(logits_with(engine, ids=IDS), logits_with(llama, ids=IDS)) < 1e-2
        stored = next(t for t in gguf.GGUFReader(out).tensors if t.name == "blk.1.ffn_down.weight")
        assert np.array_equal(engine.weight("blocks.1.mlp.W_out"), gguf.quants.dequantize(stored.data, stored.tensor_type))
        engine.close()


def test_a_tied_unembedding_is_the_embedding(tmp_path: Path) -> None:
    tied = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    engine, other = GgufEngine(tied.gguf, EXACT), HfEngine(tied.hf)
    assert nmse(logits_with(engine, ids=IDS), logits_with(other, ids=IDS)) < 1e-6
    assert np.array_equal(engine.weight("unembed.W_U"), engine.weight("embed.W_E"))
    engine.close(), other.close()
    shutil.rmtree(tied.hf)

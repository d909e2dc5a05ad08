"""Claims about Hugging Face models of a type without a row: what is handed out is what transformers' eager attention computes, whole,
in pieces and while generating; what cannot be told or checked is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backend.engines import OpenOptions, Request, Sampling, hf_generic
from backend.engines.hf import HfEngine
from backend.engines.hf_generic import NO_ROW, NO_UNEMBED
from backend.engines.hf_taps import TAP
from backend.errors import LayerscopeError
from backend.experiments.capture import CaptureSpec
from backend.experiments.capture import capture as capture_trace
from backend.files import hf_config, hf_keys
from backend.files.hf_types import GENERIC_TYPES, NOT_SERVED
from backend.intervention import Intervention
from backend.trace import Trace
from backend.weights import open_weights
from tests.generic_models import CONFIGS, save_generic
from tests.test_engines_agree import nmse
from tests.test_hf_engine import Values, capture, eager_model
from tests.tiny_models import save_tokenizer

torch.set_num_threads(2)
IDS = [0, 290, 284, 280, 306, 275, 31, 290, 284, 77, 255, 12, 9, 9]
CPU = OpenOptions(device="cpu", n_threads=2)
# Attention outside transformers' interface, read from eager outputs; no attention at all; and models that keep a state.
EAGER, WITHOUT_ATTENTION, WHOLE = ("falcon", "bloom", "mpt"), ("mamba",), ("mamba", "jamba")
LAYERS = {"falcon": "transformer.h", "bloom": "transformer.h", "gpt_bigcode": "transformer.h", "mpt": "transformer.blocks", "gpt_neox": "gpt_neox.layers",
          "mamba": "backbone.layers", "opt": "model.decoder.layers"}  # fmt: skip
W_O = {"phi": "self_attn.dense", "gpt_neox": "attention.dense", "opt": "self_attn.out_proj", "gpt_bigcode": "attn.c_proj"}


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("generic")

    def of(kind: str) -> Path:
        return folder / kind if (folder / kind).exists() else save_generic(kind, folder / kind)

    return of


@pytest.fixture(scope="module")
def engine(kind: str, made: Callable[[str], Path]) -> Iterator[HfEngine]:
    engine = HfEngine(made(kind), CPU)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def values(engine: HfEngine) -> Values:
    return capture(engine, IDS)


@pytest.fixture(scope="module")
def falcon(made: Callable[[str], Path]) -> HfEngine:
    return HfEngine(made("falcon"), CPU)


@pytest.fixture(scope="module")
def phi(made: Callable[[str], Path]) -> HfEngine:
    return HfEngine(made("phi"), CPU)


def oracle(kind: str, folder: Path) -> Values:
    """Layer outputs, eager attentions, what enters W_O, and logits, from transformers alone."""
    model, found = eager_model(folder), {}
    attending = []
    for i, layer in enumerate(model.get_submodule(LAYERS.get(kind, "model.layers"))):
        names = dict(layer.named_modules())
        if (w_o := W_O.get(kind, "self_attn.o_proj")) in names:
            names[w_o].register_forward_pre_hook(lambda module, args, i=i: found.__setitem__(("z", i), args[0][0].numpy().copy()))
        if any(name in names for name in ("self_attn", "self_attention", "attn", "attention")):
            attending.append(i)
        layer.register_forward_hook(lambda module, args, out, i=i: found.__setitem__(("resid_post", i), (out[0] if isinstance(out, tuple) else out)[0].numpy().copy()))
    with torch.no_grad():
        output = model(torch.tensor([IDS]), output_attentions=True)
    found["logits", None] = output.logits[0].numpy()
    patterns = [pattern for pattern in getattr(output, "attentions", None) or () if pattern is not None]
    return found | {("attn_pattern", i): pattern[0].numpy() for i, pattern in zip(attending, patterns, strict=True)}


# The list of types


def test_every_causal_language_model_of_transformers_is_served_or_refused_by_name() -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    names = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert names == GENERIC_TYPES | NOT_SERVED | set(hf_keys.ARCHITECTURES)
    assert not GENERIC_TYPES & NOT_SERVED and not NOT_SERVED & set(hf_keys.ARCHITECTURES)
    encoders = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES) | set(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    of_images = set(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) | set(auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
    assert not GENERIC_TYPES & (encoders | of_images)
    assert not {name for name in GENERIC_TYPES if getattr(CONFIG_MAPPING[name], "is_encoder_decoder", False)}


@pytest.mark.parametrize("name", ["bert", "trocr", "gemma3", "no_such_model"])
def test_what_is_no_decoder_of_text_is_refused_before_anything_is_loaded(made: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = changed(made("phi"), tmp_path, model_type=name)
    with pytest.raises(LayerscopeError, match=f"architecture '{name}'"):
        HfEngine(folder, CPU)


# What transformers computes


def test_stream_pattern_heads_and_logits_are_those_of_eager_attention(kind: str, engine: HfEngine, values: Values, made: Callable[[str], Path]) -> None:
    expected = oracle(kind, made(kind))
    z = {where: found.reshape(len(IDS), -1) for where, found in values.items() if where[0] == "z"}
    assert {where for where in values if where[0] != "ln_final_out"} == {where for where in expected if where[0] != "z" or kind not in EAGER}
    wrong = {where: error for where in values if where in expected and (error := nmse(z.get(where, values[where]), expected[where])) > 1e-12}
    assert not wrong
    offered = {"resid_post", "logits"} | ({"ln_final_out"} if kind != "nanochat" else set()) | (set() if kind in WITHOUT_ATTENTION else {"attn_pattern"})
    assert engine.sites == offered | (set() if kind in (*EAGER, *WITHOUT_ATTENTION) else {"z"})


def test_looking_does_not_change_the_answer(engine: HfEngine, values: Values) -> None:
    def instruments() -> list[int]:  # transformers leaves hooks of its own behind, which collect what a call asks for
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) + hasattr(m, TAP) for m in engine._model.modules()]

    before = instruments()
    assert nmse(capture(engine, IDS, ("logits",))["logits", None], values["logits", None]) < 1e-10
    assert instruments() == before and not any(hasattr(m, TAP) for m in engine._model.modules())


def test_the_last_layers_stream_unembeds_to_the_logits(engine: HfEngine, values: Values) -> None:
    assert nmse(engine.unembed(values["resid_post", engine.info.n_layers - 1]), values["logits", None]) < 1e-12
    assert nmse(engine.unembed(values["resid_post", 0]), values["logits", None]) > 1e-3


def test_a_prompt_longer_than_a_piece_gives_the_same_values(kind: str, engine: HfEngine, values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backend.engines.hf.PIECE", 4)
    starts: set[int] = set()
    cut: dict[Any, list[NDArray[Any]]] = {}

    def sink(piece: Any) -> None:
        starts.add(piece.start)
        if piece.site in ("resid_post", "logits", "z"):
            cut.setdefault((piece.site, piece.layer), []).append(piece.values.copy())
        if piece.site == "attn_pattern":
            n = piece.values.shape[1]
            assert nmse(piece.values, values["attn_pattern", piece.layer][:, piece.start : piece.start + n, : piece.start + n]) < 1e-9

    engine.run(IDS, Request(tuple(engine.sites)), sink)
    assert starts == ({0} if kind in WHOLE else {0, 4, 8, 12})
    assert {where: error for where, parts in cut.items() if (error := nmse(np.concatenate(parts), values[where])) > 1e-9} == {}


@pytest.mark.parametrize(("name", "n_ctx"), [("phi", 1024), ("mamba", 50), ("jamba", 50)])
def test_a_model_that_keeps_a_state_runs_whole_up_to_a_limit(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, n_ctx: int) -> None:
    monkeypatch.setattr("backend.engines.hf.WHOLE_LIMIT", 50)
    engine = HfEngine(made(name), CPU)
    assert engine.n_ctx == n_ctx
    if n_ctx == 50:
        with pytest.raises(LayerscopeError, match="The prompt has 51 tokens, more than the 50"):
            engine.run([1] * 51, Request(("logits",)), lambda piece: None)


def test_generating_chooses_what_full_passes_choose(engine: HfEngine) -> None:
    edits = (Intervention("resid_post", 1, "scale", 0.5, pos=(2, 3)),)
    new = engine.generate(IDS, 5, Sampling(), edits=edits)
    logits = capture(engine, [*IDS, *new], ("logits",), edits)["logits", None]
    assert new == logits[len(IDS) - 1 : -1].argmax(-1).tolist()[: len(new)]


def test_the_integrity_report_says_that_the_type_is_generic_and_what_holds(kind: str, engine: HfEngine, tmp_path: Path) -> None:
    with Trace(capture_trace(engine, CaptureSpec(token_ids=tuple(IDS)), tmp_path)) as trace:
        assert trace.integrity["table_row"]["note"] == f"not checked: {NO_ROW}"
        held = {"unembed", "finite"} | (set() if kind in WITHOUT_ATTENTION else {"pattern_rows", "pattern_causal"})
        assert {name for name, entry in trace.integrity.items() if entry["checked"]} == held
        assert all(trace.integrity[name]["ok"] for name in held)
        assert "lens_top_ids" in trace.results
        assert trace.stored.get("attn_pattern", []) == ([] if kind in WITHOUT_ATTENTION else [1, 3] if kind == "jamba" else list(range(engine.info.n_layers)))


def test_weights_have_their_native_names(kind: str, engine: HfEngine, made: Callable[[str], Path]) -> None:
    weights = open_weights(made(kind))
    assert len(weights) == 0 and weights.native_names
    assert np.isfinite(weights[weights.native_names[0]]).all()


# Edits


def hooked_logits(folder: Path, path: str, hook: Callable[..., Any], before: bool = False) -> NDArray[np.float32]:
    model = eager_model(folder)
    module = model.get_submodule(path)
    module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def test_a_head_cut_out_is_its_slice_before_w_o(phi: HfEngine, made: Callable[[str], Path]) -> None:
    def cut(module: Any, args: Any) -> Any:
        z = args[0].clone()
        z[..., 16:32] = 0
        return (z,)

    expected = hooked_logits(made("phi"), "model.layers.1.self_attn.dense", cut, before=True)
    got = capture(phi, IDS, ("logits",), (Intervention("z", 1, "zero", head=1),))["logits", None]
    assert nmse(got, expected) < 1e-10 and nmse(capture(phi, IDS, ("logits",))["logits", None], expected) > 1e-4


def test_steering_the_stream_of_an_eager_model_is_a_plain_hook(falcon: HfEngine, made: Callable[[str], Path]) -> None:
    direction = np.linspace(-1, 2, 64, dtype=np.float32)
    expected = hooked_logits(made("falcon"), "transformer.h.1", lambda module, args, out: (out[0] + torch.from_numpy(direction), *out[1:]))
    got = capture(falcon, IDS, ("logits",), (Intervention("resid_post", 1, "add", direction),))["logits", None]
    assert nmse(got, expected) < 1e-10


def test_maps_that_nobody_looks_at_are_dropped_by_the_model_too(falcon: HfEngine) -> None:
    kept: list[Any] = []
    handle = falcon._model.register_forward_hook(lambda module, args, output: kept.extend(output.attentions or ()))
    falcon.run(IDS, Request(("attn_pattern",), (1,)), lambda piece: None)
    handle.remove()
    assert len(kept) == 3 and all(each.numel() == 0 for each in kept)


@pytest.mark.parametrize(
    ("kind", "edit", "sentence"),
    [
        ("falcon", Intervention("attn_pattern", 1, "zero"), r"\(falcon\) has no site 'attn_pattern' in layer 1 to edit"),
        ("falcon", Intervention("z", 1, "zero"), "no site 'z' to edit"),
        ("phi", Intervention("resid_pre", 0, "zero"), "no site 'embed' to edit"),
        ("jamba", Intervention("z", 0, "zero"), "no site 'z' in layer 0; it has it in 1, 3"),
    ],
)
def test_an_edit_that_would_change_nothing_is_refused(made: Callable[[str], Path], kind: str, edit: Intervention, sentence: str) -> None:
    engine = HfEngine(made(kind), CPU)
    with pytest.raises(LayerscopeError, match=sentence):
        engine.run(IDS, Request(("logits",)), lambda piece: None, (edit,))
    engine.close()


# What is left out or refused


def changed(folder: Path, to: Path, **config: Any) -> Path:
    """The model in `folder` with another config.json."""
    import shutil

    copy = Path(shutil.copytree(folder, to / "changed"))
    (copy / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **config}))
    return copy


def test_a_model_without_a_final_norm_has_no_lens_and_says_so(tmp_path: Path) -> None:
    engine = HfEngine(save_generic("opt", tmp_path / "opt", _remove_final_layer_norm=True), CPU)
    assert "ln_final_out" not in engine.sites and engine.unchecked["unembed"] == NO_UNEMBED
    with pytest.raises(LayerscopeError, match="cannot be read through a logit lens"):
        engine.unembed(np.zeros((1, 64), np.float32))
    with Trace(capture_trace(engine, CaptureSpec(token_ids=tuple(IDS)), tmp_path)) as trace:
        assert trace.integrity["unembed"]["note"] == f"not checked: {NO_UNEMBED}" and not [name for name in trace.results if name.startswith("lens")]


def test_attention_that_our_function_gets_wrong_is_read_from_eager_attention(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As attention sinks do, which the fused kernel knows nothing of."""
    from transformers import AttentionInterface

    from backend.engines import hf_attention

    def wrong(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
        return hf_attention.tapped_attention(module, query * 1.5, *args, **kwargs)

    monkeypatch.setattr(hf_attention, "register", lambda: AttentionInterface.register(hf_attention.NAME, wrong))
    engine = HfEngine(made("phi"), CPU)
    monkeypatch.undo()
    hf_attention.register()
    assert "z" not in engine.sites and engine._row.places["attn_pattern"].collected
    expected = oracle("phi", made("phi"))
    got = capture(engine, IDS)
    assert all(nmse(got["attn_pattern", i], expected["attn_pattern", i]) < 1e-12 for i in range(3)) and nmse(got["logits", None], expected["logits", None]) < 1e-12


def test_layers_that_cannot_be_told_are_refused_with_what_was_found(phi: HfEngine) -> None:
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3)) for _ in range(3))
    assert hf_generic._layers(model, phi.info) == "blocks"  # a list inside a list is no list of layers
    model.others = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(LayerscopeError, match=r"2 lists of 3 modules that could be its layers: blocks, others"):
        hf_generic._layers(model, phi.info)
    with pytest.raises(LayerscopeError, match="0 lists of 3 modules that could be its layers: none"):
        hf_generic._layers(torch.nn.Linear(2, 2), phi.info)


def test_a_layer_that_is_run_twice_holds_no_single_stream(phi: HfEngine) -> None:
    layers, stream = "model.layers", torch.zeros(1, hf_generic._PROBE, 64)
    seen = hf_generic._Seen({i: stream for i in range(3)}, {i: stream for i in range(3)})
    seen.calls.update({f"{layers}.{i}": 1 for i in range(3)})
    assert set(hf_generic._stream(seen, layers, phi.info)) == {"resid_post"}
    seen.inputs[2] = stream + 1
    assert hf_generic._stream(seen, layers, phi.info) == {}
    seen.inputs[2] = stream
    seen.calls[f"{layers}.1"] = 2
    assert hf_generic._stream(seen, layers, phi.info) == {}


# The configuration


def info_of(tmp_path: Path, made: Callable[[str], Path], kind: str, **config: Any) -> Any:
    return hf_config.model_info(changed(made(kind), tmp_path, **config))


def test_sizes_are_found_under_their_usual_names(made: Callable[[str], Path]) -> None:
    sizes = {kind: hf_config.model_info(made(kind)) for kind in ("bloom", "mpt", "gpt_bigcode", "opt", "mamba", "falcon", "granitemoeshared")}
    assert all(info.n_layers == 3 and info.d_model == 64 and info.d_vocab == 320 for info in sizes.values())
    assert {kind: info.n_heads for kind, info in sizes.items()} == {"mamba": 0, **dict.fromkeys(("bloom", "mpt", "gpt_bigcode", "opt", "falcon", "granitemoeshared"), 4)}
    assert {kind: info.d_mlp for kind, info in sizes.items()} == {"bloom": 256, "mpt": 256, "gpt_bigcode": 96, "opt": 96, "mamba": 128, "falcon": 256, "granitemoeshared": 48}
    assert (sizes["falcon"].n_kv_heads, sizes["mpt"].n_ctx, sizes["bloom"].n_ctx) == (2, 1024, hf_config.GENERIC_CONTEXT)
    assert (sizes["granitemoeshared"].n_experts, sizes["granitemoeshared"].n_experts_used, sizes["mamba"].d_head) == (5, 2, 0)


def test_a_size_by_layer_counts_as_the_largest_and_a_dense_model_has_no_experts(made: Callable[[str], Path], tmp_path: Path) -> None:
    info = info_of(tmp_path, made, "granitemoeshared", num_local_experts=0, num_key_value_heads=[1, 4, 2])
    assert (info.n_experts, info.n_experts_used, info.n_kv_heads) == (0, 0, 4)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"num_hidden_layers": None}, "n_layers = None; it must be a whole number from 1"),
        ({"hidden_size": "64"}, "hidden_size = 64"),
        ({"num_hidden_layers": 4}, "does not fit its config.json|could be its layers"),
        ({"architectures": ["PhiForSequenceClassification"]}, "not a language model"),
    ],
)
def test_a_config_without_its_sizes_is_refused(made: Callable[[str], Path], tmp_path: Path, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LayerscopeError, match=sentence):
        HfEngine(changed(made("phi"), tmp_path, **config), CPU)


def test_a_tokenizer_is_read_as_for_any_other_model(phi: HfEngine, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    assert phi.detokenize(phi.tokenize("The capital of France")) == "The capital of France"

"""Claims about GGUF models of an architecture without a row: what is handed out is what transformers computes, the rest is left out
and said, and nothing is promised that the graph at hand does not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backend.analysis.identities import Tolerances
from backend.engines import OpenOptions
from backend.engines import gguf as gguf_module
from backend.engines.gguf import GgufEngine
from backend.engines.gguf_generic import NO_ROW, NO_UNEMBED, fitting, is_pattern
from backend.engines.gguf_graph import Place, SeenNode
from backend.engines.gguf_sites import ARCHITECTURES, GENERIC
from backend.engines.gguf_unembed import Unembedding, measured
from backend.errors import LayerscopeError
from backend.experiments.capture import CaptureSpec
from backend.experiments.capture import capture as capture_trace
from backend.files.gguf_header import model_info, read_header
from backend.intervention import Intervention
from backend.model_info import ModelInfo
from backend.trace import Trace
from backend.weight_names import GGUF_NAMES
from tests import gguf_cases
from tests.generic_models import ROWS, save_generic, write_f32
from tests.test_engines_agree import NMSE, nmse
from tests.test_hf_engine import Values, capture, eager_model

torch.set_num_threads(2)
IDS = [0, 290, 284, 280, 306, 275, 31, 290, 284, 77, 255, 12, 9, 9]
EXACT = OpenOptions(n_gpu_layers=0, kv_cache="f32", n_threads=2)
WITHOUT_ATTENTION = ("mamba",)
# Where the checkpoint keeps the layers, and the module that takes all heads' outputs.
LAYERS = {"falcon": "transformer.h", "bloom": "transformer.h", "mpt": "transformer.blocks", "gpt_neox": "gpt_neox.layers", "mamba": "backbone.layers"}
W_O = {
    "falcon": "self_attention.dense", "bloom": "self_attention.dense", "mpt": "attn.out_proj", "phi": "self_attn.dense", "gpt_neox": "attention.dense",
}  # fmt: skip


@pytest.fixture(scope="module", params=ROWS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(folder, GGUF file) of a kind, made once."""
    folder = tmp_path_factory.mktemp("generic")

    def of(kind: str) -> tuple[Path, Path]:
        if not (folder / f"{kind}.gguf").exists():
            write_f32(save_generic(kind, folder / kind), folder / f"{kind}.gguf")
        return folder / kind, folder / f"{kind}.gguf"

    return of


@pytest.fixture(scope="module")
def engine(kind: str, made: Callable[[str], tuple[Path, Path]]) -> Iterator[GgufEngine]:
    engine = GgufEngine(made(kind)[1], EXACT)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def values(engine: GgufEngine) -> Values:
    return capture(engine, IDS)


@pytest.fixture
def falcon(made: Callable[[str], tuple[Path, Path]]) -> Iterator[GgufEngine]:
    engine = GgufEngine(made("falcon")[1], EXACT)
    yield engine
    engine.close()


def oracle(kind: str, folder: Path, n_layers: int, ids: list[int]) -> tuple[Values, dict[int, NDArray[Any]]]:
    """resid_post, attn_pattern and logits as transformers' eager attention gives them, and z (pos, head * d_head) by layer."""
    model = eager_model(folder)
    found: Values = {}
    heads: dict[int, NDArray[Any]] = {}
    layers = model.get_submodule(LAYERS.get(kind, "model.layers"))

    def keep_stream(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            found["resid_post", layer] = (output[0] if isinstance(output, tuple) else output)[0].numpy().copy()

        return hook

    def keep_heads(layer: int) -> Callable[..., None]:
        return lambda module, args: heads.__setitem__(layer, args[0][0].numpy().copy())

    attending = []
    for i, layer in enumerate(layers):
        layer.register_forward_hook(keep_stream(i))
        names = dict(layer.named_modules())
        if (name := W_O.get(kind, "self_attn.o_proj")) in names:
            names[name].register_forward_pre_hook(keep_heads(i))
            attending.append(i)
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True, **({} if kind in WITHOUT_ATTENTION else {"output_attentions": True}))
    found["logits", None] = output.logits[0].numpy()
    patterns = [pattern for pattern in getattr(output, "attentions", None) or () if pattern is not None]
    for layer, pattern in zip(attending, patterns, strict=True):
        found["attn_pattern", layer] = pattern[0].numpy()
    if kind not in WITHOUT_ATTENTION:  # there hidden_states has another offset
        for i in range(n_layers - 1):
            assert np.array_equal(output.hidden_states[i + 1][0].numpy(), found["resid_post", i])
    return found, heads


# What transformers computes


def test_the_tables_of_sites_and_of_weights_know_the_same_architectures() -> None:
    assert set(ARCHITECTURES) == set(GGUF_NAMES)
    assert not {gguf.MODEL_ARCH_NAMES[row.architecture] for row in ROWS.values()} & set(ARCHITECTURES) and len(ROWS) >= 6


def test_stream_pattern_heads_and_logits_are_those_of_transformers(
    kind: str, engine: GgufEngine, values: Values, made: Callable[[str], tuple[Path, Path]]
) -> None:
    expected, heads = oracle(kind, made(kind)[0], engine.info.n_layers, IDS)
    assert {where for where in values if where[0] not in ("ln_final_out", "z")} == set(expected)
    wrong = {where: error for where in expected if (error := nmse(values[where], expected[where])) > NMSE}
    assert not wrong
    assert {layer for site, layer in values if site == "z"} == set(heads)
    for layer, z in heads.items():
        assert nmse(values["z", layer].reshape(len(IDS), -1), z) < NMSE, layer
    assert engine.sites == {"resid_post", "ln_final_out", "logits", *(() if kind in WITHOUT_ATTENTION else ("attn_pattern", "z"))}


def test_a_layer_off_or_heads_in_another_order_would_fail_the_comparison(values: Values) -> None:
    assert nmse(values["resid_post", 1], values["resid_post", 0]) > 1e-3
    for where in [where for where in values if where[0] == "attn_pattern"]:
        assert nmse(np.flip(values[where], axis=0), values[where]) > 1e-3


def test_the_last_layers_stream_unembeds_to_the_logits(engine: GgufEngine, values: Values) -> None:
    last = values["resid_post", engine.info.n_layers - 1]
    assert nmse(engine.unembed(last), values["logits", None]) < NMSE
    assert nmse(engine.unembed(values["resid_post", 0]), values["logits", None]) > 1e-3


def test_a_prompt_in_pieces_gives_the_values_of_one_pass(engine: GgufEngine, values: Values, made: Callable[[str], tuple[Path, Path]], kind: str) -> None:
    in_pieces = GgufEngine(made(kind)[1], EXACT, n_ubatch=4)
    cut = capture(in_pieces, IDS)
    in_pieces.close()
    assert set(cut) == set(values)
    assert {where: error for where in cut if (error := nmse(cut[where], values[where])) > NMSE} == {}


def test_generating_chooses_what_a_full_pass_chooses(engine: GgufEngine) -> None:
    from backend.engines import Sampling

    new = engine.generate(IDS, 4, Sampling())
    logits = capture(engine, [*IDS, *new], ("logits",))["logits", None]
    assert new == logits[len(IDS) - 1 : -1].argmax(-1).tolist()[: len(new)]


def test_the_integrity_report_says_that_the_architecture_is_generic_and_what_holds(kind: str, engine: GgufEngine, tmp_path: Path) -> None:
    with Trace(capture_trace(engine, CaptureSpec(token_ids=tuple(IDS)), tmp_path)) as trace:
        report = trace.integrity
        assert report["table_row"]["note"] == f"not checked: {NO_ROW}" and not report["table_row"]["checked"]
        held = {"unembed", "finite"} | (set() if kind in WITHOUT_ATTENTION else {"pattern_rows", "pattern_causal"})
        assert {name for name, entry in report.items() if entry["checked"]} == held
        assert all(report[name]["ok"] for name in held)
        assert "attn_out not captured" in report["attn_projection"]["note"]
        assert not trace.has("result"), "without a row nobody knows which matrix is W_O"
        assert "lens_top_ids" in trace.results and trace.stored["resid_post"] == list(range(engine.info.n_layers))


def test_a_head_cut_out_gives_the_logits_of_the_same_ablation_in_transformers(falcon: GgufEngine, made: Callable[[str], tuple[Path, Path]]) -> None:
    model = eager_model(made("falcon")[0])

    def cut(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        z = args[0].clone()
        z[..., 16:32] = 0
        return (z,)

    model.get_submodule("transformer.h.1.self_attention.dense").register_forward_pre_hook(cut)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    edit = Intervention("z", 1, "zero", head=1)
    got = capture(falcon, IDS, ("logits",), (edit,))["logits", None]
    assert nmse(got, expected) < NMSE
    assert nmse(capture(falcon, IDS, ("logits",))["logits", None], expected) > 1e-4


def test_quantized_weights_still_show_how_the_model_ends(made: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    import ctypes

    from backend.engines.ggml import open_llama

    api, out = open_llama(), tmp_path / "q8.gguf"
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = 7, 2
    assert api.llama_model_quantize(str(made("cohere")[1]).encode(), str(out).encode(), ctypes.byref(params)) == 0
    engine = GgufEngine(out, EXACT)
    assert engine.info.quantization == "Q8_0" and engine._unembedding is not None
    assert (engine._unembedding.norm, engine._unembedding.divisor) == ("layer", 4.0)
    engine.close()


# What is left out


def test_without_a_way_to_logits_the_lens_is_left_out_and_the_report_says_why(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_module, "candidates", lambda *_: iter(()))
    engine = GgufEngine(made("falcon")[1], EXACT)
    with Trace(capture_trace(engine, CaptureSpec(token_ids=tuple(IDS)), tmp_path)) as trace:
        assert not [name for name in trace.results if name.startswith("lens")]
        assert trace.integrity["unembed"]["note"] == f"not checked: {NO_UNEMBED}" and trace.integrity["unembed"]["checked"] == 0
    with pytest.raises(LayerscopeError, match="cannot be read through a logit lens"):
        engine.unembed(np.zeros((1, 64), np.float32))
    engine.close()


def test_a_model_without_a_node_of_logits_is_refused_by_name(made: Callable[[str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    row = type(GENERIC)(tuple(node for node in GENERIC.nodes if node.site != "logits"))
    monkeypatch.setattr(gguf_module, "GENERIC", row)
    monkeypatch.setattr(gguf_module, "architecture", lambda name: row)
    with pytest.raises(LayerscopeError, match="'falcon', which has no row.*result_output"):
        GgufEngine(made("falcon")[1], EXACT)


INFO = ModelInfo("x", "", "gguf", "new", n_layers=2, n_heads=3, n_kv_heads=3, d_model=8, d_head=4, d_mlp=9, d_vocab=11, n_ctx=64)
GOOD = [
    SeenNode("l_out-0", 1, (), 1.0, (1, 1, 5, 8)),
    SeenNode("kq_soft_max-0", 2, (), 1.0, (1, 3, 5, 256)),
    SeenNode("kqv_out-0", 3, (), 1.0, (1, 1, 5, 12)),
    SeenNode("result_norm", 4, (), 1.0, (1, 1, 5, 8)),
    SeenNode("result_output", 5, (), 1.0, (1, 1, 5, 11)),
]


def places(nodes: list[SeenNode]) -> dict[Any, Place]:
    sites = {"l_out": "resid_post", "kq_soft_max": "attn_pattern", "kqv_out": "z", "result_norm": "ln_final_out", "result_output": "logits"}
    found = {}
    for node in nodes:
        name, _, layer = node.name.partition("-")
        at = int(layer) if layer else None
        found[sites[name], at] = Place(sites[name], at, node.name, node.op)
    return found


@pytest.mark.parametrize(
    "spoiled",
    [
        SeenNode("l_out-0", 1, (), 1.0, (1, 1, 5, 9)),  # another width
        SeenNode("l_out-0", 1, (), 1.0, (1, 4, 5, 8)),  # four streams at once
        SeenNode("l_out-0", 1, (), 1.0, (1, 1, 5, 8), type=1),  # not float32
        SeenNode("kq_soft_max-0", 2, (), 1.0, (1, 4, 5, 256)),  # another number of heads
        SeenNode("kq_soft_max-0", 2, (), 1.0, (1, 3, 1, 256)),  # not one row a token
        SeenNode("kqv_out-0", 3, (), 1.0, (1, 1, 5, 24)),
        SeenNode("result_norm", 4, (), 1.0, (1, 1, 1, 8)),
    ],
)
def test_a_node_of_another_size_is_left_out_and_the_others_stay(spoiled: SeenNode) -> None:
    assert set(fitting(places(GOOD), GOOD, INFO, 5)) == set(places(GOOD))
    nodes = [spoiled if node.name == spoiled.name else node for node in GOOD]
    (gone,) = {where for where, place in places(GOOD).items() if place.name == spoiled.name}
    assert set(fitting(places(nodes), nodes, INFO, 5)) == set(places(GOOD)) - {gone}


def test_a_name_that_stands_for_two_nodes_or_for_a_layer_that_is_not_run_is_left_out() -> None:
    twice = [*GOOD, SeenNode("l_out-0", 9, (), 1.0, (1, 1, 5, 8))]
    assert ("resid_post", 0) not in fitting(places(twice), twice, INFO, 5)
    beyond = [*GOOD, SeenNode("l_out-2", 1, (), 1.0, (1, 1, 5, 8))]
    assert ("resid_post", 2) in places(beyond) and ("resid_post", 2) not in fitting(places(beyond), beyond, INFO, 5)


def test_what_spends_more_than_one_or_looks_past_the_tokens_is_no_pattern() -> None:
    node = np.zeros((1, 2, 3, 8), np.float32)
    node[..., 0] = 1
    assert is_pattern(node)
    node[..., 0] = 0.4  # a sink keeps the rest
    assert is_pattern(node)
    node[0, 1, 2, 1] = 0.7
    assert not is_pattern(node)
    node[0, 1, 2, :] = [0.5, 0, 0, 0.2, 0, 0, 0, 0]
    assert not is_pattern(node)
    node[0, 1, 2, :] = [-0.1, 0, 0, 0, 0, 0, 0, 0]
    assert not is_pattern(node)


def test_only_an_ending_that_makes_norm_and_logits_is_taken() -> None:
    class Matrix:
        shape, size = (11, 8), 88

        def __init__(self, values: NDArray[np.float32]) -> None:
            self.values = values

        def __getitem__(self, index: Any) -> NDArray[np.float32]:
            return self.values[index]

    rng = np.random.default_rng(0)
    resid, gain, w_u = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 8), (8,), (11, 8)))
    endings = [Unembedding(norm, 1e-5, gain, None, Matrix(w_u), None, divisor) for norm in ("rms", "layer") for divisor in (1.0, 2.0)]  # type: ignore[arg-type]
    limits = Tolerances(1e-5, 1e-4, "")
    for true in endings:
        assert measured(iter(endings), resid, true.normed(resid), true(resid), limits) is true
    rms, layer = endings[0], endings[2]
    assert measured(iter(endings), resid, rms.normed(resid), 3 * rms(resid), limits) is None
    assert measured(iter(endings), resid, layer.normed(resid), rms(resid), limits) is None
    assert measured(iter(endings), resid, rms.normed(resid) + 0.01, rms(resid), limits) is None


# What the header says of such models


def info_of(tmp_path: Path, **changes: Any) -> ModelInfo:
    (tmp_path / "m.gguf").write_bytes(gguf_cases.model_file(**changes))
    return model_info(tmp_path / "m.gguf", read_header(tmp_path / "m.gguf"))


def renamed(**changes: Any) -> dict[str, Any]:
    """The cases' llama under another name."""
    keys = ("block_count", "embedding_length", "context_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv")
    sizes = dict(zip(keys, (2, 8, 64, 12, 4, 2), strict=True))
    pairs = {f"llama__{key.replace('.', '__')}": None for key in keys} | {"llama__attention__layer_norm_rms_epsilon": None}
    return pairs | {f"newarch__{key.replace('.', '__')}": (gguf_cases.U32, size) for key, size in sizes.items()} | {"general__architecture": (gguf_cases.STR, "newarch")} | changes


def test_sizes_that_differ_by_layer_count_as_the_largest_where_no_row_depends_on_them(tmp_path: Path) -> None:
    lists = {"newarch__attention__head_count_kv": (gguf_cases.ARR, (gguf_cases.I32, [0, 2])), "newarch__feed_forward_length": (gguf_cases.ARR, (gguf_cases.I32, [16, 12]))}
    info = info_of(tmp_path, **renamed(**lists))
    assert (info.n_kv_heads, info.d_mlp, info.n_heads, info.d_head) == (2, 16, 4, 2)
    with pytest.raises(LayerscopeError, match="differs between layers"):
        info_of(tmp_path, llama__attention__head_count_kv=(gguf_cases.ARR, (gguf_cases.I32, [0, 2])))


def test_a_model_may_have_no_heads_and_no_mlp_where_no_row_says_otherwise(tmp_path: Path) -> None:
    none = {f"newarch__{key}": (gguf_cases.U32, 0) for key in ("attention__head_count", "feed_forward_length")} | {"newarch__attention__head_count_kv": None}
    info = info_of(tmp_path, **renamed(**none))
    assert (info.n_heads, info.n_kv_heads, info.d_head, info.d_mlp) == (0, 0, 0, 0)
    with pytest.raises(LayerscopeError, match="head_count is 0"):
        info_of(tmp_path, llama__attention__head_count=(gguf_cases.U32, 0))


def test_blocks_that_only_guess_further_tokens_are_no_layers(tmp_path: Path) -> None:
    assert info_of(tmp_path, **renamed(newarch__nextn_predict_layers=(gguf_cases.U32, 1))).n_layers == 1
    with pytest.raises(LayerscopeError, match="nextn_predict_layers is 2"):
        info_of(tmp_path, **renamed(newarch__nextn_predict_layers=(gguf_cases.U32, 2)))

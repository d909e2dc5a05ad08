"""Claims about the computation graph as the engines record it: complete, in order, with edges that carry the data."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from backend.engines import Piece, Request, open_engine
from backend.engines.ggml import F32, Tensor, op_name
from backend.engines.gguf_nodes import Recorder, layer_of
from backend.errors import LayerscopeError
from backend.reports.model_graph import ModelGraph
from tests.generic_models import save_generic, write_f32
from tests.tiny_models import TinyModel

Get = Callable[[str], TinyModel]

# Matrix products in one block as the architecture's paper has them: (MUL_MAT, MUL_MAT_ID). Attention: a product for each projection
# that is stored, scores, values; MLP: two, or three with a gate; experts: router, and three products by expert.
PRODUCTS = {
    "llama": (9, 0), "mistral": (9, 0), "qwen2": (9, 0), "qwen3": (9, 0), "smollm3": (9, 0), "olmo2": (9, 0), "gemma2": (9, 0), "gemma3_text": (9, 0),
    "granite": (9, 0), "stablelm": (9, 0), "phi3": (6, 0), "gpt2": (6, 0), "starcoder2": (8, 0), "mixtral": (7, 3), "qwen3_moe": (7, 3), "olmoe": (7, 3),
    "gpt_oss": (7, 3), "qwen2_moe": (11, 3),
}  # fmt: skip
BOTH = ["llama", "gemma2", "gpt2", "qwen2_moe", "gpt_oss", "deepseek_v3"]


@pytest.fixture(scope="module")
def graph_of(tiny_model: Get) -> Callable[[str, str], ModelGraph]:
    """The graph of a tiny model by one engine, recorded once."""
    made: dict[tuple[str, str], ModelGraph] = {}

    def of(kind: str, engine: str) -> ModelGraph:
        if (kind, engine) not in made:
            model = tiny_model(kind)
            opened = open_engine(model.gguf if engine == "gguf" else model.hf)
            made[kind, engine] = opened.graph()
            opened.close()
        return made[kind, engine]

    return of


def ancestors(graph: ModelGraph, end: int) -> set[int]:
    """Every node that the node `end` depends on."""
    needed = {end}
    for node in reversed(graph.nodes[: end + 1]):
        if node.id in needed:
            needed.update((*node.sources, *node.after))
    return needed


def stored_names(model: TinyModel, engine: str) -> set[str]:
    """The tensors of the file; of a folder, the parameters that transformers makes of them."""
    if engine == "gguf":
        from backend.files.gguf_header import read_header

        return set(read_header(model.gguf).tensors)
    from transformers import AutoModelForCausalLM

    return {name for name, _ in AutoModelForCausalLM.from_pretrained(model.hf).named_parameters()}


@pytest.mark.parametrize("engine", ["gguf", "hf"])
@pytest.mark.parametrize("kind", BOTH)
def test_sources_exist_and_come_first_and_every_weight_reaches_the_logits(kind: str, engine: str, graph_of, tiny_model: Get):
    graph = graph_of(kind, engine)
    assert [node.id for node in graph.nodes] == list(range(len(graph.nodes)))
    for node in graph.nodes:
        assert all(0 <= source < node.id for source in (*node.sources, *node.after))
        assert node.executed or not node.sources
    logits = next(node for node in graph.nodes if ("logits", None) in node.sites)
    needed = ancestors(graph, logits.id)
    weights = {node.name: node.id for node in graph.nodes if node.kind == "weight"}
    assert set(weights) == stored_names(tiny_model(kind), engine)
    # Keys and values reach the scores through the cache alone: without the edges through memory they would be missing here.
    assert {name for name, at in weights.items() if at not in needed} == set()
    assert any(node.kind == "input" and ("tokens" in node.name or "input_ids" in node.name) for node in graph.nodes if node.id in needed)


@pytest.mark.parametrize("kind", ["falcon", "mamba", "jamba", "glm4"])
def test_an_architecture_without_a_row_has_a_whole_graph_too(kind: str, tmp_path: Path):
    folder = save_generic(kind, tmp_path / kind)
    for path in (folder, write_f32(folder, tmp_path / f"{kind}.gguf")):
        engine = open_engine(path)
        graph = engine.graph()
        engine.close()
        last = max(node.id for node in graph.nodes if node.executed)
        needed = ancestors(graph, last)
        assert all(source < node.id for node in graph.nodes for source in (*node.sources, *node.after))
        assert not [node.name for node in graph.nodes if node.kind == "weight" and node.id not in needed]
        assert {node.layer for node in graph.nodes} == {None, *range(graph.n_layers)}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_llama_cpp_multiplies_as_often_as_the_architecture_says(kind: str, graph_of):
    graph = graph_of(kind, "gguf")
    in_block, by_expert = PRODUCTS[kind]
    for layer in range(graph.n_layers):
        ops = Counter(node.op for node in graph.nodes if node.layer == layer)
        assert (ops["MUL_MAT"], ops["MUL_MAT_ID"]) == (in_block, by_expert), f"layer {layer}"
    outside = [node for node in graph.nodes if node.layer is None and node.op.startswith("MUL_MAT")]
    assert len(outside) == 1 and outside[0].shape[-1] == 320  # the unembedding
    assert all(node.backend.startswith("CPU") and node.type for node in graph.nodes)


@pytest.mark.parametrize("kind", ["llama", "olmo2", "gemma2"])
def test_blocks_are_alike_but_for_the_rows_that_the_last_one_selects(kind: str, graph_of):
    graph = graph_of(kind, "gguf")
    ops = [Counter(node.op for node in graph.nodes if node.layer == layer and node.executed) for layer in range(graph.n_layers)]
    assert all(one == ops[0] for one in ops[:-1])
    assert ops[-1] - ops[0] == Counter(GET_ROWS=2) and not ops[0] - ops[-1]


def test_shapes_names_and_sites_are_those_of_a_capture(tiny_llama: TinyModel):
    for path in (tiny_llama.gguf, tiny_llama.hf):
        engine = open_engine(path)
        graph = engine.graph(5)
        pieces: list[Piece] = []
        sites = tuple(site for site in sorted(engine.sites) if any(site == at for node in graph.nodes for at, _ in node.sites))
        engine.run([3, 7, 11, 15, 2], Request(sites), pieces.append)
        engine.close()
        shapes = {(piece.site, piece.layer): piece.values.shape for piece in pieces}
        held = {where: node for node in graph.nodes for where in node.sites}
        assert {"embed", "resid_post", "mlp_out", "ln1_out", "logits"} <= {site for site, _ in held}
        for where, node in held.items():
            if where[0] in ("attn_scores", "attn_pattern"):
                assert node.shape[:2] == shapes[where][:2] and node.shape[2] >= 5  # keys are padded
            else:
                assert np.prod(node.shape) == np.prod(shapes[where])


@pytest.mark.parametrize("kind", BOTH)
def test_every_module_with_parameters_ran_and_reads_them(kind: str, graph_of, tiny_model: Get):
    from transformers import AutoModelForCausalLM

    graph = graph_of(kind, "hf")
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind).hf)
    calls = {call.path: call for call in graph.modules}
    for path, module in model.named_modules():
        n_params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if n_params:
            assert calls[path].n_params == n_params and calls[path].class_name == type(module).__name__
    linear = [node for node in graph.nodes if node.op == "Linear" and node.layer == 0 and node.name.endswith("o_proj")]
    for node in linear:
        assert calls[node.name].outputs == (node.shape,)


def test_pytorch_edges_are_the_model_s_own_wiring(graph_of):
    graph = graph_of("llama", "hf")
    by_name = {node.name: node for node in graph.nodes}

    def takes(name: str) -> set[str]:
        """Names of the sources, views taken for what they look at."""
        sources = [graph.nodes[i] for i in by_name[name].sources]
        return {found for source in sources for found in (takes(source.name) if source.view else {source.name})}

    block = "model.layers.1"
    norm = {f"{block}.input_layernorm"}
    assert takes(f"{block}.self_attn.q_proj") - {f"{block}.self_attn.q_proj.weight", f"{block}.self_attn.q_proj.bias"} == norm
    assert takes(f"{block}.add") == {"model.layers.0.add_1", f"{block}.self_attn.o_proj"}
    assert takes(f"{block}.mlp.mul") == {f"{block}.mlp.act_fn", f"{block}.mlp.up_proj"}
    assert takes(f"{block}.add_1") == {f"{block}.add", f"{block}.mlp.down_proj"}
    assert by_name[f"{block}.add_1"].sites == (("resid_post", 1),)
    assert takes("lm_head") == {"lm_head.weight", "model.norm"}


@pytest.mark.parametrize("engine", ["gguf", "hf"])
def test_recording_leaves_no_trace(engine: str, tiny_llama: TinyModel):
    opened = open_engine(tiny_llama.gguf if engine == "gguf" else tiny_llama.hf)

    def logits() -> np.ndarray:
        kept: list[np.ndarray] = []
        opened.run([5, 9, 2], Request(("logits",)), lambda piece: kept.append(piece.values.copy()))
        return np.concatenate(kept)

    before = logits()
    first = opened.graph()
    np.testing.assert_array_equal(logits(), before)
    assert opened.graph().nodes == first.nodes
    for n in (0, 5000):
        with pytest.raises(LayerscopeError, match="tokens"):
            opened.graph(n)
    opened.close()


# The recorder alone, on tensors made here


class Made:
    """ggml tensors in memory of our own."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.ops = {op_name(i): i for i in range(90)}

    def tensor(self, name: str, op: str = "NONE", *sources: Tensor, view_of: Tensor | None = None) -> Tensor:
        made = Tensor(type=F32, op=self.ops[op], name=name.encode()[:63])
        made.ne[:], made.nb[:] = (4, 2, 1, 1), (4, 16, 32, 32)
        for i, source in enumerate(sources):
            made.src[i] = ctypes.pointer(source)
        if view_of is not None:
            made.view_src = ctypes.pointer(view_of)
        self.kept.append(made)
        return made


def test_equal_names_are_told_apart_by_their_address():
    made, recorder = Made(), Recorder(["w"], 4)
    weight = made.tensor("w")
    first = made.tensor("Qcur-1", "MUL_MAT", weight, made.tensor("inp"))
    second = made.tensor("Qcur-1", "ADD", first, first)
    third = made.tensor("Qcur-1", "ROPE", first, second)
    for node in (first, second, third):
        recorder.note(ctypes.addressof(node))
    assert [(node.kind, node.sources) for node in recorder.nodes] == [("weight", ()), ("input", ()), ("op", (0, 1)), ("op", (2, 2)), ("op", (2, 3))]


def test_what_the_scheduler_moves_to_another_backend_is_a_copy_of_what_it_moved():
    made, recorder = Made(), Recorder([], 4)
    first = made.tensor("l_out-0", "ADD", made.tensor("a"), made.tensor("b"))
    moved = made.tensor("CUDA0#l_out-0#0")
    second = made.tensor("norm-1", "RMS_NORM", moved)
    recorder.note(ctypes.addressof(first))
    recorder.note(ctypes.addressof(second))
    copy = recorder.nodes[-2]
    assert (copy.kind, copy.sources, copy.layer) == ("copy", (2,), None) and recorder.nodes[-1].sources == (copy.id,)


def test_a_view_of_memory_comes_after_the_node_that_wrote_into_it():
    made, recorder = Made(), Recorder([], 4)
    cache = made.tensor("cache_k_l2")
    early = made.tensor("cache_k_l2 (view)", "VIEW", cache, view_of=cache)
    written = made.tensor("cache_k_l2 (view)", "SET_ROWS", made.tensor("k"), made.tensor("rows"), cache, view_of=cache)
    late = made.tensor("cache_k_l2 (view)", "VIEW", cache, view_of=cache)
    reader = made.tensor("kq-2", "MUL_MAT", late, early)
    for node in (early, written, late, reader):
        recorder.note(ctypes.addressof(node))
    by_id = {id(node): number for node, number in zip((early, written, late, reader), [node.id for node in recorder.nodes if node.kind == "op"], strict=True)}
    nodes = recorder.nodes
    assert nodes[by_id[id(early)]].after == () and nodes[by_id[id(late)]].after == (by_id[id(written)],)
    assert nodes[by_id[id(reader)]].after == (by_id[id(written)],)  # through `early`, which looks at the same memory
    assert nodes[by_id[id(late)]].view and not nodes[by_id[id(written)]].view and {node.layer for node in nodes if node.kind == "op"} == {2}


@pytest.mark.parametrize("name", ["blk.99999999.x", "x-99999999999999999999", "\x1b[2J-7", "-", "", "a#b#1", "node_5"])
def test_a_strange_name_gives_no_layer_that_the_model_lacks(name: str, tmp_path: Path):
    made, recorder = Made(), Recorder([], 4)
    recorder.note(ctypes.addressof(made.tensor(name, "ADD", made.tensor("x"), made.tensor("y"))))
    assert recorder.nodes[-1].layer is None and recorder.nodes[-1].name == name
    assert layer_of("blk.3.attn_q.weight") == layer_of("cache_v_l3") == layer_of("kqv-3 (permuted)") == (True, 3)

"""Claims about native tensors: a name gives the very tensor that the engine calls so, whole, in both engines; a wrong name is refused
with the right one near it; and the trace file keeps them as FORMAT.md says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backend import engines
from backend.engines import Engine, OpenOptions, Piece, Request
from backend.engines.gguf import GgufEngine
from backend.engines.gguf_graph import SeenNode
from backend.engines.gguf_native import Natives
from backend.engines.hf import HfEngine
from backend.engines.hf_native import Natives as ModuleOutputs
from backend.engines.native import NativePiece
from backend.errors import LayerscopeError, SiteNotCaptured
from backend.estimate import trace_bytes
from backend.experiments.capture import CaptureSpec
from backend.experiments.capture import capture as capture_trace
from backend.intervention import Intervention
from backend.sites import MAX_NATIVE, split_native
from backend.trace import Trace
from components.run_form import RunRequest
from tests.test_hf_engine import IDS, capture, no_hooks
from tests.tiny_models import TinyModel

EXACT = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=2)
N = len(IDS)


@pytest.fixture(scope="module")
def gguf(tiny_mixtral: TinyModel) -> Iterator[GgufEngine]:
    engine = GgufEngine(tiny_mixtral.gguf, EXACT)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def hf(tiny_llama: TinyModel) -> Iterator[HfEngine]:
    engine = HfEngine(tiny_llama.hf)
    yield engine
    engine.close()


def natives(engine: Engine, *names: str, ids: list[int] = IDS, edits: tuple[Intervention, ...] = ()) -> dict[str, NativePiece]:
    found: dict[str, NativePiece] = {}

    def sink(piece: Piece) -> None:
        assert isinstance(piece, NativePiece) and piece.source not in found
        found[piece.source] = piece

    engine.run(ids, Request((), native=names), sink, edits)
    return found


def values(engine: Engine, name: str, **options: Any) -> NDArray[Any]:
    return natives(engine, name, **options)[name].values


# GGUF


def test_a_node_by_its_name_holds_what_the_site_of_that_node_holds(gguf: GgufEngine) -> None:
    sites = capture(gguf, IDS)
    found = natives(gguf, "l_out-1", "kq_soft_max-0", "ffn_moe_topk-2", "result_output", "Vcur-1")
    assert np.array_equal(found["l_out-1"].values, sites["resid_post", 1][None, None])
    assert found["kq_soft_max-0"].values.shape == (1, 4, N, 256)
    assert np.array_equal(found["kq_soft_max-0"].values[0, :, :, :N], sites["attn_pattern", 0])
    assert found["ffn_moe_topk-2"].values.dtype == np.int32 and np.array_equal(found["ffn_moe_topk-2"].values[0, 0], sites["expert_indices", 2])
    assert np.array_equal(found["result_output"].values[0, 0], sites["logits", None])
    assert np.array_equal(found["Vcur-1"].values[0], sites["v", 1])
    assert found["Vcur-1"].made_by == "RESHAPE" and found["l_out-1"].dims == ("ne3", "ne2", "ne1", "ne0")


def test_of_nodes_with_one_name_the_last_is_meant_or_the_one_with_the_op(gguf: GgufEngine) -> None:
    names = ("Qcur-0", "Qcur-0/ROPE", "Qcur-0/MUL_MAT", "Qcur-0/RESHAPE", "norm-1")
    found = natives(gguf, *names)
    assert tuple(sorted(found)) == tuple(sorted(names))
    assert np.array_equal(found["Qcur-0"].values, found["Qcur-0/ROPE"].values)
    assert found["Qcur-0/MUL_MAT"].values.shape == (1, 1, N, 64) and found["Qcur-0/MUL_MAT"].made_by == "MUL_MAT"
    assert np.array_equal(found["Qcur-0/MUL_MAT"].values.reshape(1, N, 4, 16), found["Qcur-0/RESHAPE"].values)
    assert not np.array_equal(found["Qcur-0/RESHAPE"].values, found["Qcur-0"].values)
    # Two nodes of a layer are called norm and have one op: before attention, and before the MLP. The last is the second.
    after_gain = capture(gguf, IDS, ("ln1_out", "ln2_out"))
    gained = found["norm-1"].values[0, 0] * gguf.weight("blocks.1.ln2.w")
    assert np.allclose(gained, after_gain["ln2_out", 1], atol=1e-6) and not np.allclose(gained, after_gain["ln1_out", 1], atol=1e-2)


def test_every_node_that_is_listed_can_be_asked_for(gguf: GgufEngine) -> None:
    listed = gguf.nodes()
    assert {(node.name, node.made_by) for node in listed} >= {("embd", "GET_ROWS"), ("Kcur-2", "ROPE"), ("ffn_moe_topk-0", "VIEW")}
    assert next(node for node in listed if node.name == "l_out-0").shape == (1, 1, 3, 64)
    names = sorted({node.name for node in listed} | {f"{node.name}/{node.made_by}" for node in listed})
    for start in range(0, len(names), MAX_NATIVE):
        found = natives(gguf, *names[start : start + MAX_NATIVE])
        assert set(found) == set(names[start : start + MAX_NATIVE])
        assert {piece.values.dtype for piece in found.values()} <= {np.dtype(np.float32), np.dtype(np.int32)}


def test_half_precision_of_a_cache_is_handed_out_as_float32(tiny_mixtral: TinyModel) -> None:
    engine = GgufEngine(tiny_mixtral.gguf, OpenOptions(n_gpu_layers=0, n_threads=2))
    assert next(node for node in engine.nodes() if node.name == "cache_k_l1 (view)").type == "f16"
    stored = values(engine, "cache_k_l1 (view)")
    assert stored.dtype == np.float32 and stored.shape == (1, 256, 2, 16)
    assert np.allclose(stored[0, :N], values(engine, "Kcur-1")[0], rtol=1e-3, atol=1e-3)
    engine.close()


def test_a_native_node_shows_the_edit_of_its_site(gguf: GgufEngine) -> None:
    z = values(gguf, "kqv_out-1", edits=(Intervention("z", 1, "zero", head=1),))[0, 0]
    assert not z[:, 16:32].any() and z[:, :16].all()


def test_a_prompt_longer_than_a_piece_runs_whole_for_a_native_tensor(tiny_mixtral: TinyModel, gguf: GgufEngine, hf: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces = GgufEngine(tiny_mixtral.gguf, EXACT, n_ubatch=4)
    assert np.allclose(values(in_pieces, "l_out-1"), values(gguf, "l_out-1"), atol=1e-5)
    in_pieces.close()
    expected = values(hf, "model.layers.1")
    monkeypatch.setattr("backend.engines.hf.PIECE", 4)
    assert expected.shape == (1, N, 64) and np.array_equal(values(hf, "model.layers.1"), expected)


def test_a_prompt_too_long_to_run_whole_is_refused_with_the_limit(gguf: GgufEngine, hf: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "WHOLE_LIMIT", N - 1)
    for engine, name in ((gguf, "l_out-1"), (hf, "model.norm")):
        with pytest.raises(LayerscopeError, match=rf"{N} tokens; native tensors need it in one piece, which holds {N - 1}"):
            natives(engine, name)
        assert capture(engine, IDS, ("logits",))["logits", None].shape == (N, 320)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("Qcurr-0", "Qcur-0"), ("l_out-7", "l_out-"), ("ffn_moe_gates-1", "ffn_moe_gate-1"), ("Qcur-0/ROPES", "Qcur-0/ROPE"), ("xyzzy", "nodes --model")],
)
def test_a_wrong_node_name_is_refused_with_names_like_it(gguf: GgufEngine, name: str, hint: str) -> None:
    with pytest.raises(LayerscopeError) as refusal:
        natives(gguf, name)
    assert repr(name) in str(refusal.value) and hint in str(refusal.value)


def test_values_that_are_no_numbers_of_an_activation_are_refused_by_type(gguf: GgufEngine) -> None:
    nodes = [SeenNode("blocks", 1, (), 1.0, (1, 1, 1, 32), type=8), SeenNode("fine", 1, (), 1.0, (1, 1, 1, 32), type=1)]
    with pytest.raises(LayerscopeError, match="'blocks' holds q8_0 values; those of type f32, f16 and i32"):
        Natives(gguf.info, ("blocks",), nodes, lambda piece: None)
    run = Natives(gguf.info, ("fine",), nodes, lambda piece: None)
    with pytest.raises(LayerscopeError, match="'fine' 0 times in this run, and 1 were expected"):
        run.check_complete()


# HF


def test_a_module_by_its_path_gives_its_output(hf: HfEngine) -> None:
    sites = capture(hf, IDS, ("mlp_pre", "attn_out", "resid_post", "ln_final_out", "logits"))
    found = natives(hf, "model.layers.1.mlp.act_fn", "model.layers.1.mlp.gate_proj", "model.layers.2.self_attn", "model.layers.0", "lm_head", "model")
    gate = torch.from_numpy(sites["mlp_pre", 1])
    assert np.array_equal(found["model.layers.1.mlp.gate_proj"].values[0], sites["mlp_pre", 1])
    assert np.array_equal(found["model.layers.1.mlp.act_fn"].values[0], torch.nn.functional.silu(gate).numpy())
    assert np.array_equal(found["model.layers.2.self_attn"].values[0], sites["attn_out", 2])  # the first of a tuple
    assert np.array_equal(found["model.layers.0"].values[0], sites["resid_post", 0])
    assert np.array_equal(found["lm_head"].values[0], sites["logits", None])
    assert np.array_equal(found["model"].values[0], sites["ln_final_out", None])  # an output object
    assert found["model.layers.1.mlp.act_fn"].made_by == "SiLUActivation" and found["lm_head"].dims == ("dim0", "dim1", "dim2")
    assert no_hooks(hf)


def test_modules_are_listed_and_a_wrong_path_is_refused_with_paths_like_it(hf: HfEngine) -> None:
    names = [node.name for node in hf.nodes()]
    assert "model.layers.2.self_attn.o_proj" in names and "" not in names
    with pytest.raises(LayerscopeError, match=r"'model.layers.1.mlp.act'.*model\.layers\.1\.mlp\.act_fn"):
        natives(hf, "model.layers.1.mlp.act")
    with pytest.raises(LayerscopeError, match="no native tensor ''"):
        natives(hf, "")
    assert no_hooks(hf)


def test_a_module_that_is_not_called_or_gives_no_tensor_is_said_to_be_so(hf: HfEngine) -> None:
    class Words(torch.nn.Module):
        def forward(self, x: Any) -> str:
            return "no tensor"

    model = torch.nn.ModuleDict({"idle": torch.nn.Linear(2, 2), "twice": torch.nn.Identity(), "words": Words()})
    with ModuleOutputs(hf.info, model, ("twice",)) as kept:
        model["twice"](torch.zeros(2)), model["twice"]((torch.ones(2), "rest"))
    pieces: list[Any] = []
    kept.hand_out(pieces.append)
    assert pieces[0].values.tolist() == [1.0, 1.0]  # the last call
    with ModuleOutputs(hf.info, model, ("idle",)) as idle:
        pass
    with pytest.raises(LayerscopeError, match=r"'idle' \(Linear\) was not called"):
        idle.hand_out(pieces.append)
    with pytest.raises(LayerscopeError, match=r"'words' \(Words\) puts out no tensor"), ModuleOutputs(hf.info, model, ("words",)):
        model["words"](None)
    assert not any(module._forward_hooks for module in model.modules())


# From the list of sites to the file


@pytest.mark.parametrize("which", ["gguf", "hf"])
def test_native_tensors_are_kept_in_the_trace_as_computed(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    engine = request.getfixturevalue(which)
    first, second = ("norm-1", "ffn_moe_topk-1") if which == "gguf" else ("model.layers.1.mlp.act_fn", "model.rotary_emb")
    spec = CaptureSpec(token_ids=tuple(IDS), sites=("resid_post", f"native:{first}", f"native:{second}"), layers=(1,))
    with Trace(capture_trace(engine, spec, tmp_path)) as trace:
        assert trace.native == [first, second] and trace.stored == {"resid_post": [1]}
        for name in (first, second):
            expected = values(engine, name)
            assert np.array_equal(trace.native_tensor(name), expected) and trace[f"native:{name}"].dtype == expected.dtype
        assert f"native:{first}" in trace and "native:other" not in trace
        assert trace.metadata["capture"]["sites"] == ["resid_post", f"native:{first}", f"native:{second}"]
        with pytest.raises(SiteNotCaptured, match=f"native:other.*native:{first}"):
            trace["native:other"]
        path = trace.path
    with h5py.File(path) as file:
        item = file["native/000"]
        assert item.attrs["name"] == first and item.attrs["op" if which == "gguf" else "module"] == {"gguf": "RMS_NORM", "hf": "SiLUActivation"}[which]
        assert list(item.attrs["dims"]) == (["ne3", "ne2", "ne1", "ne0"] if which == "gguf" else ["dim0", "dim1", "dim2"])
        assert item.fletcher32 and set(file["native"]) == {"000", "001"}


def test_a_trace_without_native_tensors_has_none(hf: HfEngine, tmp_path: Path) -> None:
    with Trace(capture_trace(hf, CaptureSpec(token_ids=(1, 2), sites=("z",)), tmp_path)) as trace:
        assert trace.native == [] and "native:model" not in trace


def test_the_format_page_says_where_native_tensors_lie() -> None:
    page = (Path(__file__).parent.parent / "backend" / "FORMAT.md").read_text()
    section = page.split("## `/native/<number>`")[1].split("\n## ")[0]
    for word in ("`name`", "`dims`", "`op`", "`module`", "`ne3`, `ne2`, `ne1`, `ne0`", "`dim0`, `dim1`", "`000`", "float32 or int32", "Qcur-0/ROPE"):
        assert word in section, word


def test_lists_of_sites_may_name_native_tensors_everywhere(hf: HfEngine) -> None:
    assert split_native(["native:a", "z", "native:a", "z", "native:b/ADD"]) == (("z",), ("a", "b/ADD"))
    with pytest.raises(LayerscopeError, match="257 native tensors are asked for, and 256"):
        split_native([f"native:{i}" for i in range(257)])
    sites = ("resid_post", "native:model")
    assert trace_bytes(hf.info, 10, sites) == trace_bytes(hf.info, 10, sites[:1])
    form = {"model": "m", "prompt": "p", "new": 0, "temperature": 0, "seed": 0, "preset": "choose", "sites": ["z"], "native": " Qcur-0/ROPE, native:cache_k_l0 (view),"}
    assert RunRequest.read(form).params()["sites"] == ["z", "native:Qcur-0/ROPE", "native:cache_k_l0 (view)"]
    assert RunRequest.read({**form, "sites": []}).sites == ("native:Qcur-0/ROPE", "native:cache_k_l0 (view)")
    with pytest.raises(LayerscopeError, match="No site is chosen"):
        RunRequest.read({**form, "sites": [], "native": " , "})


def test_the_command_line_lists_and_captures_native_tensors(tiny_llama: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    from backend.__main__ import main

    monkeypatch.setenv("LAYERSCOPE_DATA_DIR", str(tmp_path / "data"))

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["backend", *words])
        try:
            main()
        except SystemExit as stop:
            assert stop.code in (None, 0)
        return capsys.readouterr().out

    nodes = json.loads(call("nodes", "-m", str(tiny_llama.gguf), "--json"))["nodes"]
    assert {"name": "ffn_gate-1", "made_by": "MUL_MAT", "shape": [1, 1, 3, 96], "type": "f32"} in nodes
    assert "model.layers.1.mlp.act_fn" in call("nodes", "-m", str(tiny_llama.hf))
    data = json.loads(call("trace", "-m", str(tiny_llama.gguf), "-p", "Hello", "-s", "z,native:Qcur-0/ROPE", "-s", "native:ffn_gate-1", "--json"))
    assert data["native"] == ["Qcur-0/ROPE", "ffn_gate-1"] and list(data["sites"]) == ["z"]
    assert "native Qcur-0/ROPE" in call("show", data["path"])

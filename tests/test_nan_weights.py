"""Claims about models with broken weights: the run finishes, the integrity report names the first place that is NaN or infinite, the
trace is read like any other, and every page shows it."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from backend.analysis import logits
from backend.engines import Engine, OpenOptions, Sampling
from backend.engines.gguf import GgufEngine
from backend.engines.hf import HfEngine
from backend.errors import LayerscopeError
from backend.experiments.capture import CaptureSpec, capture
from backend.files.gguf_format import read_file
from backend.files.safetensors_header import safetensors_header
from backend.library import Library
from backend.trace import open_trace
from components.services import SERVER_KEY
from tests.tiny_models import TinyModel
from tests.web_app import web_app

OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=2)
IDS = (0, 290, 284, 280, 306, 275, 31, 290)
LAYER = 1


def in_gguf(source: Path, out: Path, tensor: str, value: float) -> GgufEngine:
    """An engine on a copy of `source` with one value of `tensor` (or one block's scale, where it is quantized) replaced."""
    data, place = bytearray(source.read_bytes()), read_file(source).tensors[tensor]
    dtype = np.float32 if place.type_name == "F32" else np.float16  # a block of Q8_0 begins with its scale
    data[place.offset : place.offset + np.dtype(dtype).itemsize] = dtype(value).tobytes()
    out.write_bytes(data)
    return GgufEngine(out, OPTIONS)


def in_folder(source: Path, out: Path, tensor: str, value: float) -> HfEngine:
    shutil.copytree(source, out)
    entry = safetensors_header(out / "model.safetensors")[tensor]
    data = bytearray((out / "model.safetensors").read_bytes())
    data[entry.start : entry.start + 4] = np.float32(value).tobytes()
    (out / "model.safetensors").write_bytes(data)
    return HfEngine(out, OPTIONS)


def quantized(source: Path, out: Path) -> Path:
    """`source` with its matrices in Q8_0, written by gguf-py."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


# weight of layer 1 in a GGUF file, the same in a checkpoint, and the site that it is computed into
PLACES = [
    ("attn_norm.weight", "input_layernorm.weight", "ln1_out"),
    ("attn_q.weight", "self_attn.q_proj.weight", "q"),
    ("attn_v.weight", "self_attn.v_proj.weight", "v"),
    ("attn_output.weight", "self_attn.o_proj.weight", "attn_out"),
    ("ffn_norm.weight", "post_attention_layernorm.weight", "ln2_out"),
    ("ffn_gate.weight", "mlp.gate_proj.weight", "mlp_pre"),
    ("ffn_down.weight", "mlp.down_proj.weight", "mlp_out"),
]


def finite_note(engine: Engine, folder: Path) -> str:
    """What the report says of the first value that is not finite; the trace is whole otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        path = capture(engine, CaptureSpec(token_ids=IDS, sites=("all",)), folder)
    engine.close()
    with open_trace(path) as trace:
        report = trace.integrity["finite"]
        assert not report["ok"] and 0 < report["max_error"] <= 1
        json.dumps(trace.integrity, allow_nan=False)
        for site, layer in trace:
            assert (trace[site] if layer is None else trace[site, layer]).size
        return str(report["note"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("weight", "parameter", "site"), PLACES)
def test_a_broken_weight_is_named_at_its_layer_by_both_engines(tiny_llama: TinyModel, tmp_path: Path, weight: str, parameter: str, site: str, value: float) -> None:
    engines = (
        in_gguf(tiny_llama.gguf, tmp_path / "broken.gguf", f"blk.{LAYER}.{weight}", value),
        in_folder(tiny_llama.hf, tmp_path / "broken", f"model.layers.{LAYER}.{parameter}", value),
    )
    for engine in engines:
        assert finite_note(engine, tmp_path / "traces").startswith(f"first at {site} of layer {LAYER}: ")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("weight", "site"), [(weight, site) for weight, _, site in PLACES if "norm" not in weight])
def test_a_broken_block_of_a_quantized_weight_is_named_at_its_layer(tiny_llama: TinyModel, tmp_path: Path, weight: str, site: str, value: float) -> None:
    engine = in_gguf(quantized(tiny_llama.gguf, tmp_path / "q8.gguf"), tmp_path / "broken.gguf", f"blk.{LAYER}.{weight}", value)
    assert engine.info.weight_types["Q8_0"] > 20
    assert finite_note(engine, tmp_path / "traces").startswith(f"first at {site} of layer {LAYER}: ")


def test_a_broken_embedding_row_harms_the_positions_from_its_token_on_and_an_unused_one_nothing(tiny_llama: TinyModel, tmp_path: Path) -> None:
    """Row 0 is the first token of the prompt; the same prompt without it never reads that row."""
    engine = in_gguf(tiny_llama.gguf, tmp_path / "broken.gguf", "token_embd.weight", np.nan)
    for ids, ok in ((IDS, False), (IDS[1:], True)):
        with open_trace(capture(engine, CaptureSpec(token_ids=ids), tmp_path / "traces")) as trace:
            assert trace.integrity["finite"]["ok"] is ok
            assert ok or trace.integrity["finite"]["note"].startswith("first at embed: 1 of ")
    engine.close()


@pytest.mark.parametrize("kind", ["mixtral", "gemma2", "gpt2", "olmo2", "phi3"])
def test_a_broken_output_projection_is_named_at_its_layer_in_every_kind_of_block(tiny_model: Callable[[str], TinyModel], tmp_path: Path, kind: str) -> None:
    engine = in_gguf(tiny_model(kind).gguf, tmp_path / "broken.gguf", f"blk.{LAYER}.attn_output.weight", np.nan)
    assert finite_note(engine, tmp_path / "traces").startswith(f"first at attn_out of layer {LAYER}: ")


def test_a_broken_router_is_named_and_its_experts_are_shown(tiny_mixtral: TinyModel, tmp_path: Path) -> None:
    for engine in (
        in_gguf(tiny_mixtral.gguf, tmp_path / "broken.gguf", f"blk.{LAYER}.ffn_gate_inp.weight", np.nan),
        in_folder(tiny_mixtral.hf, tmp_path / "broken", f"model.layers.{LAYER}.block_sparse_moe.gate.weight", np.nan),
    ):
        assert finite_note(engine, tmp_path / "traces").startswith(f"first at router_logits of layer {LAYER}: ")


def test_no_token_can_be_generated_and_the_sentence_says_how_to_look(tiny_llama: TinyModel, tmp_path: Path) -> None:
    engine = in_gguf(tiny_llama.gguf, tmp_path / "broken.gguf", "output_norm.weight", np.nan)
    with pytest.raises(LayerscopeError, match="no token can be chosen; run it with 0 new tokens to see where they begin"):
        capture(engine, CaptureSpec(token_ids=IDS, max_new_tokens=3), tmp_path / "traces")
    assert not list((tmp_path / "traces").glob("*"))
    with pytest.raises(LayerscopeError, match="no token can be chosen"):
        engine.generate(list(IDS), 1, Sampling(temperature=1.0))
    engine.close()


def test_a_row_of_nan_has_no_distribution_and_no_rank_but_as_many_best_tokens_as_any() -> None:
    rows = np.array([[1.0, 2.0, 0.0], [np.nan, 5.0, np.nan], [np.nan] * 3, [np.inf, 1.0, 2.0]], np.float32)
    ids, logprobs = logits.top_k(rows, 2)
    assert ids.tolist() == [[1, 0], [1, 0], [0, 1], [0, 2]]
    assert np.isfinite(logprobs[0]).all() and np.isnan(logprobs[1:3]).all()
    assert np.isnan(logits.logsumexp(rows)).tolist() == [False, True, True, True]
    assert np.isnan(logits.entropy(rows)).tolist() == [False, True, True, True]
    assert logits.rank_of(rows, 1).tolist() == [0, -1, -1, 2]


# Pages


def ask(path: str, search: str) -> Any:
    """The page as the browser gets it: its layout as JSON."""
    return post("_pages_content", {"_pages_location.pathname": path, "_pages_location.search": search})


def post(output: str, values: dict[str, Any]) -> Any:
    """Run the callback whose outputs hold `output`, with `values` for its inputs and states, as the browser would."""
    app = web_app()
    app.server.test_client().get("/_dash-dependencies")  # Dash gathers its callbacks at the first request
    key = next(key for key in app.callback_map if any(output == name or name.startswith(f"{output}.") for name in key.strip(".").split("...")))
    spec = app.callback_map[key]

    def filled(entries: list[dict[str, str]]) -> list[dict[str, Any]]:
        return [{**entry, "value": values[f"{entry['id']}.{entry['property']}"]} for entry in entries]

    outputs = [dict(zip(("id", "property"), name.rsplit(".", 1), strict=True)) for name in key.strip(".").split("...")]
    for each in outputs:
        each["property"] = each["property"].split("@")[0]
    body = {"output": key, "outputs": outputs if key.startswith("..") else outputs[0], "inputs": filled(spec["inputs"]), "state": filled(spec["state"])}
    body["changedPropIds"] = [f"{entry['id']}.{entry['property']}" for entry in spec["inputs"]]
    answer = app.server.test_client().post("/_dash-update-component", json=body)
    assert answer.status_code == 200, (output, values, answer.status_code, answer.text[:300])
    data = json.loads(answer.text, parse_constant=lambda word: pytest.fail(f"{output} sends {word}, which is no JSON"))
    assert "sideUpdate" not in data, (output, values, "the callback failed; what the page says instead", data["sideUpdate"])
    return data


@pytest.fixture(scope="module")
def broken_traces(tmp_path_factory: pytest.TempPathFactory, tiny_llama: TinyModel, tiny_mixtral: TinyModel) -> Iterator[list[str]]:
    """Traces of a model that is NaN from layer 1 on, one that is infinite, and one whose every value is NaN."""
    folder = tmp_path_factory.mktemp("broken")
    app = web_app()
    with app.server.test_request_context("/"):
        library: Library = app.server.config[SERVER_KEY].library
    ids = []
    for name, model, weight, value in (
        ("nan", tiny_llama, "blk.1.attn_q.weight", np.nan),
        ("inf", tiny_llama, "blk.1.ffn_down.weight", np.inf),
        ("all", tiny_mixtral, "token_embd.weight", np.nan),
    ):
        engine = in_gguf(model.gguf, folder / f"{name}.gguf", weight, value)
        path = capture(engine, CaptureSpec(token_ids=IDS, sites=("all",)), library.traces_dir)
        engine.close()
        ids.append(library.add(path).id)
    yield ids
    for trace_id in ids:
        library.delete(trace_id)


OF_THE_MODEL = ("/attribution", "/neurons", "/embeddings")  # they read its file, which is not on the shelf here, and say so
VIEWS = (("head", "pattern", []), ("head", "pattern", ["hidden"]), ("head", "weighted", []), ("head", "scores", []), ("mean", "pattern", []), ("rollout", "pattern", []))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_page_shows_a_broken_trace(broken_traces: list[str], number: int) -> None:
    trace = broken_traces[number]
    for page in ("/", "/trace", "/attention", "/activations", "/attribution", "/neurons", "/moe", "/embeddings", "/lens", "/logits", "/library", "/jobs"):
        layout = json.dumps(ask(page, f"?trace={trace}"))
        assert trace in layout or page in ("/", "/jobs", "/library", *OF_THE_MODEL), page
    listed = {"library-search.value": "", "library-model.value": None, "library-category.value": None, "library-page.data": {"value": 0}, "counts.data": {}}
    assert trace in json.dumps(post("library-list.children", listed))
    common = {"page-state.data": {"trace": trace, "position": 3}, "theme.data": "light"}
    with open_trace(web_library().path_of(trace)) as opened:
        sites, n_layers, n_heads = list(opened.stored), opened.info.n_layers, opened.info.n_heads
    for at in (0, len(IDS) - 1):
        where = {**common, "position.data": at}
        lens = {**where, "target-token.data": None, "lens-choice.data": {"site": "resid_post", "layer": None, "tuned": ""}}
        for mode in ("probability", "entropy", "kl", "rank", "chosen"):
            post("lens-table.figure", {**lens, "lens-mode.value": mode})
        post("lens-guesses.children", lens)
        post("target-curves.figure", lens)
        for unit in ("nats", "bits"):
            post("logits-lines.figure", {**where, "logits-unit.value": unit})
            post("logits-table.children", {**where, "logits-unit.value": unit, "logits-shown.data": None})
        post("logits-top.figure", {**where, "logits-k.value": 20})
        post("top-list.children", where)
        for layer, head, scale in itertools.product(range(n_layers), (0, n_heads - 1), ("linear", "sqrt") if at else ("linear",)):
            for of, view, first in VIEWS:
                asked = {**where, "chosen-head.data": {"layer": layer, "head": head}, "pattern-of.value": of, "pattern-view.value": view, "pattern-first.value": first}
                rest = {"pattern-window.data": None, "pinned-head.data": None, "maps-ready.data": None, "pattern-title.children": ""}
                post("pattern.figure", {**asked, **rest, "pattern-scale.value": scale})
            token = {"pattern-shown.data": {"layer": layer, "head": head}, "token-scope.value": "mean", "pattern-first.value": [], "maps-ready.data": None}
            post("token-attention.figure", {**where, **token})
        for site, layer in itertools.product(sites, range(n_layers) if at else ()):
            if site not in ("embed", "logits", "ln_final_out", "attn_pattern", "attn_scores"):
                shown = {**where, "act-site.value": site, "act-layer.value": layer}
                post("act-map.figure", shown)
                for scale in ("linear", "log"):
                    post("norms.figure", {**shown, "norm-scale.value": scale})
                for band in ("whole", "inner"):
                    post("bands.figure", {**shown, "band-range.value": band})
    for metric in ("entropy", "entropy_norm", "sink", "previous", "duplicate", "induction", "distance"):
        post("metric-heads.figure", {**common, "head-metric.value": metric, "chosen-head.data": {"layer": 1, "head": 0}, "below-threshold.value": 1, "maps-ready.data": None})
    post("outlier-lines.figure", {**common, "outlier-size.value": 100, "outlier-ratio.value": 1000, "outlier-dimension.value": 6})
    post("channel-table.children", {**common, "channel-site.value": "ln1_out"})
    for theme in ("light", "dark"):
        assert web_app().server.test_client().get(f"/thumbs/{trace}/{theme}.png").status_code == 200


def web_library() -> Library:
    app = web_app()
    with app.server.test_request_context("/"):
        library: Library = app.server.config[SERVER_KEY].library
        return library

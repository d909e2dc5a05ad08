"""Claims about reading a Hugging Face folder: headers say the truth about a good one, and a bad one is refused in one sentence."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.engines import hf_sites
from backend.errors import LayerscopeError
from backend.files.hf_config import check_folder, model_info
from backend.files.hf_keys import ARCHITECTURES
from backend.files.safetensors_header import HEADER_LIMIT, safetensors_header
from tests.tiny_models import TinyModel

ONE_TENSOR = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write_safetensors(path: Path, header: Any, data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def folder(tiny_llama: TinyModel, tmp_path: Path) -> Path:
    """A copy of a good folder, to be spoiled."""
    return Path(shutil.copytree(tiny_llama.hf, tmp_path / "spoiled"))


def change_config(folder: Path, name: str = "config.json", **changes: Any) -> Path:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, **changes}))
    return folder


def test_the_header_lists_the_tensors_that_safetensors_itself_reads(tiny_mixtral: TinyModel) -> None:
    from safetensors import safe_open

    header = safetensors_header(tiny_mixtral.hf / "model.safetensors")
    with safe_open(tiny_mixtral.hf / "model.safetensors", framework="numpy") as file:
        assert set(header) == set(file.keys())
        data = (tiny_mixtral.hf / "model.safetensors").read_bytes()
        for name, entry in header.items():
            tensor = file.get_tensor(name)
            assert entry.shape == tensor.shape
            assert data[entry.start : entry.stop] == tensor.tobytes()


def test_model_info_holds_the_sizes_the_fixture_was_made_with(tiny_mistral: TinyModel, tiny_mixtral: TinyModel) -> None:
    mistral, mixtral = model_info(tiny_mistral.hf), model_info(tiny_mixtral.hf)
    assert (mistral.architecture, mistral.n_layers, mistral.n_heads, mistral.n_kv_heads) == ("mistral", 3, 4, 2)
    assert (mistral.d_model, mistral.d_head, mistral.d_mlp, mistral.d_vocab, mistral.n_ctx) == (64, 24, 112, 320, 1024)
    assert (mixtral.n_experts, mixtral.n_experts_used, mixtral.d_mlp, mixtral.is_moe) == (5, 2, 48, True)
    assert mistral.n_bytes == 4 * mistral.n_params and mistral.quantization == "F32"
    assert (mistral.bos_id, mistral.eos_id, mistral.norm_eps) == (0, 1, 1e-5)


def test_weights_in_several_files_are_one_model(tiny_llama: TinyModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_llama.hf).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    folder = check_folder(tmp_path / "sharded")
    assert len(folder.shards) > 1
    assert {n: e.shape for n, e in folder.tensors.items()} == {n: e.shape for n, e in check_folder(tiny_llama.hf).tensors.items()}
    assert model_info(tmp_path / "sharded").n_params == model_info(tiny_llama.hf).n_params


def test_reading_a_folder_needs_neither_torch_nor_transformers(tiny_llama: TinyModel) -> None:
    code = "import sys; from pathlib import Path; from backend.files.hf_config import model_info; model_info(Path(sys.argv[1])); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code, str(tiny_llama.hf)], capture_output=True, text=True, check=True).stdout.split()
    assert "backend.files.hf_config" in modules
    assert not {"torch", "transformers", "safetensors", "llama_cpp"} & set(modules)


def test_every_architecture_has_a_row_in_both_tables() -> None:
    assert set(ARCHITECTURES) == set(hf_sites.ARCHITECTURES)


# Bad folders


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_config(folder, **changes) and None


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index(weight_map: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (remove("config.json"), "no config.json"),
        (remove("model.safetensors"), "no weights"),
        (only_pickle, r"pickled weights \(pytorch_model.bin\)"),
        (truncate, "truncated: tensor .* ends at byte"),
        (text("config.json", "{"), "no valid JSON"),
        (text("config.json", "[1]"), "JSON list"),
        (text("config.json", "[" * 100_000), "no valid JSON"),
        (text("config.json", '{"model_type": "llama", "model_type": "gpt2"}'), "a key occurs twice"),
        (text("config.json", " " * (5 << 20)), "more than the 4,194,304 bytes"),
        (config(model_type="bert"), "architecture 'bert'.*runs llama, mistral.*more decoders of text"),
        (config(model_type=None), "architecture 'None'"),
        (config(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (config(auto_map={"AutoModel": "modeling.Evil"}), "run code of its own"),
        (lambda folder: change_config(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["x", None]}), "run code of its own"),
        (config(quantization_config={"quant_method": "gptq"}), "quantised weights"),
        (config(num_hidden_layers=0), "num_hidden_layers = 0; .* from 1 to 1,000"),
        (config(num_hidden_layers=1 << 31), "from 1 to 1,000"),
        (config(num_hidden_layers=True), "num_hidden_layers = True"),
        (config(hidden_size="64"), "hidden_size = 64"),
        (config(hidden_size=-64), "hidden_size = -64"),
        (config(num_key_value_heads=3), "4 heads cannot share 3"),
        (config(num_attention_heads=5, num_key_value_heads=5, head_dim=None), "64 is no multiple of its 5 heads"),
        (config(num_attention_heads=0), "num_attention_heads = 0; .* from 1 to 1,024"),
        (config(num_attention_heads=1 << 20), "num_attention_heads = 1048576; .* from 1 to 1,024"),
        (config(num_attention_heads=[4, 4, 2]), r"num_attention_heads = \[4, 4, 2\]; it must be a whole number"),
        (config(num_key_value_heads=8), "4 heads cannot share 8"),
        (config(num_key_value_heads=0), "num_key_value_heads = 0; .* from 1"),
        (config(head_dim=0), "head_dim = 0; .* from 1"),
        (config(head_dim=8), r"q_proj.weight has shape \[64, 64\], but config.json says \[32, 64\]"),
        (config(num_attention_heads=8, head_dim=8, num_key_value_heads=8), r"k_proj.weight has shape \[32, 64\], but config.json says \[64, 64\]"),
        (config(num_hidden_layers=4), "does not fit its config.json: num_hidden_layers = 4, and the tensors of layer 3 are missing"),
        (config(vocab_size=321), r"shape \[320, 64\], but config.json says \[321, 64\]"),
        (config(rms_norm_eps=-1), "rms_norm_eps = -1"),
        (config(rms_norm_eps=float("nan")), "rms_norm_eps = nan"),
        (index({"a": "../a.safetensors"}), "no plain .safetensors file name"),
        (index({"a": "/etc/passwd"}), "no plain .safetensors file name"),
        (index({"a": "a.bin"}), "no plain .safetensors file name"),
        (index({"a": "a.safetensors", "b": "b.safetensors"}), "lacks the shard 'b.safetensors'"),
        (index({}), "has no weight_map"),
    ],
)
def test_a_bad_folder_is_refused_in_one_sentence(folder: Path, spoil: Callable[[Path], Any], sentence: str) -> None:
    spoil(folder)
    with pytest.raises(LayerscopeError, match=sentence) as caught:
        model_info(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_folder_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LayerscopeError, match="no model folder 'nowhere'"):
        model_info(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ({"w": {"dtype": "F99", "shape": [2, 3], "data_offsets": [0, 24]}}, "dtype 'F99'"),
        ({"w": {"dtype": ["F32"], "shape": [2, 3], "data_offsets": [0, 24]}}, "dtype"),
        ({"w": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 24]}}, "has 24 bytes, but its shape .* needs 32"),
        ({"w": {"dtype": "F32", "shape": [2, -3], "data_offsets": [0, 24]}}, "no valid shape"),
        ({"w": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 24]}}, "no valid shape"),
        ({"w": {"dtype": "F32", "shape": [4194305, 4194305, 211106198978564], "data_offsets": [0, 24]}}, "no valid shape"),
        ({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]}}, "has -24 bytes"),
        ({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0]}}, "no valid data_offsets"),
        ({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]}}, "starts at byte"),
        ({**ONE_TENSOR, "v": ONE_TENSOR["w"]}, "starts at byte"),
        ({**ONE_TENSOR, "v": {"dtype": "F32", "shape": [1], "data_offsets": [24, 28]}}, "truncated"),
        ({"w": "F32"}, "dtype"),
        (b'{"w": 1, "w": 2}', "a key occurs twice"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[]", "JSON list"),
    ],
)
def test_a_damaged_safetensors_header_is_refused_in_one_sentence(tmp_path: Path, header: Any, sentence: str) -> None:
    with pytest.raises(LayerscopeError, match=sentence):
        safetensors_header(write_safetensors(tmp_path / "bad.safetensors", header))


def test_a_header_length_is_bounded_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    for length, sentence in ((HEADER_LIMIT + 1, "at most 100,000,000"), ((1 << 64) - 1, "at most"), (1000, "header ends at byte 1,008")):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(LayerscopeError, match=sentence):
            safetensors_header(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_safetensors(tmp_path / "whole.safetensors", ONE_TENSOR).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(LayerscopeError):
            safetensors_header(cut)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=120),
        st.dictionaries(
            st.text(max_size=5),
            st.fixed_dictionaries({
                "dtype": st.sampled_from(["F32", "BF16", None, 3, "X"]),
                "shape": st.lists(st.one_of(st.integers(-2, 9), st.just(1 << 63), st.none()), max_size=3),
                "data_offsets": st.lists(st.one_of(st.integers(-2, 40), st.just(1 << 63), st.floats()), max_size=3),
            }),
            max_size=3,
        ),
    )
)  # fmt: skip
def test_any_header_is_read_or_refused_and_what_is_read_lies_inside_the_file(tmp_path: Path, header: Any) -> None:
    path = write_safetensors(tmp_path / "fuzzed.safetensors", header)
    try:
        entries = safetensors_header(path)
    except LayerscopeError:
        return
    assert all(0 < entry.start <= entry.stop <= path.stat().st_size for entry in entries.values())

"""Claims about the GGUF header reader: every malformed file is one sentence, never a hang, a crash or a wrong belief."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.errors import LayerscopeError
from backend.files.gguf_header import StringArray, model_info, read_header
from tests.gguf_cases import ARR, BEYOND, BOOL, CASES, F32, I32, STR, U8, U16, U32, Tensor, model_file, model_tensors
from tests.tiny_models import TinyModel


def write(folder: Path, data: bytes) -> Path:
    path = folder / "case.gguf"
    path.write_bytes(data)
    return path


def info_of(folder: Path, data: bytes) -> Any:
    path = write(folder, data)
    return model_info(path, read_header(path))


# The 33 cases of llama.cpp's own test-suite, and what broke other readers


def test_all_33_cases_of_llama_cpps_suite_are_here() -> None:
    assert len(CASES) == 33 and sum(not accepted for _, accepted in CASES.values()) == 26 + 1  # ZERO_DIM: refused here


@pytest.mark.parametrize("name", [name for name, (_, accepted) in CASES.items() if not accepted])
def test_what_llama_cpp_refuses_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(LayerscopeError, match=r"^case\.gguf is (not a valid GGUF file|truncated): .+\.$"):
        read_header(write(tmp_path, CASES[name][0]))


@pytest.mark.parametrize("name", [name for name, (_, accepted) in CASES.items() if accepted])
def test_what_llama_cpp_accepts_is_read(name: str, tmp_path: Path) -> None:
    header = read_header(write(tmp_path, CASES[name][0]))
    if name.startswith(("TENSORS", "DATA")):
        assert header.tensors["a"].shape == (2, 33) and header.tensors["b"].nbytes == 256
        assert header.tensors["b"].offset == header.data_offset + math.ceil(264 / header.alignment) * header.alignment
    if "a.u32" in header.metadata:
        assert header.metadata["a.u32"] == 7 and header.metadata["a.text"] == "hello" and header.metadata["a.flag"] is True
        assert header.metadata["a.list"].tolist() == [1.0, 2.5] and list(header.metadata["a.words"]) == ["x", "yz"]


@pytest.mark.parametrize("name", BEYOND)
def test_what_broke_other_readers_is_refused_without_memory(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, BEYOND[name])
    tracemalloc.start()
    try:
        with pytest.raises(LayerscopeError, match=r"^case\.gguf is (not a valid GGUF file|truncated): .+\.$"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(LayerscopeError, match="cannot be read"):
            read_header(path)


def test_a_truncated_file_says_which_tensor_is_cut_and_where(tmp_path: Path) -> None:
    data = model_file()
    header = read_header(write(tmp_path, data))
    last = header.tensors["output_norm.weight"]
    with pytest.raises(LayerscopeError) as refusal:
        read_header(write(tmp_path, data[:-3]))
    assert str(refusal.value) == f"case.gguf is truncated: tensor 'output_norm.weight' ends at byte {last.offset + last.nbytes:,}, the file has {len(data) - 3:,}."


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Every prefix of a valid file is a LayerscopeError: all the cuts in the header, and some in the data."""
    data = model_file()
    header_end = read_header(write(tmp_path, data)).data_offset
    for cut in (*range(header_end), *range(header_end, len(data), 97)):
        with pytest.raises(LayerscopeError, match="truncated" if cut else "it is empty"):
            read_header(write(tmp_path, data[:cut]))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1200), st.one_of(st.integers(0, 255), st.sampled_from([0, 127, 128, 255]))), min_size=1, max_size=8))
def test_a_damaged_file_is_read_or_refused_and_never_anything_else(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(model_file())
    for at, value in changes:
        data[at % len(data)] = value
    path = write(tmp_path, bytes(data))
    try:
        header = read_header(path)
    except LayerscopeError as refusal:
        assert "\n" not in str(refusal) and len(str(refusal)) < 500
        return
    assert all(0 <= t.offset and t.offset + t.nbytes <= len(data) for t in header.tensors.values())
    try:
        info = model_info(path, header)
    except LayerscopeError as refusal:
        assert "\n" not in str(refusal) and len(str(refusal)) < 500
        return
    assert info.n_layers == 2 and info.d_vocab == 16 and info.n_heads % info.n_kv_heads == 0


# What a good header says


def test_the_header_is_what_gguf_py_reads(tiny_mixtral: TinyModel) -> None:
    header, oracle = read_header(tiny_mixtral.gguf), gguf.GGUFReader(tiny_mixtral.gguf)
    assert header.data_offset == oracle.data_offset and header.alignment == oracle.alignment
    assert list(header.tensors) == [tensor.name for tensor in oracle.tensors]
    for tensor in oracle.tensors:
        ours = header.tensors[tensor.name]
        assert (ours.shape, ours.type_id, ours.offset, ours.nbytes) == (tuple(tensor.shape.tolist()[::-1]), tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
    for key, field in oracle.fields.items():
        if not key.startswith("GGUF."):
            ours, want = header.metadata[key], field.contents()
            assert (list(ours) if isinstance(ours, StringArray | np.ndarray) else ours) == want, key


def test_sizes_are_those_of_the_model_that_was_written(tiny_llama: TinyModel, tiny_mistral: TinyModel, tiny_mixtral: TinyModel) -> None:
    infos = [model_info(tiny.gguf, read_header(tiny.gguf)) for tiny in (tiny_llama, tiny_mistral, tiny_mixtral)]
    assert [info.architecture for info in infos] == ["llama"] * 3
    assert [(i.n_layers, i.n_heads, i.n_kv_heads, i.d_model, i.d_vocab, i.n_ctx) for i in infos] == [(3, 4, 2, 64, 320, 1024)] * 3
    assert [(i.d_head, i.d_mlp, i.n_experts, i.n_experts_used) for i in infos] == [(16, 96, 0, 0), (24, 112, 0, 0), (16, 48, 5, 2)]
    assert infos[0].quantization == "F32" and infos[0].weight_types == {"F32": len(read_header(tiny_llama.gguf).tensors)}
    assert infos[0].bos_id == 0 and infos[0].eos_id == 1 and infos[0].add_bos
    assert infos[0].n_bytes == 4 * infos[0].n_params < tiny_llama.gguf.stat().st_size


def test_a_valid_model_passes_so_the_refusals_below_are_for_what_they_change(tmp_path: Path) -> None:
    info = info_of(tmp_path, model_file())
    assert (info.n_layers, info.d_head, info.d_vocab, info.n_kv_heads) == (2, 2, 16, 2)
    ignored = info_of(tmp_path, model_file(tokenizer__ggml__bos_token_id=(U32, 0xFFFFFFFF)))
    assert ignored.bos_id is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general__architecture": None}, "general.architecture is missing"),
        ({"general__architecture": (U32, 3)}, "general.architecture is missing"),
        ({"general__architecture": (STR, "clip")}, "'clip', a vision or audio tower (mmproj); Layerscope runs decoders"),
        ({"general__architecture": (STR, "nomic-bert")}, "'nomic-bert', a text encoder; Layerscope runs decoders"),
        ({"general__type": (STR, "mmproj")}, "holds a vision or audio tower (mmproj), and no model"),
        ({"general__type": (STR, "imatrix")}, "holds an importance matrix for quantizing, and no model"),
        ({"general__type": (STR, "song")}, "holds something of the type 'song', and no model"),
        ({"general__type": (STR, "adapter")}, "holds a LoRA adapter, and no model"),
        ({"adapter__type": (STR, "lora"), "general__base_model__0__name": (STR, "Llama 3")}, "holds a LoRA adapter of Llama 3, and no model"),
        ({"general__architecture": (STR, "dream")}, "'dream', a diffusion language model"),
        ({"general__architecture": (STR, "eagle3")}, "'eagle3', a draft model"),
        ({"general__architecture": (STR, "gemma-embedding")}, "'gemma-embedding', an embedding model"),
        ({"general__architecture": (STR, "t5")}, "'t5', an encoder-decoder"),
        ({"general__architecture": (STR, "wavtokenizer-dec")}, "'wavtokenizer-dec', a vocoder"),
        ({"llama__attention__causal": (BOOL, False)}, "llama.attention.causal is false"),
        ({"llama__pooling_type": (U32, 3)}, "an embedding model (llama.pooling_type is 3)"),
        ({"split__count": (U16, 3)}, "part 1 of 3 by its keys"),
        ({"llama__block_count": (U32, 0)}, "block_count is 0, outside 1"),
        ({"llama__block_count": (U32, 1 << 31)}, "2,147,483,648"),
        ({"llama__block_count": (U32, 3)}, "no tensor of layer 2"),
        ({"llama__block_count": (U32, 1)}, "tensors of layer 1, and llama.block_count is 1"),
        ({"llama__block_count": (STR, "2")}, "not a whole number"),
        ({"llama__attention__head_count": (U32, 0)}, "head_count is 0"),
        ({"llama__attention__head_count": (U32, 3)}, "3 heads cannot share 2"),
        ({"llama__attention__head_count": (U32, 6)}, "cannot be divided among 6 heads"),
        ({"llama__attention__head_count": (U32, 1 << 31)}, "head_count is 2,147,483,648, outside 1 to"),
        ({"llama__attention__head_count_kv": (U32, 8)}, "4 heads cannot share 8 key/value heads"),
        ({"llama__attention__head_count_kv": (U32, 0)}, "head_count_kv is 0, outside 1"),
        ({"llama__attention__key_length": (U32, 0)}, "key_length is 0, outside 1"),
        ({"llama__attention__value_length": (U32, 3)}, "2 columns for keys and 3 for values, which llama models cannot have"),
        ({"llama__attention__head_count": (ARR, (U32, [4, 2]))}, "head_count differs between layers (4 in layer 0, 2 in layer 1), which is not supported"),
        ({"llama__attention__head_count_kv": (ARR, (I32, [2, 0]))}, "head_count_kv differs between layers (2 in layer 0, 0 in layer 1)"),
        ({"llama__attention__head_count": (ARR, (U32, []))}, "head_count is a list of 0 numbers, not a whole number"),
        ({"llama__attention__head_count": (ARR, (STR, ["4"]))}, "head_count is a list of 1 texts, not a whole number"),
        ({"llama__rope__dimension_count": (U32, 1)}, "rope.dimension_count is 1, outside 2 to 2"),
        ({"llama__attention__key_length": (U32, 8), "llama__rope__dimension_count": (U32, 4)}, "llama models turn all 8 columns of a head"),
        ({"llama__rope__scaling__type": (STR, "spiral")}, "rope.scaling.type is 'spiral', and none, linear, yarn, longrope are known"),
        ({"llama__block_count": (U32, 513)}, "block_count is 513, outside 1 to 512"),
        ({"llama__expert_count": (U32, 1025)}, "expert_count is 1,025, outside 0 to 1,024"),
        ({"llama__expert_used_count": (U32, 2)}, "expert_used_count is 2, outside 0 to 0"),
        ({"llama__expert_count": (U32, 4)}, "expert_used_count is missing"),
        ({"llama__expert_count": (U32, 4), "llama__expert_used_count": (U32, 2), "llama__expert_group_count": (U32, 3)}, "4 experts cannot be divided among 3"),
        ({"llama__expert_count": (U32, 4), "llama__expert_used_count": (U32, 2), "llama__expert_group_count": (U32, 2)}, "expert_group_used_count is missing"),
        ({"tokenizer__ggml__tokens": (ARR, (STR, ["a", "b"] * 8))}, "tokens 0 and 2 of tokenizer.ggml.tokens are both 'a'"),
        ({"llama__embedding_length": (U32, 0)}, "embedding_length is 0"),
        ({"llama__embedding_length": (U32, 16)}, "8 columns, and embedding_length is 16"),
        ({"llama__embedding_length": (U32, 1 << 31)}, "2,147,483,648"),
        ({"llama__context_length": None}, "context_length is missing"),
        ({"llama__attention__layer_norm_rms_epsilon": (F32, float("nan"))}, "not a positive number"),
        ({"llama__expert_count": (U32, 4), "llama__expert_used_count": (U32, 5)}, "expert_used_count is 5, outside 1 to 4"),
        ({"tokenizer__ggml__scores": (ARR, (U8, [0] * 16))}, "scores has the wrong type"),
        ({"tokenizer__ggml__scores": (ARR, (F32, [0.0] * 15))}, "15 entries, and the embedding has 16 rows"),
        ({"tokenizer__ggml__token_type": (ARR, (I32, [1] * 4))}, "4 entries"),
        ({"tokenizer__ggml__tokens": (ARR, (STR, ["a"]))}, "1 entries"),
        ({"tokenizer__ggml__tokens": (ARR, (U32, [1] * 16))}, "tokens has the wrong type"),
        ({"tokenizer__ggml__bos_token_id": (U32, 16)}, "bos_token_id is 16, outside 0 to 15"),
    ],
)
def test_sizes_that_cannot_be_true_are_refused_with_the_value(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(LayerscopeError) as refusal:
        info_of(tmp_path, model_file(**changes))
    assert words in str(refusal.value) and str(refusal.value).startswith("case.gguf ")


def test_a_model_without_an_embedding_or_with_a_layer_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LayerscopeError, match=r"no matrix token_embd\.weight"):
        info_of(tmp_path, model_file(tensors=model_tensors()[1:]))
    with pytest.raises(LayerscopeError, match="no tensor of layer 1"):
        info_of(tmp_path, model_file(tensors=model_tensors(1)))
    with pytest.raises(LayerscopeError, match="no matrix"):
        info_of(tmp_path, model_file(tensors=[Tensor("token_embd.weight", (8,)), *model_tensors()[1:]]))


def test_text_that_is_no_utf8_is_shown_with_replacement_characters(tmp_path: Path) -> None:
    words = [b"\xff\xfe"] + [f"t{i}".encode() for i in range(15)]
    header = read_header(write(tmp_path, model_file(tokenizer__ggml__tokens=(ARR, (STR, words)), general__name=(STR, b"\xc3("))))
    assert header.metadata["general.name"] == "\ufffd(" and header.metadata["tokenizer.ggml.tokens"][0] == "\ufffd\ufffd"


def test_a_long_list_of_empty_strings_takes_memory_of_the_files_order(tmp_path: Path) -> None:
    """A list of empty strings is the worst ratio of objects to bytes."""
    n = 100_000
    data = model_file(general__tags=(ARR, (STR, [b""] * n)))
    path = write(tmp_path, data)
    tracemalloc.start()
    try:
        header = read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(header.metadata["general.tags"]) == n and peak < 4 * len(data)


@pytest.mark.fuzz
@pytest.mark.timeout(300)  # none may hang
def test_ten_thousand_mutants_of_a_real_file(tiny_mixtral: TinyModel, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = np.frombuffer(tiny_mixtral.gguf.read_bytes(), np.uint8)
    head = read_header(tiny_mixtral.gguf).data_offset
    for _ in range(10_000):
        mutant = data.copy()
        mutant[rng.integers(0, head, rng.integers(1, 9))] = rng.integers(0, 256)
        path = write(tmp_path, mutant.tobytes())
        try:
            model_info(path, read_header(path))
        except LayerscopeError as refusal:
            assert "\n" not in str(refusal)

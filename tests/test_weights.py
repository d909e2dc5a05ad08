"""Claims about weights by name: both formats give the same numbers under the same names, and only what is asked for is read."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backend import weight_rows
from backend.engines.ggml import open_llama
from backend.errors import LayerscopeError
from backend.weights import open_weights
from tests.gguf_cases import STR, model_file
from tests.tiny_models import TinyModel, save_tiny

KINDS = ("llama", "mistral", "mixtral")


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module")
def quantized(tiny_llama: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama in Q8_0 by llama.cpp's own quantizer."""
    out, api = tmp_path_factory.mktemp("quantized") / "tiny-q8_0.gguf", open_llama()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = 7, 1
    assert api.llama_model_quantize(str(tiny_llama.gguf).encode(), str(out).encode(), ctypes.byref(params)) == 0
    return out


def test_both_formats_hold_the_same_names_and_the_same_numbers(tiny: TinyModel) -> None:
    ours, theirs = open_weights(tiny.gguf), open_weights(tiny.hf)
    assert list(ours) == list(theirs) and len(ours) >= 3 + 3 * 9
    for name in theirs:
        assert ours[name].dtype == np.float32
        assert np.array_equal(ours[name], theirs[name]), name


def test_names_mean_what_the_checkpoint_means(tiny: TinyModel) -> None:
    stored, ours = load_file(tiny.hf / "model.safetensors"), open_weights(tiny.gguf)
    block = "model.layers.1."
    expected = {
        "embed.W_E": stored["model.embed_tokens.weight"],
        "unembed.W_U": stored["lm_head.weight"],
        "ln_final.w": stored["model.norm.weight"],
        "blocks.1.ln1.w": stored[block + "input_layernorm.weight"],
        "blocks.1.ln2.w": stored[block + "post_attention_layernorm.weight"],
        **{f"blocks.1.attn.W_{x}": stored[f"{block}self_attn.{x.lower()}_proj.weight"] for x in "QKVO"},
    }
    if ours.info.is_moe:
        expected["blocks.1.mlp.W_router"] = stored[block + "block_sparse_moe.gate.weight"]
        for name, w in (("W_gate", "w1"), ("W_in", "w3"), ("W_out", "w2")):
            experts = [stored[f"{block}block_sparse_moe.experts.{e}.{w}.weight"] for e in range(5)]
            expected[f"blocks.1.mlp.experts.{name}"] = np.stack(experts)
    else:
        for name, projection in (("W_gate", "gate"), ("W_in", "up"), ("W_out", "down")):
            expected[f"blocks.1.mlp.{name}"] = stored[f"{block}mlp.{projection}_proj.weight"]
    for name, want in expected.items():
        assert np.array_equal(ours[name], want), name


def test_native_names_give_the_tensor_as_it_is_stored(tiny_llama: TinyModel) -> None:
    ours = open_weights(tiny_llama.gguf)
    for tensor in gguf.GGUFReader(tiny_llama.gguf).tensors:
        assert np.array_equal(ours[tensor.name], tensor.data), tensor.name
        assert tensor.name in ours.native_names and tensor.name in ours
    assert not np.array_equal(ours["blk.0.attn_q.weight"], ours["blocks.0.attn.W_Q"])  # reordered for RoPE by the converter
    assert np.array_equal(np.sort(ours["blk.0.attn_q.bias"]), np.sort(ours["blocks.0.attn.b_Q"]))


KEYS: list[Any] = [
    ..., 0, -1, slice(2, 5), slice(None, None, -3), (slice(4), slice(1, 9, 2)), (3, 5), (..., -1), ([3, 3, 0], slice(None, 4)), slice(0, 0),
]  # fmt: skip


def test_slices_are_numpys(tiny_mixtral: TinyModel, tiny_llama: TinyModel) -> None:
    for path in (tiny_mixtral.gguf, tiny_mixtral.hf, tiny_llama.gguf):
        opened = open_weights(path)
        for name in ("embed.W_E", "blocks.1.attn.W_Q", "blocks.2.mlp.experts.W_in", "ln_final.w", "blocks.0.attn.b_K"):
            if name not in opened:
                continue
            whole = opened[name]
            for key in KEYS:
                if isinstance(key, tuple) and len(key) > whole.ndim:
                    continue
                assert np.array_equal(opened.lazy(name)[key], whole[key]), (name, key)
    with pytest.raises(IndexError):
        opened.lazy("ln_final.w")[1, 2]
    with pytest.raises(IndexError):
        opened.lazy("embed.W_E")[10_000]


def test_only_the_rows_that_are_asked_for_are_read(tiny_mixtral: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    genuine = weight_rows._read_exactly
    monkeypatch.setattr(weight_rows, "_read_exactly", lambda fd, path, offset, n: (read.append(n), genuine(fd, path, offset, n))[1])
    for path in (tiny_mixtral.gguf, tiny_mixtral.hf):
        opened = open_weights(path)
        experts = opened.lazy("blocks.0.mlp.experts.W_out")
        assert (experts.shape, experts.dtype, experts.nbytes) == ((5, 64, 48), "F32", 4 * 5 * 64 * 48)
        assert not read
        experts[3, 10:12]
        assert sum(read) == 2 * 48 * 4
        read.clear()


def test_quantized_weights_are_dequantized_bit_for_bit_as_gguf_py_does(quantized: Path) -> None:
    opened = open_weights(quantized)
    for tensor in gguf.GGUFReader(quantized).tensors:
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(opened[tensor.name], want), tensor.name
        if want.ndim == 2:
            assert np.array_equal(opened.lazy(tensor.name)[5:7, 3:40], want[5:7, 3:40])
    assert opened.lazy("blocks.1.mlp.W_out").dtype == "Q8_0" and opened.lazy("blocks.1.mlp.W_out").nbytes == 64 * 96 // 32 * 34


def test_halves_are_read_exactly(tmp_path: Path, tiny_llama: TinyModel) -> None:
    """F16 and BF16 in safetensors: every bit pattern of a half is a float32."""
    import torch
    from safetensors.torch import save_file as save_torch

    folder = tmp_path / "half"
    shutil.copytree(tiny_llama.hf, folder)
    tensors = {name: torch.from_numpy(values) for name, values in load_file(folder / "model.safetensors").items()}
    for dtype in (torch.float16, torch.bfloat16):
        save_torch({name: values.to(dtype) for name, values in tensors.items()}, folder / "model.safetensors")
        got = open_weights(folder)
        assert np.array_equal(got["blocks.2.mlp.W_in"], tensors["model.layers.2.mlp.up_proj.weight"].to(dtype).float().numpy())


def test_a_tied_unembedding_is_there_under_both_names(tmp_path: Path) -> None:
    tied = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    for path in (tied.hf, tied.gguf):
        opened = open_weights(path)
        assert np.array_equal(opened["unembed.W_U"], opened["embed.W_E"])
        assert opened.lazy("unembed.W_U").native == opened.lazy("embed.W_E").native


def test_shards_are_one_model_and_a_shard_outside_the_folder_is_refused(tmp_path: Path, tiny_llama: TinyModel) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_llama.hf, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole, parts = open_weights(tiny_llama.hf), open_weights(folder)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    index["weight_map"][names[0]] = "../../etc/passwd.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LayerscopeError, match="no plain .safetensors file name"):
        open_weights(folder)


def test_a_name_that_does_not_exist_is_refused_and_is_not_contained(tiny_llama: TinyModel) -> None:
    opened = open_weights(tiny_llama.gguf)
    for name in ("blocks.3.attn.W_Q", "blocks.0.mlp.W_router", "nonsense"):
        assert name not in opened
        with pytest.raises(LayerscopeError, match=name):
            opened[name]


def test_a_file_that_shrinks_after_it_was_opened_is_an_error_and_no_crash(tiny_llama: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "shrinking.gguf"
    shutil.copy(tiny_llama.gguf, path)
    opened = open_weights(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(LayerscopeError, match=r"shrinking\.gguf became shorter"):
        for name in opened:
            opened[name]


def test_an_architecture_without_a_row_has_its_native_names_only(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(model_file(general__architecture=(STR, "mamba")).replace(b"llama.", b"mamba."))
    opened = open_weights(path)
    assert list(opened) == [] and opened["token_embd.weight"].shape == (16, 8)

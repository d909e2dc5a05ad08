"""The mixture of experts that is measured: a random Mixtral of 64 experts, 8 of which serve a token, made once under data/bench."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bench.models import FOLDER

N_LAYERS, N_EXPERTS, K = 12, 64, 8
SIZES = {
    "num_hidden_layers": N_LAYERS, "num_local_experts": N_EXPERTS, "num_experts_per_tok": K, "hidden_size": 512, "intermediate_size": 256, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 8192, "max_position_embeddings": 4096,
}  # fmt: skip
_NAME = f"mixtral-{N_LAYERS}x{SIZES['hidden_size']}-{N_EXPERTS}e"


def describe() -> str:
    attention, expert = 4 * SIZES["hidden_size"] ** 2, 3 * SIZES["hidden_size"] * SIZES["intermediate_size"]
    n_params = N_LAYERS * (attention + N_EXPERTS * expert) + 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    return (f"random Mixtral, {n_params / 1e6:,.0f} M parameters ({N_LAYERS} layers, d_model {SIZES['hidden_size']}, {N_EXPERTS} experts of d_mlp {SIZES['intermediate_size']}, "
            f"{K} a token, vocabulary {SIZES['vocab_size']:,})")  # fmt: skip


def hf_folder() -> Path:
    """The model as a folder of float32 safetensors, made on first use."""
    from tests.tiny_models import save_tiny

    folder = FOLDER / _NAME
    if folder.is_dir():
        return folder
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        save_tiny("mixtral", part, **SIZES)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def gguf_file() -> Path:
    """The same weights as a Q8_0 GGUF file, quantized by llama.cpp, made on first use."""
    from backend.files.demo import VARIANTS
    from backend.files.gguf_writer import write_gguf
    from backend.files.quantizer import run_quantizer

    out = FOLDER / f"{_NAME}-q8_0.gguf"
    if out.is_file():
        return out
    f16 = out.with_name(f".{out.name}.{os.getpid()}.f16")
    part, q8_0 = f16.with_suffix(".part"), VARIANTS["demo-moe-q8_0"].ftype
    assert q8_0 is not None
    try:
        write_gguf(hf_folder(), f16, ftype="f16")
        run_quantizer(f16, part, q8_0)
        part.rename(out)
    finally:
        f16.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    return out

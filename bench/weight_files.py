"""GGUF files for the measurements of the weight report: Llama's sizes, Q4_K blocks of random numbers, of any size on disk, made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from bench.models import FOLDER

D_MODEL, D_MLP, N_HEADS, N_KV_HEADS, D_VOCAB = 4096, 14336, 32, 8, 32000
_BLOCK, _BLOCK_BYTES = 256, 144


def shapes(n_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensor name -> shape (out, in) of an 8B Llama cut to `n_layers`, its vocabulary Llama 2's."""
    kv = D_MODEL // N_HEADS * N_KV_HEADS
    yield "token_embd.weight", (D_VOCAB, D_MODEL)
    for layer in range(n_layers):
        block = {
            "attn_norm": (D_MODEL,), "attn_q": (D_MODEL, D_MODEL), "attn_k": (kv, D_MODEL), "attn_v": (kv, D_MODEL), "attn_output": (D_MODEL, D_MODEL),
            "ffn_norm": (D_MODEL,), "ffn_gate": (D_MLP, D_MODEL), "ffn_up": (D_MLP, D_MODEL), "ffn_down": (D_MODEL, D_MLP),
        }  # fmt: skip
        yield from ((f"blk.{layer}.{name}.weight", shape) for name, shape in block.items())
    yield "output_norm.weight", (D_MODEL,)


def q4_k_file(n_layers: int, folder: Path = FOLDER) -> Path:
    """The file of that many layers (0.12 GB each), made on first use and then kept."""
    out = folder / f"llama-{n_layers}x{D_MODEL}-random-q4_k.gguf"
    if out.is_file():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        _write(part, n_layers)
        part.rename(out)
    finally:
        part.unlink(missing_ok=True)
    return out


def _write(path: Path, n_layers: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    for add, value in (
        (writer.add_context_length, 8192), (writer.add_embedding_length, D_MODEL), (writer.add_block_count, n_layers),
        (writer.add_feed_forward_length, D_MLP), (writer.add_head_count, N_HEADS), (writer.add_head_count_kv, N_KV_HEADS),
    ):  # fmt: skip
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    sizes = list(shapes(n_layers))
    for name, shape in sizes:
        n, quantized = int(np.prod(shape)), len(shape) > 1
        raw = gguf.GGMLQuantizationType.Q4_K if quantized else None
        stored = (*shape[:-1], shape[-1] // _BLOCK * _BLOCK_BYTES) if quantized else shape
        writer.add_tensor_info(name, stored, np.dtype(np.uint8 if quantized else np.float32), n // _BLOCK * _BLOCK_BYTES if quantized else 4 * n, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, shape in sizes:
        writer.write_tensor_data(_blocks(rng, int(np.prod(shape)) // _BLOCK) if len(shape) > 1 else 1 + 0.3 * rng.standard_normal(shape, np.float32))
    writer.close()


def _blocks(rng: np.random.Generator, n: int) -> np.ndarray:
    """n Q4_K blocks of random scales and values, (n, 144) bytes: block_q4_K of ggml is d, dmin (float16), 12 bytes of scales, 128 of values."""
    blocks = np.frombuffer(rng.bytes(n * _BLOCK_BYTES), np.uint8).reshape(n, _BLOCK_BYTES).copy()
    blocks[:, :4] = np.frombuffer(np.array([1e-4, 7.5e-4], np.float16).tobytes(), np.uint8)
    return blocks

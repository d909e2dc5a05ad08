"""The models that are measured: random Llama checkpoints, made once under data/bench, as Hugging Face folder and as GGUF.

Weights are drawn as in tests/tiny_models.py, large enough that attention is far from uniform: a uniform pattern would compress
to nothing and flatter the sizes of traces. Times do not depend on the values.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bench.measure import ROOT

FOLDER = ROOT / "data" / "bench"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama model, by transformers' names."""

    num_hidden_layers: int = 16
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    vocab_size: int = 16384
    max_position_embeddings: int = 8192

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, (out, in)."""
        d, m, v = self.hidden_size, self.intermediate_size, self.vocab_size
        kv = d // self.num_attention_heads * self.num_key_value_heads
        block = {
            "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m), "input_layernorm": (d,), "post_attention_layernorm": (d,),
        }  # fmt: skip
        blocks = {f"model.layers.{i}.{name}.weight": shape for i in range(self.num_hidden_layers) for name, shape in block.items()}
        return {"model.embed_tokens.weight": (v, d), **blocks, "model.norm.weight": (d,), "lm_head.weight": (v, d)}

    @property
    def n_params(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


BASE = Sizes()
# For growth curves: small enough that 4,096 tokens and 32 layers take seconds.
SMALL = Sizes(num_hidden_layers=8, hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=2, vocab_size=4096)


def hf_folder(sizes: Sizes = BASE) -> Path:
    """The model as a folder of float32 safetensors, made on first use."""
    from safetensors.numpy import save_file

    from tests.tiny_models import save_tokenizer

    folder = FOLDER / _name(sizes)
    if folder.is_dir():
        return folder
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        rng = np.random.default_rng(0)
        tensors = {name: _random(rng, shape) for name, shape in sizes.shapes.items()}
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        save_tokenizer(part)  # TransformerLens opens no model without one
        (part / "config.json").write_text(json.dumps(_config(sizes), indent=1))
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def gguf_file(sizes: Sizes = BASE) -> Path:
    """The same weights as a Q8_0 GGUF file, quantized by llama.cpp, made on first use."""
    from backend.files.demo import VARIANTS
    from backend.files.gguf_writer import write_gguf
    from backend.files.quantizer import run_quantizer

    out = FOLDER / f"{_name(sizes)}-q8_0.gguf"
    if out.is_file():
        return out
    folder, f16 = hf_folder(sizes), out.with_name(f".{out.name}.{os.getpid()}.f16")
    part = f16.with_suffix(".part")
    q8_0 = VARIANTS["demo-dense-q8_0"].ftype
    assert q8_0 is not None
    try:
        write_gguf(folder, f16, ftype="f16")
        run_quantizer(f16, part, q8_0)
        part.rename(out)
    finally:
        f16.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    return out


def random_ids(n: int, sizes: Sizes = BASE) -> list[int]:
    """n token ids, the same at every call; ids 0 and 1 are special."""
    return [int(i) for i in np.random.default_rng(1).integers(2, sizes.vocab_size, n)]


def describe(sizes: Sizes) -> str:
    return (
        f"random Llama, {sizes.n_params / 1e6:,.0f} M parameters ({sizes.num_hidden_layers} layers, d_model {sizes.hidden_size:,}, {sizes.num_attention_heads} heads, "
        f"{sizes.num_key_value_heads} key/value heads, d_mlp {sizes.intermediate_size:,}, vocabulary {sizes.vocab_size:,})"
    )


def _name(sizes: Sizes) -> str:
    return f"llama-{sizes.num_hidden_layers}x{sizes.hidden_size}-{sizes.n_params // 1000}k"


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    return values * np.float32(1.4 * shape[-1] ** -0.5) if len(shape) > 1 else 1 + np.float32(0.3) * values


def _config(sizes: Sizes) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "dtype": "float32",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1,
        "head_dim": sizes.hidden_size // sizes.num_attention_heads, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **asdict(sizes),
    }  # fmt: skip

"""How a PyTorch model is loaded: where its weights lie, and whether bitsandbytes stores them in fewer bits.

LLM.int8(): Dettmers et al., arXiv:2208.07339; NF4: Dettmers et al., arXiv:2305.14314. Both need bitsandbytes, accelerate and a CUDA
device; spreading a model over devices (device_map "auto") needs accelerate. What is missing is said in one sentence before anything
is loaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.engines import OpenOptions
from backend.errors import LayerscopeError
from backend.files.bounded_json import read_json
from backend.files.hf_config import CONFIG_LIMIT, bitsandbytes_bits

if TYPE_CHECKING:
    import torch

PACKED = "its values are packed in memory and not read"


def stored_bits(path: Path) -> str:
    """ "int8", "nf4" or "fp4" for a folder that bitsandbytes wrote, else ""."""
    return bitsandbytes_bits(read_json(path / "config.json", CONFIG_LIMIT).get("quantization_config"))


def quantization(options: OpenOptions, path: Path) -> str:
    """How the weights are stored once loaded: "int8", "nf4", "fp4", or "" for as they are.

    Raises LayerscopeError, naming every missing part, where that or the device map cannot be done here.
    """
    stored = stored_bits(path)
    if stored and options.quantize != "none":
        raise LayerscopeError(f"{path.name} is quantized to {stored} already and cannot be loaded as {options.quantize}.")
    bits = stored or (options.quantize if options.quantize != "none" else "")
    missing = missing_parts(bool(bits), options.device_map == "auto")
    if missing:
        what = f"{bits} weights of {path.name} need bitsandbytes, accelerate and a CUDA device" if bits else "A device map needs accelerate"
        raise LayerscopeError(f"{what}; missing here: {' and '.join(missing)}.")
    if bits and options.device not in ("auto", "cuda") and not options.device.startswith("cuda:"):
        raise LayerscopeError(f"{bits} weights of {path.name} need a CUDA device, and {options.device[:40]!r} was asked for.")
    return bits


def missing_parts(quantized: bool, spread: bool) -> list[str]:
    """What this machine lacks of what quantized weights, or a device map, need."""
    packages = [name for name, wanted in (("bitsandbytes", quantized), ("accelerate", quantized or spread)) if wanted and importlib.util.find_spec(name) is None]
    return packages + (["a CUDA device"] if quantized and not _has_cuda() else [])


def arguments(options: OpenOptions, bits: str, stored: bool, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told beyond the folder and the dtype; {} where the model is moved to `device` once it is loaded.

    stored: the folder's own configuration says how it is quantized.
    """
    if not bits and options.device_map != "auto":
        return {}
    here = f"cuda:{device.index or 0}" if device.type == "cuda" else str(device)
    found: dict[str, Any] = {"device_map": "auto" if options.device_map == "auto" else {"": here}}
    if bits and not stored:
        found["quantization_config"] = _bitsandbytes(bits, options.dtype)
    return found


def _bitsandbytes(bits: str, dtype: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if bits == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    half = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float16
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=half if dtype == "auto" else getattr(torch, dtype))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()

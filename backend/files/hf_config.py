"""What is known of a Hugging Face model folder from config.json and the safetensors headers alone: no torch, no weights read.

The shelf of models, the estimate before a run and the weights reader stand on this module, so it is written for files that
nobody vouches for: every length is bounded before it is believed, and everything that could run code (remote code named in
`auto_map`, pickled weights) is refused here, by name, before transformers sees the folder.

    model_info(folder)          -> ModelInfo
    check_folder(folder)        -> Folder: its config, its shards and their headers, or one sentence

What its config's keys are called is in hf_keys, a file's header in safetensors_header.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backend.errors import LayerscopeError
from backend.files.bounded_json import read_json
from backend.files.hf_keys import ARCHITECTURES, ConfigKeys
from backend.files.hf_types import GENERIC_TYPES, generic_keys
from backend.files.model_kinds import refuse_config, refuse_folder
from backend.files.safetensors_header import TensorEntry, safetensors_header
from backend.model_info import ModelInfo
from backend.weight_names import HF_NAMES

CONFIG_LIMIT = 4 << 20  # bytes of config.json, tokenizer_config.json
INDEX_LIMIT = 64 << 20  # bytes of model.safetensors.index.json
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Sizes that no real model exceeds: beyond them a config is a mistake or an attack, and is refused before anything is allocated.
GENERIC_CONTEXT = 2048  # tokens, where no row says which key holds the limit and no usual one does
_LIMITS = {
    "n_layers": 1_000, "n_heads": 1_024, "n_kv_heads": 1_024, "d_model": 131_072, "d_head": 8_192, "d_mlp": 1_048_576,
    "d_vocab": 4_194_304, "n_ctx": 1 << 26, "n_experts": 1_024, "n_experts_used": 1_024, "sliding_window": 1 << 26,
    "n_dense_layers": 1_000, "d_head_v": 8_192, "d_kv_latent": 131_072,
}  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """A model folder that passed every check: its config and, per shard file, the tensors it holds."""

    path: Path
    config: dict[str, Any]
    keys: ConfigKeys
    shards: dict[Path, dict[str, TensorEntry]]

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        return {name: entry for shard in self.shards.values() for name, entry in shard.items()}


def model_info(path: Path) -> ModelInfo:
    """ModelInfo of the folder at `path`, from its headers.

    `add_bos` is what tokenizer_config.json says, False where it says nothing; the engine replaces it by what the tokenizer does.
    Raises LayerscopeError with one sentence for a folder that cannot be run.
    """
    folder = check_folder(path)
    sizes = _sizes(folder.config, folder.keys, path.name)
    _check_shapes(folder, sizes)
    entries = folder.tensors.values()
    elements = Counter[str]()
    for entry in entries:
        elements[entry.dtype] += math.prod(entry.shape)
    tokenizer = read_json(path / "tokenizer_config.json", CONFIG_LIMIT) if (path / "tokenizer_config.json").is_file() else {}
    rope = folder.config.get("rope_parameters") or {}
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    return ModelInfo(
        name=path.name,
        source=str(path),
        engine="hf",
        architecture=folder.config["model_type"],
        norm_eps=_number(folder.config, folder.keys.norm_eps, 1e-6, path.name),
        rope_theta=_number({"rope_theta": theta or folder.config.get("rope_theta")}, "rope_theta", 10000.0, path.name),
        bos_id=_token_id(folder.config.get("bos_token_id")),
        eos_id=_token_id(folder.config.get("eos_token_id")),
        add_bos=tokenizer.get("add_bos_token") is True,
        quantization=bitsandbytes_bits(folder.config.get("quantization_config")) or (elements.most_common(1)[0][0] if elements else ""),
        n_params=sum(elements.values()),
        n_bytes=sum(entry.stop - entry.start for entry in entries),
        weight_types=dict(Counter(entry.dtype for entry in entries)),
        **sizes,
    )


def check_folder(path: Path) -> Folder:
    """Read and check a model folder's headers.

    Raises LayerscopeError: no folder, no config.json, remote code, pickle-only weights, an architecture that is no decoder of text
    or that transformers does not know, quantised weights, or a config or header that is damaged.
    """
    if not path.is_dir():
        raise LayerscopeError(f"There is no model folder {path.name!r}.")
    refuse_folder(path)
    if not (path / "config.json").is_file():
        raise LayerscopeError(f"The folder {path.name!r} is no model: it has no config.json.")
    config = read_json(path / "config.json", CONFIG_LIMIT)
    refuse_config(path.name, config)
    tokenizer = read_json(path / "tokenizer_config.json", CONFIG_LIMIT) if (path / "tokenizer_config.json").is_file() else {}
    for name, data in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if data.get("auto_map") or data.get("trust_remote_code"):
            raise LayerscopeError(f"{path.name} asks to run code of its own (auto_map in {name}), which Layerscope never does.")
    keys = _architecture(config, path.name)
    _check_quantization(config.get("quantization_config"), path.name)
    return Folder(path, config, keys, {shard: safetensors_header(shard) for shard in shard_paths(path)})


def bitsandbytes_bits(quantization: Any) -> str:
    """ "int8", "nf4" or "fp4" for a quantization_config of bitsandbytes, "" for any other value."""
    if not isinstance(quantization, dict) or quantization.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return ""
    if quantization.get("load_in_8bit") is True:
        return "int8"
    return str(quantization.get("bnb_4bit_quant_type", "fp4"))[:8] if quantization.get("load_in_4bit") is True else ""


def _check_quantization(quantization: Any, name: str) -> None:
    """Raise LayerscopeError unless the weights are plain, or stored by bitsandbytes where the packages to read them are installed."""
    if not quantization:
        return
    method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else "unnamed"
    if not bitsandbytes_bits(quantization):
        raise LayerscopeError(f"{name} holds quantised weights (quantization_config: {str(method)[:40]}); the PyTorch engine reads plain safetensors and bitsandbytes.")
    missing = [package for package in ("bitsandbytes", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise LayerscopeError(f"{name} holds quantised weights of bitsandbytes, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed.")


def shard_paths(path: Path) -> list[Path]:
    """The safetensors files of a model folder. Shard names in the index are plain file names: no folder, no parent.

    Raises LayerscopeError where there are none, naming the pickle files there are instead, and where a shard is missing.
    """
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not index.is_file():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix.lower() in PICKLE_SUFFIXES)
        if pickles:
            raise LayerscopeError(f"{path.name} holds only pickled weights ({pickles[0]}), which can run code when read; convert them to safetensors.")
        raise LayerscopeError(f"The folder {path.name!r} has no weights: neither model.safetensors nor model.safetensors.index.json.")
    weight_map = read_json(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LayerscopeError(f"{index.name} of {path.name} has no weight_map.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise LayerscopeError(f"{index.name} of {path.name} names a shard {name[:80]!r}, which is no plain .safetensors file name.")
        if not (path / name).is_file():
            raise LayerscopeError(f"{path.name} lacks the shard {name!r} that its index names.")
    return [path / name for name in names]


def _architecture(config: Mapping[str, Any], name: str) -> ConfigKeys:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in {*ARCHITECTURES, *GENERIC_TYPES}:
        raise LayerscopeError(f"{name} has the architecture {str(model_type)[:40]!r}; the PyTorch engine runs {', '.join(ARCHITECTURES)}, and in part "
                              f"{len(GENERIC_TYPES - set(ARCHITECTURES))} more decoders of text that transformers knows.")  # fmt: skip
    classes = config.get("architectures") or []
    if classes and not any(str(c).endswith(("ForCausalLM", "LMHeadModel")) for c in classes):
        raise LayerscopeError(f"{name} is a {str(classes[0])[:60]}, not a language model that predicts the next token (ForCausalLM).")
    keys = ARCHITECTURES.get(model_type) or replace(ConfigKeys(mlp_ratio=4, embed="", generic=True), **generic_keys(config))
    for key, needed in keys.requires:
        if config.get(key, needed) != needed:
            raise LayerscopeError(f"{name} has {key} = {str(config[key])[:40]}; {model_type} models run with {needed} only.")
    return keys


def _sizes(config: Mapping[str, Any], keys: ConfigKeys, name: str) -> dict[str, int]:
    """Every size of ModelInfo, each between 1 (0 where it may be absent) and its limit, and fitting together."""

    def size(field: str, key: str | None, default: int | None = None) -> int:
        value = config.get(key) if key else None
        if keys.generic and isinstance(value, list) and value and all(type(item) is int for item in value):
            value = max(value)
        value = default if value is None else value
        low = 0 if default == 0 else 1
        if type(value) is not int or not low <= value <= _LIMITS[field]:
            raise LayerscopeError(f"config.json of {name} has {key or field} = {str(value)[:40]}; it must be a whole number from {low} to {_LIMITS[field]:,}.")
        return value

    sizes = {field: size(field, getattr(keys, field)) for field in ("n_layers", "d_model")}
    sizes["n_heads"] = size("n_heads", keys.n_heads, None if keys.n_heads else 0)  # mamba and the like have none
    sizes["n_ctx"] = size("n_ctx", keys.n_ctx, GENERIC_CONTEXT if keys.generic else None)
    sizes["d_mlp"] = size("d_mlp", keys.d_mlp, keys.mlp_ratio and keys.mlp_ratio * sizes["d_model"])
    sizes["d_vocab"] = size("d_vocab", "vocab_size")
    sizes["n_kv_heads"] = size("n_kv_heads", keys.n_kv_heads, sizes["n_heads"])
    if isinstance(keys.d_head, tuple):
        sizes["d_head"] = sum(size("d_head", key) for key in keys.d_head)
    elif config.get(keys.d_head) is None and sizes["n_heads"] and sizes["d_model"] % sizes["n_heads"]:
        raise LayerscopeError(f"config.json of {name}: d_model {sizes['d_model']} is no multiple of its {sizes['n_heads']} heads.")
    else:
        sizes["d_head"] = size("d_head", keys.d_head, (sizes["d_model"] // sizes["n_heads"] or 1) if sizes["n_heads"] else 0)
    d_head_v = size("d_head_v", keys.d_head_v) if keys.d_head_v else 0
    sizes["d_head_v"] = d_head_v if d_head_v != sizes["d_head"] else 0
    sizes["d_kv_latent"] = sum(size("d_kv_latent", key) for key in keys.d_kv_latent)
    if sizes["n_kv_heads"] and sizes["n_heads"] % sizes["n_kv_heads"]:
        raise LayerscopeError(f"config.json of {name}: {sizes['n_heads']} heads cannot share {sizes['n_kv_heads']} key/value heads evenly.")
    n_experts = keys.n_experts_alias if keys.n_experts and config.get(keys.n_experts) is None and keys.n_experts_alias in config else keys.n_experts
    for field, key in (("n_experts", n_experts), ("n_experts_used", keys.n_experts_used)):
        sizes[field] = size(field, key, 0 if keys.generic else None) if key else 0
    if keys.generic:  # a dense model of a type that can have experts says how many of its 0 experts would answer
        sizes["n_experts_used"] = min(sizes["n_experts_used"], sizes["n_experts"])
    if sizes["n_experts_used"] > sizes["n_experts"]:
        raise LayerscopeError(f"config.json of {name} uses {sizes['n_experts_used']} experts a token, but has {sizes['n_experts']}.")
    sizes["n_dense_layers"] = min(size("n_dense_layers", keys.n_dense_layers, 0), sizes["n_layers"]) if keys.n_dense_layers else 0
    if keys.d_expert and not sizes["n_dense_layers"]:
        sizes["d_mlp"] = size("d_mlp", keys.d_expert)
    windowed = keys.sliding_window_if is None or config.get(keys.sliding_window_if) is True
    sizes["sliding_window"] = size("sliding_window", keys.sliding_window, 0) if windowed else 0
    return sizes


def _number(config: Mapping[str, Any], key: str, default: float, name: str) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
        raise LayerscopeError(f"config.json of {name} has {key} = {str(value)[:40]}; it must be a positive number.")
    return float(value)


def _token_id(value: Any) -> int | None:
    """A config gives one id, a list of them, or null; the first stands for the list."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if type(value) is int and value >= 0 else None


def _check_shapes(folder: Folder, sizes: Mapping[str, int]) -> None:
    """Hold the layers and the matrices at both ends and of the first layer's heads against the sizes, before memory is taken for them.

    What else does not fit, transformers reports when it loads the weights.
    """
    name, tensors, d_model = folder.path.name, folder.tensors, sizes["d_model"]
    present = {next((part for part in tensor.split(".") if part.isdecimal()), "") for tensor in tensors} - {""}
    absent = set(range(sizes["n_layers"])) - {int(layer) for layer in present}
    if present and absent:
        raise LayerscopeError(f"{name} does not fit its config.json: {folder.keys.n_layers} = {sizes['n_layers']}, and the tensors of layer {min(absent)} are missing.")
    q, kv = sizes["n_heads"] * sizes["d_head"], sizes["n_kv_heads"] * sizes["d_head"]
    z = sizes["n_heads"] * (sizes["d_head_v"] or sizes["d_head"])
    names = {"embed.W_E": folder.keys.embed} | dict(HF_NAMES.get(folder.config["model_type"], {}))
    shapes = {"embed.W_E": (sizes["d_vocab"], d_model), "unembed.W_U": (sizes["d_vocab"], d_model)}
    shapes |= {f"blocks.{{}}.attn.W_{x}": (rows, d_model) for x, rows in (("Q", q), ("K", kv), ("V", kv))} | {"blocks.{}.attn.W_O": (d_model, z)}
    for canonical, want in shapes.items():
        stored = names.get(canonical)
        if not isinstance(stored, str):
            continue  # a part of a fused or transposed matrix
        stored = stored.replace("{}", "0")
        # A checkpoint that was saved without its output matrix leaves out the first part of every name.
        entry = tensors.get(stored) or tensors.get(stored.partition(".")[2])
        if entry is not None and entry.shape != want:
            raise LayerscopeError(f"{name}: {stored} has shape {list(entry.shape)}, but config.json says {list(want)}.")

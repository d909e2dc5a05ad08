"""What is known of a Hugging Face model folder from config.json and the safetensors headers alone: no torch, no weights read.

The shelf of models, the estimate before a run and the weights reader stand on this module, so it is written for files that
nobody vouches for: every length is bounded before it is believed, and everything that could run code (remote code named in
`auto_map`, pickled weights) is refused here, by name, before transformers sees the folder.

    model_info(folder)          -> ModelInfo
    check_folder(folder)        -> Folder: its config, its shards and their headers, or one sentence
    safetensors_header(path)    -> names, dtypes, shapes and byte ranges of one file
"""

from __future__ import annotations

import importlib.util
import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backend.errors import LayerscopeError
from backend.files.hf_types import GENERIC_TYPES, generic_keys
from backend.files.model_kinds import refuse_config, refuse_folder
from backend.files.stand_ins import SHOWN_BYTES, stand_in
from backend.model_info import ModelInfo
from backend.weight_names import HF_NAMES

CONFIG_LIMIT = 4 << 20  # bytes of config.json, tokenizer_config.json
INDEX_LIMIT = 64 << 20  # bytes of model.safetensors.index.json
HEADER_LIMIT = 100_000_000  # bytes; the cap of the safetensors format itself
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Bytes of one element for every dtype name of the safetensors format that a model here can be stored in.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class ConfigKeys:
    """Where one architecture's config.json keeps what ModelInfo wants; one row an architecture."""

    n_layers: str = "num_hidden_layers"
    n_heads: str = "num_attention_heads"
    n_kv_heads: str = "num_key_value_heads"
    d_model: str = "hidden_size"
    d_head: str | tuple[str, ...] = "head_dim"  # several: their sum
    d_head_v: str | None = None
    d_kv_latent: tuple[str, ...] = ()
    d_mlp: str = "intermediate_size"
    d_expert: str | None = None  # where layers of both kinds can be: the width of an expert
    n_dense_layers: str | None = None
    n_ctx: str = "max_position_embeddings"
    norm_eps: str = "rms_norm_eps"
    n_experts: str | None = None
    n_experts_alias: str | None = None  # transformers 5 writes another name than the model's makers did
    n_experts_used: str | None = None
    sliding_window: str | None = None
    sliding_window_if: str | None = None  # it counts only where this is true
    tied: bool = False  # whether embedding and output matrix are one where the config leaves it out
    mlp_ratio: int | None = None  # d_mlp / d_model where the config leaves d_mlp out
    requires: tuple[tuple[str, object], ...] = ()  # what else must be set so: variants that would need other sites
    embed: str = "model.embed_tokens.weight"  # its tensor: (d_vocab, d_model)
    generic: bool = False  # no row: keys found by their usual names; a size may be absent, or a list with one value a layer


# Every head has keys and values of its own, made from what all share: so there are as many key/value heads as heads.
_DEEPSEEK = ConfigKeys(
    n_kv_heads="num_attention_heads", d_head=("qk_nope_head_dim", "qk_rope_head_dim"), d_head_v="v_head_dim",
    d_kv_latent=("kv_lora_rank", "qk_rope_head_dim"), d_expert="moe_intermediate_size", n_dense_layers="first_k_dense_replace",
    n_experts="n_routed_experts", n_experts_used="num_experts_per_tok",
)  # fmt: skip

# The architectures that the PyTorch engine runs, by config.json's `model_type`; backend.engines.hf_sites has a row for each.
ARCHITECTURES: dict[str, ConfigKeys] = {
    "llama": ConfigKeys(),
    "mistral": ConfigKeys(sliding_window="sliding_window"),
    "mixtral": ConfigKeys(n_experts="num_local_experts", n_experts_used="num_experts_per_tok", sliding_window="sliding_window"),
    "qwen2": ConfigKeys(sliding_window="sliding_window", sliding_window_if="use_sliding_window"),
    "qwen3": ConfigKeys(sliding_window="sliding_window", sliding_window_if="use_sliding_window"),
    "smollm3": ConfigKeys(sliding_window="sliding_window", sliding_window_if="use_sliding_window"),
    "olmo2": ConfigKeys(),
    "gemma2": ConfigKeys(sliding_window="sliding_window", tied=True),
    "gemma3_text": ConfigKeys(sliding_window="sliding_window", tied=True),
    "qwen3_moe": ConfigKeys(
        sliding_window="sliding_window", sliding_window_if="use_sliding_window", d_mlp="moe_intermediate_size",
        n_experts="num_experts", n_experts_alias="num_local_experts", n_experts_used="num_experts_per_tok",
        requires=(("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    ),
    "qwen2_moe": ConfigKeys(
        sliding_window="sliding_window", sliding_window_if="use_sliding_window", d_mlp="moe_intermediate_size",
        n_experts="num_experts", n_experts_alias="num_local_experts", n_experts_used="num_experts_per_tok",
        requires=(("decoder_sparse_step", 1), ("mlp_only_layers", [])),
    ),
    "olmoe": ConfigKeys(n_experts="num_experts", n_experts_alias="num_local_experts", n_experts_used="num_experts_per_tok"),
    "phi3": ConfigKeys(sliding_window="sliding_window"),
    "gpt2": ConfigKeys(
        n_layers="n_layer", n_heads="n_head", d_model="n_embd", d_mlp="n_inner", n_ctx="n_positions", norm_eps="layer_norm_epsilon",
        tied=True, mlp_ratio=4, requires=(("add_cross_attention", False),), embed="transformer.wte.weight",
    ),
    "starcoder2": ConfigKeys(tied=True, norm_eps="norm_epsilon", sliding_window="sliding_window"),
    "stablelm": ConfigKeys(norm_eps="layer_norm_eps"),
    "granite": ConfigKeys(),
    "gpt_oss": ConfigKeys(n_experts="num_local_experts", n_experts_used="num_experts_per_tok", sliding_window="sliding_window"),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}

# Sizes that no real model exceeds: beyond them a config is a mistake or an attack, and is refused before anything is allocated.
GENERIC_CONTEXT = 2048  # tokens, where no row says which key holds the limit and no usual one does
_LIMITS = {
    "n_layers": 1_000, "n_heads": 1_024, "n_kv_heads": 1_024, "d_model": 131_072, "d_head": 8_192, "d_mlp": 1_048_576,
    "d_vocab": 4_194_304, "n_ctx": 1 << 26, "n_experts": 1_024, "n_experts_used": 1_024, "sliding_window": 1 << 26,
    "n_dense_layers": 1_000, "d_head_v": 8_192, "d_kv_latent": 131_072,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: bytes `start` to `stop` of the file, row-major."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


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


def safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, without reading any: name -> TensorEntry, byte ranges counted from the file's start.

    Checked as the format demands (https://github.com/huggingface/safetensors, "Format"): header at most 100 MB and inside the
    file, known dtypes, byte ranges that fit the shapes and fill the file without hole or overlap.
    Raises LayerscopeError naming the file and what is wrong.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if instead := stand_in(file.read(SHOWN_BYTES)):
            raise LayerscopeError(f"{path.name} of {path.parent.name} is no safetensors file: it is {instead}.")
        file.seek(0)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise LayerscopeError(f"{path.name} is truncated: it has {size} bytes, fewer than the 8 of a safetensors prefix.")
        (length,) = struct.unpack("<Q", prefix)
        if length > HEADER_LIMIT:
            raise LayerscopeError(f"The header of {path.name} claims {length:,} bytes; at most {HEADER_LIMIT:,} are allowed.")
        if 8 + length > size:
            raise LayerscopeError(f"{path.name} is truncated: its header ends at byte {8 + length:,}, the file has {size:,}.")
        header = parse_json(file.read(length), f"The header of {path.name}")
    header.pop("__metadata__", None)
    entries = {name: _entry(path.name, name, row, 8 + length) for name, row in header.items()}
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise LayerscopeError(f"{path.name} is damaged: tensor {name[:80]!r} starts at byte {entry.start:,}, expected {at:,}.")
        at = entry.stop
        if at > size:
            raise LayerscopeError(f"{path.name} is truncated: tensor {name[:80]!r} ends at byte {at:,}, the file has {size:,}.")
    return entries


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; raises LayerscopeError otherwise."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise LayerscopeError(f"{path.name} of {path.parent.name} has more than the {limit:,} bytes allowed.")
    if not data.lstrip().startswith(b"{") and (instead := stand_in(data[:SHOWN_BYTES])):
        raise LayerscopeError(f"{path.name} of {path.parent.name} is no valid JSON: it is {instead}.")
    return parse_json(data, f"{path.name} of {path.parent.name}")


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """One JSON object from untrusted bytes. Duplicate keys are refused: two readers could each believe another one."""
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise LayerscopeError(f"{what} is no valid JSON: {str(error)[:120]}.") from None
    if not isinstance(value, dict):
        raise LayerscopeError(f"{what} holds a JSON {type(value).__name__}, not an object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _entry(file: str, name: str, row: Any, data_start: int) -> TensorEntry:
    """Check one row of a safetensors header; offsets become positions in the file."""
    where = f"Tensor {name[:80]!r} of {file}"
    dtype, shape, offsets = (row.get(key) for key in ("dtype", "shape", "data_offsets")) if isinstance(row, dict) else (None, None, None)
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise LayerscopeError(f"{where} has dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPE_BYTES)}.")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise LayerscopeError(f"{where} has no valid shape: {str(shape)[:80]}.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise LayerscopeError(f"{where} has no valid data_offsets: {str(offsets)[:80]}.")
    need = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != need:
        raise LayerscopeError(f"{where} has {offsets[1] - offsets[0]:,} bytes, but its shape {shape} in {dtype} needs {need:,}.")
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


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

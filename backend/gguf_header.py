"""A bounded reader of GGUF headers: what the file says about itself, checked before llama.cpp is allowed to see it.

Pure Python over ordinary reads (no mapping, so that a file that shrinks is a short read and not a SIGBUS), because the web process
lists models from here and llama.cpp itself aborts or overruns on crafted files. Every count and length is held against a limit and
against the bytes that are left before anything is allocated; every rejection is one LayerscopeError.

    read_header(path)           -> GgufHeader: metadata, tensors (name, shape, type, place), nothing of the weights
    model_info(path, header)    -> ModelInfo: sizes of the model, held against each other and against the tensors

The layout is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, overload

import numpy as np

from backend.errors import LayerscopeError
from backend.ggml_types import FILE_TYPES, GGML_TYPES
from backend.model_info import ModelInfo

MAX_KEYS = 65_536
MAX_TENSORS = 1_000_000
MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 10 << 20
MAX_STRINGS = 4_000_000  # in one array; the largest merge tables have about half a million
MAX_METADATA_BYTES = 512 << 20
MAX_TENSOR_NAME_BYTES = 63  # ggml's GGML_MAX_NAME, less the final zero
MAX_ALIGNMENT = 1 << 20
MAX_LAYERS, MAX_WIDTH, MAX_VOCAB, MAX_EXPERTS = 4096, 1 << 20, 1 << 24, 4096

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY, _UINT32 = 8, 9, 4

# What is no text generator: encoders, vision towers, vocoders. llama.cpp loads some of them; there is no next token to look at.
_NOT_GENERATORS = frozenset(
    ("clip", "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "jina-bert-v2", "jina-bert-v3", "t5", "t5encoder", "gemma-embedding", "wavtokenizer-dec")
)


class TensorInfo(NamedTuple):
    """One tensor of the file. `shape` is NumPy's order (the reverse of ggml's ne); `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    offset: int
    nbytes: int


class StringArray(Sequence[str]):
    """An array of strings from the metadata, decoded when looked at; bytes that are no UTF-8 become U+FFFD."""

    def __init__(self, raw: list[bytes]) -> None:
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [text.decode("utf-8", "replace") for text in self.raw[index]]
        return self.raw[index].decode("utf-8", "replace")


@dataclass(frozen=True)
class GgufHeader:
    """`metadata` values are int, float, bool, str, a NumPy array of numbers or a StringArray. Tensors keep the order of the file."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_offset: int
    alignment: int
    file_size: int


class _Reader:
    """Bounded little-endian reads; a length is checked against what is left before it is read."""

    def __init__(self, file: BinaryIO, size: int, label: str) -> None:
        self.file, self.size, self.label, self.at = file, size, label, 0

    def refuse(self, what: str) -> NoReturn:
        raise LayerscopeError(f"{self.label} is not a valid GGUF file: {what}.")

    @property
    def left(self) -> int:
        return self.size - self.at

    def take(self, n: int, what: str) -> bytes:
        data = self.file.read(n) if n <= self.left else b""
        if len(data) != n:
            raise LayerscopeError(f"{self.label} is truncated: {what} at byte {self.at:,} needs {n:,} bytes, the file has {max(self.left, 0):,} more.")
        self.at += n
        return data

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def string(self, limit: int, what: str) -> bytes:
        length = self.number("<Q", f"the length of {what}")
        if length > limit:
            self.refuse(f"{what} is {length:,} bytes long, the limit is {limit:,}")
        return self.take(length, what)


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of the GGUF file at `path`.

    Raises LayerscopeError when the file is missing, no GGUF, truncated, or breaks a rule of the format or a limit of this module.
    Time and memory are at most proportional to the header's size in the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _parse(_Reader(file, os.fstat(file.fileno()).st_size, path.name))
    except OSError as error:
        raise LayerscopeError(f"{path} cannot be read: {error.strerror or error}.") from None


def _parse(reader: _Reader) -> GgufHeader:
    if (magic := reader.take(4, "the magic")) != b"GGUF":
        reader.refuse(f"it begins with {magic!r}, not with b'GGUF'")
    version = reader.number("<I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        reader.refuse("it is big-endian" if swapped in (2, 3) else f"its version is {version}, and versions 2 and 3 are known")
    n_tensors, n_keys = reader.number("<q", "the number of tensors"), reader.number("<q", "the number of keys")
    # The smallest key takes 14 bytes (length, one letter, type, value), the smallest tensor 32.
    for what, count, limit, smallest in (("tensors", n_tensors, MAX_TENSORS, 32), ("keys", n_keys, MAX_KEYS, 14)):
        if not 0 <= count <= limit:
            reader.refuse(f"it declares {count:,} {what}, the limit is {limit:,}")
        if count * smallest > reader.left:
            raise LayerscopeError(f"{reader.label} is truncated: it declares {count:,} {what}, and only {reader.left:,} bytes follow.")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key, value = _read_pair(reader)
        if key in metadata:
            reader.refuse(f"the key {key[:80]!r} stands there twice")
        metadata[key] = value
    alignment = metadata.get("general.alignment", 32)
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        reader.refuse(f"general.alignment is {alignment:,}, not a power of two up to {MAX_ALIGNMENT:,}")
    declared = [_read_tensor(reader) for _ in range(n_tensors)]
    data_offset = -(-reader.at // alignment) * alignment
    return GgufHeader(version, metadata, _place(reader, declared, data_offset, alignment), data_offset, alignment, reader.size)


def _read_pair(reader: _Reader) -> tuple[str, Any]:
    raw = reader.string(MAX_KEY_BYTES, "a key")
    try:
        key = raw.decode("utf-8")
    except UnicodeDecodeError:
        reader.refuse(f"the key {raw[:40]!r} is not UTF-8")
    if not key:
        reader.refuse("it has an empty key")
    what = f"the value of {key[:80]!r}"
    kind = reader.number("<I", f"the type of {key[:80]!r}")
    if key == "general.alignment" and kind != _UINT32:
        reader.refuse(f"general.alignment has type {kind}, it must be uint32 ({_UINT32})")
    if reader.at > MAX_METADATA_BYTES:
        reader.refuse(f"its metadata is larger than {MAX_METADATA_BYTES:,} bytes")
    if kind == _STRING:
        return key, reader.string(MAX_STRING_BYTES, what).decode("utf-8", "replace")
    if kind == _ARRAY:
        return key, _read_array(reader, what)
    if kind not in _SCALARS:
        reader.refuse(f"{what} has type {kind}, which does not exist")
    return key, reader.number(_SCALARS[kind], what)


def _read_array(reader: _Reader, what: str) -> Any:
    kind, count = reader.number("<I", what), reader.number("<Q", what)
    if kind == _ARRAY:
        reader.refuse(f"{what} is an array of arrays")
    if kind != _STRING and kind not in _SCALARS:
        reader.refuse(f"{what} is an array of type {kind}, which does not exist")
    width = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind])
    if count * width > reader.left:
        raise LayerscopeError(f"{reader.label} is truncated: {what} declares {count:,} items, and only {reader.left:,} bytes follow.")
    if count * width > MAX_METADATA_BYTES or (kind == _STRING and count > MAX_STRINGS):
        reader.refuse(f"{what} has {count:,} items, more than the limits ({MAX_STRINGS:,} strings, {MAX_METADATA_BYTES:,} bytes) allow")
    if kind != _STRING:
        return np.frombuffer(reader.take(count * width, what), dtype=_SCALARS[kind])
    items = []
    for _ in range(count):
        items.append(reader.string(MAX_STRING_BYTES, what))
        if reader.at > MAX_METADATA_BYTES:
            reader.refuse(f"its metadata is larger than {MAX_METADATA_BYTES:,} bytes")
    return StringArray(items)


def _read_tensor(reader: _Reader) -> TensorInfo:
    """One tensor as declared; `offset` is still relative to the data, `_place` makes it absolute."""
    raw = reader.string(MAX_TENSOR_NAME_BYTES, "a tensor name")
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        reader.refuse(f"the tensor name {raw!r} is not UTF-8")
    n_dims = reader.number("<I", f"the dimensions of {name!r}")
    if not 1 <= n_dims <= 4:
        reader.refuse(f"tensor {name!r} has {n_dims:,} dimensions, and 1 to 4 are possible")
    ne = struct.unpack(f"<{n_dims}q", reader.take(8 * n_dims, f"the shape of {name!r}"))
    type_id, offset = reader.number("<I", f"the type of {name!r}"), reader.number("<Q", f"the offset of {name!r}")
    if min(ne) < 1:
        reader.refuse(f"tensor {name!r} has the shape {ne}, and every dimension must be at least 1")
    if math.prod(ne) >= 1 << 63:
        reader.refuse(f"tensor {name!r} has the shape {ne}, more than 2^63 values")
    if type_id not in GGML_TYPES:
        reader.refuse(f"tensor {name!r} has type {type_id}, which is not known")
    type_name, block, block_bytes = GGML_TYPES[type_id]
    if ne[0] % block:
        reader.refuse(f"tensor {name!r} has rows of {ne[0]:,} values, not a multiple of the {block} of a {type_name} block")
    return TensorInfo(name, ne[::-1], type_id, type_name, offset, math.prod(ne) // block * block_bytes)


def _place(reader: _Reader, declared: list[TensorInfo], data_offset: int, alignment: int) -> dict[str, TensorInfo]:
    """Check that the tensors follow each other without a gap, as llama.cpp demands, and end inside the file."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for tensor in declared:
        if tensor.name in tensors:
            reader.refuse(f"tensor {tensor.name!r} stands there twice")
        if tensor.offset != expected:
            reader.refuse(f"tensor {tensor.name!r} is at offset {tensor.offset:,}, and {expected:,} was due with alignment {alignment}")
        end = data_offset + tensor.offset + tensor.nbytes
        if end > reader.size:
            raise LayerscopeError(f"{reader.label} is truncated: tensor {tensor.name!r} ends at byte {end:,}, the file has {reader.size:,}.")
        tensors[tensor.name] = tensor._replace(offset=data_offset + tensor.offset)
        expected = -(-(tensor.offset + tensor.nbytes) // alignment) * alignment
    return tensors


class _Sizes:
    """Typed access to the metadata of one architecture, each number held against its range."""

    def __init__(self, label: str, header: GgufHeader, architecture: str) -> None:
        self.label, self.metadata, self.prefix = label, header.metadata, architecture

    def refuse(self, what: str) -> NoReturn:
        raise LayerscopeError(f"{self.label} does not describe a model: {what}.")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """`key` without the architecture's prefix. A list with one value for each layer counts if all its values are the same."""
        full = key if "." in key and key.split(".")[0] == "tokenizer" else f"{self.prefix}.{key}"
        value = self.metadata.get(full, default)
        if isinstance(value, np.ndarray):
            if value.size == 0 or (value != value[0]).any():
                self.refuse(f"{full} differs between layers, which is not supported")
            value = value[0].item()
        if value is None:
            self.refuse(f"{full} is missing")
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(f"{full} is {str(value)[:40]!r}, not a whole number")
        if not low <= value <= high:
            self.refuse(f"{full} is {value:,}, outside {low:,} to {high:,}")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            self.refuse(f"{self.prefix}.{key} is {str(value)[:40]!r}, not a positive number")
        return float(value)


def model_info(path: Path, header: GgufHeader) -> ModelInfo:
    """The model's sizes from its header, each held against its range, the others and the tensors.

    `architecture` is the file's general.architecture: mistral and mixtral files carry "llama".
    Raises LayerscopeError for an encoder or vision file, a part of a split file, and sizes that cannot be true.
    """
    path = Path(path)
    metadata, tensors = header.metadata, header.tensors
    architecture = _language_model(path.name, metadata)
    size = _Sizes(path.name, header, architecture)
    n_layers = size.integer("block_count", 1, MAX_LAYERS)
    d_model = size.integer("embedding_length", 1, MAX_WIDTH)
    n_heads = size.integer("attention.head_count", 1, MAX_WIDTH)
    n_kv_heads = size.integer("attention.head_count_kv", 1, MAX_WIDTH, n_heads)
    if n_heads % n_kv_heads:
        size.refuse(f"{n_heads} heads cannot share {n_kv_heads} key/value heads")
    if f"{architecture}.attention.key_length" not in metadata and d_model % n_heads:
        size.refuse(f"an embedding_length of {d_model} cannot be divided among {n_heads} heads")
    d_head = size.integer("attention.key_length", 1, MAX_WIDTH, d_model // n_heads)
    n_experts = size.integer("expert_count", 0, MAX_EXPERTS, 0)
    d_mlp = size.integer("feed_forward_length", 1, MAX_WIDTH, 4 * d_model)
    d_vocab = _vocabulary_size(size, tensors, d_model)
    missing = set(range(n_layers)) - {int(name.split(".")[1]) for name in tensors if name.startswith("blk.") and name.split(".")[1].isdecimal()}
    if missing:
        size.refuse(f"it has no tensor of layer {min(missing)}, and {architecture}.block_count is {n_layers}")
    model = str(metadata.get("tokenizer.ggml.model", ""))
    return ModelInfo(
        name=path.stem,
        source=str(path),
        engine="gguf",
        architecture=architecture,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_model=d_model,
        d_head=d_head,
        d_mlp=size.integer("expert_feed_forward_length", 1, MAX_WIDTH, d_mlp) if n_experts else d_mlp,
        d_vocab=d_vocab,
        n_ctx=size.integer("context_length", 1, 1 << 31),
        n_experts=n_experts,
        n_experts_used=size.integer("expert_used_count", 1, n_experts) if n_experts else 0,
        sliding_window=size.integer("attention.sliding_window", 0, 1 << 31, 0),
        norm_eps=size.real("attention.layer_norm_rms_epsilon", size.real("attention.layer_norm_epsilon", 1e-5)),
        rope_theta=size.real("rope.freq_base", 10000.0),
        bos_id=_token_id(size, "tokenizer.ggml.bos_token_id", d_vocab),
        eos_id=_token_id(size, "tokenizer.ggml.eos_token_id", d_vocab),
        # Without the key llama.cpp adds BOS for SentencePiece vocabularies; the engine asks llama.cpp itself once the model is open.
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", model == "llama")),
        quantization=_quantization(metadata, tensors),
        n_params=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        n_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        weight_types=dict(Counter(tensor.type_name for tensor in tensors.values())),
    )


def _language_model(label: str, metadata: dict[str, Any]) -> str:
    """The architecture's name, if this file is a whole model that generates text."""
    architecture = metadata.get("general.architecture")
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise LayerscopeError(f"{label} holds no model: its general.type is {str(kind)[:40]!r}.")
    if not isinstance(architecture, str) or not architecture:
        raise LayerscopeError(f"{label} does not describe a model: general.architecture is missing.")
    if architecture in _NOT_GENERATORS:
        raise LayerscopeError(f"{label} holds {architecture!r}, which is not a decoder that predicts the next token.")
    split = metadata.get("split.count", 1)
    if not isinstance(split, int) or split > 1:
        raise LayerscopeError(f"{label} is one of {str(split)[:12]} parts of a split GGUF; join them with llama-gguf-split --merge first.")
    return architecture


def _vocabulary_size(size: _Sizes, tensors: dict[str, TensorInfo], d_model: int) -> int:
    """Rows of the embedding, which every per-token list of the tokenizer must match (llama.cpp reads them side by side)."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        size.refuse("it has no matrix token_embd.weight")
    d_vocab, width = embedding.shape
    if width != d_model:
        size.refuse(f"token_embd.weight has {width:,} columns, and embedding_length is {d_model:,}")
    if d_vocab > MAX_VOCAB:
        size.refuse(f"its vocabulary has {d_vocab:,} tokens, the limit is {MAX_VOCAB:,}")
    kinds: dict[str, Any] = {"tokens": StringArray, "scores": np.dtype("<f4"), "token_type": np.dtype("<i4")}
    for key, kind in kinds.items():
        values = size.metadata.get(f"tokenizer.ggml.{key}")
        if values is None:
            continue
        right = isinstance(values, StringArray) if kind is StringArray else isinstance(values, np.ndarray) and values.dtype == kind
        if not right:
            size.refuse(f"tokenizer.ggml.{key} has the wrong type")
        if len(values) != d_vocab:
            size.refuse(f"tokenizer.ggml.{key} has {len(values):,} entries, and the embedding has {d_vocab:,} rows")
    return d_vocab


def _token_id(size: _Sizes, key: str, d_vocab: int) -> int | None:
    if size.metadata.get(key) in (None, 0xFFFFFFFF):
        return None
    return size.integer(key, 0, d_vocab - 1)


def _quantization(metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> str:
    """The file's own name for its quantization, else the type that stores most of its bytes."""
    named = metadata.get("general.file_type")
    if isinstance(named, int) and named in FILE_TYPES:
        return FILE_TYPES[named]
    n_bytes: Counter[str] = Counter()
    for tensor in tensors.values():
        n_bytes[tensor.type_name] += tensor.nbytes
    return n_bytes.most_common(1)[0][0]

"""The GGUF format, read with bounds: metadata and tensor table of a file that nobody vouches for.

    read_file(path)    -> GgufHeader of this one file; backend.files.gguf_split joins the parts of a model that comes in several

Every count and length is held against a limit and against the bytes that are left before anything is allocated; every rejection is
one LayerscopeError. Ordinary reads and no mapping, so that a file that shrinks is a short read and not a SIGBUS.
The layout is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, overload

import numpy as np

from backend.errors import LayerscopeError
from backend.files.ggml_types import GGML_TYPES
from backend.files.stand_ins import SHOWN_BYTES, stand_in

MAX_KEYS = 65_536
MAX_TENSORS = 1_000_000
MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 10 << 20
MAX_STRINGS = 4_000_000  # in one array; the largest merge tables have about half a million
MAX_METADATA_BYTES = 512 << 20
MAX_TENSOR_NAME_BYTES = 63  # ggml's GGML_MAX_NAME, less the final zero
MAX_ALIGNMENT = 1 << 20

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# Keys that llama.cpp reads without asking for their type first: another one aborts the process.
_FIXED_TYPES = {"general.alignment": (4, "uint32"), "split.no": (2, "uint16"), "split.count": (2, "uint16"), "split.tensors.count": (5, "int32")}
_TYPE_NAMES = {0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32", 7: "bool", 8: "string", 10: "uint64", 11: "int64", 12: "float64"}


class TensorInfo(NamedTuple):
    """One tensor. `shape` is NumPy's order (the reverse of ggml's ne); `offset` counts from the start of the file at `path`."""

    path: Path
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
    """`metadata` values are int, float, bool, str, a NumPy array of numbers or a StringArray. Tensors keep the order of the file.

    `files`: those that the model lies in, in order. Of a model in parts, all else but the tensors is that of the first.
    `types` names the format's own type of each metadata value: uint32, string, array of float32, ...
    """

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_offset: int
    alignment: int
    file_size: int
    types: dict[str, str]
    files: tuple[Path, ...]


class _Reader:
    """Bounded little-endian reads; a length is checked against what is left before it is read."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.file, self.size, self.path, self.label, self.at = file, size, path, path.name, 0

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


def read_file(path: Path) -> GgufHeader:
    """Read and check the header of the one GGUF file at `path`.

    Raises LayerscopeError when the file is missing, no GGUF, truncated, or breaks a rule of the format or a limit of this module.
    Time and memory are at most proportional to the header's size in the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _parse(_Reader(file, os.fstat(file.fileno()).st_size, path))
    except OSError as error:
        raise LayerscopeError(f"{path} cannot be read: {error.strerror or error}.") from None


def _parse(reader: _Reader) -> GgufHeader:
    first = reader.file.read(SHOWN_BYTES)
    reader.file.seek(0)
    if not first.startswith(b"GGUF") and (instead := stand_in(first)):
        reader.refuse(f"it is {instead}")
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
    types: dict[str, str] = {}
    for _ in range(n_keys):
        key, kind, value = _read_pair(reader)
        if key in metadata:
            reader.refuse(f"the key {key[:80]!r} stands there twice")
        metadata[key], types[key] = value, kind
    alignment = metadata.get("general.alignment", 32)
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        reader.refuse(f"general.alignment is {alignment:,}, not a power of two up to {MAX_ALIGNMENT:,}")
    declared = [_read_tensor(reader) for _ in range(n_tensors)]
    data_offset = -(-reader.at // alignment) * alignment
    return GgufHeader(version, metadata, _place(reader, declared, data_offset, alignment), data_offset, alignment, reader.size, types, (reader.path,))


def _read_pair(reader: _Reader) -> tuple[str, str, Any]:
    """Key, name of the type, value."""
    raw = reader.string(MAX_KEY_BYTES, "a key")
    try:
        key = raw.decode("utf-8")
    except UnicodeDecodeError:
        reader.refuse(f"the key {raw[:40]!r} is not UTF-8")
    if not key:
        reader.refuse("it has an empty key")
    what = f"the value of {key[:80]!r}"
    kind = reader.number("<I", f"the type of {key[:80]!r}")
    if key in _FIXED_TYPES and kind != _FIXED_TYPES[key][0]:
        reader.refuse(f"{key} has type {kind}, it must be {_FIXED_TYPES[key][1]} ({_FIXED_TYPES[key][0]})")
    if reader.at > MAX_METADATA_BYTES:
        reader.refuse(f"its metadata is larger than {MAX_METADATA_BYTES:,} bytes")
    if kind == _STRING:
        return key, "string", reader.string(MAX_STRING_BYTES, what).decode("utf-8", "replace")
    if kind == _ARRAY:
        items, values = _read_array(reader, what)
        return key, f"array of {items}", values
    if kind not in _SCALARS:
        reader.refuse(f"{what} has type {kind}, which does not exist")
    return key, _TYPE_NAMES[kind], reader.number(_SCALARS[kind], what)


def _read_array(reader: _Reader, what: str) -> tuple[str, Any]:
    """Name of the items' type, and the items."""
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
        return _TYPE_NAMES[kind], np.frombuffer(reader.take(count * width, what), dtype=_SCALARS[kind])
    items = []
    for _ in range(count):
        items.append(reader.string(MAX_STRING_BYTES, what))
        if reader.at > MAX_METADATA_BYTES:
            reader.refuse(f"its metadata is larger than {MAX_METADATA_BYTES:,} bytes")
    return "string", StringArray(items)


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
    return TensorInfo(reader.path, name, ne[::-1], type_id, type_name, offset, math.prod(ne) // block * block_bytes)


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

"""The header of a safetensors file: names, dtypes, shapes and byte ranges, every length bounded before it is believed."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.errors import LayerscopeError
from backend.files.bounded_json import parse_json
from backend.files.stand_ins import SHOWN_BYTES, stand_in

HEADER_LIMIT = 100_000_000  # bytes; the cap of the safetensors format itself

# Bytes of one element for every dtype name of the safetensors format that a model here can be stored in.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file: bytes `start` to `stop` of the file, row-major."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


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

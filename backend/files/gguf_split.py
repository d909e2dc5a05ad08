"""A GGUF model in several files: from any of its parts to the whole.

llama.cpp finds the parts by name alone (llama_split_path): PREFIX-00001-of-00003.gguf and so on. The first holds the metadata,
every part holds split.no (from 0), split.count and split.tensors.count (of all parts together), and the tensors are spread over
them. What the parts say of each other is held against their names and contents here, before llama.cpp sees any of them.

    parts_of(path)      every file of the model that `path` is a file of, from its name
    read_header(path)   -> GgufHeader: metadata of the first part, tensors of all
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from backend.errors import LayerscopeError
from backend.files.gguf_format import GgufHeader, StringArray, TensorInfo, read_file

MAX_PARTS = 1000

_PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class _Part(NamedTuple):
    """What a file's name says: part `number` (from 1) of `total`."""

    prefix: str
    number: int
    total: int

    def file_name(self, number: int) -> str:
        return f"{self.prefix}-{number:05}-of-{self.total:05}.gguf"


def _part(path: Path) -> _Part | None:
    match = _PART_NAME.fullmatch(path.name)
    part = _Part(match[1], int(match[2]), int(match[3])) if match else None
    return part if part and 1 <= part.number <= part.total and 2 <= part.total <= MAX_PARTS else None


def whole_name(path: Path) -> str:
    """The name of the model in `path`: the file's own, without the -0000x-of-0000y of a part."""
    part = _part(path)
    return f"{part.prefix}.gguf" if part else path.name


def parts_of(path: Path) -> tuple[Path, ...]:
    """The files of the model in `path`, in order, whether they are there or not; itself alone if its name is not that of a part."""
    part = _part(path)
    return tuple(path.with_name(part.file_name(number)) for number in range(1, part.total + 1)) if part else (path,)


def one_a_model(paths: Iterable[Path]) -> Iterator[Path]:
    """The first that is there of each model's parts, and every other file; `paths` in order of name."""
    seen: set[Path] = set()
    for path in paths:
        first = parts_of(path)[0]
        if first not in seen:
            seen.add(first)
            yield path


def read_header(path: Path) -> GgufHeader:
    """Read and check the headers of the GGUF model at `path`, in one file or in parts, of which `path` is any.

    Raises LayerscopeError when a file is missing, no GGUF, truncated, or breaks a rule of the format (see gguf_format), and when
    the parts do not belong together.
    """
    path = Path(path)
    given, part = read_file(path), _part(path)
    declared = given.metadata.get("split.count", 0)
    if declared > MAX_PARTS:
        raise LayerscopeError(f"{path.name} has split.count = {declared:,}, and the limit is {MAX_PARTS:,} parts.")
    if declared != part.total if part else declared > 1:
        by_name = f"and by its name part {part.number} of {part.total}" if part else "and its name does not end in -00001-of-00002.gguf or the like"
        number = given.metadata.get("split.no", 0) + 1
        by_keys = f"part {number} of {declared} by its keys" if declared > 1 else "a whole model by its keys (split.count is missing or below 2)"
        raise LayerscopeError(f"{path.name} is {by_keys}, {by_name}.")
    if part is None:
        return given
    files = parts_of(path)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise LayerscopeError(f"{path.name} is part {part.number} of {part.total}, and {missing[0]}{more} missing from its folder.")
    headers = [given if file == path else read_file(file) for file in files]
    for number, header in enumerate(headers):
        _check_part(header, headers[0], number, part.total)
    return replace(headers[0], tensors=_joined(headers), files=files)


def _check_part(header: GgufHeader, first: GgufHeader, number: int, count: int) -> None:
    """Raise LayerscopeError unless the part says of itself what its name says, and nothing else than the first part says."""
    label = header.files[0].name
    for key, want in (("split.no", number), ("split.count", count)):
        if header.metadata.get(key) != want:
            raise LayerscopeError(f"{label} has {key} = {header.metadata.get(key)}, and by its name it must be {want}.")
    for key in header.metadata.keys() & first.metadata.keys() - {"split.no"}:
        if not _same(header.metadata[key], first.metadata[key]):
            raise LayerscopeError(f"{label} belongs to another model than {first.files[0].name}: they differ in {key[:80]}.")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, StringArray) and isinstance(b, StringArray):
        return a.raw == b.raw
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _joined(headers: list[GgufHeader]) -> dict[str, TensorInfo]:
    """The tensors of all parts. Raises LayerscopeError for one that stands in two of them, and for another number than was promised."""
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise LayerscopeError(f"The tensor {name!r} stands both in {tensors[name].path.name} and in {tensor.path.name}.")
            tensors[name] = tensor
    promised = headers[0].metadata.get("split.tensors.count")
    if promised != len(tensors):
        raise LayerscopeError(f"{headers[0].files[0].name} has split.tensors.count = {promised}, and its {len(headers)} parts hold {len(tensors):,} tensors.")
    return tensors

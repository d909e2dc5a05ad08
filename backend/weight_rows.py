"""The rows of a stored tensor, wherever they lie: in one file, stacked from several tensors, some of their columns, every n-th.

Files are read with pread and never mapped, so a file that shrinks meanwhile is an error and not a crash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from backend.errors import LayerscopeError

_FLOATS: dict[str, type[np.generic]] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


class Rows(Protocol):
    """The innermost axis of a stored tensor, row by row."""

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the given numbers, (len(rows), columns)."""

    def places(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the values in these rows and columns lie among the stored ones, counted from the first in the order of the file."""


@dataclass(frozen=True)
class FileRows:
    """Rows that lie one after the other in a file. `type_id`: ggml's type, None for a plain float named by `dtype`."""

    path: Path
    offset: int
    columns: int
    row_bytes: int
    dtype: str
    type_id: int | None = None

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        runs = [(int(run[0]), len(run)) for run in np.split(rows, breaks) if len(run)]
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            data = [_read_exactly(descriptor, self.path, self.offset + first * self.row_bytes, n * self.row_bytes) for first, n in runs]
        finally:
            os.close(descriptor)
        return self._decode(data[0] if len(data) == 1 else b"".join(data))

    def places(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows * self.columns + columns

    def _decode(self, data: bytes) -> NDArray[np.float32]:
        if self.dtype in _FLOATS:
            return np.frombuffer(data, _FLOATS[self.dtype]).reshape(-1, self.columns).astype(np.float32)
        if self.dtype == "BF16":
            return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, self.columns)
        if self.type_id is None:
            raise LayerscopeError(f"{self.path.name} stores weights as {self.dtype}, which cannot be read; F16, BF16, F32 and F64 can.")
        from backend.engines.ggml import dequantize  # libggml-base alone, and only where a weight is quantized

        return dequantize(self.type_id, data, len(data) // self.row_bytes * self.columns).reshape(-1, self.columns)

    @property
    def why_unreadable(self) -> str | None:
        """See Weight.why_unreadable."""
        if self.dtype in _FLOATS or self.dtype == "BF16":
            return None
        if self.type_id is None:
            return f"{self.path.name} stores weights as {self.dtype}, which cannot be read; F16, BF16, F32 and F64 can."
        from backend.engines.ggml import can_dequantize

        return None if can_dequantize(self.type_id) else f"{self.path.name} stores a tensor as {self.dtype}, which ggml cannot convert to float32."

    def pieces(self, start: int, stop: int, most: int) -> Iterator[NDArray[np.float32]]:
        """See Weight.pieces."""
        from backend.engines.ggml import dequantize

        type_id = None if self.dtype in _FLOATS or self.dtype == "BF16" else self.type_id
        single = self if type_id is not None or not self.columns else replace(self, columns=1, row_bytes=self.row_bytes // self.columns)
        buffer = np.empty(min(most, max(stop - start, 0)), np.float32)
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for at in range(start, stop, most):
                n = min(most, stop - at)
                first, n_bytes = at * self.row_bytes // self.columns, n * self.row_bytes // self.columns
                data = _read_exactly(descriptor, self.path, self.offset + first, n_bytes)
                yield single._decode(data).reshape(-1) if type_id is None else dequantize(type_id, data, n, buffer[:n])
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class StackedRows:
    """Equal matrices, such as the experts of one layer, one after the other."""

    parts: tuple[FileRows, ...]
    rows_each: int

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        out = np.empty((len(rows), self.parts[0].columns), np.float32)
        owner = rows // self.rows_each
        for part in np.unique(owner):
            out[owner == part] = self.parts[part].read(rows[owner == part] % self.rows_each)
        return out

    def places(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows * self.parts[0].columns + columns


@dataclass(frozen=True)
class Columns:
    """The columns of stored matrices of `n_rows` x `n_columns`, for tensors that lie (in, out). A matrix is read whole whichever of them are asked for."""

    stored: Rows
    n_rows: int
    n_columns: int

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        out = np.empty((len(rows), self.n_rows), np.float32)
        owner, column = rows // self.n_columns, rows % self.n_columns
        for matrix in np.unique(owner):
            mine = owner == matrix
            out[mine] = self.stored.read(matrix * self.n_rows + np.arange(self.n_rows, dtype=np.int64))[:, column[mine]].T
        return out

    def places(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.stored.places(rows // self.n_columns * self.n_rows + columns, rows % self.n_columns)


@dataclass(frozen=True)
class EveryNth:
    """Rows with every n-th of their columns from the i-th, for matrices that lie interleaved."""

    stored: Rows
    step: tuple[int, int]

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        i, n = self.step
        return np.ascontiguousarray(self.stored.read(rows)[:, i::n])

    def places(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        i, n = self.step
        return self.stored.places(rows, i + n * columns)


@dataclass(frozen=True)
class Half:
    """The first or second `n_rows` of every 2 n_rows rows, for experts whose two matrices of the input lie fused, expert after expert."""

    stored: Rows
    n_rows: int
    half: int

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.stored.read(self._stored_rows(rows))

    def places(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.stored.places(self._stored_rows(rows), columns)

    def _stored_rows(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return (2 * (rows // self.n_rows) + self.half) * self.n_rows + rows % self.n_rows


def _read_exactly(descriptor: int, path: Path, offset: int, n: int) -> bytes:
    chunks: list[bytes] = []
    while n:
        chunk = os.pread(descriptor, min(n, 1 << 30), offset)
        if not chunk:
            raise LayerscopeError(f"{path.name} became shorter while it was read: byte {offset:,} is gone.")
        chunks.append(chunk)
        offset, n = offset + len(chunk), n - len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)

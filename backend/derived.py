"""Derived: arrays and JSON that are slow to compute and belong to a trace, kept on disk under a size limit.

Stands on diskcache, which pickles what it cannot store plainly, so that whoever can write its file can run code here
(CVE-2025-69872, no fixed release). `PlainDisk` therefore stores and reads bytes and text alone, and refuses the rest.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diskcache
import numpy as np
from numpy.typing import NDArray

from backend.durable import private_folder
from backend.errors import LayerscopeError

Key = tuple[str | int | float | bool | None, ...]

_MODE_RAW, _MODE_BINARY, _MODE_TEXT = 1, 2, 3
_FILE_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{28}\.val")
_DTYPE_KINDS = "biufc"  # numbers alone: an object array would be a pickle again


class PlainDisk(diskcache.Disk):
    """diskcache's storage without pickle, in either direction, and without file names from elsewhere."""

    def put(self, key: Any) -> tuple[Any, bool]:
        if type(key) is not str:
            raise TypeError(f"A cache key must be text, not {type(key).__name__}.")
        return super().put(key)

    def get(self, key: Any, raw: bool) -> Any:
        if not raw:
            raise self._refusal("a pickled key")
        return super().get(key, raw)

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> tuple[int, int, str | None, Any]:
        if type(value) is not bytes or read:
            raise TypeError(f"A cached value must be bytes, not {type(value).__name__}.")
        return super().store(value, read, key=key)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode not in (_MODE_RAW, _MODE_BINARY, _MODE_TEXT):
            raise self._refusal("a pickled value")
        if filename is not None and not _FILE_NAME.fullmatch(filename):
            raise self._refusal(f"the file name {filename[:80]!r}")
        return super().fetch(mode, filename, value, read)

    def _refusal(self, what: str) -> LayerscopeError:
        return LayerscopeError(f"The cache {self._directory} holds {what}, which Layerscope never writes; delete the folder, it is rebuilt.")


class Derived:
    """A cache of what was computed from traces. Keys are tuples of plain values that begin with what it is: ("lens_target", id, 42).

    Safe to use from several threads and processes. What is asked for and not there is None.
    """

    def __init__(self, folder: Path, size_limit: int = 1 << 30) -> None:
        """Opens or makes the cache in `folder` (mode 0700), which keeps at most about `size_limit` bytes, oldest out first."""
        # diskcache drops 10 entries at a time by default, which may be all of them, the new one included, where entries are large.
        self._cache = diskcache.Cache(str(private_folder(Path(folder))), disk=PlainDisk, size_limit=size_limit, cull_limit=2, disk_min_file_size=1 << 15)

    def get_bytes(self, key: Key) -> bytes | None:
        value = self._cache.get(_text(key))
        if value is not None and type(value) is not bytes:
            raise LayerscopeError(f"The cache {self._cache.directory} holds a {type(value).__name__} where bytes belong; delete the folder, it is rebuilt.")
        return value

    def put_bytes(self, key: Key, value: bytes) -> None:
        self._cache.set(_text(key), bytes(value))

    def get_json(self, key: Key) -> Any | None:
        data = self.get_bytes(key)
        return None if data is None else json.loads(data)

    def put_json(self, key: Key, value: Any) -> None:
        self.put_bytes(key, json.dumps(value, ensure_ascii=False).encode("utf-8"))

    def get_array(self, key: Key) -> NDArray[Any] | None:
        data = self.get_bytes(key)
        return None if data is None else _decode(data)

    def put_array(self, key: Key, values: NDArray[Any]) -> None:
        """Numbers of any shape; the bytes are kept as they are."""
        if values.dtype.kind not in _DTYPE_KINDS:
            raise TypeError(f"Only arrays of numbers can be cached, not {values.dtype}.")
        header = json.dumps({"dtype": values.dtype.newbyteorder("<").str, "shape": values.shape})
        self.put_bytes(key, header.encode("ascii") + b"\n" + values.astype(values.dtype.newbyteorder("<")).tobytes())

    def close(self) -> None:
        self._cache.close()


def _text(key: Key) -> str:
    return json.dumps(key, ensure_ascii=True, separators=(",", ":"))


def _decode(data: bytes) -> NDArray[Any]:
    """Inverse of put_array. Nothing is allocated that the stored bytes do not fill."""
    header, _, body = data.partition(b"\n")
    try:
        fields = json.loads(header)
        dtype = np.dtype(fields["dtype"])
        if dtype.kind not in _DTYPE_KINDS:
            raise ValueError(f"dtype {dtype}")
        return np.frombuffer(body, dtype=dtype).reshape(fields["shape"]).copy()
    except (ValueError, TypeError, KeyError) as error:
        raise LayerscopeError(f"A cached array cannot be read ({error}); delete the cache folder, it is rebuilt.") from None

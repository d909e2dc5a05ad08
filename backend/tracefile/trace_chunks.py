"""Chunks of a trace file, encoded outside HDF5: byte shuffle, then a Zstandard frame with a checksum of its content.

What comes out is what HDF5's own filters (shuffle, 32015) read. HDF5 would do it under one lock, and Python's, while the engine
waits; here several threads encode at once. The frame's checksum (xxHash of the content, RFC 8878) takes the place of HDF5's
Fletcher-32: a flipped bit is an error on reading.

    create(...)          a dataset for such chunks
    encode(values)       -> the bytes of one chunk
    Encoder              encodes on threads, writes in order
    verify(...)          reads every chunk of a closed file back against what was written
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import zstandard
from numpy.typing import NDArray

_LEVEL = 1  # level 3 takes twice as long and saves half a per cent of an attention map
_ZSTANDARD = 32015  # its number among HDF5's registered filters
FILTERS: Mapping[str, Any] = {"shuffle": True, **hdf5plugin.Zstd(clevel=_LEVEL)}

_MOST_WAITING = 32 << 20  # bytes of chunks that are encoded and not yet written

Offset = tuple[int, ...]
Written = dict[str, dict[Offset, int]]  # path of a dataset -> place of a chunk in it -> CRC-32 of the chunk's bytes in the file

_local = threading.local()


def create(file: h5py.File, path: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: tuple[int, ...], fill: float, attrs: Mapping[str, str | list[str]]) -> h5py.Dataset:
    """A dataset with FILTERS, its groups made on the way, and its text attributes: what `h5py.Group.create_dataset` does, at a tenth of its cost."""
    space = h5py.h5s.create_simple(shape)
    dataset = h5py.h5d.create(file.id, path.encode(), _type(dtype), space, _plan(chunks, dtype, fill), _parents())
    for name, value in attrs.items():
        space = h5py.h5s.create(h5py.h5s.SCALAR) if isinstance(value, str) else h5py.h5s.create_simple((len(value),))
        h5py.h5a.create(dataset, name.encode(), _text(), space).write(np.array(value, object))
    return h5py.Dataset(dataset)


@functools.lru_cache(256)
def _plan(chunks: tuple[int, ...], dtype: np.dtype[Any], fill: float) -> h5py.h5p.PropDCID:
    """The creation properties of a dataset. These and what follows are asked for again and again, and describe no file."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk(chunks)
    plan.set_fill_value(np.array(fill, dtype))
    plan.set_shuffle()
    plan.set_filter(_ZSTANDARD, h5py.h5z.FLAG_OPTIONAL, (_LEVEL,))
    return plan


@functools.cache
def _parents() -> h5py.h5p.PropLCID:
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    return links


@functools.cache
def _type(dtype: np.dtype[Any]) -> h5py.h5t.TypeID:
    return h5py.h5t.py_create(dtype, logical=True)


@functools.cache
def _text() -> h5py.h5t.TypeID:
    return h5py.h5t.py_create(h5py.string_dtype(), logical=True)


def encode(values: NDArray[Any]) -> bytes:
    """The bytes of one chunk, a contiguous array of the chunk's full shape."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(compression_params=_parameters())
    return _local.compressor.compress(_shuffled(values))


@functools.cache
def _parameters() -> zstandard.ZstdCompressionParameters:
    """Level 1 that looks for long repetitions only. What can be saved in activations is the entropy of their high bytes; short repetitions are chance."""
    return zstandard.ZstdCompressionParameters.from_level(_LEVEL, min_match=7, hash_log=8, write_checksum=1)


def _shuffled(values: NDArray[Any]) -> NDArray[np.uint8]:
    """First bytes of all values, then all second bytes, ...: HDF5's shuffle filter, little-endian."""
    size = values.dtype.itemsize
    if size == 2:  # twice as fast as the transposition below, and what nearly all chunks are
        words = values.reshape(-1).view(np.uint16)
        planes = np.empty((2, words.size), np.uint8)
        np.copyto(planes[0], words, casting="unsafe")
        np.copyto(planes[1], words >> 8, casting="unsafe")
        return planes
    return np.ascontiguousarray(values.reshape(-1).view(np.uint8).reshape(-1, size).T)


class Encoder:
    """Encodes chunks on threads of its own and writes them from the caller's, in the order they came."""

    def __init__(self, n_threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="encode")
        self._waiting: collections.deque[tuple[h5py.Dataset, str, Offset, Future[tuple[bytes, int]], int]] = collections.deque()
        self._n_bytes = self._n_put = 0
        self.written: Written = {}

    def put(self, dataset: h5py.Dataset, path: str, offset: Offset, values: NDArray[Any]) -> None:
        """Write `values`, a whole chunk that nobody changes any more, at `offset` of the dataset at `path`; at the latest when `finish` returns."""
        self._waiting.append((dataset, path, offset, self._pool.submit(_encoded, values), values.nbytes))
        self._n_bytes += values.nbytes
        self._n_put += 1
        while self._waiting and (self._n_bytes > _MOST_WAITING or self._waiting[0][3].done()):
            self._write_first()

    def mark(self) -> int:
        """A point in the order of what is put, for `finish`."""
        return self._n_put

    def finish(self, mark: int | None = None) -> None:
        """Write all that is waiting, or all that was put before `mark`."""
        while len(self._waiting) > (0 if mark is None else self._n_put - mark):
            self._write_first()

    def close(self) -> None:
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _write_first(self) -> None:
        dataset, path, offset, future, n_bytes = self._waiting.popleft()
        data, checksum = future.result()
        self._n_bytes -= n_bytes
        dataset.id.write_direct_chunk(offset, data)
        self.written.setdefault(path, {})[offset] = checksum


def _encoded(values: NDArray[Any]) -> tuple[bytes, int]:
    data = encode(values)
    return data, zlib.crc32(data)


def tiles(array: NDArray[Any], chunk: tuple[int, ...], fill: float) -> list[tuple[Offset, NDArray[Any]]]:
    """Cut `array`, whose corner lies on the grid of chunks, into whole chunks; what sticks out over its end is `fill`."""
    cut: list[tuple[Offset, NDArray[Any]]] = []
    steps = [range(0, size, step) for size, step in zip(array.shape, chunk, strict=True)]
    for offset in itertools.product(*steps):
        part = array[tuple(slice(at, at + step) for at, step in zip(offset, chunk, strict=True))]
        if part.shape != chunk:
            whole = np.full(chunk, fill, array.dtype)
            whole[tuple(slice(0, size) for size in part.shape)] = part
            part = whole
        cut.append((offset, np.ascontiguousarray(part)))
    return cut


def verify(path: Path, written: Written, others: Iterable[str]) -> None:
    """Read a closed file back: the chunks in `written` byte by byte, the datasets `others` through HDF5 and its checksums.

    Raises OSError where a chunk is missing or differs.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with h5py.File(path, "r", locking=False) as file, ThreadPoolExecutor(2) as pool:
            checks = [pool.submit(_check_bytes, descriptor, _places(file, name, chunks), name) for name, chunks in written.items()]
            for name in others:
                for tile in file[name].iter_chunks():
                    file[name][tile]
            for check in checks:
                check.result()
    finally:
        os.close(descriptor)


def _places(file: h5py.File, name: str, chunks: Mapping[Offset, int]) -> list[tuple[int, int, int]]:
    """(offset in the file, bytes, checksum) of every chunk that was written to the dataset `name`."""
    stored: dict[Offset, tuple[int, int]] = {}
    h5py.h5d.open(file.id, name.encode()).chunk_iter(lambda chunk: stored.update({tuple(chunk.chunk_offset): (chunk.byte_offset, chunk.size)}))
    lost = chunks.keys() - stored.keys()
    if lost:
        raise OSError(f"{len(lost)} of {len(chunks)} chunks of {name} are not in the file")
    return [(*stored[offset], checksum) for offset, checksum in chunks.items()]


def _check_bytes(descriptor: int, chunks: list[tuple[int, int, int]], name: str) -> None:
    for offset, n, checksum in chunks:
        if zlib.crc32(os.pread(descriptor, n, offset)) != checksum:
            raise OSError(f"a chunk of {name} does not read as it was written")

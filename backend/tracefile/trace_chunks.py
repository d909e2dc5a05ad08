"""Chunks of a trace file, encoded outside HDF5: byte shuffle, then a Zstandard frame with a checksum of its content.

What comes out is what HDF5's own filters (shuffle, 32015) read. HDF5 would do it under one lock, and Python's; here several threads
encode at once. The frame's checksum (xxHash of the content, RFC 8878) takes the place of HDF5's
Fletcher-32: a flipped bit is an error on reading.

    create(...)          a dataset for such chunks
    encode(values)       -> the bytes of one chunk
    Encoder              encodes on threads, writes in order
    verify(...)          reads every chunk of a closed file back against what was written
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import xxhash
import zstandard
from numpy.typing import DTypeLike, NDArray

_LEVEL = 1  # level 3 takes twice as long and saves half a per cent of an attention map
_ZSTANDARD = 32015  # its number among HDF5's registered filters
FILTERS: Mapping[str, Any] = {"shuffle": True, **hdf5plugin.Zstd(clevel=_LEVEL)}

_READERS = 2  # threads that read a file back
_GROUP = 2  # chunks that a thread takes at a time
_MUCH_LEFT = 2  # groups
_BATCH = 8 << 20  # bytes of chunks that are encoded together: enough that threads are worth waking

Offset = tuple[int, ...]
Written = dict[str, dict[Offset, int]]  # path of a dataset -> place of a chunk in it -> XXH3 of the chunk's bytes in the file

_local = threading.local()


def create(file: h5py.File, path: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: tuple[int, ...], fill: float,
           attrs: Mapping[str, str | tuple[str, ...]]) -> h5py.Dataset:  # fmt: skip
    """A dataset with FILTERS, its groups made on the way, and its text attributes: what `h5py.Group.create_dataset` does, at a tenth of its cost."""
    space = h5py.h5s.create_simple(shape)
    dataset = h5py.h5d.create(file.id, path.encode(), _type(dtype), space, _plan(chunks, dtype, fill), _parents())
    for name, value in attrs.items():
        kind, space, stored = _text(value)
        h5py.h5a.create(dataset, name.encode(), kind, space).write(stored, mtype=kind)
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


@functools.lru_cache(256)
def _text(value: str | tuple[str, ...]) -> tuple[h5py.h5t.TypeID, h5py.h5s.SpaceID, NDArray[np.bytes_]]:
    """HDF5's type and space of a text, or a row of them, and the text in it: UTF-8 of fixed length, which lies in the dataset's own header."""
    stored = np.array(value.encode() if isinstance(value, str) else [text.encode() for text in value], np.bytes_)
    kind = h5py.h5t.C_S1.copy()
    kind.set_size(stored.itemsize)
    kind.set_strpad(h5py.h5t.STR_NULLPAD)
    kind.set_cset(h5py.h5t.CSET_UTF8)
    return kind, h5py.h5s.create_simple(stored.shape) if stored.shape else h5py.h5s.create(h5py.h5s.SCALAR), stored


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
    """First bytes of all values, then all second bytes, ...: HDF5's shuffle filter, little-endian. What is returned is written over by the thread's next call."""
    size = values.dtype.itemsize
    if size == 2:  # what nearly all chunks are
        from backend.tracefile import compiled_bytes

        words = values.reshape(-1).view(np.uint16)
        if len(getattr(_local, "planes", ())) < values.nbytes:
            _local.planes = np.empty(values.nbytes, np.uint8)
        planes = _local.planes[: values.nbytes]
        compiled_bytes.shuffle_halves(words, planes)
        return planes
    return np.ascontiguousarray(values.reshape(-1).view(np.uint8).reshape(-1, size).T)


class Encoder:
    """Collects chunks, encodes a batch of them on several threads, the caller's among them, and writes it in the order it came.

    What each step needs, HDF5's code and tables too, has left the processor's cache by the time that the engine has computed another
    layer: a batch pays for that once. `dataset` gives the dataset at a path, and makes it if need be; `after_batch` hears when a batch is in the file.
    A batch waits in memory of its own: among the arrays that come and go with every layer it would keep their heap from ever being one piece.
    """

    def __init__(self, dataset: Callable[[str], h5py.Dataset], after_batch: Callable[[], None], n_threads: int) -> None:
        self._dataset, self._after_batch = dataset, after_batch
        self._pool = ThreadPoolExecutor(max(n_threads - 1, 1), thread_name_prefix="encode")
        self._waiting: list[tuple[str, Offset, NDArray[Any]]] = []
        self._n_bytes = self._n_used = 0
        self._memory = np.empty(_BATCH, np.uint8)
        self.written: Written = {}

    def room(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array to be filled and then put, in whole chunks, before anything else is asked for; it is this object's own from then on."""
        kind = np.dtype(dtype)
        size = kind.itemsize * math.prod(shape)
        if size > _BATCH:
            return np.empty(shape, kind)
        if self._n_used + size > _BATCH:
            self.finish()
        begin, self._n_used = self._n_used, self._n_used + size
        return self._memory[begin : begin + size].view(kind).reshape(shape)

    def put(self, path: str, offset: Offset, values: NDArray[Any]) -> None:
        """Write `values`, a whole chunk that nobody changes any more, at `offset` of the dataset at `path`; at the latest when `finish` returns."""
        self._waiting.append((path, offset, values))
        self._n_bytes += values.nbytes

    def settle(self) -> None:
        """Write what is waiting if it is a batch."""
        if self._n_bytes >= _BATCH:
            self.finish()

    def finish(self) -> None:
        """Write all that is waiting."""
        batch, self._waiting, self._n_bytes, self._n_used = self._waiting, [], 0, 0
        groups = [batch[at : at + _GROUP] for at in range(0, len(batch), _GROUP)]
        others = [self._pool.submit(_encode_all, group) for group in groups]
        mine: dict[int, list[tuple[bytes, int]]] = {}
        last = len(groups) - 1
        for at, (group, other) in enumerate(zip(groups, others, strict=True)):
            for path, _, _ in group:
                self._dataset(path)
            # The caller has the writing to do. Only where the others have much left does it take over what nobody has begun, from the end.
            while at not in mine and not other.done() and last - at >= _MUCH_LEFT and others[last].cancel():
                mine[last] = _encode_all(groups[last])
                last -= 1
            encoded = mine[at] if at in mine else other.result()
            for (path, offset, _), (data, checksum) in zip(group, encoded, strict=True):
                self._dataset(path).id.write_direct_chunk(offset, data)
                self.written.setdefault(path, {})[offset] = checksum
        self._after_batch()

    def close(self) -> None:
        """End its threads and forget what waits."""
        self._waiting, self._memory = [], np.empty(0, np.uint8)
        self._pool.shutdown(wait=True, cancel_futures=True)


def _encode_all(chunks: list[tuple[str, Offset, NDArray[Any]]]) -> list[tuple[bytes, int]]:
    """The bytes of every chunk, and their checksum."""
    encoded = [encode(values) for _, _, values in chunks]
    return [(data, xxhash.xxh3_64_intdigest(data)) for data in encoded]


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
        with h5py.File(path, "r", locking=False) as file, ThreadPoolExecutor(_READERS) as pool:
            places = [place for name, chunks in written.items() for place in _places(file, name, chunks)]
            checks = [pool.submit(_check_bytes, descriptor, places[at::_READERS]) for at in range(_READERS)]
            for name in others:
                for tile in file[name].iter_chunks():
                    file[name][tile]
            for check in checks:
                check.result()
    finally:
        os.close(descriptor)


def _places(file: h5py.File, name: str, chunks: Mapping[Offset, int]) -> list[tuple[str, int, int, int]]:
    """(dataset, offset in the file, bytes, checksum) of every chunk that was written to the dataset `name`."""
    stored: dict[Offset, tuple[int, int]] = {}
    h5py.h5d.open(file.id, name.encode()).chunk_iter(lambda chunk: stored.__setitem__(chunk.chunk_offset, (chunk.byte_offset, chunk.size)))
    lost = chunks.keys() - stored.keys()
    if lost:
        raise OSError(f"{len(lost)} of {len(chunks)} chunks of {name} are not in the file")
    return [(name, *stored[offset], checksum) for offset, checksum in chunks.items()]


def _check_bytes(descriptor: int, chunks: list[tuple[str, int, int, int]]) -> None:
    buffer = memoryview(bytearray(max((n for _, _, n, _ in chunks), default=0)))
    for name, offset, n, checksum in chunks:
        if os.preadv(descriptor, [buffer[:n]], offset) != n or xxhash.xxh3_64_intdigest(buffer[:n]) != checksum:
            raise OSError(f"a chunk of {name} does not read as it was written")

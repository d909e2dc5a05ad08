"""TraceWriter: streams the pieces of a run into one HDF5 file and publishes it in one step.

The file is written as `<id>.h5.part`, flushed, closed, read back once against its checksums, and only then renamed: a
half-written trace is never visible under its name. This is the gate at which every array is held against the vocabulary.
"""

from __future__ import annotations

import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from backend.durable import publish
from backend.engines import Piece
from backend.engines.native import NativePiece
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo
from backend.sites import SITES
from backend.trace_layout import FLOAT16_MAX, FORMAT, NATIVE_GROUP, PART_SUFFIX, SUFFIX, VERSION, check_id, chunk_shape, new_id, site_path, write_json

_COMPRESSION = {"shuffle": True, "fletcher32": True, **hdf5plugin.Zstd(clevel=3)}
_NEGATIVE_INFINITY_SITES = ("attn_scores",)


class TraceWriter:
    """Writes one trace into `folder`. Leaving the `with` block without `publish` removes what was written.

    precision "float16" stores floats in half precision (a site whose values exceed 65,504 as float32); "float32" stores every
    value as computed.
    """

    def __init__(self, folder: Path, info: ModelInfo, n_tokens: int, precision: str = "float16", trace_id: str | None = None) -> None:
        if precision not in ("float16", "float32"):
            raise LayerscopeError(f"Precision {precision!r} is neither float16 nor float32.")
        self.id = check_id(trace_id) if trace_id else new_id()
        self.info, self.n_tokens = info, n_tokens
        self.final = Path(folder) / f"{self.id}{SUFFIX}"
        self.part = Path(folder) / f"{self.id}{PART_SUFFIX}"
        self._float = np.dtype(precision)
        self._open = True
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            # Exclusive creation: two writers can never share a part file. The lock says that its writer lives, as long as it does.
            self._lock = os.open(self.part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._file = h5py.File(self.part, "w", libver=("v110", "v110"), locking=False)
        except OSError as error:
            raise LayerscopeError(f"No trace can be written in {folder}: {error.strerror or error}.") from None

    # -- activations -------------------------------------------------------------------------------------------------------

    def write(self, piece: Piece) -> None:
        """Store one piece of a site at its place. Raises LayerscopeError if its shape contradicts the vocabulary."""
        site = SITES[piece.site]
        values = self._checked(piece)
        path = site_path(piece.site, piece.layer)
        dataset = self._file[path] if path in self._file else self._create(path, piece, values)
        if dataset.dtype == np.float16 and not _fits_float16(values):
            dataset = self._widen(path, dataset)
        stop = piece.start + values.shape[1 if site.is_attention_map else 0]
        with np.errstate(over="ignore"):
            if site.is_attention_map:
                dataset[:, piece.start : stop, : values.shape[2]] = values
            else:
                dataset[piece.start : stop] = values

    def _checked(self, piece: Piece) -> NDArray[Any]:
        site, values = SITES[piece.site], piece.values
        axis = 1 if site.is_attention_map else 0
        n_here = values.shape[axis] if values.ndim > axis else 0
        sizes = {**self.info.dims, "pos": n_here, "q_pos": n_here, "k_pos": piece.start + n_here}
        want = tuple(sizes[d] for d in site.dims)
        if values.shape != want or piece.start + n_here > self.n_tokens:
            named = ", ".join(f"{d}={s}" for d, s in zip(site.dims, want, strict=True))
            raise LayerscopeError(f"{piece.site} of layer {piece.layer} ({piece.source}) came as {values.shape}, but ({named}) was expected.")
        if (piece.layer is None) == site.per_layer:
            raise LayerscopeError(f"{piece.site} {'needs' if site.per_layer else 'has no'} layer, but came with layer {piece.layer}.")
        if (values.dtype.kind == "i") != (site.dtype == "int"):
            raise LayerscopeError(f"{piece.site} holds {site.dtype} values, but came as {values.dtype}.")
        return values

    def _create(self, path: str, piece: Piece, values: NDArray[Any]) -> h5py.Dataset:
        site = SITES[piece.site]
        n = self.n_tokens
        shape = (values.shape[0], n, n) if site.is_attention_map else (n, *values.shape[1:])
        dtype = np.dtype(np.int32) if site.dtype == "int" else self._float if _fits_float16(values) else np.dtype(np.float32)
        fill = -np.inf if piece.site in _NEGATIVE_INFINITY_SITES else 0
        dataset = self._file.create_dataset(path, shape, dtype, chunks=chunk_shape(site.dims, shape, dtype.itemsize), fillvalue=fill, **_COMPRESSION)
        dataset.attrs["dims"] = list(site.dims)
        dataset.attrs["source"] = piece.source
        return dataset

    def _widen(self, path: str, dataset: h5py.Dataset) -> h5py.Dataset:
        """Replace a float16 dataset by a float32 one when a later piece brings values that float16 cannot hold."""
        values, attrs, chunks, fill = dataset[...].astype(np.float32), dict(dataset.attrs), dataset.chunks, dataset.fillvalue
        del self._file[path]
        wide = self._file.create_dataset(path, data=values, chunks=chunks, fillvalue=fill, **_COMPRESSION)
        wide.attrs.update(attrs)
        return wide

    def native(self, piece: NativePiece) -> None:
        """Store a whole native tensor, as computed."""
        group = self._file.require_group(NATIVE_GROUP)
        filters = {"chunks": True, **_COMPRESSION} if piece.values.size and piece.values.ndim else {}
        dataset = group.create_dataset(f"{len(group):03d}", data=piece.values, **filters)
        made_by = {"gguf": "op", "hf": "module"}[self.info.engine]
        dataset.attrs.update({"name": piece.source, made_by: piece.made_by, "dims": list(piece.dims)})

    # -- reading back what was stored, for results that need the whole run ----------------------------------------------------

    def has(self, site: str, layer: int | None = None) -> bool:
        return site_path(site, layer) in self._file

    def __getitem__(self, key: str | tuple[str, int]) -> NDArray[np.float32]:
        site, layer = key if isinstance(key, tuple) else (key, None)
        return np.asarray(self._file[site_path(site, layer)][...], dtype=np.float32)

    # -- the rest ------------------------------------------------------------------------------------------------------------

    def tokens(self, ids: list[int], texts: list[str], n_prompt: int, special: list[int]) -> None:
        group = self._file.create_group("tokens")
        group.create_dataset("ids", data=np.asarray(ids, dtype=np.int32))
        group.create_dataset("special", data=np.asarray(special, dtype=np.int32))
        write_json(group, "texts", texts)
        group.attrs["n_prompt"] = n_prompt

    def logits(self, summary: dict[str, NDArray[Any]]) -> None:
        """top_ids, top_logprobs (pos, k); logsumexp, next_logprobs, next_ranks, entropy (pos,)."""
        for name, values in summary.items():
            self._file.create_dataset(f"logits/{name}", data=values, fletcher32=True, chunks=values.shape)

    def vocabulary(self, texts: dict[int, str]) -> None:
        """Texts of the token ids that occur in the tokens, the top-k lists and the results."""
        group = self._file.create_group("vocabulary")
        ids = sorted(texts)
        group.create_dataset("ids", data=np.asarray(ids, dtype=np.int32))
        write_json(group, "texts", [texts[i] for i in ids])

    def result(self, name: str, values: NDArray[Any], dims: tuple[str, ...], **labels: Any) -> None:
        """An array that an experiment computed, with its axis names and labels."""
        dataset = self._file.create_dataset(f"results/{name}", data=values, chunks=values.shape if values.size else None, **(_COMPRESSION if values.size else {}))
        dataset.attrs["dims"] = list(dims)
        dataset.attrs["labels"] = json.dumps({"dims": list(dims), **labels})

    def publish(self, *, engine_version: str, category: str = "", tags: tuple[str, ...] = (), **metadata: Any) -> Path:
        """Write the metadata, close, verify and rename; the path of the finished trace.

        Raises LayerscopeError, leaving nothing behind, if the disk is full or what was written cannot be read back.
        """
        attrs = self._file.attrs
        group = self._file.create_group("metadata")
        for name, value in {"model": self.info.to_json(), "tags": list(tags), **metadata}.items():
            write_json(group, name, value)
        attrs.update({"format": FORMAT, "version": VERSION, "id": self.id, "engine": self.info.engine, "engine_version": engine_version})
        attrs.update({"created_at": datetime.now(UTC).isoformat(timespec="seconds"), "category": category, "complete": 1})
        try:
            self._file.flush()
            self._close()
            _read_back(self.part)
            publish(self.part, self.final)
            self._unlock()
        except OSError as error:
            self.discard()
            raise LayerscopeError(f"The trace could not be written to {self.final.parent}: {error.strerror or error}.") from None
        return self.final

    def discard(self) -> None:
        """Remove what was written so far."""
        try:
            self._close()
        finally:
            self.part.unlink(missing_ok=True)
            self._unlock()

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._file.close()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.part.exists():
            self.discard()


def _fits_float16(values: NDArray[Any]) -> bool:
    """True if no finite value exceeds what float16 holds (infinities and NaN are kept by both)."""
    if values.dtype.kind != "f" or not values.size:
        return True
    top = float(np.max(np.abs(values), initial=0.0, where=np.isfinite(values)))
    return top <= FLOAT16_MAX


def _read_back(path: Path) -> None:
    """Read every chunk once: HDF5 raises OSError where a stored checksum does not hold."""

    def visit(_: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and item.chunks:
            for tile in item.iter_chunks():
                item[tile]

    with h5py.File(path, "r", locking=False) as file:
        file.visititems(visit)

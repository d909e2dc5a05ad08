"""TraceWriter: streams the pieces of a run into one HDF5 file and publishes it in one step.

The file is written as `<id>.h5.part`, flushed, closed, read back once against its checksums, and only then renamed: a
half-written trace is never visible under its name. This is the gate at which every array is held against the vocabulary.
Arrays that arrive in whole chunks are encoded outside HDF5, a batch of them at a time (trace_chunks).
"""

from __future__ import annotations

import fcntl
import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from backend.durable import publish
from backend.engines import Piece, default_threads
from backend.engines.native import NativePiece
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo
from backend.sites import SITES
from backend.tracefile.half_precision import FLOAT16_MAX, overflowed, to_float16
from backend.tracefile.packed_maps import PACKED_TOKENS, n_cells, pack
from backend.tracefile.trace_chunks import FILTERS, Encoder, create, tiles, verify
from backend.tracefile.trace_layout import FORMAT, NATIVE_GROUP, PACKED, PART_SUFFIX, SUFFIX, VERSION, check_id, chunk_shape, new_id, site_path, write_json

# Native tensors are left to HDF5 and its own checksum.
_NATIVE = {"fletcher32": True, **FILTERS}
_ENCODERS = 4  # threads that encode
_NEGATIVE_INFINITY_SITES = ("attn_scores",)


class TraceWriter:
    """Writes one trace into `folder`. Leaving the `with` block without `publish` removes what was written.

    precision "float16" stores floats in half precision (a site whose values exceed 65,504 as float32); "float32" stores every
    value as computed. `rows`: the query positions, first to before last, that are kept of attention maps; None: all.
    """

    def __init__(self, folder: Path, info: ModelInfo, n_tokens: int, precision: str = "float16", trace_id: str | None = None,
                 rows: tuple[int, int] | None = None) -> None:  # fmt: skip
        if precision not in ("float16", "float32"):
            raise LayerscopeError(f"Precision {precision!r} is neither float16 nor float32.")
        self.id = check_id(trace_id) if trace_id else new_id()
        self.info, self.n_tokens = info, n_tokens
        self.final = Path(folder) / f"{self.id}{SUFFIX}"
        self.part = Path(folder) / f"{self.id}{PART_SUFFIX}"
        self._float, self._rows = np.dtype(precision), rows
        self._open = True
        self._plans: dict[str, tuple[Any, ...]] = {}  # path of a dataset that is not made yet -> what `create` is told
        self._datasets: dict[str, h5py.Dataset] = {}  # those that are open: each costs 65 KB
        self._complete: set[str] = set()  # paths of those that nothing more is written to
        self._layouts: dict[str, tuple[tuple[int, ...], float]] = {}  # chunk shape and fill value of each: asking HDF5 takes longer
        self._wide: set[str] = set()  # paths of what float16 cannot hold
        self._through_hdf5: set[str] = set()  # paths of chunked datasets that HDF5 itself wrote to
        self._encoder = Encoder(self._dataset, self._close_complete, n_threads=min(default_threads(), _ENCODERS))
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            # Exclusive creation: two writers can never share a part file. HDF5 makes it, for it would truncate one that is there, and ext4 writes a
            # truncated file to the disk while it is closed. The lock says that its writer lives, as long as it does; until then it is too young to be stale.
            self._file = h5py.File(self.part, "x", libver=("v110", "v110"), locking=False)
            self._lock = os.open(self.part, os.O_RDWR)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            # HDF5's own words name files and flags; the system's name for the error is what a reader knows.
            why = "File exists" if self.part.exists() else os.strerror(error.errno) if error.errno else str(error)
            raise LayerscopeError(f"No trace can be written in {folder}: {why}.") from None

    # -- activations -------------------------------------------------------------------------------------------------------

    def write(self, piece: Piece, causal: bool | None = None, largest: float | None = None) -> None:
        """Store one piece of a site at its place. Raises LayerscopeError if its shape contradicts the vocabulary.

        The piece's values are read before this returns; its chunks may reach the file later, at the latest on `flush`.
        causal: of an attention map, whether it is known to hold nothing but the mask's value after the diagonal; None: it is looked at.
        largest: the largest magnitude among the values, if that is known.
        """
        values = self._packed(piece, self._checked(piece), causal)
        path = site_path(piece.site, piece.layer)
        narrow = values.dtype.kind != "i" and self._float == np.float16 and path not in self._wide
        stored = to_float16(values, self._encoder.room(values.shape, np.float16)) if narrow else values
        overflow = stored.dtype == np.float16 and (largest is None or largest > FLOAT16_MAX) and overflowed(stored, values)
        if path not in self._layouts:
            self._plan(path, piece, np.dtype(np.float32) if overflow else stored.dtype, packed=values.ndim == 2)
        elif overflow:
            self._widen(path)
        if overflow:
            self._wide.add(path)
            stored = values
        self._place(path, piece, stored)

    def _place(self, path: str, piece: Piece, values: NDArray[Any]) -> None:
        """Whole chunks go to the encoder; a piece that ends inside a chunk goes through HDF5, which joins it with the next."""
        is_map = SITES[piece.site].is_attention_map
        axis = 1 if is_map else 0
        heads = piece.heads or range(self.info.n_heads)
        chunk, fill = self._layouts[path]
        step, stop = chunk[axis], piece.start + values.shape[axis]
        if piece.start + piece.values.shape[axis] == self.n_tokens:
            self._complete.add(path)
        if piece.start % step or (stop % step and stop != self.n_tokens):
            self._through_hdf5.add(path)
            dataset = self._dataset(path)
            if is_map:
                for head, rows in zip(heads, values, strict=True):
                    dataset[head, piece.start : stop, : values.shape[2]] = rows
            else:
                dataset[piece.start : stop] = values
            return
        if values is piece.values:
            values = values.copy()  # float32 and integers are stored as they came, and what came is only lent
        for offset, tile in tiles(values, chunk, fill):
            at = list(offset)
            at[axis] += piece.start
            at[0] = heads[at[0]] if is_map else at[0]
            self._encoder.put(path, tuple(at), tile)
        self._encoder.settle()

    def flush(self) -> None:
        """Bring everything that was written into the file, so that it can be read back."""
        self._encoder.finish()

    def _checked(self, piece: Piece) -> NDArray[Any]:
        site, values = SITES[piece.site], piece.values
        axis = 1 if site.is_attention_map else 0
        n_here = values.shape[axis] if values.ndim > axis else 0
        sizes = {**self.info.dims, "pos": n_here, "q_pos": n_here, "k_pos": piece.start + n_here}
        if piece.heads is not None:
            sizes["head"] = len(piece.heads)
        want = tuple(sizes[d] for d in site.dims)
        if values.shape != want or piece.start + n_here > self.n_tokens:
            named = ", ".join(f"{d}={s}" for d, s in zip(site.dims, want, strict=True))
            raise LayerscopeError(f"{piece.site} of layer {piece.layer} ({piece.source}) came as {values.shape}, but ({named}) was expected.")
        if (piece.layer is None) == site.per_layer:
            raise LayerscopeError(f"{piece.site} {'needs' if site.per_layer else 'has no'} layer, but came with layer {piece.layer}.")
        if (values.dtype.kind == "i") != (site.dtype == "int"):
            raise LayerscopeError(f"{piece.site} holds {site.dtype} values, but came as {values.dtype}.")
        return values

    def _packed(self, piece: Piece, values: NDArray[Any], causal: bool | None) -> NDArray[Any]:
        """The cells of a whole map up to the diagonal, (head, cell), where nothing is lost with the others; else the values as they are."""
        whole = SITES[piece.site].is_attention_map and values.shape[1] == self.n_tokens <= PACKED_TOKENS
        cells = pack(values, _fill(piece.site), causal) if whole else None
        return values if cells is None else cells

    def _plan(self, path: str, piece: Piece, dtype: np.dtype[Any], packed: bool) -> None:
        """Say what the dataset of a site is, which is made when it is first written to."""
        site, n = SITES[piece.site], self.n_tokens
        shape = (self.info.n_heads, n, n) if site.is_attention_map else (n, *piece.values.shape[1:])
        fill, dims = _fill(piece.site), site.dims
        attrs: dict[str, str | tuple[str, ...]] = {"source": piece.source}
        if site.is_attention_map and packed:
            shape, dims = (self.info.n_heads, n_cells(n)), ("head", "cell")
            attrs[PACKED] = "lower triangle"
        attrs["dims"] = dims
        if site.is_attention_map and (piece.heads is not None or self._rows is not None):
            first, last = self._rows or (0, n)
            attrs["kept"] = json.dumps({"heads": list(piece.heads or range(self.info.n_heads)), "rows": [first, last]})
        chunk = chunk_shape(dims, shape, dtype.itemsize, piece.heads is not None)
        self._layouts[path] = chunk, fill
        self._plans[path] = (path, shape, dtype, chunk, fill, attrs)

    def _dataset(self, path: str) -> h5py.Dataset:
        if path in self._plans:
            self._datasets[path] = create(self._file, *self._plans.pop(path))
        elif path not in self._datasets:
            self._datasets[path] = self._file[path]
        return self._datasets[path]

    def _close_complete(self) -> None:
        for path in self._complete & self._datasets.keys():
            del self._datasets[path]

    def _widen(self, path: str) -> None:
        """Replace a float16 dataset by a float32 one when a later piece brings values that float16 cannot hold."""
        self.flush()
        narrow = self._dataset(path)
        values, attrs, chunks, fill = narrow[...].astype(np.float32), dict(narrow.attrs), narrow.chunks, narrow.fillvalue
        self._encoder.written.pop(path, None)
        self._through_hdf5.add(path)
        del self._file[path]
        wide = self._datasets[path] = self._file.create_dataset(path, data=values, chunks=chunks, fillvalue=fill, **FILTERS)
        wide.attrs.update(attrs)

    def native(self, piece: NativePiece) -> None:
        """Store a whole native tensor, as computed."""
        group = self._file.require_group(NATIVE_GROUP)
        filters = {"chunks": True, **_NATIVE} if piece.values.size and piece.values.ndim else {}
        if filters:
            self._through_hdf5.add(f"{NATIVE_GROUP}/{len(group):03d}")
        dataset = group.create_dataset(f"{len(group):03d}", data=piece.values, **filters)
        made_by = {"gguf": "op", "hf": "module"}[self.info.engine]
        dataset.attrs.update({"name": piece.source, made_by: piece.made_by, "dims": list(piece.dims)})

    # -- reading back what was stored, for results that need the whole run ----------------------------------------------------

    def has(self, site: str, layer: int | None = None) -> bool:
        return site_path(site, layer) in self._layouts

    def __getitem__(self, key: str | tuple[str, int]) -> NDArray[np.float32]:
        self.flush()
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
            self._whole(f"logits/{name}", values, {})

    def vocabulary(self, texts: dict[int, str]) -> None:
        """Texts of the token ids that occur in the tokens, the top-k lists and the results."""
        group = self._file.create_group("vocabulary")
        ids = sorted(texts)
        group.create_dataset("ids", data=np.asarray(ids, dtype=np.int32))
        write_json(group, "texts", [texts[i] for i in ids])

    def result(self, name: str, values: NDArray[Any], dims: tuple[str, ...], **labels: Any) -> None:
        """An array that an experiment computed, with its axis names and labels."""
        self._whole(f"results/{name}", values, {"dims": dims, "labels": json.dumps({"dims": list(dims), **labels})})

    def _whole(self, path: str, values: NDArray[Any], attrs: dict[str, str | tuple[str, ...]]) -> None:
        """A dataset of one chunk, whose values nobody changes any more."""
        if not values.size:
            self._file.create_dataset(path, data=values).attrs.update(attrs)
            return
        self._plans[path] = (path, values.shape, values.dtype, values.shape, 0, attrs)
        self._complete.add(path)
        self._encoder.put(path, (0,) * values.ndim, np.ascontiguousarray(values))
        self._encoder.settle()

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
            self.flush()
            self._file.flush()
            self._close()
            with ThreadPoolExecutor(1, thread_name_prefix="sync") as beside:
                synced = beside.submit(os.fsync, self._lock)  # the disk is at work while what it is given is read back from memory
                verify(self.part, self._encoder.written, self._through_hdf5)
                synced.result()
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
            self._encoder.close()
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


def _fill(site: str) -> float:
    """What a map holds where the mask forbids attention, and HDF5 where nothing was written."""
    return -np.inf if site in _NEGATIVE_INFINITY_SITES else 0.0

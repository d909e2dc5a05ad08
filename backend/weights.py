"""Weights by name, read from the file when looked at: a Mapping over GGUF files and Hugging Face folders alike.

    weights = open_weights("model.gguf")
    weights["blocks.1.mlp.W_out"]                 float32 ndarray in file orientation (out, in), dequantized
    weights.lazy("blocks.1.mlp.W_out")[3:5, :16]  the same, but only these rows are read and dequantized
    weights.lazy("embed.W_E").shape               nothing is read
    weights.stored("blk.1.ffn_down.weight").pieces()   all values of a stored tensor, one after the other, in bounded memory

Canonical names follow TransformerLens: embed.W_E, blocks.L.ln1.w, blocks.L.attn.W_Q/W_K/W_V/W_O (biases b_Q, ...), blocks.L.ln2.w,
blocks.L.mlp.W_gate/W_in/W_out, blocks.L.mlp.W_router, blocks.L.mlp.experts.W_gate/W_in/W_out (expert, out, in), ln_final.w, unembed.W_U.
Where an architecture has them: biases of norms (ln1.b, ...), attn.q_norm.w and k_norm.w ((head, d_head) where each head has its own), ln1_post.w and ln2_post.w, pos_embed.W_pos,
mlp.shared.W_gate/W_in/W_out of a shared expert, attn.sinks, biases of the router (mlp.b_router) and of experts (mlp.experts.b_gate, ...),
mlp.b_correction that a router adds to choose by; of latent attention the matrices of its paper (DeepSeek-AI, arXiv:2405.04434): attn.W_DQ, W_UQ,
W_DKV (the rotary key's rows last), W_UK and W_UV (head after head), and attn.q_a_norm.w and kv_a_norm.w between them.
Under them both formats give the same numbers: rows that the converter to GGUF reordered for RoPE stand in the checkpoint's order
again, fused matrices are taken apart, and a norm's w is what it multiplies with, also where the checkpoint keeps w - 1. The file's own
names are accepted as well and give the tensor as it is stored. Tied embeddings appear under both names.

Where the values lie in the files, and how they are read, is in weight_rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.errors import LayerscopeError
from backend.files.gguf_header import GgufHeader, TensorInfo, model_info, read_header
from backend.files.hf_config import check_folder
from backend.files.safetensors_header import TensorEntry
from backend.model_info import ModelInfo
from backend.weight_names import EACH, GGUF_NAMES, HF_NAMES, ROTARY_INTERLEAVED, Names, Stored, section_rows
from backend.weight_rows import Columns, EveryNth, FileRows, Half, Rows, StackedRows

# Values read at a time where a tensor is read from end to end: few enough that they and their double-precision copies stay near the cores.
PIECE = 1 << 17
PIECE_UNIT = 256  # the longest block of any quantized type


@dataclass(frozen=True)
class Weight:
    """One tensor, not read yet. Indexing gives float32; ints, slices, an ellipsis and one list of ints are understood.

    `row_order[i]` is the stored row that is row i here. `plus` is added to what is stored. `native`: the file's own name or names.
    """

    name: str
    native: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    rows: Rows
    row_order: NDArray[np.int64] | None = None
    plus: float = 0.0

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        values = self._stored(_full_index(key, self.shape))
        return values + np.float32(self.plus) if self.plus else values

    def _stored(self, index: tuple[Any, ...]) -> NDArray[np.float32]:
        if self.ndim == 1:
            values = self.rows.read(np.zeros(1, np.int64))[0]
            return values[index[0]] if self.row_order is None else values[self.row_order][index[0]]
        leading = np.arange(math.prod(self.shape[:-1]), dtype=np.int64).reshape(self.shape[:-1])[index[:-1]]
        stored = leading if self.row_order is None else self.row_order[leading]
        values = self.rows.read(stored.reshape(-1)).reshape(*leading.shape, self.shape[-1])
        return values[..., index[-1]]

    def places(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the values at the places `at` of this weight (flat, C order) lie in the tensor that stores them, flat; of several tensors one after the other."""
        row, column = np.divmod(at, self.shape[-1])
        if self.row_order is not None:
            row, column = (row, self.row_order[column]) if self.ndim == 1 else (self.row_order[row], column)
        return self.rows.places(row, column)

    @property
    def why_unreadable(self) -> str | None:
        """Why a tensor under its native name has no values as float32 (it holds integers, or a type that nothing here reads); None: it has."""
        return self.rows.why_unreadable if isinstance(self.rows, FileRows) else None

    def pieces(self, start: int = 0, stop: int | None = None, most: int = PIECE) -> Iterator[NDArray[np.float32]]:
        """The values `start` to `stop` of a tensor under its native name, flat, in the order of the file, at most `most` at a time.

        `start` and `most` are multiples of PIECE_UNIT. A piece is good until the next one is asked for: both may be the same memory.
        """
        if not isinstance(self.rows, FileRows):
            raise LayerscopeError(f"{self.name} is made from what the file stores; its pieces are those of {self.native[0]}.")
        if start % PIECE_UNIT or most % PIECE_UNIT:
            raise ValueError(f"pieces begin at multiples of {PIECE_UNIT}, not at {start} in steps of {most}")
        return self.rows.pieces(start, self.size if stop is None else stop, most)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[...].astype(dtype or np.float32, copy=False)


class Weights(Mapping[str, NDArray[np.float32]]):
    """Canonical name -> float32 ndarray, in model order; `lazy(name)` gives the handle instead."""

    def __init__(self, info: ModelInfo, canonical: Mapping[str, Weight], native: Mapping[str, Weight]) -> None:
        self.info = info
        self._canonical, self._native = canonical, native

    def lazy(self, name: str) -> Weight:
        """The handle of a weight by its canonical or its native name; raises LayerscopeError for a name that does not exist."""
        weight = self._canonical.get(name) or self._native.get(name)
        if weight is None:
            raise LayerscopeError(f"{self.info.name} has no weight {name[:80]!r}.")
        return weight

    @property
    def native_names(self) -> tuple[str, ...]:
        return tuple(self._native)

    def stored(self, name: str) -> Weight:
        """The tensor as the file stores it, by its native name or by the canonical name of what is made from it (its first part)."""
        weight = self.lazy(name)
        return self._native.get(name) or self._native[weight.native[0]]

    def canonical_names(self) -> dict[str, list[str]]:
        """Native name -> the canonical weights that are made from it: several for a fused matrix, none for what has no such name."""
        found: dict[str, list[str]] = {name: [] for name in self._native}
        for name, weight in self._canonical.items():
            for native in weight.native:
                found[native].append(name)
        return found

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self.lazy(name)[...]

    def __contains__(self, name: object) -> bool:
        return name in self._canonical or name in self._native

    def __iter__(self) -> Iterator[str]:
        return iter(self._canonical)

    def __len__(self) -> int:
        return len(self._canonical)


def open_weights(path: str | Path) -> Weights:
    """The weights of a GGUF file (any part of one that is split) or of a folder of safetensors; only headers are read.

    Raises LayerscopeError for what cannot be opened, with the reason. An architecture without a row in backend.weight_names
    has its native names only.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    header = read_header(path)
    return _open_gguf(header, model_info(path, header))


def _open_gguf(header: GgufHeader, info: ModelInfo) -> Weights:
    native = {name: Weight(name, (name,), tensor.shape, tensor.type_name, tensor.nbytes, _gguf_rows(tensor)) for name, tensor in header.tensors.items()}
    names = GGUF_NAMES.get(info.architecture, {})
    canonical: dict[str, Weight] = {}
    for name, stored in _by_layer(names, info.n_layers):
        weight = native.get(stored.name)
        if weight is None and name == "unembed.W_U":
            weight = native.get(_stored_name(names, "embed.W_E"))
        if weight is not None:
            order = _row_order(name, weight.shape[0], info) if info.architecture in ROTARY_INTERLEAVED else None
            canonical[name] = _canonical(name, weight, stored, info) if order is None else replace(weight, name=name, row_order=order)
    return Weights(info, canonical, native)


def _gguf_rows(tensor: TensorInfo) -> FileRows:
    n_rows = math.prod(tensor.shape[:-1])
    return FileRows(tensor.path, tensor.offset, tensor.shape[-1], tensor.nbytes // n_rows, tensor.type_name, tensor.type_id)


def _row_order(name: str, n_rows: int, info: ModelInfo) -> NDArray[np.int64] | None:
    """Stored row of each of the checkpoint's rows of W_Q and W_K: ggml turns the pairs (2i, 2i + 1), transformers (i, i + d_head/2)."""
    kind = name.rpartition(".")[2]
    heads = {"W_Q": info.n_heads, "b_Q": info.n_heads, "W_K": info.n_kv_heads, "b_K": info.n_kv_heads}.get(kind)
    if heads is None:
        return None
    return np.arange(n_rows, dtype=np.int64).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _open_folder(path: Path) -> Weights:
    from backend.files.hf_config import model_info as folder_info

    folder, info = check_folder(path), folder_info(path)
    native = {name: _safetensors_weight(shard, name, entry) for shard, tensors in folder.shards.items() for name, entry in tensors.items()}
    names = HF_NAMES.get(info.architecture, {})
    canonical: dict[str, Weight] = {}
    for name, stored in _by_layer(names, info.n_layers):
        weight = _in_folder(native, stored.name)
        if weight is None and name == "unembed.W_U" and folder.config.get("tie_word_embeddings", folder.keys.tied):
            weight = _in_folder(native, _stored_name(names, "embed.W_E"))
        mark = next((mark for mark in EACH if mark in stored.name), None)
        if mark:
            weight = _stack(native, stored.name, mark, info, name)
        if weight is not None:
            canonical[name] = _canonical(name, weight, stored, info)
    return Weights(info, canonical, native)


def _in_folder(native: Mapping[str, Weight], name: str) -> Weight | None:
    """A checkpoint that was saved without its output matrix leaves out the first part of every name."""
    return native.get(name) or native.get(name.partition(".")[2])


def _canonical(name: str, weight: Weight, stored: Stored, info: ModelInfo) -> Weight:
    """The canonical weight inside a stored tensor."""
    shape, rows, nbytes = weight.shape, weight.rows, weight.nbytes
    if stored.step:
        i, n = stored.step
        shape, rows, nbytes = (*shape[:-1], len(range(i, shape[-1], n))), EveryNth(rows, stored.step), nbytes // n
    if stored.transposed:
        shape, rows = (*shape[:-2], shape[-1], shape[-2]), Columns(rows, shape[-2], shape[-1])
    if stored.half is not None:
        shape, rows, nbytes = (*shape[:-2], shape[-2] // 2, shape[-1]), Half(rows, shape[-2] // 2, stored.half), nbytes // 2
    if stored.flat:
        shape = (math.prod(shape[:-1]), shape[-1])
    if not stored.section:
        return replace(weight, name=name, shape=shape, rows=rows, nbytes=nbytes, plus=stored.plus)
    order = section_rows(stored.section, info, shape[0])
    nbytes = nbytes // shape[0] * len(order)
    return replace(weight, name=name, shape=(len(order), *shape[1:]), rows=rows, nbytes=nbytes, row_order=order, plus=stored.plus)


def _safetensors_weight(shard: Path, name: str, entry: TensorEntry) -> Weight:
    columns = entry.shape[-1] if entry.shape else 1
    n_rows, n_bytes = math.prod(entry.shape[:-1]), entry.stop - entry.start
    rows = FileRows(shard, entry.start, columns, n_bytes // max(n_rows, 1), entry.dtype)
    return Weight(name, (name,), entry.shape or (1,), entry.dtype, n_bytes, rows)


def _stack(native: Mapping[str, Weight], stored: str, mark: str, info: ModelInfo, name: str) -> Weight | None:
    """The matrices of the experts, or the norms of the heads, of one layer as one weight, (expert, out, in) or (head, d_head)."""
    n, what = info.dims[EACH[mark]], EACH[mark].replace("_", " ")
    parts = [native[one] for i in range(n) if (one := stored.replace(mark, str(i))) in native]
    if not parts:
        return None
    if len(parts) != n or len({(part.shape, part.dtype) for part in parts}) > 1:
        raise LayerscopeError(f"{info.name} has {len(parts)} of {n} equal {what}s for {name}.")
    first = parts[0]
    rows = StackedRows(tuple(part.rows for part in parts if isinstance(part.rows, FileRows)), math.prod(first.shape[:-1]))
    return Weight(name, tuple(part.name for part in parts), (len(parts), *first.shape), first.dtype, sum(part.nbytes for part in parts), rows)


def _stored_name(names: Names, name: str) -> str:
    stored = names[name]
    return stored.name if isinstance(stored, Stored) else stored


def _by_layer(names: Names, n_layers: int) -> Iterator[tuple[str, Stored]]:
    """(canonical name, where it is stored) with the layers filled in, in the order of a forward pass."""
    every = {name: stored if isinstance(stored, Stored) else Stored(stored) for name, stored in names.items()}
    for name in ("embed.W_E", "pos_embed.W_pos"):
        if name in every:
            yield name, every[name]
    for layer in range(n_layers):
        for name, stored in every.items():
            if name.startswith("blocks."):
                yield name.replace("{}", str(layer)), replace(stored, name=stored.name.replace("{}", str(layer)))
    for name in ("ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U"):
        if name in every:
            yield name, every[name]


def _full_index(key: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """`key` with one entry for every axis; raises IndexError as NumPy would."""
    parts = list(key) if isinstance(key, tuple) else [key]
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1 or len(parts) - len(dots) > len(shape):
        raise IndexError(f"too many indices for a weight of shape {shape}")
    at = dots[0] if dots else len(parts)
    parts[at : at + len(dots)] = [slice(None)] * (len(shape) - len(parts) + len(dots))
    lists = [part for part in parts if not isinstance(part, slice | int | np.integer)]
    if len(lists) > 1 or any(np.ndim(part) != 1 for part in lists):
        raise IndexError("a weight takes ints, slices and at most one list of ints")
    return tuple(parts)



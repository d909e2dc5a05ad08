"""ActivationStore: the activations of one run on disk, until those of another are held against them.

One unlinked file takes them all, so a killed process leaves nothing behind. A place's values are rows of features, (pos, feature):
heads lie side by side; of an attention map, feature h * n_tokens + k is what head h gives to key k; chosen experts are a row of
zeros and ones over all of them.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backend.engines import Piece
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo
from backend.sites import SITES

Key = tuple[int, str, int | None]  # prompt, site, layer


class ActivationStore:
    """Rows of features by (prompt, site, layer). Use as a context manager; the file is gone after it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._file = folder, tempfile.TemporaryFile(dir=folder)
        self._at: dict[Key, tuple[int, int, int]] = {}  # offset, rows, features
        self._end = 0

    def put(self, key: Key, start: int, rows: NDArray[np.float32], n_tokens: int) -> None:
        """Keep the rows of positions `start` and on, of `n_tokens` in all. Raises LayerscopeError when the disk is full."""
        width = rows.shape[1]
        if key not in self._at:
            self._at[key] = (self._end, n_tokens, width)
            self._end += 4 * n_tokens * width
        data = np.ascontiguousarray(rows, np.float32).data.cast("B")
        offset = self._at[key][0] + 4 * start * width
        try:
            while len(data):
                written = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise LayerscopeError(f"The activations of the reference cannot be kept in {self._folder}: {error.strerror}.") from None

    def rows(self, key: Key) -> NDArray[np.float32]:
        """(pos, feature), read from the file as it is used."""
        offset, n_rows, width = self._at[key]
        return np.memmap(self._file, np.float32, "r", offset, (n_rows, width))

    def __contains__(self, key: Key) -> bool:
        return key in self._at

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def feature_rows(piece: Piece, n_tokens: int, info: ModelInfo) -> NDArray[np.float32]:
    """The values of a piece as rows of features, (n, feature) float32; of masked scores, -inf in every model, 0 is kept."""
    values, site = piece.values, SITES[piece.site]
    if site.is_attention_map:
        n_heads, n, n_keys = values.shape
        padded = np.zeros((n, n_heads, n_tokens), np.float32)
        padded[:, :, :n_keys] = np.where(np.isneginf(values), 0, values).swapaxes(0, 1)
        return padded.reshape(n, -1)
    if site.name == "expert_indices":
        chosen = np.zeros((len(values), info.n_experts), np.float32)
        np.put_along_axis(chosen, values.astype(np.int64), 1.0, axis=1)
        return chosen
    return np.asarray(values, np.float32).reshape(len(values), -1)


def stored_bytes(info: ModelInfo, n_tokens: int, sites: tuple[str, ...]) -> int:
    """What a run of `n_tokens` takes in the store."""
    sizes = {**info.dims, "q_pos": n_tokens, "k_pos": n_tokens, "pos": n_tokens}
    cells = {name: math.prod(sizes[dim] for dim in SITES[name].dims) * (info.n_layers if SITES[name].per_layer else 1) for name in sites}
    if "expert_indices" in cells:
        cells["expert_indices"] = n_tokens * info.n_experts * info.n_layers
    return 4 * sum(cells.values())

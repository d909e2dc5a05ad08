"""One matrix of a stored tensor, read in blocks of rows: what is drawn, multiplied and measured without holding it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from backend.errors import LayerscopeError
from backend.weights import Weight

BLOCK = 1 << 20  # weights of a block


class Matrix:
    """The last two axes of a tensor; of a stack (experts) the matrix numbered `index`.

    shape: (row, column) as in the file: (output, input), except in the files of GPT-2's safetensors.
    """

    def __init__(self, tensor: Weight, index: int = 0) -> None:
        """Raises LayerscopeError for a vector, for a matrix that is not there, and for a tensor that cannot be read as numbers."""
        if tensor.why_unreadable is not None:
            raise LayerscopeError(tensor.why_unreadable)
        if tensor.ndim < 2 or not tensor.size:
            raise LayerscopeError(f"{tensor.name[:80]} has the shape {list(tensor.shape)} and is no matrix.")
        n = n_matrices(tensor)
        if not 0 <= index < n:
            raise LayerscopeError(f"{tensor.name[:80]} has {n:,} matrices; there is no number {index}.")
        self.shape = (tensor.shape[-2], tensor.shape[-1])
        self._tensor, self._before = tensor, tuple(int(i) for i in np.unravel_index(index, tensor.shape[:-2])) if tensor.ndim > 2 else ()

    def blocks(self, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, (n, column) float32) of the whole matrix, or of rows and columns from .. to; all columns of a row are read in any case."""
        start, stop = rows or (0, self.shape[0])
        kept = slice(*columns) if columns else slice(None)
        step = max(1, BLOCK // self.shape[1])
        for first in range(start, stop, step):
            yield first, self._tensor[(*self._before, slice(first, min(first + step, stop)), kept)]


def n_matrices(tensor: Weight) -> int:
    """How many matrices a tensor is a stack of; 0 for a vector."""
    return math.prod(tensor.shape[:-2]) if tensor.ndim > 1 and tensor.size else 0

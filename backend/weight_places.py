"""Where one entry of a canonical weight lies in the file: the stored tensor, the matrix of a stack, its row and column."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backend.errors import LayerscopeError
from backend.weights import Weights


@dataclass(frozen=True)
class StoredPlace:
    """An entry as the file has it. matrix: which one of a stack, counted over all leading axes; 0 where there is one."""

    tensor: str
    matrix: int
    row: int
    column: int


def place_in_file(weights: Weights, name: str, row: int, column: int, expert: int | None = None) -> StoredPlace:
    """The stored place of an entry of a canonical matrix, or of the matrices of experts. Raises LayerscopeError for one that is not there."""
    weight = weights.lazy(name)
    index = (row, column) if expert is None else (expert, row, column)
    if len(index) != weight.ndim or any(not 0 <= i < n for i, n in zip(index, weight.shape, strict=True)):
        raise LayerscopeError(f"{name[:80]} has no entry {list(index)}: its shape is {list(weight.shape)}.")
    place = int(weight.places(np.array([np.ravel_multi_index(index, weight.shape)]))[0])
    part, place = divmod(place, weights.lazy(weight.native[0]).size)  # tensors of one weight are equally large
    tensor = weight.native[part]
    matrix_row, stored_column = divmod(place, weights.lazy(tensor).shape[-1])
    matrix, stored_row = divmod(matrix_row, weights.lazy(tensor).shape[-2])
    return StoredPlace(tensor, matrix, stored_row, stored_column)

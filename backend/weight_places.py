"""Where one entry of a canonical weight lies in the file: the stored tensor, the matrix of a stack, its row and column."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backend.errors import LayerscopeError
from backend.weight_rows import Columns, EveryNth, FileRows, StackedRows
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
    at = int(np.ravel_multi_index(index[:-1], weight.shape[:-1]))
    at = at if weight.row_order is None else int(weight.row_order[at])
    rows, part = weight.rows, 0
    while not isinstance(rows, FileRows):
        if isinstance(rows, EveryNth):
            column, rows = rows.step[0] + rows.step[1] * column, rows.stored
        elif isinstance(rows, Columns):
            matrix, stored_column = divmod(at, rows.n_columns)
            at, column, rows = matrix * rows.n_rows + column, stored_column, rows.stored
        elif isinstance(rows, StackedRows):
            part, at = divmod(at, rows.rows_each)
            rows = rows.parts[part]
        else:
            raise TypeError(f"{type(rows).__name__} says nothing of places")
    tensor = weight.native[part]
    matrix, row = divmod(at, weights.lazy(tensor).shape[-2])
    return StoredPlace(tensor, matrix, row, column)

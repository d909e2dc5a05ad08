"""What was computed from a model's weights, as it lies in the cache of derived arrays: kept under `model_files.identity` of its files, so a changed file is read anew.

    WeightReport    every tensor's statistics and histogram
    TensorDetail    one matrix: norms of its rows and columns, its map, its singular values
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.spectrum import Spectrum
from backend.derived import Derived
from backend.errors import LayerscopeError

MAP_SIDE = 1024  # rows and columns of a matrix' map, at most
VERSION = 1  # of what is stored; another one is computed anew


@dataclass(frozen=True)
class WeightReport:
    """Every stored tensor of a model, in the order of its file.

    rows: one dict a tensor: name, canonical (names), layer (or None), component, shape, dtype, size (number of weights), nbytes, bits (per weight),
          the names of analysis.weights.STATISTICS, moments (of `analysis.weights.Moments`), largest ([[index, value], ...]), exponent (of the
          histogram), note (why there are no statistics, else "").
    bins: (tensor, bin) counts, the bins of `analysis.weights.bin_edges(exponent)`.
    """

    rows: list[dict[str, Any]]
    bins: NDArray[np.uint64]

    def row(self, name: str) -> tuple[int, dict[str, Any]]:
        """Number and row of a tensor by its native name or by a canonical one; raises LayerscopeError."""
        for i, row in enumerate(self.rows):
            if name == row["name"] or name in row["canonical"]:
                return i, row
        raise LayerscopeError(f"This model has no tensor {name[:80]!r}.")

    def save(self, derived: Derived, identity: str) -> None:
        small = self.bins.astype(np.uint32) if not len(self.bins) or int(self.bins.max()) < 1 << 32 else self.bins
        derived.put_array(("weight_bins", VERSION, identity), small)
        derived.put_json(("weight_rows", VERSION, identity), self.rows)

    @classmethod
    def load(cls, derived: Derived, identity: str) -> WeightReport | None:
        rows, bins = derived.get_json(("weight_rows", VERSION, identity)), derived.get_array(("weight_bins", VERSION, identity))
        return None if rows is None or bins is None else cls(rows, bins.astype(np.uint64))


@dataclass(frozen=True)
class TensorDetail:
    """One matrix of a model (of a stack, the one numbered `index`).

    row_norms: (row,); column_norms: (column,); map: `analysis.weights.SignedMap` of at most MAP_SIDE cells a side; spectrum: None where a value is NaN or infinite.
    """

    row_norms: NDArray[np.float32]
    column_norms: NDArray[np.float32]
    map: NDArray[np.float32]
    spectrum: Spectrum | None

    def save(self, derived: Derived, identity: str, name: str, index: int) -> None:
        for part in ("row_norms", "column_norms", "map"):
            derived.put_array(_key(part, identity, name, index), getattr(self, part))
        found = self.spectrum
        derived.put_array(_key("singular_values", identity, name, index), np.empty(0) if found is None else found.values)
        derived.put_json(_key("spectrum", identity, name, index), None if found is None else [found.n, found.energy])

    @classmethod
    def load(cls, derived: Derived, identity: str, name: str, index: int) -> TensorDetail | None:
        parts = [derived.get_array(_key(part, identity, name, index)) for part in ("row_norms", "column_norms", "map", "singular_values")]
        data = derived.get_bytes(_key("spectrum", identity, name, index))
        rows, columns, cells, values = parts
        if rows is None or columns is None or cells is None or values is None or data is None:
            return None
        size = derived.get_json(_key("spectrum", identity, name, index))
        return cls(rows, columns, cells, None if size is None else Spectrum(values, int(size[0]), float(size[1])))


def _key(part: str, identity: str, name: str, index: int) -> tuple[str | int, ...]:
    return f"weight_{part}", VERSION, identity, name, index

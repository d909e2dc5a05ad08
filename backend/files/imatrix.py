"""An importance matrix, as llama.cpp's llama-imatrix writes it: for each weight, how large its inputs were on some text.

The file is a GGUF whose tensors come in pairs, NAME.in_sum2 (sum of squared inputs, by expert and column) and NAME.counts (how many
rows were summed, by expert). The quantizer is given the mean square of each input column.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backend.errors import LayerscopeError
from backend.files.gguf_format import GgufHeader, read_file

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path) -> dict[str, NDArray[np.float32]]:
    """Native weight name -> mean squared input (expert * column,) float32. Raises LayerscopeError for a file that is no importance matrix.

    Columns of an expert that no text went through count 1 each, as in llama.cpp's own quantizer.
    """
    path = Path(path)
    if not path.is_file():
        raise LayerscopeError(f"There is no importance matrix at {path}.")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise LayerscopeError(f"{path.name} is no GGUF file; an importance matrix in the old .dat format is converted by llama-imatrix --in-file OLD -o NEW.gguf.")
    header = read_file(path)
    names = [name.removesuffix(_SUMS) for name in header.tensors if name.endswith(_SUMS)]
    if not names:
        raise LayerscopeError(f"{path.name} holds no importance matrix: none of its tensors ends in {_SUMS}.")
    return {name: _mean_square(path, header, name) for name in names}


def _mean_square(path: Path, header: GgufHeader, name: str) -> NDArray[np.float32]:
    if name + _COUNTS not in header.tensors:
        raise LayerscopeError(f"{path.name} has {name}{_SUMS} without {name}{_COUNTS}.")
    sums, counts = (_floats(path, header, name + ending) for ending in (_SUMS, _COUNTS))
    if len(sums) % len(counts):
        raise LayerscopeError(f"{path.name} has {len(sums):,} sums of {name} for {len(counts):,} counts.")
    by_expert, n = sums.reshape(len(counts), -1), counts[:, None]
    found = np.where(n > 0, by_expert / np.where(n > 0, n, 1), 1.0).astype(np.float32).ravel()
    if not np.isfinite(found).all():
        raise LayerscopeError(f"{path.name} holds values of {name} that are not finite.")
    return found


def _floats(path: Path, header: GgufHeader, name: str) -> NDArray[np.float64]:
    tensor = header.tensors[name]
    if tensor.type_name != "F32":
        raise LayerscopeError(f"{path.name} stores {name} as {tensor.type_name}, not as F32.")
    return np.fromfile(path, np.float32, tensor.nbytes // 4, offset=tensor.offset).astype(np.float64)

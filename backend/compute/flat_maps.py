"""Maps of heads as one line of memory, which is how compiled loops take them: then the innermost step is known to be one value."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray


def flat_maps(maps: NDArray[Any]) -> tuple[NDArray[np.float32], int, int]:
    """The memory of maps (head, q, k) as one line of float32, and the steps from head to head and from row to row in it; copied only if it is in another type or order."""
    values = maps if maps.dtype == np.float32 and maps.strides[2] == 4 and min(maps.strides) > 0 else np.ascontiguousarray(maps, np.float32)
    head_step, row_step = values.strides[0] // 4, values.strides[1] // 4
    n_heads, n, n_keys = values.shape
    size = (n_heads - 1) * head_step + (n - 1) * row_step + n_keys if values.size else 0
    return as_strided(values, (size,), (4,), writeable=False), head_step, row_step

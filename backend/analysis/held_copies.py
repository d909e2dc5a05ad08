"""Values of an engine as a capture takes them: how large they are, and copies of those that `identities` holds while their layer is at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def measured(values: Array, copy_to: Callable[[int], Array] | None = None) -> tuple[Array, float | None]:
    """`values`, or a copy of them, and their largest |x| if they are float32 in one piece, infinite where any is NaN; one pass for both.

    copy_to: size -> flat float32 memory for the copy of such values; None: no copy.
    """
    if values.dtype != np.float32 or not values.flags.c_contiguous:
        return (np.array(values, order="C") if copy_to else values), None
    from backend.analysis import compiled

    if copy_to is None:
        kept, top = values, compiled.largest(values.reshape(-1))
    else:
        kept = copy_to(values.size).reshape(values.shape)
        top = compiled.copy_largest(values.reshape(-1), kept.reshape(-1))
    return kept, float("inf") if np.isnan(top) else float(top)


class HeldCopies:
    """Memory for copies of `identities.HELD` sites, which every layer uses again: among an engine's own arrays, which come and go, they would keep its heap in pieces.

    A layer's copy is written over by the next layer's, except resid_post's, which that layer adds to.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, int], Array] = {}

    def of(self, site: str, layer: int | None) -> Callable[[int], Array]:
        """Where `measured` puts a copy of that site."""
        key = site, (layer or 0) % 2 if site == "resid_post" else 0

        def memory(size: int) -> Array:
            if key not in self._memory or self._memory[key].size < size:
                self._memory[key] = np.empty(size, np.float32)
            return self._memory[key][:size]

        return memory

"""How loops over values are compiled, by Numba, for what NumPy would go over several times.

Importing this module takes half a second, for Numba, so that modules with such loops are imported at first use. Compiling takes some seconds
for all of them, once: the code is kept beside the module, or in the user's cache folder where that cannot be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# Sums may be taken in another order, as NumPy does too, a product and a sum rounded once, and the sign of a zero lost.
FAST = {"reassoc", "contract", "nsz"}


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Numba's njit, without Python's lock; kept on disk unless there is no folder for it."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba: "no locator available"
            return numba.njit(nogil=True, **options)(function)

    return decorate

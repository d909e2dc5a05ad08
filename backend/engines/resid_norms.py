"""The light capture of a generation: how long the residual stream is after each layer, at the position that writes the next token."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from backend.analysis.activations import l2_norms
from backend.engines import Piece, Request, Where

SITE = "resid_post"


class ResidNorms:
    """A sink that keeps one number a layer of each pass, the last position's, and forgets the values."""

    def __init__(self, places: Collection[Where], n_layers: int, wanted: bool) -> None:
        """`wanted`: without a listener nothing is asked of the engine."""
        self.request = Request((SITE,) if wanted and any(site == SITE for site, _ in places) else ())
        self.values: NDArray[np.float32] = np.full(n_layers, np.nan, np.float32)

    def __call__(self, piece: Piece) -> None:
        assert piece.layer is not None
        self.values[piece.layer] = l2_norms(piece.values[-1:])[0]

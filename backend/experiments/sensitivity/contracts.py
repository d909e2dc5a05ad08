"""What the parts of a sensitivity run hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Chosen:
    """Weights chosen out of a model, as columns (n,), best (or least) first within a scope.

    tensor   index into `names`      at  place in that canonical tensor, flattened in C order
    value    the weight, float32     score  of the metric, float32
    scope    0 for the whole model, or the layer
    """

    names: tuple[str, ...]
    tensor: NDArray[np.int64]
    at: NDArray[np.int64]
    value: NDArray[np.float32]
    score: NDArray[np.float32]
    scope: NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """What a metric says of a model. tensors: rows of `tensors` in docs/sensitivity.md. `bottom` has as many entries in each tensor as `top`."""

    metric: str
    mode: str
    top: Chosen
    bottom: Chosen
    tensors: list[dict[str, Any]]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Losses:
    """nll: (token,) nats of every predicted token; window: (token,) int64, the window that each is of."""

    nll: NDArray[np.float64]
    window: NDArray[np.int64]

    @property
    def mean(self) -> float:
        return float(self.nll.mean())

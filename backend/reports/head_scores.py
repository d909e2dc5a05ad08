"""HeadScores: what the head detector found of a model, as it lies in the cache of derived arrays under the identity of the model's files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.derived import Derived

VERSION = 1
# What is ranked, in this order: score -> how it is called.
TITLES = {"induction": "Induction", "previous": "Previous token", "duplicate": "Duplicate token"}


@dataclass(frozen=True)
class HeadScores:
    """scores: name of TITLES -> (layer, head) float32, NaN for a layer without attention; accuracy: share of repeated tokens that the model says;
    prompts: length, repeats, prompts and seed of the test; has_bos: a BOS stands before the first block."""

    scores: dict[str, NDArray[np.float32]]
    accuracy: float
    prompts: dict[str, int]
    has_bos: bool

    def ranked(self, name: str, n: int) -> list[tuple[int, int, float]]:
        """(layer, head, score) of the `n` highest, best first."""
        values = self.scores[name]
        order = np.argsort(np.where(np.isnan(values), np.inf, -values), axis=None, kind="stable")[:n]
        places = zip(*np.unravel_index(order, values.shape), strict=True)
        return [(int(layer), int(head), float(values[layer, head])) for layer, head in places if np.isfinite(values[layer, head])]

    def to_json(self) -> dict[str, Any]:
        """Scores as nested lists; null where there is none."""
        scores = {name: [[round(float(v), 6) if np.isfinite(v) else None for v in row] for row in values] for name, values in self.scores.items()}
        return {"scores": scores, "accuracy": round(self.accuracy, 6), "prompts": self.prompts, "has_bos": self.has_bos}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeadScores:
        scores = {name: np.array([[np.nan if v is None else v for v in row] for row in rows], np.float32) for name, rows in data["scores"].items()}
        return cls(scores, data["accuracy"], data["prompts"], data["has_bos"])

    def save(self, derived: Derived, identity: str) -> None:
        derived.put_json(("head_scores", VERSION, identity), self.to_json())

    @classmethod
    def load(cls, derived: Derived, identity: str) -> HeadScores | None:
        """The last test of these files."""
        found = derived.get_json(("head_scores", VERSION, identity))
        return None if found is None else cls.from_json(found)

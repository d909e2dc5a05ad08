"""A projection as it lies in the cache of derived arrays: kept under what it was made from and every parameter, so that another choice is another entry."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.derived import Derived
from backend.errors import LayerscopeError
from backend.reports.vectors import Choice

VERSION = 1
METHODS = {"pca": "PCA", "umap": "UMAP", "tsne": "t-SNE"}
SCALES = {"raw": "as they are", "unit": "at length 1"}
# Rows that a method is given; of more a random sample. t-SNE's time grows fastest: 10,000 rows take about two minutes on two cores.
LIMITS = {"pca": 1 << 22, "umap": 300_000, "tsne": 10_000}


@dataclass(frozen=True)
class ProjectionSpec:
    """What to project and how. scale: "unit" brings every vector to length 1 first, so that distances are angles. include: rows that a sample must hold."""

    choice: Choice
    method: str = "pca"
    dims: int = 2
    scale: str = "raw"
    seed: int = 0
    include: tuple[int, ...] = ()

    def checked(self) -> ProjectionSpec:
        """Itself; raises LayerscopeError for a method, scale or number of dimensions that does not exist."""
        for what, value, known in (("method", self.method, METHODS), ("scale", self.scale, SCALES)):
            if value not in known:
                raise LayerscopeError(f"There is no {what} {value[:40]!r}; there are {', '.join(known)}.")
        if self.dims not in (2, 3):
            raise LayerscopeError(f"A projection has 2 or 3 dimensions, not {self.dims}.")
        return self

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "choice": self.choice.to_json(), "include": list(self.include)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ProjectionSpec:
        include = tuple(int(i) for i in data.get("include") or ())
        return cls(Choice.from_json(data["choice"]), str(data["method"]), int(data["dims"]), str(data["scale"]), int(data.get("seed", 0)), include).checked()

    def key(self, identity: str) -> str:
        """A name for the result. identity: of the model's files (`model_files.identity`), which traces do not depend on: they never change.

        PCA gives all its axes at once, and the whole of what it is given: neither dims nor include make another.
        """
        fields = self.to_json()
        if self.method == "pca":
            fields = {**fields, "dims": 0, "include": [], "seed": 0}
        fields["choice"]["model"] = ""
        fields["identity"] = identity if self.choice.is_matrix else ""
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Projection:
    """rows: (point,) numbers of the vectors that are points, ascending; coords: (point, 2 or 3); norms: (row,) Euclidean length of every vector, NaN where a value
    is NaN or infinite; ratio: (k,) share of the variance of the points' principal components; facts: n, d, n_left_out, n_zero, n_sampled_from (0: all), seconds.
    """

    rows: NDArray[np.int32]
    coords: NDArray[np.float32]
    norms: NDArray[np.float32]
    ratio: NDArray[np.float64]
    facts: dict[str, Any]

    def save(self, derived: Derived, key: str) -> None:
        for part in ("rows", "coords", "norms", "ratio"):
            derived.put_array(("projection", VERSION, key, part), getattr(self, part))
        derived.put_json(("projection", VERSION, key, "facts"), self.facts)

    @classmethod
    def load(cls, derived: Derived, key: str) -> Projection | None:
        facts = derived.get_json(("projection", VERSION, key, "facts"))
        rows, coords, norms, ratio = (derived.get_array(("projection", VERSION, key, part)) for part in ("rows", "coords", "norms", "ratio"))
        return None if facts is None or rows is None or coords is None or norms is None or ratio is None else cls(rows, coords, norms, ratio, facts)


@dataclass(frozen=True)
class VocabularyTexts:
    """Every token of a model: its text, (token,) class numbers of `analysis.token_classes`, ids of control tokens."""

    texts: list[str]
    classes: NDArray[np.uint8]
    special: frozenset[int]

    def save(self, derived: Derived, identity: str) -> None:
        derived.put_array(("vocabulary_classes", VERSION, identity), self.classes)
        derived.put_json(("vocabulary", VERSION, identity), {"texts": self.texts, "special": sorted(self.special)})

    @classmethod
    def load(cls, derived: Derived, identity: str) -> VocabularyTexts | None:
        words, classes = derived.get_json(("vocabulary", VERSION, identity)), derived.get_array(("vocabulary_classes", VERSION, identity))
        return None if words is None or classes is None else cls(words["texts"], classes, frozenset(words["special"]))

    def find(self, text: str, limit: int) -> list[int]:
        """Ids of the tokens that a search means, best first: "#12" by id; else those that are the text, with or without a leading space,
        then those that begin with it, then those that hold it; case only counts where nothing differs otherwise.
        """
        if text[:1] == "#" and text[1:].isdecimal() and int(text[1:]) < len(self.texts):
            return [int(text[1:])]
        wanted = text.casefold()
        if not wanted:
            return []
        matching = ((i, token) for i, token in enumerate(self.texts) if wanted in token.casefold())
        return [i for _, _, i in sorted((_rank(token, text), len(token), i) for i, token in matching)[:limit]]


def _rank(token: str, text: str) -> int:
    """How far a token is from what was typed, 0 the nearest; the order of VocabularyTexts.find."""
    bare, wanted = token.strip(), text.strip()
    tests = (token == text, bare == wanted, bare.casefold() == wanted.casefold(), bare.casefold().startswith(wanted.casefold()))
    return tests.index(True) if True in tests else len(tests)

"""What an embedding view looks at: the rows of W_E or W_U, or the states that traces hold of a site, as vectors that are read in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backend.errors import LayerscopeError
from backend.sites import SITES
from backend.trace import Trace
from backend.weights import Weight, Weights

MATRICES = {"W_E": "Input embeddings W_E", "W_U": "Output embeddings W_U"}
# Sites with one vector of floats a position; heads are laid side by side. `result` and `logits` are left out for their width.
SITES_SHOWN = tuple(name for name, site in SITES.items() if site.dims[0] == "pos" and site.dtype == "float" and name not in ("result", "logits", "expert_weights"))
MAX_TRACES = 64
_BLOCK = 1 << 21  # values read at a time
_EMBED = -1  # the "layer" of the embeddings before block 0, where a path begins

# Where the matrices lie in files of an architecture that has no canonical names.
_NATIVE = {
    "W_E": ("token_embd.weight", "model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight", "backbone.embeddings.weight"),
    "W_U": ("output.weight", "lm_head.weight", "embed_out.weight"),
}
_CANONICAL = {"W_E": "embed.W_E", "W_U": "unembed.W_U"}


@dataclass(frozen=True)
class Choice:
    """Which vectors. what: "W_E", "W_U" or a site of SITES_SHOWN; layer: one, or None for all there are (a site without layers has none)."""

    model: str
    what: str
    traces: tuple[str, ...] = ()
    layer: int | None = None

    @property
    def is_matrix(self) -> bool:
        return self.what in MATRICES

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "traces": list(self.traces)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Choice:
        layer = data.get("layer")
        return cls(str(data["model"]), str(data["what"]), tuple(str(trace) for trace in data.get("traces") or ()), None if layer is None else int(layer))


class Vectors(Protocol):
    """Rows of one width. shape: (row, dimension); groups: (row,), equal for all states of one token of one trace."""

    shape: tuple[int, int]

    @property
    def groups(self) -> NDArray[np.int64]: ...

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, (n, dimension) float32), in order."""

    def row(self, number: int) -> NDArray[np.float32]: ...


class MatrixRows:
    """The rows of a matrix of the vocabulary: row i belongs to token i."""

    def __init__(self, weights: Weights, what: str) -> None:
        """Raises LayerscopeError where the model has no such matrix."""
        self.weight = _matrix(weights, what)
        self.what, self.shape = what, (self.weight.shape[0], self.weight.shape[1])
        self.tied = what == "W_U" and self.weight.native == _matrix(weights, "W_E").native

    @property
    def groups(self) -> NDArray[np.int64]:
        return np.arange(self.shape[0], dtype=np.int64)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        step = max(1, _BLOCK // self.shape[1])
        for first in range(0, self.shape[0], step):
            yield first, self.weight[first : min(first + step, self.shape[0])]

    def row(self, number: int) -> NDArray[np.float32]:
        return self.weight[number]


def _matrix(weights: Weights, what: str) -> Weight:
    for name in (_CANONICAL[what], *_NATIVE[what], *(_NATIVE["W_E"] if what == "W_U" else ())):
        if name in weights:
            found = weights.lazy(name)
            if found.ndim != 2 or not found.size:
                raise LayerscopeError(f"{name} of {weights.info.name} has the shape {list(found.shape)} and is no matrix.")
            return found
    raise LayerscopeError(f"{weights.info.name} ({weights.info.architecture}) has no matrix that is known as {what}.")


class TraceRows:
    """The states of a site, trace after trace, layer after layer, position after position.

    trace, layer, position: (row,) where each row comes from; layer -1 is `embed`, which goes before the layers of resid_post.
    """

    def __init__(self, traces: Sequence[Trace], what: str, layer: int | None = None) -> None:
        """Raises LayerscopeError where a trace does not hold the site (at that layer), or traces have different widths."""
        if what not in SITES_SHOWN:
            raise LayerscopeError(f"{what[:80]!r} is no site with one vector a position; those are {', '.join(SITES_SHOWN)}.")
        if not 0 < len(traces) <= MAX_TRACES:
            raise LayerscopeError(f"{len(traces)} traces were chosen; 1 to {MAX_TRACES} can be shown together.")
        self.traces, self.what = list(traces), what
        self.layers = self._layers(layer)
        parts = [(number, layer, trace.n_tokens) for number, trace in enumerate(self.traces) for layer in self.layers]
        sizes = [n for _, _, n in parts]
        self.trace = np.repeat(np.array([number for number, _, _ in parts], np.int32), sizes)
        self.layer = np.repeat(np.array([at for _, at, _ in parts], np.int32), sizes)
        self.position = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self.shape = (len(self.trace), self._values(0, self.layers[0]).shape[1])

    def _layers(self, layer: int | None) -> list[int]:
        site = SITES[self.what]
        for trace in self.traces:
            if not trace.has(self.what, layer if site.per_layer else None):
                where = f" at layer {layer}" if layer is not None and site.per_layer else ""
                raise LayerscopeError(f"The trace {trace.id} of {trace.info.name} does not hold {self.what}{where}.")
        if not site.per_layer:
            return [_EMBED]
        if layer is not None:
            return [layer]
        common = set.intersection(*(set(trace.layers(self.what)) for trace in self.traces))
        if not common:
            raise LayerscopeError(f"The {len(self.traces)} traces hold {self.what} at no layer in common.")
        first = [_EMBED] if self.what == "resid_post" and all(trace.has("embed") for trace in self.traces) else []
        return [*first, *sorted(common)]

    def _values(self, number: int, layer: int) -> NDArray[np.float32]:
        trace = self.traces[number]
        plain = not SITES[self.what].per_layer
        values = trace[self.what] if plain else trace["embed"] if layer == _EMBED else trace[self.what, layer]
        return values.reshape(len(values), -1)

    @property
    def groups(self) -> NDArray[np.int64]:
        longest = max(trace.n_tokens for trace in self.traces)
        return self.trace.astype(np.int64) * longest + self.position

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        step = max(1, _BLOCK // self.shape[1])
        for part, start in enumerate(self._starts[:-1]):
            number, at = divmod(part, len(self.layers))
            values = self._values(number, self.layers[at])
            if values.shape[1] != self.shape[1]:
                where = f"layer {self.layers[at]} of {self.traces[number].id}"
                raise LayerscopeError(f"{self.what} has {self.shape[1]:,} columns in the first trace and {values.shape[1]:,} in {where}.")
            for first in range(0, len(values), step):
                yield int(start) + first, values[first : first + step]

    def row(self, number: int) -> NDArray[np.float32]:
        return self._values(int(self.trace[number]), int(self.layer[number]))[int(self.position[number])]

    def row_at(self, trace: int, layer: int, position: int) -> int | None:
        """The row of a state, None if it is not among them."""
        if layer not in self.layers or not 0 <= position < self.traces[trace].n_tokens:
            return None
        return int(self._starts[trace * len(self.layers) + self.layers.index(layer)]) + position


def open_vectors(choice: Choice, weights: Callable[[], Weights], open_trace: Callable[[str], Trace]) -> MatrixRows | TraceRows:
    """The vectors of a choice. weights: opens the model's; open_trace: by id. Raises LayerscopeError."""
    if choice.is_matrix:
        return MatrixRows(weights(), choice.what)
    return TraceRows([open_trace(trace) for trace in choice.traces], choice.what, choice.layer)

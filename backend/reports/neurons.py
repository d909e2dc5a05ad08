"""What neurons write into the vocabulary, and where over all traces of a model each neuron of a layer is largest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.neurons import merge_top, written_direction
from backend.derived import Derived, Key
from backend.errors import Cancelled, LayerscopeError
from backend.readout import Readout
from backend.trace import Trace

PROMOTED = 8  # tokens of each sign
EXAMPLES = 10  # places of each sign
_BLOCK = 1 << 24  # weights of W_U that are read at a time

_Top = tuple[NDArray[np.float32], NDArray[np.int64]]  # values and ids, see merge_top


@dataclass(frozen=True)
class Promoted:
    """Tokens that a neuron writes for when its value is positive, best first, and against: ids and unscaled logits, (neuron, PROMOTED) each."""

    for_ids: NDArray[np.int64]
    for_logits: NDArray[np.float32]
    against_ids: NDArray[np.int64]
    against_logits: NDArray[np.float32]

    def parts(self) -> dict[str, NDArray[Any]]:
        return {"for_ids": self.for_ids, "for_logits": self.for_logits, "against_ids": self.against_ids, "against_logits": self.against_logits}


def weights_read(readout: Readout, neurons: Sequence[tuple[int, int]]) -> int:
    """How many weights `promoted` reads: W_U, and W_out of every layer among the neurons."""
    info = readout.weights.info
    return info.d_vocab * info.d_model + len({layer for layer, _ in neurons}) * info.d_model * info.d_mlp


def promoted(readout: Readout, neurons: Sequence[tuple[int, int]], progress: Callable[[str, int, int], None] = lambda *_: None,
             should_stop: Callable[[], bool] = lambda: False) -> Promoted:  # fmt: skip
    """Each neuron's column of W_out, the final norm's gain folded in, through W_U. neurons: (layer, number)."""
    weights, written = readout.weights, []
    for layer, neuron in neurons:
        name = f"blocks.{layer}.mlp.W_out"
        if name not in weights:
            raise LayerscopeError(f"{weights.info.name} has no {name}: layer {layer} has no MLP of its own.")
        if not 0 <= neuron < weights.lazy(name).shape[1]:
            raise LayerscopeError(f"Neuron {layer}.{neuron} is outside 0-{weights.lazy(name).shape[1] - 1}.")
    matrices: dict[int, NDArray[np.float32]] = {}
    for layer in sorted({layer for layer, _ in neurons}):
        chosen = [neuron for at, neuron in neurons if at == layer]
        matrices[layer] = np.ascontiguousarray(weights[f"blocks.{layer}.mlp.W_out"][:, chosen].T)
    places = {layer: iter(matrix) for layer, matrix in matrices.items()}
    for layer, _ in neurons:
        post = weights[f"blocks.{layer}.ln2_post.w"] if f"blocks.{layer}.ln2_post.w" in weights else None
        written.append(written_direction(readout.ending, next(places[layer]), post))
    return _through_w_u(readout, np.array(written, np.float32), progress, should_stop)


def _through_w_u(readout: Readout, written: NDArray[np.float32], progress: Callable[[str, int, int], None], should_stop: Callable[[], bool]) -> Promoted:
    w_u = readout.weights.lazy("unembed.W_U")
    step = max(1, _BLOCK // w_u.shape[1])
    tops: list[_Top | None] = [None, None]
    for start in range(0, w_u.shape[0], step):
        if should_stop():
            raise Cancelled
        progress("rows of W_U", start, w_u.shape[0])
        logits = w_u[start : start + step] @ written.T * np.float32(readout.ending.multiplier)
        tops = [merge_top(top, sign * logits, start, PROMOTED) for top, sign in zip(tops, (1, -1), strict=True)]
    best, worst = tops
    assert best is not None and worst is not None, "a vocabulary has tokens"
    return Promoted(best[1].T, best[0].T, worst[1].T, -worst[0].T)


# -- where a neuron is largest ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """The places where each neuron of a layer is largest and smallest over some traces.

    values, places: (2, EXAMPLES, d_mlp); [0] largest first, [1] smallest first. A place is a running number of positions: `where` says
    whose. n_tokens: of each trace, in their order. n_bad: values that are NaN or infinite; NaN takes no place.
    """

    trace_ids: list[str]
    n_tokens: list[int]
    values: NDArray[np.float32]
    places: NDArray[np.int64]
    n_bad: int

    def of(self, neuron: int, side: int) -> Iterator[tuple[str, int, float]]:
        """(trace id, position, value) of one neuron; side 0: largest, 1: smallest."""
        starts = np.cumsum([0, *self.n_tokens])
        for place, value in zip(self.places[side, :, neuron], self.values[side, :, neuron], strict=True):
            if place >= 0:
                at = int(np.searchsorted(starts, place, side="right")) - 1
                yield self.trace_ids[at], int(place - starts[at]), float(value)

    @staticmethod
    def key(model: str, layer: int, trace_ids: Iterable[str]) -> Key:
        """Where it lies in the cache; changes with the traces."""
        return "neuron_examples", model, layer, hashlib.sha256(" ".join(sorted(trace_ids)).encode()).hexdigest()[:16]

    def save(self, derived: Derived, key: Key) -> None:
        derived.put_array((*key, "values"), self.values)
        derived.put_array((*key, "places"), self.places)
        derived.put_json((*key, "traces"), [self.trace_ids, self.n_tokens, self.n_bad])

    @classmethod
    def load(cls, derived: Derived, key: Key) -> Examples | None:
        values, places, traces = derived.get_array((*key, "values")), derived.get_array((*key, "places")), derived.get_json((*key, "traces"))
        return None if values is None or places is None or traces is None else cls(traces[0], traces[1], values, places, traces[2])


def find_examples(traces: Iterable[Trace], layer: int) -> Examples:
    """Over all traces that hold mlp_post of the layer; raises LayerscopeError if none does, or they are of models of different width."""
    tops: list[_Top | None] = [None, None]
    ids: list[str] = []
    lengths: list[int] = []
    bad = 0
    for trace in traces:
        if not trace.has("mlp_post", layer):
            continue
        values = trace["mlp_post", layer]
        if tops[0] is not None and values.shape[1] != tops[0][0].shape[1]:
            there, before = values.shape[1], tops[0][0].shape[1]
            raise LayerscopeError(f"Trace {trace.id} has {there:,} neurons in layer {layer}, the others {before:,}: the model of that name was another then.")
        bad += int(values.size - np.isfinite(values).sum())
        tops = [merge_top(top, sign * values, sum(lengths), EXAMPLES) for top, sign in zip(tops, (1, -1), strict=True)]
        ids.append(trace.id)
        lengths.append(trace.n_tokens)
    largest, smallest = tops
    if largest is None or smallest is None:
        raise LayerscopeError(f"No trace holds mlp_post of layer {layer}.")
    return Examples(ids, lengths, np.stack([largest[0], -smallest[0]]), np.stack([largest[1], smallest[1]]), bad)

"""What the Embeddings page shows comes from here: the model and traces of the address, the vectors, projections and texts from the cache, what a projection costs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.embeddings import FULL_SIDE, sample
from backend.analysis.token_classes import CLASSES, token_class
from backend.errors import LayerscopeError
from backend.model_files import ModelEntry, identity
from backend.model_info import ModelInfo
from backend.reports.embedding_neighbours import matrices
from backend.reports.projection import LIMITS, METHODS, Projection, ProjectionSpec, VocabularyTexts
from backend.reports.vectors import MATRICES, MAX_TRACES, SITES_SHOWN, Choice, MatrixRows, TraceRows, open_vectors
from backend.trace import Trace
from backend.weights import Weights, open_weights
from components.services import services
from components.states import empty
from components.token_label import token_label
from components.trace_view import one_line

SHOWN = {2: 200_000, 3: 100_000}  # points that are drawn at most, by dimensions
SHOWN_PLAIN = 8_000  # where the browser has no WebGL
_AT_ONCE_S = 20.0
_READ_PER_S, _PRODUCTS_PER_S = 1.5e8, 3e10  # values and multiply-adds of two cores; only ever shown as "about"


@dataclass(frozen=True)
class Place:
    """The model of the page, and the traces whose states it may show, the open one first."""

    model: str
    traces: tuple[str, ...]
    entry: ModelEntry | None
    why_no_model: str = ""

    @property
    def identity(self) -> str:
        """Of the model's files; "" while there are none."""
        return identity(self.entry.path) if self.entry is not None and self.entry.path.exists() else ""

    @property
    def weights(self) -> Weights:
        """Raises LayerscopeError while there are none."""
        if self.entry is None:
            raise LayerscopeError(self.why_no_model)
        return _weights(self.identity, str(self.entry.path))

    @property
    def info(self) -> ModelInfo | None:
        return self.entry.info if self.entry is not None else services().library.open(self.traces[0]).info

    def opened(self) -> list[Trace]:
        return [services().library.open(trace) for trace in self.traces]

    def sources(self) -> list[str]:
        """What can be chosen: the matrices of the model, then the sites that all traces hold."""
        opened = self.opened()
        sites = [name for name in SITES_SHOWN if opened and all(trace.has(name) for trace in opened)]
        return [*(MATRICES if self.entry is not None else ()), *sites]

    def layers(self, what: str) -> list[int]:
        """Layers at which all traces hold a site; [] for what has none."""
        if what in MATRICES:
            return []
        found = [set(trace.layers(what)) for trace in self.opened()]
        return sorted(set.intersection(*found)) if found else []


def place(model: str | None, traces: tuple[str, ...]) -> Place:
    """Raises LayerscopeError for a trace that is not there, one of another model, or (without traces) a model that is not there."""
    library = services().library
    traces = tuple(dict.fromkeys(traces))[:MAX_TRACES]
    if traces:
        names = {library.summary(trace).model_name for trace in traces}
        if len(names) > 1:
            raise LayerscopeError(f"The traces are of {' and '.join(sorted(names))}; states of different models have nothing in common.")
        model = names.pop()
    try:
        return Place(str(model), traces, library.resolve_model(str(model)))
    except LayerscopeError as problem:
        if not traces:
            raise
        return Place(str(model), traces, None, str(problem))


@functools.lru_cache(maxsize=4)
def _weights(key: str, path: str) -> Weights:
    """Headers alone; the key changes with the file."""
    return open_weights(path)


# -- a projection and what belongs to its points --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """One projection with what its points are called. key: of the projection in the cache."""

    place: Place
    spec: ProjectionSpec
    key: str
    projection: Projection

    @functools.cached_property
    def vectors(self) -> MatrixRows | TraceRows:
        return open_vectors(self.spec.choice, lambda: self.place.weights, services().library.open)

    @property
    def states(self) -> TraceRows | None:
        return self.vectors if isinstance(self.vectors, TraceRows) else None

    @functools.cached_property
    def vocabulary(self) -> VocabularyTexts | None:
        return vocabulary(self.place)

    @functools.cached_property
    def dims(self) -> int:
        return min(self.spec.dims, self.projection.coords.shape[1])

    def label(self, row: int) -> str:
        """The token of a vector as it is written on screen."""
        if self.states is not None:
            trace, at = self.states.traces[int(self.states.trace[row])], int(self.states.position[row])
            return token_label(trace.token_texts[at], at in trace.special)
        return self.token(row)

    def token(self, token_id: int) -> str:
        """A token of the vocabulary as it is written on screen."""
        words = self.vocabulary
        return f"[{token_id}]" if words is None else token_label(words.texts[token_id], token_id in words.special)

    def where(self, row: int) -> str:
        """Where a vector comes from: an id, or layer, position and trace."""
        if self.states is None:
            return f"id {row:,}"
        states, parts = self.states, []
        if len(states.layers) > 1 or self.spec.choice.layer is not None:
            parts.append(layer_name(int(states.layer[row]), self.spec.choice.what))
        parts.append(f"position {int(states.position[row])}")
        if len(states.traces) > 1:
            parts.append(f"trace {int(states.trace[row]) + 1}")
        return ", ".join(parts)

    def short_place(self, row: int) -> str:
        """The same for a narrow column: "id 12", "L3, pos 5"."""
        if self.states is None:
            return f"id {row:,}"
        layer = int(self.states.layer[row])
        named = [] if len(self.states.layers) < 2 else ["embed" if layer < 0 else f"L{layer}"]
        trace = [] if len(self.states.traces) < 2 else [f"trace {int(self.states.trace[row]) + 1}"]
        return ", ".join([*named, f"pos {int(self.states.position[row])}", *trace])

    @functools.cached_property
    def classes(self) -> NDArray[np.uint8]:
        """(row,) numbers into CLASSES."""
        if self.states is None:
            words = self.vocabulary
            return np.zeros(self.vectors.shape[0], np.uint8) if words is None else words.classes
        numbers = {name: i for i, name in enumerate(CLASSES)}
        by_trace = [np.array([numbers[token_class(text, at in trace.special)] for at, text in enumerate(trace.token_texts)], np.uint8) for trace in self.states.traces]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in by_trace])])
        return np.concatenate(by_trace)[starts[self.states.trace] + self.states.position]

    def shown(self, webgl: bool, include: tuple[int, ...]) -> NDArray[np.int64]:
        """Numbers of the points that are drawn: all, or a seeded sample of them that holds the rows in `include`."""
        limit = SHOWN[self.dims] if webgl else SHOWN_PLAIN
        return _shown_points(self.key, self.projection, self.vectors, limit, include if len(self.projection.rows) > limit else ())


def layer_name(layer: int, what: str) -> str:
    return ("embed" if what == "resid_post" else what) if layer < 0 else f"layer {layer}"


def _shown_points(key: str, projection: Projection, vectors: MatrixRows | TraceRows, limit: int, include: tuple[int, ...]) -> NDArray[np.int64]:
    rows = projection.rows
    if len(rows) <= limit:
        return np.arange(len(rows), dtype=np.int64)
    wanted = np.flatnonzero(np.isin(rows, np.array(include, np.int64)))
    return sample(vectors.groups[rows], limit, wanted)


def view(place_: Place, spec: ProjectionSpec) -> View | None:
    """The projection, or None while nobody has made it."""
    key = spec.key(place_.identity)
    if spec.choice.is_matrix and not place_.identity:
        return None
    try:
        found = View(place_, spec, key, _projection(key))
        if spec.choice.is_matrix:
            _read_vocabulary(place_.identity)
    except LookupError:
        return None
    return found


@functools.lru_cache(maxsize=4)
def _projection(key: str) -> Projection:
    found = Projection.load(services().derived, key)
    if found is None:
        raise LookupError(key)
    return found


@functools.lru_cache(maxsize=2)
def _read_vocabulary(key: str) -> VocabularyTexts:
    found = VocabularyTexts.load(services().derived, key)
    if found is None:
        raise LookupError(key)
    return found


def vocabulary(place_: Place) -> VocabularyTexts | None:
    """The texts of the model's tokens, or None while no job has read them."""
    try:
        return _read_vocabulary(place_.identity) if place_.identity else None
    except LookupError:
        return None


def vocabulary_matrices(place_: Place) -> dict[str, MatrixRows]:
    """W_E and W_U of the model, {} where its file is not there."""
    return matrices(place_.weights) if place_.identity else {}


# -- what is not there yet ------------------------------------------------------------------------------------------------------------


def seconds(place_: Place, spec: ProjectionSpec) -> float:
    """About how long a projection takes on two cores."""
    n, d = _shape(place_, spec.choice)
    rows = min(n, LIMITS[spec.method])
    products = float(n) * d * d / 2 if d <= FULL_SIDE or n <= FULL_SIDE else 22.0 * n * d * 64
    more = {"pca": 0.0, "umap": 8 + rows * rows * 60 / _PRODUCTS_PER_S + rows * 1.5e-3, "tsne": 2 + rows * 1.2e-2}[spec.method]
    return 4 * n * d / _READ_PER_S + products / _PRODUCTS_PER_S + more


def _shape(place_: Place, choice: Choice) -> tuple[int, int]:
    info = place_.info
    if choice.is_matrix:
        return (info.d_vocab, info.d_model) if info else (0, 0)
    vectors = open_vectors(choice, lambda: place_.weights, services().library.open)
    return vectors.shape


def missing(place_: Place, spec: ProjectionSpec) -> tuple[Any, bool]:
    """(what stands in place of the picture before it was made, whether it is made at once since that is seconds)."""
    n, d = _shape(place_, spec.choice)
    cost = seconds(place_, spec)
    about = f"about {max(1, round(cost)):,} seconds" if cost < 120 else f"about {cost / 60:,.0f} minutes"
    limit = LIMITS[spec.method]
    part = f" Of {n:,} vectors a random sample of {limit:,} is taken." if n > limit else ""
    words = f"{n:,} vectors of {d:,} dimensions: {about} on two cores.{part} The result is kept."
    return empty(f"{METHODS[spec.method]} is not computed yet", words, None, "circle-dashed"), cost <= _AT_ONCE_S


def trace_options(place_: Place) -> list[dict[str, str]]:
    """The traces of the model that can be shown together, newest first."""
    known = services().library.traces(model=place_.model, limit=200)
    return [{"label": f"{one_line(trace.prompt, 46)} · {trace.n_tokens} tokens", "value": trace.id} for trace in known]



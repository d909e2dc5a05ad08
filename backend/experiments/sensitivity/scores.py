"""A metric's scores of a model's weights, one tensor after the other.

    magnitude                                  the weights alone
    wanda, obs                                 what enters each matrix, summed over the text (inputs.py)
    grad_x_weight, grad_squared, hutchinson    backward passes, of Hugging Face models
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from backend.analysis import sensitivity as analysis
from backend.engines import Engine, ShouldStop, never_stop
from backend.engines.hf import HfEngine
from backend.engines.hf_gradients import Gradients, Named
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Progress, no_progress
from backend.experiments.sensitivity import GRADIENT_METRICS, METRICS
from backend.experiments.sensitivity.inputs import input_vectors, source_of

Array = NDArray[np.float32]
Windows = Sequence[list[int]]
Scored = Iterator[tuple[str, Array, Array]]
BACKWARD = "backward passes, windows"

_OF_INPUT = {"wanda": analysis.wanda, "obs": analysis.obs}
_OF_GRADIENT: dict[str, Callable[[Array, Array], Array]] = {
    "grad_x_weight": analysis.grad_x_weight,
    "grad_squared": lambda weight, squares: squares,
    "hutchinson": lambda weight, diagonal: analysis.hutchinson(diagonal),
}


def check_metric(engine: Engine, metric: str, names: Sequence[str]) -> None:
    """Raise LayerscopeError for a metric that does not exist, that the engine cannot give, or cannot give of one of `names`."""
    if metric not in METRICS:
        raise LayerscopeError(f"There is no metric {metric[:40]!r}; metrics are {', '.join(METRICS)}.")
    if not names:
        raise LayerscopeError("There are no weights to score: at least one matrix must be named.")
    if metric in GRADIENT_METRICS and not isinstance(engine, HfEngine):
        able = [name for name in METRICS if name not in GRADIENT_METRICS]
        raise LayerscopeError(f"{engine.info.name} is a GGUF file, and llama.cpp gives no gradients for {metric}; metrics that it can give are {', '.join(able)}.")
    if metric in _OF_INPUT:
        for name in names:
            source_of(engine, name)


def scored(engine: Engine, windows: Windows, metric: str, names: Sequence[str], seed: int = 0, probes: int = 8,
           progress: Progress = no_progress, should_stop: ShouldStop = never_stop) -> Scored:  # fmt: skip
    """(canonical name, scores, weights) of each of `names`, in their order; both float32 in the canonical tensor's shape, the receiver's own.

    windows: token ids; not looked at for magnitude. seed and probes: of hutchinson. One tensor is in memory at a time, besides what the
    metric's passes need: one float32 a weight for gradients, two more for hutchinson, inputs.GRAM_BYTES at most for obs. The passes run
    when this is called. Raises LayerscopeError as check_metric does, and for what a run cannot take; Cancelled.
    """
    check_metric(engine, metric, names)
    if metric in GRADIENT_METRICS:
        assert isinstance(engine, HfEngine), "checked"
        found = _passes(engine.gradients(names), windows, metric, seed, probes, progress, should_stop)
        return _together(engine, names, ((name, _OF_GRADIENT[metric], values) for name, values in found), should_stop)
    if metric in _OF_INPUT:
        sources = [source_of(engine, name) for name in names]
        vectors = input_vectors(engine, windows, sources, metric, progress, should_stop)
        return _together(engine, names, ((name, _OF_INPUT[metric], vectors[source]) for name, source in zip(names, sources, strict=True)), should_stop)
    return _together(engine, names, ((name, lambda weight, _: analysis.magnitude(weight), None) for name in names), should_stop)


def _together(engine: Engine, names: Sequence[str], parts: Iterator[tuple[str, Callable[..., Array], object]], should_stop: ShouldStop) -> Scored:
    for name, formula, measured in parts:
        if should_stop():
            raise Cancelled
        weight = engine.weight(name)
        yield name, formula(weight, measured), weight


def _passes(gradients: Gradients, windows: Windows, metric: str, seed: int, probes: int, progress: Progress, should_stop: ShouldStop) -> Named:
    def on_window(done: int) -> None:
        progress(BACKWARD, done, len(windows))

    if metric == "hutchinson":
        return gradients.hessian_diagonal(windows, probes, seed, should_stop, on_window)
    over_text = gradients.mean if metric == "grad_x_weight" else gradients.mean_squared
    return over_text(windows, should_stop, on_window)

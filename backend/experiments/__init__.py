"""Experiments: each takes an engine and writes an immutable trace, or something that is computed from one.

`KINDS` names what a job can be. An experiment gets a `Context` (a warm engine, the folders, progress, cancel) and its
parameters as JSON, and returns JSON.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from backend.engines import Engine, ShouldStop, never_stop

Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, total: int) -> None:
    """The progress callback of a caller who does not watch."""


class EngineSource(Protocol):
    def __call__(self, model: str, options: dict[str, Any]) -> Engine: ...


@dataclass
class Context:
    """What the worker lends to an experiment."""

    engine: EngineSource  # loads a model by its name on the shelf, and keeps it warm
    traces_dir: Path
    library: Any  # backend.library.Library
    derived: Any  # backend.derived.Derived
    live: Any = None  # backend.live.LiveRecords
    batches: Any = None  # backend.batches.Batches
    job_id: str = ""
    progress: Progress = no_progress
    should_stop: ShouldStop = never_stop
    extra: dict[str, Any] = field(default_factory=dict)


Experiment = Callable[[Context, dict[str, Any]], dict[str, Any]]


def _job(module: str, function: str) -> Experiment:
    """A job of a module of this package, imported when it first runs: torch and llama_cpp come with it."""

    def run(context: Context, params: dict[str, Any]) -> dict[str, Any]:
        job: Experiment = getattr(importlib.import_module(f"{__name__}.{module}"), function)
        return job(context, params)

    return run


KINDS: dict[str, Experiment] = {
    "attention_maps": _job("attention_maps", "attention_maps_job"),
    "head_detector": _job("head_detector", "head_detector_job"),
    "capture": _job("capture", "capture_job"),
    "generate": _job("generation", "generate_job"),
    "batch": _job("batch", "batch_job"),
    "aggregate": _job("batch", "aggregate_job"),
    "lens": _job("logit_lens", "lens_job"),
    "lens_target": _job("logit_lens", "lens_target_job"),
    "attribution": _job("attribution", "attribution_job"),
    "neuron_examples": _job("neurons", "neuron_examples_job"),
    "neuron_tokens": _job("neurons", "neuron_tokens_job"),
    "expert_sweep": _job("experts", "expert_sweep_job"),
    "expert_usage": _job("experts", "expert_usage_job"),
    "vocabulary": _job("attribution", "vocabulary_job"),
    "tuned_lens": _job("tuned_lens", "tuned_lens_job"),
    "quantization": _job("quantization", "quantization_job"),
    "embeddings": _job("embeddings", "embeddings_job"),
    "neighbours": _job("embeddings", "neighbours_job"),
    "graph": _job("graph", "graph_job"),
    "sensitivity": _job("sensitivity.job", "sensitivity_job"),
    "weight_report": _job("weight_report", "weight_report_job"),
    "weight_tensor": _job("weight_report", "weight_tensor_job"),
}

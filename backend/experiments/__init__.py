"""Experiments: each takes an engine and writes an immutable trace, or something that is computed from one.

`KINDS` names what a job can be. An experiment gets a `Context` (a warm engine, the folders, progress, cancel) and its
parameters as JSON, and returns JSON.
"""

from __future__ import annotations

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
    job_id: str = ""
    progress: Progress = no_progress
    should_stop: ShouldStop = never_stop
    extra: dict[str, Any] = field(default_factory=dict)


Experiment = Callable[[Context, dict[str, Any]], dict[str, Any]]


def _capture(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    from backend.experiments.capture import capture_job

    return capture_job(context, params)


def _lens(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    from backend.experiments.logit_lens import lens_job

    return lens_job(context, params)


def _lens_target(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    from backend.experiments.logit_lens import lens_target_job

    return lens_target_job(context, params)


def _quantization(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    from backend.experiments.quantization import quantization_job

    return quantization_job(context, params)


KINDS: dict[str, Experiment] = {"capture": _capture, "lens": _lens, "lens_target": _lens_target, "quantization": _quantization}

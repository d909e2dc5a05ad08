"""What is checked before a run begins, so that nothing is found wrong after an hour of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backend.engines import Engine
from backend.engines.weight_edits import WeightChange
from backend.errors import LayerscopeError
from backend.experiments.sensitivity import CONTROLS, MAX_TOPK, METRICS, MODES, PERTURBATIONS, Spec
from backend.experiments.sensitivity.scores import check_metric

MAX_SEEDS, MAX_SPARSITIES, MAX_PROBES = 20, 20, 1000
_MAX_SEED = 2**31


def check_spec(spec: Spec) -> None:
    """Raises LayerscopeError with the value and the choices or limits."""
    for what, value, choices in (("metric", spec.metric, METRICS), ("mode", spec.mode, MODES), ("perturbation", spec.perturb, PERTURBATIONS),
                                 *(("control", control, CONTROLS) for control in spec.controls)):  # fmt: skip
        if value not in choices:
            raise LayerscopeError(f"There is no {what} {value[:40]!r}; {what}s are {', '.join(choices)}.")
    for what, number, most in (("number of top weights", spec.topk, MAX_TOPK), ("number of probes", spec.probes, MAX_PROBES)):
        if not 1 <= number <= most:
            raise LayerscopeError(f"The {what} is {number:,}; it must be between 1 and {most:,}.")
    if not math.isfinite(spec.perturb_scale):
        raise LayerscopeError(f"The scale of the perturbation is {spec.perturb_scale}; it must be a finite number.")
    if spec.bit is not None and spec.perturb != "bit_flip":
        raise LayerscopeError(f"Bit {spec.bit} is named, and {spec.perturb} flips none; choose the perturbation bit_flip.")
    _check_list("seed", spec.seeds, MAX_SEEDS, lambda seed: 0 <= seed < _MAX_SEED, f"a whole number from 0 to {_MAX_SEED - 1:,}")
    if not spec.seeds:
        raise LayerscopeError("There is no seed; name one at least, for example 0.")
    _check_list("sparsity", spec.prune, MAX_SPARSITIES, lambda share: 0 < share < 1, "a share between 0 and 1")


def _check_list(what: str, values: Sequence[Any], most: int, good: Any, wanted: str) -> None:
    if wrong := [value for value in values if not good(value)]:
        raise LayerscopeError(f"The {what} {wrong[0]} is not {wanted}.")
    if len(values) > most:
        raise LayerscopeError(f"There are {len(values)} values of {what}, and {most} is the limit.")
    if twice := [value for i, value in enumerate(values) if value in values[:i]]:
        raise LayerscopeError(f"The {what} {twice[0]} is named more than once.")


def check_out_dir(out: Path) -> None:
    """Raises LayerscopeError for a folder that holds anything: a run never writes over another."""
    try:
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise LayerscopeError(f"{out} exists and is not an empty folder; a run never overwrites anything, so name another.")
    except OSError as error:
        raise LayerscopeError(f"The folder {out} cannot be used: {error.strerror}.") from None


def check_engine(engine: Engine, spec: Spec, names: Sequence[str]) -> None:
    """Raises LayerscopeError for what this engine, or the storage of one of these weights, cannot do."""
    check_metric(engine, spec.metric, names)
    if spec.gradient_flow and engine.info.engine != "hf":
        raise LayerscopeError(f"{engine.info.name} is a GGUF file, and llama.cpp gives no gradients; leave out the gradient flow, or run the Hugging Face model.")
    if spec.perturb == "bit_flip":
        for name in names:
            flippable(engine, name, spec.bit)
    with engine.perturbed([WeightChange(names[0], np.zeros(1, np.int64), np.zeros(1, np.float32))]):  # says at once if weights cannot be written
        pass


def flippable(engine: Engine, name: str, bit: int | None) -> int:
    """The bit that is flipped in a weight's codes: `bit`, None: the most significant. Raises LayerscopeError where its storage has no such bit."""
    bits = engine.code_bits(name)
    if not bits:
        raise LayerscopeError(f"The entries of {name} share their stored codes, so none has a bit of its own to flip; choose another perturbation.")
    if bit is not None and not 0 <= bit < bits:
        raise LayerscopeError(f"There is no bit {bit} to flip in {name}: an entry of it has bits 0-{bits - 1}.")
    return bits - 1 if bit is None else bit

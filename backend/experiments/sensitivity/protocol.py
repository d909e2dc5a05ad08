"""One run of the protocol: rank the weights of a model, perturb the best against controls, and write the folder of docs/sensitivity.md.

    checks         nothing that could have been known before is found wrong later
    texts          windows of a text           perplexity     losses on them
    ranking        the weights                 perturbation, stability, pruning, super_weights: what is done with them
    run_folder     the files

A run changes weights in memory alone and puts them back; its folder appears whole, or not at all.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.engines import Engine, ShouldStop, never_stop
from backend.errors import LayerscopeError
from backend.experiments import Progress, no_progress
from backend.experiments.sensitivity import GRADIENT_METRICS, INPUT_METRICS, METRICS, Spec
from backend.experiments.sensitivity.checks import check_engine, check_out_dir, check_spec
from backend.experiments.sensitivity.contracts import Losses, Ranking
from backend.experiments.sensitivity.inputs import known_source
from backend.experiments.sensitivity.perplexity import evaluate
from backend.experiments.sensitivity.perturbation import perturb
from backend.experiments.sensitivity.pruning import masks, prune
from backend.experiments.sensitivity.ranking import gradient_flow, matrices, place, rank
from backend.experiments.sensitivity.run_folder import manifest, part_of, publish, top_rows
from backend.experiments.sensitivity.scores import scored
from backend.experiments.sensitivity.stability import stability
from backend.experiments.sensitivity.super_weights import search, unsearched
from backend.experiments.sensitivity.texts import Text, read_text
from backend.reports.sensitivity_run import SCHEMA, SensitivityRun, open_run


def new_run_id() -> str:
    return secrets.token_hex(13)


def run(engine: Engine, spec: Spec, out_dir: Path, *, run_id: str | None = None, command: Sequence[str] = (), text_file: Path | None = None,
        progress: Progress = no_progress, should_stop: ShouldStop = never_stop) -> SensitivityRun:  # fmt: skip
    """Do what `spec` says with `engine`, and write it to `out_dir`, which must not exist or be empty.

    command: argv, for the manifest; text_file: where the text lies if `spec.text` is only its name. A GGUF engine must have been opened with
    `editable_weights`. Every seed is the spec's own: the same spec, model, text and packages give the same numbers. Raises LayerscopeError in
    one sentence, before anything is computed where it can be known; Cancelled. After either the model is as it was, to the bit, and nothing
    is left on disk.
    """
    out_dir = Path(out_dir)
    check_spec(spec)
    check_out_dir(out_dir)
    names, left_out = _scorable(engine, spec)
    check_engine(engine, spec, names)
    text = read_text(engine, str(text_file or spec.text), spec.max_samples, spec.max_length)
    work = _Run(engine, spec, names, text, progress, should_stop, notes=[*text.notes, *left_out])
    with part_of(out_dir) as part:
        stats = work.stats(part)
        about = manifest(engine, spec, work.text, run_id or new_run_id(), list(command), work.seconds, work.notes)
        publish(part, out_dir, about, {"schema": SCHEMA, "id": about["id"], **stats}, top_rows(work.ranking))
    return open_run(out_dir)


def _scorable(engine: Engine, spec: Spec) -> tuple[tuple[str, ...], list[str]]:
    """The matrices that are ranked; where nobody named components, those that the metric cannot score are left out, in a sentence."""
    every = matrices(engine, spec.layers, spec.components)
    if spec.components is not None or spec.metric not in INPUT_METRICS:
        return every, []
    names = tuple(name for name in every if known_source(engine, name) is not None)
    without = list(dict.fromkeys(place(name)[1] for name in every if name not in set(names)))
    if not names or not without:
        return every, []
    are = "is" if len(without) == 1 else "are"
    return names, [f"{', '.join(without)} {are} not ranked: what enters there is no site of {engine.info.name}, and {spec.metric} needs it."]


@dataclass
class _Run:
    """The stages of a run, with how long each took and what a reader must know."""

    engine: Engine
    spec: Spec
    names: tuple[str, ...]
    text: Text
    progress: Progress
    should_stop: ShouldStop
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ranking: Ranking = field(init=False)

    def stats(self, folder: Path) -> dict[str, Any]:
        """sensitivity_stats.json but for its head."""
        spec = self.spec
        baseline = self._baseline()
        with self._timed("ranking"):
            self.ranking = self._rank(spec.metric, self.text.windows, spec.seeds[0])
        with self._timed("perturbation"):
            perturbation = self._noted(perturb(self.engine, self.ranking, spec, self.text.windows, baseline, **self._watched))
        return {
            "metric": spec.metric, "mode": spec.mode, "tensors": self.ranking.tensors, "perturbation": perturbation,
            "stability": self._when(spec.stability_check, "stability", self._stability),
            "pruning": self._when(bool(spec.prune), "pruning", lambda: self._pruning(baseline, folder)),
            "gradient_flow": self._when(spec.gradient_flow, "gradient_flow", lambda: gradient_flow(self.engine, self.text.windows, self.names, **self._watched)),
            "super_weights": self._when(spec.super_weights, "super_weights", lambda: self._super_weights(baseline)),
        }  # fmt: skip

    @property
    def _watched(self) -> dict[str, Any]:
        return {"progress": self.progress, "should_stop": self.should_stop}

    def _baseline(self) -> Losses:
        with self._timed("baseline"):
            found = evaluate(self.engine, self.text.windows, stage="baseline", **self._watched)
        if (number := next((i for i, nll in enumerate(found.nll) if not abs(nll) < float("inf")), None)) is not None:
            raise LayerscopeError(f"The loss of {self.engine.info.name} is {found.nll[number]} in window {found.window[number] + 1} of the text, before anything is changed; "
                                  "sensitivity needs a model with a finite loss.")  # fmt: skip
        if len(self.text.windows) < 2:
            self.notes.append("The text is one window, so there are no intervals: they say how much windows differ.")
        return found

    def _rank(self, metric: str, windows: Sequence[list[int]], seed: int) -> Ranking:
        return rank(self.engine, windows, metric, self.names, self.spec.topk, self.spec.mode, seed=seed, probes=self.spec.probes, **self._watched)

    def _stability(self) -> dict[str, Any]:
        gone = set() if self.engine.info.engine == "hf" else set(GRADIENT_METRICS)
        if any(known_source(self.engine, name) is None for name in self.names):
            gone |= set(INPUT_METRICS)
        available = [metric for metric in METRICS if metric not in gone]
        return self._noted(stability(self.ranking, self.spec, self.text.windows, available, self._rank))

    def _pruning(self, baseline: Losses, folder: Path) -> dict[str, Any]:
        spec = self.spec
        scores = scored(self.engine, self.text.windows, spec.metric, self.names, spec.seeds[0], spec.probes, **self._watched)
        found = masks(scores, spec.metric, spec.prune, self.should_stop)
        return self._noted(prune(self.engine, found, spec.metric, self.text.windows, baseline, folder, **self._watched))

    def _super_weights(self, baseline: Losses) -> dict[str, Any]:
        self.notes += unsearched(self.engine)
        return search(self.engine, self.text.windows, baseline=baseline, seed=self.spec.seeds[0], **self._watched)

    def _noted(self, found: tuple[dict[str, Any], list[str]]) -> dict[str, Any]:
        self.notes += found[1]
        return found[0]

    def _when(self, wanted: bool, stage: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        if not wanted:
            return None
        with self._timed(stage):
            return make()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 3)

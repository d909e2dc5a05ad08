"""The search for single weights that a model cannot do without: spikes on both sides of W_out say where to look, ablation says what it is worth.

A candidate is `confirmed` where zeroing it raises the loss, at the low end of its interval, by BEYOND_RANDOM times what the worst of `n_random` random
weights of the same matrix does; else `published`, where the table of known super weights has it for this model; else `found`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.super_weights import THRESHOLD, TOP_J, Candidate, LayerPeaks, candidates, in_order, larger, largest, magnitude_ranks, persistence
from backend.engines import Engine, Piece, Request, ShouldStop, never_stop
from backend.engines.weight_edits import WeightChange
from backend.errors import Cancelled, LayerscopeError, ranges
from backend.experiments import Progress, no_progress
from backend.experiments.sensitivity import perplexity
from backend.experiments.sensitivity.contracts import Losses
from backend.reports.known_super_weights import Match, recognise

MOST = 16  # candidates that are ablated, and kept
BEYOND_RANDOM = 20.0
_CELLS = 1 << 22  # values of a matrix that are read at a time
_SITES = ("mlp_post", "mlp_out", "resid_post")

Windows = Sequence[Sequence[int]]
Evaluate = Callable[[Engine, Windows], Losses]
Floats = NDArray[np.float32]


def search(engine: Engine, windows: Windows, *, top_j: int = TOP_J, threshold: float = THRESHOLD, n_random: int = 20, seed: int = 0, most: int = MOST,
           evaluate: Evaluate | None = None, baseline: Losses | None = None, progress: Progress = no_progress,
           should_stop: ShouldStop = never_stop) -> dict[str, Any]:  # fmt: skip
    """`super_weights` of sensitivity_stats.json (docs/sensitivity.md), the farthest out first. The model is as it was afterwards, to the bit.

    evaluate: the losses of the model, as it is, on the windows; baseline: those of the unchanged model, where they are known already. `random.worst_ratio`:
    that ratio of the random weights of all candidates' matrices that is farthest from 1, either way.
    Raises LayerscopeError for limits that make no sense, and for a model whose weights cannot be named or written; Cancelled.
    """
    _check(top_j, threshold, n_random, most)
    seen = _watch(engine, windows, top_j, progress, should_stop)
    found = [each for layer, peaks in seen.peaks.items() for each in candidates(layer, peaks, partial(engine.weight, _Matrix(layer).name), threshold)]
    found = in_order(found, engine.info.n_layers)[:most]
    matrices = {layer: _Matrix(layer, shape=(len(seen.peaks[layer].outputs), len(seen.peaks[layer].inputs))) for layer in {each.layer for each in found}}
    published = _published(engine)
    n_evaluations = len(found) + len(matrices) * n_random + sum(each.fits for each in published)
    ablate = _Ablation(engine, windows, evaluate or partial(perplexity.evaluate, should_stop=should_stop), n_evaluations, progress, should_stop, baseline)
    taken = [(each.layer, each.row, each.column) for each in found] + [(each.layer, each.row, each.column) for each in published]
    random = {layer: [ablate(matrix, at)["ratio"] for at in matrix.random(n_random, seed, taken)] for layer, matrix in matrices.items()}
    ranks = {layer: _ranks(engine, matrix, [each for each in found if each.layer == layer]) for layer, matrix in matrices.items()}
    known = {(each.layer, each.row, each.column) for each in published if each.fits and each.expert is None}
    rows = []
    for each in found:
        effect = ablate(matrices[each.layer], (each.row, each.column))
        status = "confirmed" if confirmed(effect["ci"], random[each.layer]) else "published" if (each.layer, each.row, each.column) in known else "found"
        rows.append({"layer": each.layer, "name": matrices[each.layer].name, "expert": None, "row": each.row, "column": each.column, "value": each.value,
                     "magnitude_rank": ranks[each.layer][each.row, each.column], "input_spike": each.input_spike, "output_spike": each.output_spike,
                     "persistence": persistence(seen.leaders, each.layer, each.row)[0], **effect, "status": status})  # fmt: skip
    every = [ratio for ratios in random.values() for ratio in ratios]
    return {"threshold": threshold, "candidates": rows, "published": [each.row_of(ablate, found) for each in published],
            "random": {"n": len(every), "worst_ratio": _worst(every)}}  # fmt: skip


def confirmed(ci: Sequence[float] | None, random: Sequence[float | None]) -> bool:
    """Whether a weight whose ablation has the interval `ci` of perplexity ratios does more than random ones, of the ratios `random`; see the module."""
    worst = _worst(random)
    return ci is not None and worst is not None and ci[0] > 1 and math.log(ci[0]) >= BEYOND_RANDOM * abs(math.log(worst))


def unsearched(engine: Engine) -> list[str]:
    """Sentences on the layers where `search` cannot look, for the notes of a run."""
    info = engine.info
    without = [layer for layer in range(info.n_layers) if any((site, layer) not in engine.places for site in _SITES[:2])]
    if not without:
        return []
    why = "the hidden values of single experts are no site" if info.is_moe else "the model does not show the hidden values and the output of its MLP there"
    return [f"Super weights were not searched for in layer{'s' * (len(without) > 1)} {ranges(without)}: {why}."]


def _check(top_j: int, threshold: float, n_random: int, most: int) -> None:
    for what, value, low, high in (("channels a layer (top_j)", top_j, 1, 100), ("random weights a matrix", n_random, 0, 10_000), ("candidates", most, 1, 1000)):
        if not low <= value <= high:
            raise LayerscopeError(f"The number of {what} is {value:,}; it must be between {low:,} and {high:,}.")
    if not 1 <= threshold < math.inf:
        raise LayerscopeError(f"The threshold of a spike is {threshold:g}; it is in units of the median channel, and must be 1 or more.")


def _worst(ratios: Sequence[float | None]) -> float | None:
    known = [ratio for ratio in ratios if ratio]
    return max(known, key=lambda ratio: abs(math.log(ratio))) if known else None


# -- what the activations say ------------------------------------------------------------------------------------------------------------


class _Watch:
    """The sink of the runs: peaks of every layer's MLP, and which channel leads its residual stream."""

    def __init__(self, n_layers: int, top_j: int) -> None:
        self.peaks: dict[int, LayerPeaks] = {}
        self._stream: list[Floats] = [np.zeros(0, np.float32)] * n_layers
        self._top_j, self._inputs = top_j, dict[int, Floats]()

    def __call__(self, piece: Piece) -> None:
        layer = piece.layer
        if layer is None:
            return
        if piece.site == "resid_post":
            self._stream[layer] = larger(self._stream[layer], piece.values)
        elif piece.site == "mlp_post":
            self._inputs[layer] = np.array(piece.values)
        elif layer in self._inputs:  # mlp_out, which also layers of experts have
            self.peaks.setdefault(layer, LayerPeaks(self._top_j)).add(self._inputs.pop(layer), piece.values)

    @property
    def leaders(self) -> list[int | None]:
        """The channel of each layer's resid_post that has its largest |value|."""
        return [next(iter(largest(sizes, 1)), None) for sizes in self._stream]


def _watch(engine: Engine, windows: Windows, top_j: int, progress: Progress, should_stop: ShouldStop) -> _Watch:
    seen, request = _Watch(engine.info.n_layers, top_j), Request(tuple(site for site in _SITES if site in engine.sites))
    for number, ids in enumerate(windows):
        progress("looking for spikes", number, len(windows))
        if should_stop():
            raise Cancelled
        engine.run(list(ids), request, seen, (), should_stop)
    return seen


# -- what ablation says ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
    """W_out of a layer, or of one of its experts. shape: (d_model, d_mlp)."""

    layer: int
    expert: int | None = None
    shape: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.mlp.{'W_out' if self.expert is None else 'experts.W_out'}"

    def flat(self, row: int, column: int) -> int:
        """The place in the canonical tensor, (expert, row, column) where there are experts."""
        return ((self.expert or 0) * self.shape[0] + row) * self.shape[1] + column

    def blocks(self, engine: Engine) -> Iterator[Floats]:
        if self.expert is not None:
            yield engine.weight(self.name, np.array([self.expert]))
            return
        step = max(1, _CELLS // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield engine.weight(self.name, np.arange(start, min(start + step, self.shape[0])))

    def random(self, n: int, seed: int, taken: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
        """`n` different places (all there are, if fewer), drawn evenly, without those `taken`: (layer, row, column)."""
        others = [row * self.shape[1] + column for layer, row, column in taken if layer == self.layer]
        size = math.prod(self.shape)
        drawn = np.random.default_rng([seed, self.layer]).choice(size, min(size, n + len(others)), replace=False)
        return [divmod(int(at), self.shape[1]) for at in drawn[~np.isin(drawn, others)][:n]]


class _Ablation:
    """Perplexity with one weight set to zero, against the model as it is. Each place is measured once."""

    def __init__(self, engine: Engine, windows: Windows, evaluate: Evaluate, n: int, progress: Progress, should_stop: ShouldStop, baseline: Losses | None) -> None:
        self._engine, self._windows, self._evaluate, self._progress, self._should_stop = engine, windows, evaluate, progress, should_stop
        self._n, self._known = n, dict[tuple[str, int], dict[str, Any]]()
        self._baseline = evaluate(engine, windows) if n and baseline is None else baseline

    def __call__(self, matrix: _Matrix, at: tuple[int, int]) -> dict[str, Any]:
        """{"ratio", "ci"}, null where the loss is not finite."""
        place = matrix.name, matrix.flat(*at)
        if place not in self._known:
            if self._should_stop():
                raise Cancelled
            self._progress("zeroing single weights", len(self._known), self._n)
            with self._engine.perturbed([WeightChange(place[0], np.array([place[1]]), np.zeros(1, np.float32))]):
                losses = self._evaluate(self._engine, self._windows)
            assert self._baseline is not None
            self._known[place] = {name: value for name, value in perplexity.compared(losses, self._baseline).items() if name in ("ratio", "ci")}
        return self._known[place]


def _ranks(engine: Engine, matrix: _Matrix, found: Sequence[Candidate]) -> dict[tuple[int, int], int]:
    ranks = magnitude_ranks(matrix.blocks(engine), [each.value for each in found])
    return {(each.row, each.column): rank for each, rank in zip(found, ranks, strict=True)}


# -- what is published -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A published place and what the opened model has there."""

    match: Match
    matrix: _Matrix
    value: float
    rank: int

    @property
    def layer(self) -> int:
        return self.match.place.layer

    @property
    def expert(self) -> int | None:
        return self.match.place.expert

    @property
    def row(self) -> int:
        return self.match.place.row

    @property
    def column(self) -> int:
        return self.match.place.column

    @property
    def fits(self) -> bool:
        return self.match.fits(self.rank)

    def row_of(self, ablate: _Ablation, found: Sequence[Candidate]) -> dict[str, Any]:
        """A row of `published`; a place that is probably another model's is not ablated."""
        is_found = self.expert is None and any((each.layer, each.row, each.column) == (self.layer, self.row, self.column) for each in found)
        ratio = ablate(self.matrix, (self.row, self.column))["ratio"] if self.fits else None
        return {"layer": self.layer, "expert": self.expert, "row": self.row, "column": self.column, "found": is_found, "ratio": ratio,
                "source": self.match.sentence(self.value, self.rank)}  # fmt: skip


def _published(engine: Engine) -> list[_Place]:
    """The published places that this model could have, each looked at in its weights."""
    places = []
    for match in recognise(engine.info):
        at = match.place
        matrix = _Matrix(at.layer, at.expert, (engine.info.d_model, engine.info.d_mlp))
        index = at.row if at.expert is None else at.expert
        value = float(engine.weight(matrix.name, np.array([index])).reshape(-1, matrix.shape[1])[0 if at.expert is None else at.row, at.column])
        places.append(_Place(match, matrix, value, magnitude_ranks(matrix.blocks(engine), [value])[0]))
    return places

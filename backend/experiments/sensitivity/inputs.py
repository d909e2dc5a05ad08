"""What enters each matrix of a model over a text, as wanda and obs need it: one number an input.

Sums are float64 and run over all tokens of all windows. Matrices that read the same values share a sum. For obs a sum is a Gram
matrix, the inputs squared times 8 bytes: as many as GRAM_BYTES hold are summed in one pass over the text, then inverted one by one
and dropped, and further passes do the rest. What enters the last matrix of experts is no site: it takes a forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import dsyrk

from backend.analysis.sensitivity import inverse_diagonal
from backend.engines import Engine, Piece, Request, ShouldStop, never_stop
from backend.engines.expert_inputs import ShowsExpertInputs
from backend.errors import LayerscopeError
from backend.experiments import Progress, no_progress
from backend.weights import Weights, open_weights

GRAM_BYTES = 2 << 30  # of the Gram matrices of one pass: one of 16,384 inputs
INPUTS = "inputs of matrices, windows"

HIDDEN = "expert_hidden"  # beside the sites: what enters W_out of each expert (backend.engines.expert_inputs)

_ATTENTION, _MLP = ("ln1_out", "resid_pre"), ("ln2_out", "resid_mid", "ln1_out")
# Component -> sites, of which the first that the layer has holds its input. Without a norm before it a block reads the residual stream itself
# (OLMo 2); without a second norm the MLP reads what attention reads (StableLM 2 12B).
_READS: dict[str, tuple[str, ...]] = {
    **{f"attn.W_{x}": _ATTENTION for x in ("Q", "K", "V", "DQ", "DKV")},
    "attn.W_O": ("z",),
    **{f"mlp.W_{x}": _MLP for x in ("gate", "in", "router")},
    **{f"mlp.shared.W_{x}": _MLP for x in ("gate", "in")},
    **{f"mlp.experts.W_{x}": _MLP for x in ("gate", "in")},
    "mlp.experts.W_out": (HIDDEN,),
    "mlp.W_out": ("mlp_post",),
    "unembed.W_U": ("ln_final_out",),
}


@dataclass(frozen=True)
class Source:
    """Whose values enter a matrix: a site of a layer; by_expert: of them, for each expert, those of the tokens that chose it."""

    site: str
    layer: int | None
    by_expert: bool = False


Unit = tuple[Source, int]  # the expert, 0 where there are none


def source_of(engine: Engine, name: str) -> Source:
    """Raises LayerscopeError for a matrix whose input is no site of the model, with the components that have one."""
    if (source := known_source(engine, name)) is not None:
        return source
    able = [each for each in _READS if each.startswith(("attn", "mlp"))]
    raise LayerscopeError(f"The input of {name[:80]} is no site of {engine.info.name} ({engine.info.architecture}), and wanda and obs need it; "
                          f"components that can have one are {', '.join(able)}.")  # fmt: skip


def known_source(engine: Engine, name: str) -> Source | None:
    """Where the values come from that enter a matrix; None: from no site of the model."""
    _, block, rest = name.partition("blocks.")
    number, _, component = rest.partition(".") if block else ("", "", name)
    layer = int(number) if number.isdecimal() else None
    by_expert = component.startswith("mlp.experts.")
    for site in _READS.get(component, ()):
        source = Source(*_before(site, layer), by_expert)
        there = source.site == HIDDEN or (source.site, source.layer) in engine.places
        if there and (not by_expert or ("expert_indices", layer) in engine.places):
            return source
    return None


def _before(site: str, layer: int | None) -> tuple[str, int | None]:
    """resid_pre as the site that an engine hands out."""
    if site == "resid_pre" and layer is not None:
        return ("embed", None) if layer == 0 else ("resid_post", layer - 1)
    return site, None if site == "ln_final_out" else layer


def input_vectors(engine: Engine, windows: Sequence[list[int]], sources: Sequence[Source], metric: str, progress: Progress = no_progress,
                  should_stop: ShouldStop = never_stop) -> dict[Source, NDArray[np.float64]]:  # fmt: skip
    """Source -> one number for each of its inputs, (in,) or (expert, in): ||x_j||_2 for wanda, [H^-1]_jj for obs.

    An expert that no token chose has 0, or infinity. Raises LayerscopeError for a Gram matrix beyond GRAM_BYTES, or as a run does; Cancelled.
    """
    if not windows:
        raise LayerscopeError(f"There is no window of text for {metric} to take inputs over, and at least 1 is needed.")
    every = [(source, expert) for source in dict.fromkeys(sources) for expert in range(engine.info.n_experts if source.by_expert else 1)]
    groups = [every] if metric == "wanda" else list(_grouped(engine, every))
    found: dict[Unit, NDArray[np.float64]] = {}
    for i, units in enumerate(groups):
        sums = (Squares if metric == "wanda" else Grams)({unit: width(engine, unit[0]) for unit in units})
        at_sites, hidden = [unit for unit in units if unit[0].site != HIDDEN], [unit for unit in units if unit[0].site == HIDDEN]
        for done, window in enumerate(windows, 1):
            if at_sites:
                engine.run(window, _request(at_sites), Gathering(sums.add, at_sites), should_stop=should_stop)
            if hidden:
                _hidden(engine, window, hidden, sums.add, should_stop)
            progress(INPUTS, i * len(windows) + done, len(groups) * len(windows))
        found.update(sums.finished())
    return {source: np.stack([found[source, expert] for expert in range(engine.info.n_experts)]) if source.by_expert else found[source, 0] for source in dict.fromkeys(sources)}


def width(engine: Engine, source: Source) -> int:
    """How many inputs a source has."""
    info = engine.info
    if source.site == HIDDEN:
        return weights_of(engine).lazy(f"blocks.{source.layer}.mlp.experts.W_out").shape[-1]
    return {"z": info.n_heads * info.dims["d_head_v"], "mlp_post": info.d_mlp}.get(source.site, info.d_model)


def weights_of(engine: Engine) -> Weights:
    """The weights of an engine's files: names and shapes without reading any."""
    return open_weights(Path(engine.info.source))


def _grouped(engine: Engine, every: Sequence[Unit]) -> Iterator[list[Unit]]:
    group: list[Unit] = []
    held = 0
    for unit in every:
        size = 8 * width(engine, unit[0]) ** 2
        if size > GRAM_BYTES:
            raise LayerscopeError(f"obs needs a matrix of {width(engine, unit[0]):,} inputs squared for {unit[0].site} of {engine.info.name}, "
                                  f"{size:,} bytes, and the limit is {GRAM_BYTES:,}.")  # fmt: skip
        if held + size > GRAM_BYTES:
            yield group
            group, held = [], 0
        group.append(unit)
        held += size
    yield group


def _request(units: Sequence[Unit]) -> Request:
    sites = {source.site for source, _ in units} | {"expert_indices" for source, _ in units if source.by_expert}
    return Request(tuple(sorted(sites)), tuple(sorted({source.layer for source, _ in units if source.layer is not None})) or None)


def _hidden(engine: Engine, window: list[int], units: Sequence[Unit], add: Callable[[Unit, NDArray[np.float32]], None], should_stop: ShouldStop) -> None:
    wanted = {(source.layer, expert): (source, expert) for source, expert in units}

    def on_rows(layer: int, expert: int, rows: NDArray[np.float32]) -> None:
        if (layer, expert) in wanted:
            add(wanted[layer, expert], rows)

    cast(ShowsExpertInputs, engine).expert_inputs(window, sorted({layer for layer, _ in wanted if layer is not None}), on_rows, should_stop)


class Squares:
    """Sums of squares: what wanda's norms are the roots of."""

    def __init__(self, widths: dict[Unit, int]) -> None:
        self._sums = {unit: np.zeros(n) for unit, n in widths.items()}

    def add(self, unit: Unit, rows: NDArray[np.float32]) -> None:
        """rows: (token, in)."""
        values = rows.astype(np.float64)
        self._sums[unit] += np.einsum("ti,ti->i", values, values)

    def finished(self) -> Iterator[tuple[Unit, NDArray[np.float64]]]:
        for unit, total in self._sums.items():
            yield unit, np.sqrt(total)


class Grams:
    """Upper triangles of X X^T, in the order that LAPACK factors in place."""

    def __init__(self, widths: dict[Unit, int]) -> None:
        self._sums = {unit: np.zeros((n, n), order="F") for unit, n in widths.items()}

    def add(self, unit: Unit, rows: NDArray[np.float32]) -> None:
        """rows: (token, in)."""
        if len(rows):
            self._sums[unit] = dsyrk(1.0, rows.astype(np.float64).T, beta=1.0, c=self._sums[unit], overwrite_c=1)

    def finished(self) -> Iterator[tuple[Unit, NDArray[np.float64]]]:
        for unit in list(self._sums):
            yield unit, inverse_diagonal(self._sums.pop(unit))


class Gathering:
    """A sink that hands the rows of each source to `add`; rows that go to experts wait until the router has chosen."""

    def __init__(self, add: Callable[[Unit, NDArray[np.float32]], None], units: Sequence[Unit]) -> None:
        self._add, self._whole = add, {(source.site, source.layer): (source, expert) for source, expert in units if not source.by_expert}
        routed = [unit for unit in units if unit[0].by_expert]
        self._routed = {(source.site, source.layer) for source, _ in routed}
        self._of_layer: dict[int | None, list[Unit]] = {}
        for unit in routed:
            self._of_layer.setdefault(unit[0].layer, []).append(unit)
        self._waiting: dict[int | None, NDArray[Any]] = {}

    def __call__(self, piece: Piece) -> None:
        if piece.site == "expert_indices":
            self._to_experts(piece)
            return
        where, rows = (piece.site, piece.layer), piece.values.reshape(len(piece.values), -1)
        if where in self._whole:
            self._add(self._whole[where], rows)
        if where in self._routed:
            self._waiting[piece.layer] = rows.copy()

    def _to_experts(self, piece: Piece) -> None:
        rows = self._waiting.pop(piece.layer, None)
        for source, expert in self._of_layer.get(piece.layer, ()):
            assert rows is not None, "a router reads what its experts read"
            self._add((source, expert), rows[(piece.values == expert).any(axis=1)])

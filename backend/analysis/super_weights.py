"""Super weights: single entries of W_out that a model cannot do without, found by the spikes of activation that they make.

Yu et al. 2024 (arXiv:2411.07191): a super weight W_out[row, column] turns one very large input channel of W_out into one very large output channel,
which then stays in the residual stream. They take one arg-max of inputs and outputs in each layer. A replication found that this misses some and invents
others, so here: the `top_j` largest inputs and outputs of a layer in absolute value; an input counts only where it is what makes the output (a spike
that nothing comes of is no super weight); and candidates of the last layer, which write to the logits and have nothing to last through, come last.
Whether a candidate matters only its ablation says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOP_J = 3  # inputs and outputs of a layer that are looked at: Llama 3 8B's three published weights share one input
THRESHOLD = 3.0  # a channel's largest |value| in units of the median channel's, inputs and outputs alike
CARRIED = 0.2  # of an output's peak that one weight has to make: several may share it, as two of LLaMA 30B do

Floats = NDArray[np.float32]
RowsOf = Callable[[NDArray[np.int64]], Floats]


@dataclass(frozen=True)
class Candidate:
    """One entry of a layer's W_out. carried: share of the output's peak that the entry makes there; spikes: see `spikes`."""

    layer: int
    row: int
    column: int
    value: float
    input_spike: float
    output_spike: float
    carried: float

    @property
    def score(self) -> float:
        """The geometric mean of its two spikes."""
        return float(np.sqrt(self.input_spike * self.output_spike))


class LayerPeaks:
    """The largest |value| of every input and output channel of a layer's W_out, gathered as texts stream by.

    inputs: (d_mlp,), outputs: (d_model,). Of the `top_j` largest outputs the whole input is kept that the layer had at their peak.
    Values that are not finite take no part.
    """

    def __init__(self, top_j: int = TOP_J) -> None:
        self.top_j = top_j
        self.inputs: Floats = np.zeros(0, np.float32)
        self.outputs: Floats = np.zeros(0, np.float32)
        self.input_at: dict[int, Floats] = {}

    def add(self, inputs: Floats, outputs: Floats) -> None:
        """inputs: (pos, d_mlp), outputs: (pos, d_model), of the same positions."""
        sizes, before = _sizes(outputs), self.outputs
        self.inputs = larger(self.inputs, inputs)
        self.outputs = larger(before, outputs)
        for channel in largest(self.outputs, self.top_j):
            # A channel gets among the largest only by a peak of its own, so the input at it is at hand here.
            if not len(before) or self.outputs[channel] > before[channel]:
                self.input_at[channel] = np.array(inputs[sizes[:, channel].argmax()], np.float32)
        self.input_at = {channel: self.input_at[channel] for channel in largest(self.outputs, self.top_j)}


def larger(known: Floats, values: Floats) -> Floats:
    """The largest |value| of each channel so far: known (channel,), or empty at the beginning, values (pos, channel)."""
    here = _sizes(values).max(axis=0)
    return here if not len(known) else np.maximum(known, here)


def largest(sizes: Floats, n: int) -> list[int]:
    """The `n` channels of the largest sizes, the largest first; those that are 0 are none."""
    return [int(i) for i in np.argsort(-sizes, kind="stable")[:n] if sizes[i] > 0]


def spikes(peaks: Floats) -> NDArray[np.float64]:
    """How far each channel stands out: its largest |value| over all positions, in units of the median of all channels' (those that are never 0 only)."""
    alive = peaks[peaks > 0]
    return np.asarray(peaks / np.median(alive), np.float64) if len(alive) else np.zeros(len(peaks))


def candidates(layer: int, peaks: LayerPeaks, rows_of: RowsOf, threshold: float = THRESHOLD) -> list[Candidate]:
    """The entries of a layer's W_out that join two spikes of at least `threshold`, and make at least CARRIED of the output's peak.

    rows_of: rows of W_out by number, (n,) -> (n, d_mlp). What W_out itself gives at a peak is taken from it, not from mlp_out: between them
    lie a bias, and in some architectures a norm or a multiplier.
    """
    of_inputs, of_outputs = spikes(peaks.inputs), spikes(peaks.outputs)
    columns = [c for c in largest(peaks.inputs, peaks.top_j) if of_inputs[c] >= threshold]
    rows = [r for r in largest(peaks.outputs, peaks.top_j) if of_outputs[r] >= threshold]
    found = []
    for row, weights in zip(rows, rows_of(np.array(rows, np.int64)) if rows and columns else (), strict=False):
        made = weights.astype(np.float64) * peaks.input_at[row]
        whole = made.sum()
        for column in columns:
            carried = float(made[column] / whole) if whole else 0.0
            if carried >= CARRIED:
                found.append(Candidate(layer, row, column, float(weights[column]), float(of_inputs[column]), float(of_outputs[row]), carried))
    return found


def in_order(found: Iterable[Candidate], n_layers: int) -> list[Candidate]:
    """The farthest out first; those of the last layer after all others."""
    return sorted(found, key=lambda each: (each.layer == n_layers - 1, -each.score))


def persistence(leaders: Sequence[int | None], layer: int, row: int) -> tuple[float | None, int | None]:
    """Share of the layers after `layer` whose residual stream has its largest |value| in channel `row`, and the first layer from `layer` on that has.

    leaders: that channel of resid_post in every layer, None where it is unknown. (None, ...) for the last layer: no layer comes after it.
    """
    after = leaders[layer + 1 :]
    onset = next((at for at in range(layer, len(leaders)) if leaders[at] == row), None)
    return (sum(leader == row for leader in after) / len(after) if after else None), onset


def magnitude_ranks(blocks: Iterable[Floats], values: Sequence[float]) -> list[int]:
    """The rank of each |value| in a matrix that comes in blocks: 1 for the largest; equal ones share the best rank."""
    sizes, above = np.abs(np.asarray(values, np.float32)), np.zeros(len(values), np.int64)
    for block in blocks:
        here = np.abs(block)
        above += [int(np.count_nonzero(here > size)) for size in sizes]
    return [int(n) + 1 for n in above]


def _sizes(values: Floats) -> Floats:
    return np.where(np.isfinite(values), np.abs(values), 0).astype(np.float32, copy=False)

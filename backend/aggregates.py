"""Statistics of one trace as a few small arrays, and their aggregates over many traces, kept in the derived cache.

A trace's row is computed once, while its batch runs or by a job, and weighs kilobytes; an aggregate goes through rows one at a time and is
kept as counts, means and squared distances, so that a batch that has grown is taken up where it was left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.activations import l2_norms
from backend.analysis.aggregate import Moments, mean_or_nan
from backend.analysis.attention import METRICS
from backend.errors import LayerscopeError
from backend.trace import Trace

NORM_SITES = ("resid_post", "attn_out", "mlp_out")
PREDICTION = ("logprob", "entropy", "top1")

Row = dict[str, NDArray[Any]]


def row_of(trace: Trace) -> Row:
    """The statistics of one trace, each prompt's first position left out where its attention to itself would dominate.

    head_METRIC (layer, head): as stored by the capture; norm_SITE (layer,): mean L2 norm over positions from 1; lens_kl (layer,): mean
    KL(model || layer) over positions from 1, nats; logprob, entropy (nats) and top1, (): means over the positions that predict a token of
    the prompt: its log-probability, the entropy there, and how often it was the most probable. NaN where there is no value.
    """
    info = trace.info
    row: Row = {name: np.asarray(value) for name, value in prediction_of(trace).items()}
    for metric in METRICS:
        if f"attn_{metric}" in trace.results:
            row[f"head_{metric}"] = _by_layer(trace.result(f"attn_{metric}"), trace.result_attrs(f"attn_{metric}")["layers"], info.n_layers)
    for site in NORM_SITES:
        layers = trace.layers(site)
        if layers:
            row[f"norm_{site}"] = _by_layer(np.array([mean_or_nan(l2_norms(trace[site, layer])[1:]) for layer in layers]), layers, info.n_layers)
    if "lens_kl" in trace.results:
        rows = trace.result_attrs("lens_kl")["rows"]
        numbered = [(at, int(name)) for at, name in enumerate(rows) if name.isdecimal()]
        kl = trace.result("lens_kl")
        row["lens_kl"] = _by_layer(np.array([mean_or_nan(kl[at, 1:]) for at, _ in numbered]), [layer for _, layer in numbered], info.n_layers)
    return row


def prediction_of(trace: Trace) -> dict[str, float]:
    """logprob, entropy and top1 of the prompt's own tokens."""
    at = slice(0, trace.n_prompt - 1)
    ranks = trace.next_ranks[at]
    return {
        "logprob": mean_or_nan(trace.next_logprobs[at]),
        "entropy": mean_or_nan(trace.entropy[at]),
        "top1": mean_or_nan(np.where(ranks >= 0, ranks == 0, np.nan)),
    }


def _by_layer(values: NDArray[np.floating], layers: Sequence[int], n_layers: int) -> NDArray[np.float32]:
    whole = np.full((n_layers, *values.shape[1:]), np.nan, np.float32)
    whole[list(layers)] = values
    return whole


class Aggregates:
    """Rows and aggregates in a derived cache."""

    def __init__(self, derived: Any) -> None:
        self._derived = derived

    def put_row(self, trace: Trace) -> Row:
        row = row_of(trace)
        self._put(("aggregate_row", trace.id), {name: np.asarray(values, np.float64) for name, values in row.items()})
        return row

    def row(self, trace_id: str) -> Row | None:
        return self._get(("aggregate_row", trace_id))

    def missing(self, trace_ids: Iterable[str]) -> list[str]:
        """Those whose row is not in the cache."""
        return [trace_id for trace_id in trace_ids if self._derived.get_json(("aggregate_row", trace_id, "names")) is None]

    def over(self, trace_ids: Sequence[str], scope: str) -> dict[str, Moments]:
        """Name -> moments over all rows. scope: names the set of traces, so that one that has grown goes on from what is known.

        Raises LayerscopeError for a trace of another model's shape, and if a row is missing: fill the `missing` first.
        """
        known = self._derived.get_json(("aggregate", scope))
        moments: dict[str, Moments] = {}
        start = 0
        if known and known["n"] <= len(trace_ids) and known["of"] == _digest(trace_ids[: known["n"]]):
            state = self._get(("aggregate_state", scope))
            if state is not None:
                start, moments = known["n"], {name: Moments.restored(values) for name, values in state.items()}
        for trace_id in trace_ids[start:]:
            self._add(moments, trace_id)
        if start < len(trace_ids):
            self._put(("aggregate_state", scope), {name: found.state for name, found in moments.items()})
            self._derived.put_json(("aggregate", scope), {"n": len(trace_ids), "of": _digest(trace_ids)})
        return moments

    def _add(self, moments: dict[str, Moments], trace_id: str) -> None:
        row = self.row(trace_id)
        if row is None:
            raise LayerscopeError(f"The statistics of trace {trace_id} are not in the cache; compute them first.")
        for name, values in row.items():
            try:
                moments.setdefault(name, Moments(values.shape)).add(values)
            except ValueError:
                raise LayerscopeError(f"Trace {trace_id} is of a model of another shape than those before it; aggregate one model at a time.") from None

    def _put(self, key: tuple[Any, ...], arrays: Row) -> None:
        """One array of all values, then their names and shapes: a reader that finds the names finds the values."""
        flat = np.concatenate([np.asarray(values, np.float64).ravel() for values in arrays.values()]) if arrays else np.zeros(0)
        self._derived.put_array(key, flat)
        self._derived.put_json((*key, "names"), {name: list(np.shape(values)) for name, values in arrays.items()})

    def _get(self, key: tuple[Any, ...]) -> Row | None:
        names, flat = self._derived.get_json((*key, "names")), self._derived.get_array(key)
        if names is None or flat is None or len(flat) != sum(int(np.prod(shape)) for shape in names.values()):
            return None
        found, at = {}, 0
        for name, shape in names.items():
            size = int(np.prod(shape))
            found[name] = flat[at : at + size].reshape(shape)
            at += size
        return found


def _digest(trace_ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(trace_ids).encode()).hexdigest()

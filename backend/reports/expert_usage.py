"""Use of experts over many traces of one model: by category of prompt, and as time goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend.analysis.moe import expert_counts
from backend.derived import Derived, Key
from backend.errors import LayerscopeError
from backend.trace import Trace


@dataclass(frozen=True)
class Usage:
    """How often each expert was chosen in each trace. counts: (trace, layer, expert), 0 in layers that a trace does not hold.

    The other lists have one entry a trace, oldest first; `created_at` is ISO 8601.
    """

    trace_ids: list[str]
    categories: list[str]
    prompts: list[str]
    created_at: list[str]
    n_tokens: list[int]
    counts: NDArray[np.int64]

    def by_category(self, layer: int) -> tuple[list[str], NDArray[np.int64]]:
        """Categories by name, and (category, expert) the choices of all their traces together."""
        names = sorted(set(self.categories))
        rows = np.array([names.index(each) for each in self.categories])
        found = np.zeros((len(names), self.counts.shape[2]), np.int64)
        np.add.at(found, rows, self.counts[:, layer])
        return names, found

    @staticmethod
    def key(model: str, trace_ids: Iterable[str]) -> Key:
        """Where it lies in the cache; changes with the traces."""
        return "expert_usage", model, hashlib.sha256(" ".join(sorted(trace_ids)).encode()).hexdigest()[:16]

    def save(self, derived: Derived, key: Key) -> None:
        derived.put_array((*key, "counts"), self.counts)
        derived.put_json((*key, "traces"), [self.trace_ids, self.categories, self.prompts, self.created_at, self.n_tokens])

    @classmethod
    def load(cls, derived: Derived, key: Key) -> Usage | None:
        counts, rest = derived.get_array((*key, "counts")), derived.get_json((*key, "traces"))
        return None if counts is None or rest is None else cls(rest[0], rest[1], rest[2], rest[3], rest[4], counts)


def find_usage(traces: Iterable[Trace]) -> Usage:
    """Over all traces that hold expert_indices; raises LayerscopeError if none does, or they are of models of different size."""
    rows: list[tuple[str, str, str, str, int, NDArray[np.int64]]] = []
    for trace in traces:
        layers = trace.stored.get("expert_indices", [])
        if not layers:
            continue
        counts = np.zeros((trace.info.n_layers, trace.info.n_experts), np.int64)
        for layer in layers:
            counts[layer] = expert_counts(trace["expert_indices", layer], trace.info.n_experts)
        if rows and rows[0][5].shape != counts.shape:
            there, before = "{} layers of {} experts".format(*counts.shape), "{} of {}".format(*rows[0][5].shape)
            raise LayerscopeError(f"Trace {trace.id} has {there}, the others {before}: the model of that name was another then.")
        rows.append((trace.id, trace.category, trace.prompt[:200], trace.created_at, trace.n_tokens, counts))
    if not rows:
        raise LayerscopeError("No trace of this model holds expert_indices.")
    rows.sort(key=lambda row: row[3])
    ids, categories, prompts, dates, lengths, every = zip(*rows, strict=True)
    return Usage(list(ids), list(categories), list(prompts), list(dates), list(lengths), np.stack(every))

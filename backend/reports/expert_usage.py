"""Use of experts over many traces of one model: by category of prompt, by token, and as time goes on."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.moe import expert_counts
from backend.analysis.moe_compare import pairwise, within_between
from backend.derived import Derived, Key
from backend.errors import LayerscopeError
from backend.trace import Trace

TOKENS = 48  # texts that are counted apart: the most frequent


@dataclass(frozen=True)
class Usage:
    """How often each expert was chosen in each trace. counts: (trace, layer, expert), 0 in layers that a trace does not hold.

    The other lists have one entry a trace, oldest first; `created_at` is ISO 8601. tokens: the texts that occur most in all of them together,
    with how often, most frequent first; token_counts: (token, layer, expert).
    """

    trace_ids: list[str]
    categories: list[str]
    prompts: list[str]
    created_at: list[str]
    n_tokens: list[int]
    counts: NDArray[np.int64]
    tokens: list[tuple[str, int]]
    token_counts: NDArray[np.int64]

    def alike(self, layer: int | None) -> tuple[list[str], dict[str, NDArray[np.float64]]]:
        """Categories by name, and (category, category) matrices of `moe_compare.pairwise`: of one layer, or the mean over the layers that were used."""
        layers = [layer] if layer is not None else [int(each) for each in np.flatnonzero(self.counts.sum(axis=(0, 2)))]
        every = [(names, pairwise(list(counts))) for names, counts in map(self.by_category, layers)]
        return every[0][0], {name: np.mean([found[name] for _, found in every], axis=0) for name in every[0][1]}

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
        derived.put_array((*key, "token_counts"), self.token_counts)
        derived.put_json((*key, "traces"), [self.trace_ids, self.categories, self.prompts, self.created_at, self.n_tokens, self.tokens])

    @classmethod
    def load(cls, derived: Derived, key: Key) -> Usage | None:
        counts, of_tokens, rest = derived.get_array((*key, "counts")), derived.get_array((*key, "token_counts")), derived.get_json((*key, "traces"))
        if counts is None or of_tokens is None or rest is None:
            return None
        trace_ids, categories, prompts, created_at, n_tokens, tokens = rest
        return cls(trace_ids, categories, prompts, created_at, n_tokens, counts, [(text, n) for text, n in tokens], of_tokens)


def usage_report(found: Usage) -> dict[str, Any]:
    """The usage as JSON: counts by trace, category and token, [layer][expert] each; categories against each other and traces within and between them."""
    layers = [int(each) for each in np.flatnonzero(found.counts.sum(axis=(0, 2)))]
    names, whole = found.alike(None)
    return {
        "layers": layers,
        "traces": [{"trace_id": trace_id, "created_at": date, "category": category, "prompt": prompt, "n_tokens": n, "counts": counts[layers].tolist()}
                   for trace_id, date, category, prompt, n, counts in
                   zip(found.trace_ids, found.created_at, found.categories, found.prompts, found.n_tokens, found.counts, strict=True)],
        "categories": {name: [found.by_category(layer)[1][at].tolist() for layer in layers] for at, name in enumerate(names)},
        "tokens": [{"token": text, "n": n, "counts": counts[layers].tolist()} for (text, n), counts in zip(found.tokens, found.token_counts, strict=True)],
        "similarity": {"categories": names, "overall": _matrices(whole), "by_layer": {str(layer): _matrices(found.alike(layer)[1]) for layer in layers}},
        "within_between": {str(layer): [_finite(value) for value in within_between(list(found.counts[:, layer]), found.categories)] for layer in layers},
    }  # fmt: skip


def _matrices(found: dict[str, NDArray[np.float64]]) -> dict[str, list[list[float | None]]]:
    return {name: [[_finite(value) for value in row] for row in matrix] for name, matrix in found.items()}


def _finite(value: float) -> float | None:
    """JSON has no NaN: it becomes None."""
    return float(value) if math.isfinite(value) else None


def frequent_tokens(traces: Iterable[Trace]) -> list[tuple[str, int]]:
    """The texts of the TOKENS most frequent tokens of the traces that hold expert_indices, with how often they occur."""
    found: Counter[str] = Counter()
    for trace in traces:
        if trace.stored.get("expert_indices"):
            found.update(trace.token_texts)
    return found.most_common(TOKENS)


def find_usage(traces: Iterable[Trace], tokens: Sequence[tuple[str, int]] = ()) -> Usage:
    """Over all traces that hold expert_indices, and apart for the tokens that `frequent_tokens` gave.

    Raises LayerscopeError if no trace holds them, or they are of models of different size.
    """
    places = {text: at for at, (text, _) in enumerate(tokens)}
    of_tokens: NDArray[np.int64] | None = None
    rows: list[tuple[str, str, str, str, int, NDArray[np.int64]]] = []
    for trace in traces:
        layers = trace.stored.get("expert_indices", [])
        if not layers:
            continue
        counts = np.zeros((trace.info.n_layers, trace.info.n_experts), np.int64)
        at = np.array([places.get(text, -1) for text in trace.token_texts], np.int64)
        of_tokens = np.zeros((len(places), *counts.shape), np.int64) if of_tokens is None else of_tokens
        for layer in layers:
            chosen = trace["expert_indices", layer]
            counts[layer] = expert_counts(chosen, trace.info.n_experts)
            if of_tokens.shape[1:] == counts.shape:
                np.add.at(of_tokens[:, layer], (np.repeat(at[at >= 0], chosen.shape[1]), chosen[at >= 0].ravel()), 1)
        if rows and rows[0][5].shape != counts.shape:
            there, before = "{} layers of {} experts".format(*counts.shape), "{} of {}".format(*rows[0][5].shape)
            raise LayerscopeError(f"Trace {trace.id} has {there}, the others {before}: the model of that name was another then.")
        rows.append((trace.id, trace.category, trace.prompt[:200], trace.created_at, trace.n_tokens, counts))
    if not rows or of_tokens is None:
        raise LayerscopeError("No trace of this model holds expert_indices.")
    rows.sort(key=lambda row: row[3])
    ids, categories, prompts, dates, lengths, every = zip(*rows, strict=True)
    return Usage(list(ids), list(categories), list(prompts), list(dates), list(lengths), np.stack(every), list(tokens), of_tokens)

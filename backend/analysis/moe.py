"""Mixture-of-experts routing in numbers: how evenly experts are used, which go together, what follows what, how close a choice was.

Indices are (pos, k) expert numbers, best first, as `Trace.routing` gives them. Whatever takes counts takes an array (expert,) or a plain
mapping {expert: count}; an expert that was never chosen counts as zero, it is not left out. Two distributions are compared in
`backend.analysis.moe_compare`.

    load            Shannon entropy (nats; normalised by ln E), Gini, coefficient of variation (population), mean load / largest load
    Switch loss     Fedus, Zoph and Shazeer 2021 (arXiv 2101.03961), equation 4
    z-loss          Zoph et al. 2022, ST-MoE (arXiv 2202.08906), equation 5
    repeats         Jiang et al. 2024, Mixtral (arXiv 2401.04088), table 5
    co-activation, specialisation   Muennighoff et al. 2024, OLMoE (arXiv 2409.02060), section 5
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

from backend.analysis.logits import logsumexp

Counts = Mapping[int, float] | Sequence[float] | NDArray[Any]
Indices = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Routing:
    """What the router of one layer decided. logits and probs: (pos, expert); indices, weights: (pos, k); what was not captured is None."""

    layer: int
    n_experts: int
    indices: Indices
    weights: NDArray[np.float32] | None = None
    probs: NDArray[np.float32] | None = None
    logits: NDArray[np.float32] | None = None

    @property
    def k(self) -> int:
        return int(self.indices.shape[1])

    @property
    def counts(self) -> NDArray[np.int64]:
        """(expert,) how many tokens chose each expert; their sum is tokens x k."""
        return expert_counts(self.indices, self.n_experts)


@dataclass(frozen=True)
class Load:
    """How evenly experts are used. `balance` is the mean load divided by the largest: 1 when all are equal, 1 / E when one takes all."""

    entropy: float
    entropy_norm: float
    gini: float
    variation: float
    balance: float
    n_used: int
    busiest: int
    busiest_share: float


@dataclass(frozen=True)
class SwitchLoss:
    """E * sum_i f_i P_i, with f_i (expert,) the share of choices that went to i and P_i (expert,) its mean router probability.

    f sums to 1 over all k choices, so that an even router has the loss `uniform` = 1 for every k. Transformers sums over the k choices
    instead: its value is k times this one.
    """

    loss: float
    f: NDArray[np.float64]
    p: NDArray[np.float64]
    uniform: float = 1.0


@dataclass(frozen=True)
class Repeats:
    """Consecutive tokens that keep an expert, as shares, each with what random choices of k different experts would give.

    first: the first choice is the same. any: at least one of the k experts is the same ("first or second choice" for k = 2).
    overlap: mean number of experts that both tokens chose.
    """

    first: float
    first_random: float
    any: float
    any_random: float
    overlap: float
    overlap_random: float


def expert_counts(indices: Indices, n_experts: int) -> NDArray[np.int64]:
    """(expert,) how often each expert was chosen. Raises ValueError for an index that is no expert."""
    flat = np.asarray(indices).ravel()
    if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < n_experts:
        raise ValueError(f"Expert {int(flat.min() if flat.min() < 0 else flat.max())} is outside 0-{n_experts - 1}.")
    return np.bincount(flat, minlength=n_experts).astype(np.int64)


def as_counts(counts: Counts, n_experts: int | None = None) -> NDArray[np.float64]:
    """(expert,) float64; of a mapping, experts that are not named are zero. n_experts None: up to the largest named.

    Raises ValueError for negative or infinite counts, names that are no expert, or no expert at all.
    """
    if isinstance(counts, Mapping):
        size = n_experts if n_experts is not None else max((int(e) for e in counts), default=-1) + 1
        values = np.zeros(size)
        for expert, count in counts.items():
            if not 0 <= int(expert) < size:
                raise ValueError(f"Expert {expert} is outside 0-{size - 1}.")
            values[int(expert)] = count
    else:
        values = np.asarray(counts, dtype=np.float64).ravel()
    if n_experts is not None and len(values) != n_experts:
        raise ValueError(f"There are counts of {len(values)} experts, and {n_experts} experts.")
    if not len(values) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("Counts of experts must be finite numbers, none below 0, of one expert at least.")
    return values


def shares(counts: Counts, n_experts: int | None = None) -> NDArray[np.float64]:
    """(expert,) counts divided by their sum; NaN where nothing was counted."""
    values = as_counts(counts, n_experts)
    total = values.sum()
    return values / total if total else np.full(len(values), np.nan)


def load_entropy(counts: Counts) -> float:
    """Shannon entropy of the load, nats: 0 when one expert takes all, ln E when all are used equally."""
    p = shares(counts)
    used = p[p > 0]
    return float(-(used * np.log(used)).sum()) + 0.0 if len(used) else math.nan


def gini(counts: Counts) -> float:
    """Gini coefficient, sum_i (2i - n - 1) x_(i) / (n sum x) over the counts in rising order: 0 when all are equal, (E - 1) / E when one takes all."""
    x = np.sort(as_counts(counts))
    n, total = len(x), x.sum()
    return float((2 * np.arange(1, n + 1) - n - 1) @ x / (n * total)) if total else math.nan


def load(counts: Counts, n_experts: int | None = None) -> Load:
    """Every measure of one load. All are NaN where nothing was counted; the normalised entropy of a single expert is 1."""
    values = as_counts(counts, n_experts)
    total, mean, n = values.sum(), values.mean(), len(values)
    entropy = load_entropy(values)
    busiest = int(values.argmax())
    if not total:
        return Load(math.nan, math.nan, math.nan, math.nan, math.nan, 0, busiest, math.nan)
    return Load(
        entropy=entropy, entropy_norm=entropy / math.log(n) if n > 1 else 1.0, gini=gini(values), variation=float(values.std() / mean), balance=float(mean / values.max()),
        n_used=int((values > 0).sum()), busiest=busiest, busiest_share=float(values[busiest] / total),
    )  # fmt: skip


def switch_loss(indices: Indices, probs: NDArray[Any]) -> SwitchLoss:
    """The Switch auxiliary loss of one layer; probs: (pos, expert) over all experts."""
    probs = np.asarray(probs, dtype=np.float64)
    f = shares(expert_counts(indices, probs.shape[1]))
    p = probs.mean(axis=0)
    return SwitchLoss(float(probs.shape[1] * (f @ p)), f, p)


def z_loss(logits: NDArray[Any]) -> float:
    """Router z-loss: mean over tokens of logsumexp(logits)^2."""
    return float(np.mean(logsumexp(np.asarray(logits)) ** 2))


def router_entropy(probs: NDArray[Any]) -> NDArray[np.float64]:
    """(pos,) entropy of the router's distribution over all experts, nats; rows are normalised first, since sigmoid scores do not sum to 1."""
    p = np.asarray(probs, dtype=np.float64)
    found: NDArray[np.float64] = entr(p / p.sum(axis=-1, keepdims=True)).sum(axis=-1)
    return found


def chosen(indices: Indices, n_experts: int) -> NDArray[np.bool_]:
    """(pos, expert) True where the token chose the expert."""
    found = np.zeros((len(indices), n_experts), dtype=bool)
    np.put_along_axis(found, np.asarray(indices, dtype=np.int64), True, axis=1)
    return found


def co_activation(indices: Indices, n_experts: int) -> NDArray[np.int64]:
    """(expert i, expert j) tokens that chose both, over all pairs of the k chosen ones; the diagonal is how many chose i.

    OLMoE's own script counts pairs that are neighbours in rank only; here every pair counts.
    """
    one = chosen(indices, n_experts).astype(np.float64)  # BLAS multiplies no integers; these stay exact
    return (one.T @ one).astype(np.int64)


def co_activation_share(indices: Indices, n_experts: int) -> NDArray[np.float64]:
    """(expert i, expert j) N_ij / N_i: of the tokens that chose i, the share that also chose j. Rows of unused experts, and the diagonal, are NaN."""
    both = co_activation(indices, n_experts).astype(np.float64)
    used = np.diag(both).copy()
    found = np.divide(both, used[:, None], out=np.full_like(both, np.nan), where=used[:, None] > 0)
    np.fill_diagonal(found, np.nan)
    return found


def transitions(before: Indices, after: Indices, n_experts: int) -> NDArray[np.int64]:
    """(expert, expert) tokens whose first choice was i in one layer and j in a later one. Both: (pos, k) of the same tokens."""
    found = np.zeros((n_experts, n_experts), dtype=np.int64)
    np.add.at(found, (np.asarray(before)[:, 0], np.asarray(after)[:, 0]), 1)
    return found


def repeats(indices: Indices, n_experts: int) -> Repeats:
    """How often a token keeps an expert of the token before it; NaN for fewer than two tokens.

    Random baselines for k different experts of E: 1 / E; 1 - C(E - k, k) / C(E, k), 46 % for 2 of 8; k^2 / E.
    """
    k = indices.shape[1]
    one = chosen(indices, n_experts)
    both = (one[1:] & one[:-1]).sum(axis=1)
    same = np.asarray(indices)[1:, 0] == np.asarray(indices)[:-1, 0]
    means = [float(part.mean()) if len(part) else math.nan for part in (same, both > 0, both)]
    return Repeats(means[0], 1 / n_experts, means[1], 1 - math.comb(n_experts - k, k) / math.comb(n_experts, k), means[2], k * k / n_experts)


def specialisation(indices: Indices, labels: Sequence[Hashable], n_experts: int) -> tuple[list[Hashable], NDArray[np.int64], NDArray[np.float64]]:
    """Which experts serve which label (a token's text, a category): labels most frequent first, tokens of each (label,), and
    (label, expert) the share of the label's tokens that chose the expert. Each row sums to k. labels: one for each token.
    """
    if len(labels) != len(indices):
        raise ValueError(f"There are {len(labels)} labels for {len(indices)} tokens.")
    names: dict[Hashable, int] = {}
    rows = np.array([names.setdefault(label, len(names)) for label in labels], dtype=np.int64)
    n = np.bincount(rows, minlength=len(names))
    found = np.zeros((len(names), n_experts))
    np.add.at(found, rows, chosen(indices, n_experts).astype(np.float64))
    order = np.argsort(-n, kind="stable")
    every = list(names)
    return [every[i] for i in order], n[order], found[order] / np.maximum(n[order], 1)[:, None]


def margins(scores: NDArray[Any], indices: Indices) -> NDArray[np.float64]:
    """(pos,) the lowest score among the chosen experts less the highest among the others; 0 is a tie, which the engine's sort decided.

    scores: (pos, expert), logits or probabilities. Below 0: the choice was not by these scores alone, as with groups or a correction
    bias (DeepSeek). NaN where all experts are chosen.
    """
    values = np.asarray(scores, dtype=np.float64)
    one = chosen(indices, values.shape[1])
    if one.all():
        return np.full(len(values), np.nan)
    return np.where(one, values, np.inf).min(axis=1) - np.where(one, -np.inf, values).max(axis=1)


def ties(scores: NDArray[Any], indices: Indices) -> list[tuple[int, list[int]]]:
    """Positions where an expert that was not chosen scored exactly what a chosen one did, each with the experts that share that score."""
    margin = margins(scores, indices)
    found = []
    for position in np.flatnonzero(margin == 0):
        row = np.asarray(scores)[position]
        found.append((int(position), [int(e) for e in np.flatnonzero(row == row[np.asarray(indices)[position]].min())]))
    return found

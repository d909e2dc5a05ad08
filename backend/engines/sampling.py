"""How the next token is chosen from one row of logits: greedy, or sampled after top-k, min-p and top-p, in NumPy.

Both engines call this one function, so the same logits and seed give the same token in each. The cuts are applied in the order
of llama.cpp's default chain (top-k, top-p, min-p, temperature): the cuts see the model's own probabilities, and the temperature
only reshapes what survives them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backend.engines import Sampling
from backend.errors import LayerscopeError


class Choice(NamedTuple):
    """A token, and the probability with which it was drawn: that of the sampler after its cuts and temperature, 1 for a greedy choice."""

    token: int
    probability: float


def check_sampling(sampling: Sampling) -> None:
    """Raise LayerscopeError, naming the value and its limits, for a setting outside its range."""
    limits = {"temperature": (0.0, 100.0), "top_k": (0, 1 << 31), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0), "seed": (0, 1 << 63)}
    for name, (low, high) in limits.items():
        value = getattr(sampling, name)
        if not low <= value <= high:
            raise LayerscopeError(f"{name} is {value}; it must lie between {low} and {high}.")


def choose(logits: NDArray[np.float32], sampling: Sampling, rng: np.random.Generator) -> Choice:
    """The next token.

    logits: (d_vocab,). Greedy (temperature 0) takes the largest, the lowest id among equals. Otherwise the tokens that survive

        top_k   the k most probable tokens
        top_p   the smallest set of most probable tokens whose probability reaches p (Holtzman et al., arXiv:1904.09751)
        min_p   tokens at least min_p times as probable as the best (Nguyen et al., arXiv:2407.01082)

    are drawn from with probability proportional to exp(logit / temperature). The best token always survives.
    Raises LayerscopeError where logits hold NaN or no finite value: there is nothing to choose from.
    """
    if np.isnan(logits).any() or not np.isfinite(logits).any():
        raise LayerscopeError("The model's logits hold NaN or no finite value, so no token can be chosen; run it with 0 new tokens to see where they begin.")
    if sampling.temperature == 0:
        return Choice(int(np.argmax(logits)), 1.0)
    order = np.argsort(-logits, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    probs = _softmax(logits[order])
    keep = np.concatenate(([0.0], np.cumsum(probs)[:-1])) < sampling.top_p
    keep &= probs >= sampling.min_p * probs[0]
    keep[0] = True
    order = order[keep]
    probs = _softmax(logits[order] / np.float64(sampling.temperature))
    at = int(rng.choice(len(order), p=probs))
    return Choice(int(order[at]), float(probs[at]))


def _softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - np.float64(logits.max()))
    return weights / weights.sum()

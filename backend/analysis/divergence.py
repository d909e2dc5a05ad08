"""How far one distribution lies from another, from log-probabilities.

The only home of these formulas. All take natural log-probabilities (..., d_vocab) and give nats (total variation: no unit).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def kl(p_log: Floats, q_log: Floats) -> NDArray[np.float64]:
    """Kullback-Leibler divergence KL(p || q) = sum p ln(p / q) over the last axis, in nats; p is the reference.

    p_log, q_log: (..., d_vocab) natural log-probabilities. Infinite where q is 0 and p is not. Returns (...,).
    Source: Kullback and Leibler 1951.
    """
    p_log, q_log = np.asarray(p_log, np.float64), np.asarray(q_log, np.float64)
    held = np.isneginf(p_log)  # 0 ln 0 = 0, whatever q is there
    with np.errstate(invalid="ignore"):
        terms = np.exp(p_log) * (p_log - q_log)
    return np.where(held, 0.0, terms).sum(axis=-1)


def js(p_log: Floats, q_log: Floats) -> NDArray[np.float64]:
    """Jensen-Shannon divergence in nats: the mean of KL(p || m) and KL(q || m) with m = (p + q) / 2. Between 0 and ln 2.

    Symmetric; its square root is a metric. Source: Lin 1991.
    """
    p_log, q_log = np.asarray(p_log, np.float64), np.asarray(q_log, np.float64)
    middle = np.logaddexp(p_log, q_log) - np.log(2.0)
    return (kl(p_log, middle) + kl(q_log, middle)) / 2


def total_variation(p_log: Floats, q_log: Floats) -> NDArray[np.float64]:
    """Half the sum of |p - q|: the most that the probability of any event can differ. Between 0 and 1."""
    return np.abs(np.exp(np.asarray(p_log, np.float64)) - np.exp(np.asarray(q_log, np.float64))).sum(axis=-1) / 2

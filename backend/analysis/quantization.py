"""What quantization changed: the error of weights, and of next-token predictions. The reference always comes first.

    ErrorSums         sums over any part of a tensor that add up to its error: tensors are streamed, never held whole
    prediction_shift  per position: KL, whether the best token is still the same, how the real next token's log-prob changed

Distances between activations are in `divergence`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from backend.analysis import divergence, logits


@dataclass(frozen=True)
class ErrorSums:
    """Sums over pairs (reference p, other q) of values, with d = q - p; those of two parts add up to those of the whole."""

    n: int = 0
    squared_error: float = 0.0  # sum d^2
    squared_reference: float = 0.0  # sum p^2
    squared_other: float = 0.0  # sum q^2
    product: float = 0.0  # sum p q
    max_error: float = 0.0  # max |d|

    @classmethod
    def of(cls, reference: NDArray[np.floating], other: NDArray[np.floating]) -> ErrorSums:
        """Of two arrays of the same shape; float64 within."""
        p, q = np.asarray(reference, np.float64).ravel(), np.asarray(other, np.float64).ravel()
        d = q - p
        largest = float(np.abs(d).max()) if len(d) else 0.0
        return cls(len(p), float(d @ d), float(p @ p), float(q @ q), float(p @ q), largest)

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            self.n + other.n,
            self.squared_error + other.squared_error,
            self.squared_reference + other.squared_reference,
            self.squared_other + other.squared_other,
            self.product + other.product,
            float(np.maximum(self.max_error, other.max_error)),
        )

    @property
    def rmse(self) -> float:
        """Root mean square error, in the unit of the values."""
        return float(np.sqrt(self.squared_error / self.n)) if self.n else float("nan")

    @property
    def relative_rmse(self) -> float:
        """sqrt(sum d^2 / sum p^2): the error as a share of the values' own size. Infinite where the reference is all 0 and the other is not."""
        return float(np.sqrt(_ratio(self.squared_error, self.squared_reference, 0.0)))

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio, 10 log10(sum p^2 / sum d^2) in dB; infinite where nothing changed (Widrow and Kollar 2008)."""
        ratio = _ratio(self.squared_reference, self.squared_error, float("inf"))
        return float(10 * np.log10(ratio)) if ratio > 0 else float("-inf")

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two tensors taken as vectors; 1 where both are all 0."""
        lengths = np.sqrt(self.squared_reference) * np.sqrt(self.squared_other)
        if self.squared_reference == self.squared_other == 0:
            return 1.0
        return float(np.clip(self.product / lengths, -1.0, 1.0)) if lengths else float("nan")

    def metrics(self) -> dict[str, float]:
        """rmse, relative_rmse, sqnr_db, max_error, cosine."""
        return {name: getattr(self, name) for name in METRICS}


METRICS = ("rmse", "relative_rmse", "sqnr_db", "max_error", "cosine")


def prediction_shift(reference: NDArray[np.floating], other: NDArray[np.floating], ids: ArrayLike) -> dict[str, NDArray]:
    """How the next-token predictions of a model differ from those of its reference, position by position.

    reference, other: (pos, d_vocab) logits; ids: (pos,) the tokens that both ran over.
    Returns kl (pos,) = KL(reference || other) in nats; reference_top, top (pos,) int32 ids of the best token of each;
    reference_prob, prob (pos,) their probabilities; next_logprob_change (pos,) nats, log q - log p of the token that really
    follows, NaN at the last position. Floats are float32, but kl is float64: 1e-9 is a meaningful value there.
    """
    kl = np.empty(len(reference), np.float64)
    for rows in logits.row_blocks(*reference.shape):
        kl[rows] = np.maximum(divergence.kl(logits.log_softmax(reference[rows]), logits.log_softmax(other[rows])), 0.0)  # rounding may give -1e-17
    (reference_top, reference_log), (top, top_log) = logits.top_k(reference, 1), logits.top_k(other, 1)
    change = logits.next_token_logprobs(other, ids) - logits.next_token_logprobs(reference, ids)
    return {
        "kl": kl,
        "reference_top": reference_top[:, 0],
        "top": top[:, 0],
        "reference_prob": np.exp(reference_log[:, 0]),
        "prob": np.exp(top_log[:, 0]),
        "next_logprob_change": change,
    }


def _ratio(over: float, under: float, equal: float) -> float:
    """over / under; `equal` where both are 0, infinite where only `under` is."""
    if under == 0:
        return equal if over == 0 else float("inf")
    return over / under

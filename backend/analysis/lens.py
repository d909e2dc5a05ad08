"""The logit lens: what the model would say if a layer's residual stream were already the last.

The final norm and the unembedding, made for the last layer, are applied to an earlier one (nostalgebraist 2020, "interpreting
GPT: the logit lens"). A lens of the last layer is the model itself: KL 0 and the same top tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from backend.analysis import divergence, logits


@dataclass(frozen=True)
class Reference:
    """The model's own distributions, made once and held against every layer.

    weights: (pos, d_vocab) float32, exp(logits - their maximum); totals, logs, spreads: (pos,) the sums of the weights, the logarithms of
    those, and sums of weight x (logit - maximum).
    """

    weights: NDArray[np.float32]
    totals: NDArray[np.float64]
    logs: NDArray[np.float64]
    spreads: NDArray[np.float64]

    @classmethod
    def of(cls, final: NDArray[np.floating]) -> Reference:
        """From the model's own logits (pos, d_vocab)."""
        weights, sums = np.empty(final.shape, np.float32), np.empty((3, len(final)), np.float64)
        reader = logits.RowReader(final.shape[1], 1)
        with np.errstate(invalid="ignore"):
            for i, row in enumerate(final):
                reader.take(np.asarray(row, np.float32))
                weights[i] = reader.weights
                sums[:, i] = reader.total, reader.log_total, np.dot(reader.weights, reader.shifted)
        return cls(weights, *sums)

    def kl(self, at: int, reader: logits.RowReader) -> float:
        """KL(model || row) in nats at one position, of the row that the reader took last; 0 to the bit for the model's own row.

        sum p (ln p - ln q), with p and q as weight / total: the terms of both are sums over the model's weights.
        """
        crossed = float(np.dot(self.weights[at], reader.shifted))
        found = (self.spreads[at] - crossed) / self.totals[at] + reader.log_total - self.logs[at]
        if math.isfinite(found) or math.isnan(reader.log_total) or math.isnan(self.logs[at]):
            return max(float(found), 0.0) if math.isfinite(found) else math.nan
        with np.errstate(divide="ignore"):  # a logit of -inf: 0 ln 0 is 0, and p ln 0 is not
            return float(divergence.kl(np.log(self.weights[at].astype(np.float64)) - self.logs[at], reader.shifted - np.float64(reader.log_total)))


def read_rows(row: NDArray[np.floating], reference: Reference, following: NDArray[np.integer], k: int = 10) -> dict[str, NDArray]:
    """What the lens keeps of some positions of one layer, in one pass over the vocabulary.

    row:       (pos, d_vocab) logits that this layer's stream gives through the final norm and the unembedding
    reference: the model's own, of the same positions
    following: (pos,) the tokens that really follow

    Returns, per position: top_ids (pos, k) int32 and top_logprobs (pos, k) float32, best first; entropy (pos,) nats;
    kl (pos,) = KL(model || row) in nats; next_logprob (pos,) and next_rank (pos,) int32, 0 for the best, of the token that follows.
    """
    reader, kl, rows = logits.RowReader(row.shape[1], k), np.empty(len(row), np.float32), []
    with np.errstate(invalid="ignore"):
        for i, values in enumerate(row):
            rows.append(reader.read(np.asarray(values, np.float32), int(following[i])))
            kl[i] = reference.kl(i, reader)
    found = logits.joined(rows)
    return {"top_ids": found["top_ids"], "top_logprobs": found["top_logprobs"], "entropy": found["entropy"], "kl": kl,
            "next_logprob": found["next_logprobs"], "next_rank": found["next_ranks"]}  # fmt: skip


def lens_row(row: NDArray[np.floating], final: NDArray[np.floating], ids: ArrayLike, k: int = 10) -> dict[str, NDArray]:
    """`read_rows` of a whole trace: final (pos, d_vocab) the model's own logits, ids (pos,) its tokens. Nothing follows the last: NaN, rank -1."""
    found = read_rows(row, Reference.of(final), np.append(np.asarray(ids)[1:], 0), k)
    found["next_logprob"][-1:], found["next_rank"][-1:] = np.nan, -1
    return found


def target_row(row: NDArray[np.floating], token_id: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Log-probability and rank of one token at every position of one layer. row: (pos, d_vocab) -> (pos,), (pos,)."""
    reader, logprobs, ranks = logits.RowReader(row.shape[1], 1), np.empty(len(row), np.float32), np.empty(len(row), np.int32)
    with np.errstate(invalid="ignore"):
        for i, values in enumerate(row):
            reader.take(np.asarray(values, np.float32))
            logprobs[i] = float(values[token_id]) - reader.top - reader.log_total
            ranks[i] = reader.rank(np.asarray(values, np.float32), token_id)
    return logprobs, ranks

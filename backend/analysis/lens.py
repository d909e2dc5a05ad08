"""The logit lens: what the model would say if a layer's residual stream were already the last.

The final norm and the unembedding, made for the last layer, are applied to an earlier one (nostalgebraist 2020, "interpreting
GPT: the logit lens"). A lens of the last layer is the model itself: KL 0 and the same top tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from backend.analysis import divergence, logits


def lens_row(row: NDArray[np.floating], final: NDArray[np.floating], ids: ArrayLike, k: int = 10) -> dict[str, NDArray]:
    """Everything the lens page shows of one layer.

    row:   (pos, d_vocab) logits that this layer's residual stream gives through the final norm and the unembedding
    final: (pos, d_vocab) the model's own logits
    ids:   (pos,) the tokens of the trace

    Returns, per position: top_ids (pos, k) int32 and top_logprobs (pos, k) float32, best first; entropy (pos,) nats;
    kl (pos,) = KL(final || row) in nats; next_logprob (pos,) of the token that really follows, NaN at the last position;
    next_rank (pos,) int32, 0 for the best, -1 at the last position.
    """
    top_ids, top_logprobs = logits.top_k(row, k)
    kl = np.empty(len(row), np.float32)
    for rows in logits.row_blocks(*row.shape):
        kl[rows] = divergence.kl(logits.log_softmax(final[rows]), logits.log_softmax(row[rows]))
    return {
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
        "entropy": logits.entropy(row),
        "kl": kl,
        "next_logprob": logits.next_token_logprobs(row, ids),
        "next_rank": np.append(logits.rank_of(row[:-1], np.asarray(ids)[1:]), np.int32(-1)),
    }


def target_row(row: NDArray[np.floating], token_id: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Log-probability and rank of one token at every position of one layer. row: (pos, d_vocab) -> (pos,), (pos,)."""
    values = np.asarray(row[:, token_id], np.float64) - logits.logsumexp(row)
    return values.astype(np.float32), logits.rank_of(row, token_id)

"""Direct logit attribution: what each part of the residual stream adds to one logit, or to the difference of two.

The logit is linear in the residual stream once the scale of the final norm is frozen at the value it had in the run, so it is a sum
over whatever the stream is a sum of: embeddings, heads, biases, MLPs (TransformerLens' logit attribution, `ln_final.hook_scale`
frozen; Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). Everything here is in float64 but the product with W_O,
which is of its own precision: it is most of the work.

RMS norm: Zhang & Sennrich, arXiv:1910.07467; LayerNorm: Ba et al., arXiv:1607.06450.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Ending:
    """From the last residual stream to logits: multiplier * W_U norm(x), and then a soft-cap where there is one.

    norm        RMS norm, or LayerNorm, which takes the mean off first
    gain, bias  (d_model,) of that norm; bias None: it has none
    multiplier  of the logits: 1 / logits_scaling (granite), logit_scale (cohere)
    softcap     the cap c in c tanh(logit / c); 0: none
    """

    norm: Literal["rms", "layer"]
    eps: float
    gain: NDArray[np.floating]
    bias: NDArray[np.floating] | None = None
    multiplier: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True)
class Direction:
    """One logit, or a difference of two, as a linear function of the residual stream: x @ vector + constant, (d_model,)."""

    vector: Vector
    constant: float

    def of(self, values: NDArray[np.floating]) -> Vector:
        """What vectors (..., d_model) of the residual stream add: (...)."""
        return np.asarray(values, np.float64) @ self.vector


def norm_scale(x: NDArray[np.floating], norm: Literal["rms", "layer"], eps: float) -> float:
    """What the norm divides one vector (d_model,) by: the root of its mean square (rms) or variance (layer), plus eps."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean() if norm == "layer" else x
    return float(np.sqrt(np.mean(centred**2) + eps))


def logit_direction(ending: Ending, resid: NDArray[np.floating], w_u: NDArray[np.floating], against: NDArray[np.floating] | None = None) -> Direction:
    """The direction of one token's logit before any soft-cap, or of that logit less another's.

    resid: (d_model,) that leaves the last block; its norm's scale is the one that is frozen. w_u, against: (d_model,) rows of W_U.
    """
    row = np.asarray(w_u, np.float64) - (0.0 if against is None else np.asarray(against, np.float64))
    folded = row * np.asarray(ending.gain, np.float64)
    if ending.norm == "layer":
        folded = folded - folded.mean()  # (x - mean(x)) @ f = x @ (f - mean(f))
    constant = 0.0 if ending.bias is None else float(np.asarray(ending.bias, np.float64) @ row)
    return Direction(folded * (ending.multiplier / norm_scale(resid, ending.norm, ending.eps)), constant * ending.multiplier)


@dataclass(frozen=True)
class AttentionParts:
    """What one layer's attention adds: each head's share (head,), and that of W_O's bias."""

    heads: Vector
    bias: float


def attention_parts(z: NDArray[np.floating], w_o: NDArray[np.floating], direction: Direction, bias: NDArray[np.floating] | None = None,
                    multiplier: float = 1.0, post_gain: NDArray[np.floating] | None = None, post_eps: float = 0.0) -> AttentionParts:  # fmt: skip
    """Each head's share of one layer's attention at one position.

    z: (head, d_head_v); w_o: (d_model, head * d_head_v); bias: (d_model,) of W_O. multiplier: the block's factor on attention's output.
    post_gain: (d_model,) of the RMS norm that follows W_O in some architectures; its scale is frozen at that of the whole output.
    """
    w_o = np.asarray(w_o)
    seen = direction.vector * multiplier
    if post_gain is not None:
        whole = w_o @ np.asarray(z, w_o.dtype).reshape(-1) + (0.0 if bias is None else np.asarray(bias, np.float64))
        seen = seen * np.asarray(post_gain, np.float64) / norm_scale(whole, "rms", post_eps)
    through = (seen.astype(w_o.dtype) @ w_o).reshape(z.shape)
    return AttentionParts(np.einsum("hd,hd->h", np.asarray(z, np.float64), through), 0.0 if bias is None else float(np.asarray(bias, np.float64) @ seen))


def before_softcap(logit: float, softcap: float) -> float:
    """The logit that c tanh(x / c) was made of; as it is where softcap is 0. Infinite where rounding has put it at the cap itself."""
    with np.errstate(divide="ignore"):
        return float(softcap * np.arctanh(np.clip(logit / softcap, -1, 1))) if softcap else logit

"""From the residual stream to logits outside llama.cpp: final norm, W_U, and what an architecture does to the logits last.

RMS norm: Zhang & Sennrich, arXiv:1910.07467; LayerNorm: Ba et al., arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from backend.analysis.identities import Tolerances, relative_error
from backend.files.gguf_header import GgufHeader
from backend.model_info import ModelInfo
from backend.weights import Weight, Weights

_CACHED_BYTES = 1 << 30
_NORMS: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")


@dataclass
class Unembedding:
    """Calling it gives resid (..., d_model) -> logits (..., d_vocab), in float32, or those of some tokens only.

    gain, bias   (d_model,) of the final norm; None: it has none
    w_u          (d_vocab, d_model), dequantized on first use and kept where it is small enough
    w_u_bias     (d_vocab,) added to the product
    divisor      of the logits; softcap: the cap c in c tanh(logits / c), 0: none
    """

    norm: Literal["rms", "layer"]
    eps: float
    gain: NDArray[np.float32] | None
    bias: NDArray[np.float32] | None
    w_u: Weight
    w_u_bias: NDArray[np.float32] | None = None
    divisor: float = 1.0
    softcap: float = 0.0
    _cached: list[NDArray[np.float32]] = field(default_factory=list, repr=False)

    def normed(self, resid: NDArray[Any]) -> NDArray[np.float32]:
        """The final norm alone, gain and bias included: (..., d_model)."""
        rows = np.asarray(resid, np.float32)
        if self.norm == "layer":
            rows = rows - rows.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.mean(np.square(rows), axis=-1, keepdims=True, dtype=np.float64) + self.eps)
        normed = (rows / scale).astype(np.float32)
        normed = normed if self.gain is None else normed * self.gain
        return normed if self.bias is None else normed + self.bias

    def __call__(self, resid: NDArray[Any], tokens: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        logits = self._times_w_u(self.normed(resid), tokens)
        bias = self.w_u_bias if self.w_u_bias is None or tokens is None else self.w_u_bias[tokens]
        if bias is not None:
            logits += bias
        if self.divisor != 1.0:  # in place: another block of logits costs as much time as reading it
            logits /= np.float32(self.divisor)
        return np.asarray(self.softcap * np.tanh(logits / self.softcap), np.float32) if self.softcap else logits

    def _times_w_u(self, normed: NDArray[np.float32], tokens: NDArray[np.int64] | None) -> NDArray[np.float32]:
        n_rows = self.w_u.shape[0]
        if tokens is not None:
            return np.asarray(normed @ (self._cached[0][tokens] if self._cached else self.w_u[tokens]).T)
        if not self._cached and 4 * self.w_u.size <= _CACHED_BYTES:
            self._cached.append(self.w_u[:])
        if self._cached:
            return np.asarray(normed @ self._cached[0].T)
        step = max(1, _CACHED_BYTES // 4 // self.w_u.shape[1])
        return np.concatenate([normed @ self.w_u[i : i + step].T for i in range(0, n_rows, step)], axis=-1)


def candidates(info: ModelInfo, header: GgufHeader, weights: Weights) -> Iterator[Unembedding]:
    """Every way in which llama.cpp's architectures end that this file's tensors and keys allow."""
    native = weights.native_names

    def vector(name: str) -> NDArray[np.float32] | None:
        return weights[name] if name in native else None

    w_u = next((name for name in ("output.weight", "token_embd.weight") if name in native), None)
    if w_u is None or weights.lazy(w_u).shape != (info.d_vocab, info.d_model):
        return
    scale, cap = (header.metadata.get(f"{info.architecture}.{key}") for key in ("logit_scale", "final_logit_softcapping"))
    divisors = (1.0, float(scale), 1 / float(scale)) if scale else (1.0,)
    caps = (float(cap), 0.0) if cap else (0.0,)
    cached: list[NDArray[np.float32]] = []
    for norm, divisor, softcap in product(_NORMS, divisors, caps):
        yield Unembedding(norm, info.norm_eps, vector("output_norm.weight"), vector("output_norm.bias"), weights.lazy(w_u), vector("output.bias"), divisor, softcap, cached)


def measured(choices: Iterator[Unembedding], resid: NDArray[Any], normed: NDArray[Any], logits: NDArray[Any], limits: Tolerances) -> Unembedding | None:
    """Of `choices` the one that makes `normed` (n, d_model) and `logits` (n, d_vocab), which llama.cpp gave, of `resid`; None if none does.

    The norm must agree as float32 arithmetic does: it never goes through a quantized product, and RMS norm and LayerNorm can lie close.
    """
    errors = [(relative_error(choice(resid), logits), choice) for choice in choices if relative_error(choice.normed(resid), normed) <= 10 * limits.sums]
    error, best = min(errors, key=lambda item: item[0], default=(float("inf"), None))
    return best if error <= limits.matmul else None

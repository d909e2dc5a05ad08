"""Direct logit attribution of one position of a trace: every part of its residual stream, and what it adds to a logit.

Activations come from the trace, W_O and the rows of W_U from the model's own file; the model is not run. The parts are what was
captured, so that their sum differs from the model's logit by rounding: of the stored half precision, of quantized kernels. Both sums
are kept, and nothing is scaled to make them meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.attribution import Direction, attention_parts, before_softcap, logit_direction
from backend.errors import Cancelled, LayerscopeError, SiteNotCaptured
from backend.readout import Readout
from backend.trace import Trace

# kind -> what it is; the order is that of the computation
KINDS = {
    "embed": "token embedding",
    "position": "position embedding",
    "head": "attention head",
    "attn": "attention, all heads together",
    "bias": "bias of W_O",
    "rest": "attention beyond its heads and bias",
    "mlp": "MLP",
    "constant": "bias of the final norm",
}


@dataclass(frozen=True)
class Part:
    """One part of the residual stream; value: what it adds to the logit, or to the difference."""

    kind: str
    value: float
    layer: int | None = None
    head: int | None = None

    @property
    def name(self) -> str:
        """ "3.1" for a head, "mlp 3", "embed"."""
        if self.kind == "head":
            return f"{self.layer}.{self.head}"
        return self.kind if self.layer is None else f"{self.kind} {self.layer}"


@dataclass(frozen=True)
class Attribution:
    """parts: in the order of the computation.

    total     the sum of the parts
    readout   the final norm and W_U of the captured last residual stream: the same number if the parts are all there is
    logit     what the model itself gave, before any soft-cap; None where the trace does not hold it (beyond the stored top tokens)
    token, against  ids; against None: the logit of one token
    """

    position: int
    token: int
    against: int | None
    parts: list[Part]
    readout: float
    logit: float | None
    notes: list[str]

    @property
    def total(self) -> float:
        return sum(part.value for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "parts": [dataclasses.asdict(part) for part in self.parts]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Attribution:
        return cls(**{**data, "parts": [Part(**part) for part in data["parts"]]})

    def heads(self, n_layers: int, n_heads: int) -> NDArray[np.float64]:
        """(layer, head), NaN where a layer has no heads apart."""
        found = np.full((n_layers, n_heads), np.nan)
        for part in self.parts:
            if part.kind == "head":
                found[part.layer, part.head] = part.value
        return found

    def through_layers(self, n_layers: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Sum of everything up to and with each layer's attention, and up to and with its MLP, (layer,) each; the constant is in all."""
        before = sum(part.value for part in self.parts if part.layer is None)
        mlp, attention = np.zeros(n_layers), np.zeros(n_layers)
        for part in self.parts:
            if part.layer is not None:
                (mlp if part.kind == "mlp" else attention)[part.layer] += part.value
        after = before + np.cumsum(attention + mlp)
        return after - mlp, after


def attribute(trace: Trace, readout: Readout, position: int, token: int, against: int | None = None,
              progress: Callable[[str, int, int], None] = lambda *_: None, should_stop: Callable[[], bool] = lambda: False) -> Attribution:  # fmt: skip
    """What each part adds to the logit of `token` at `position` (negative: from the end), less that of `against`.

    Raises LayerscopeError for a position or token outside, or another model; SiteNotCaptured where embed, attn_out (or z), mlp_out or
    the last resid_post is not in the trace.
    """
    position = checked(trace, readout, position, token, against)
    n_layers = trace.info.n_layers
    last = n_layers - 1
    resid = trace.position("resid_post", last, position)
    w_u = readout.weights.lazy("unembed.W_U")
    direction = logit_direction(readout.ending, resid, w_u[token], None if against is None else w_u[against])
    parts = [*_embedding(trace, readout, position, direction)]
    for layer in range(n_layers):
        if should_stop():
            raise Cancelled
        progress("layers", layer, n_layers)
        parts += _attention(trace, readout, position, layer, direction)
        parts.append(Part("mlp", float(direction.of(trace.position("mlp_out", layer, position))), layer))
    if readout.ending.bias is not None:
        parts.append(Part("constant", direction.constant))
    progress("layers", n_layers, n_layers)
    logit = _model_logit(trace, position, token, readout.ending.softcap)
    other = 0.0 if against is None else _model_logit(trace, position, against, readout.ending.softcap)
    difference = None if logit is None or other is None else logit - other
    return Attribution(position, token, against, parts, float(direction.of(resid)) + direction.constant, difference, _notes(trace, readout, parts))


def checked(trace: Trace, readout: Readout, position: int, token: int, against: int | None) -> int:
    """The position counted from the start; raises LayerscopeError for what lies outside, or does not belong together."""
    if not -trace.n_tokens <= position < trace.n_tokens:
        raise LayerscopeError(f"Position {position} is outside the {trace.n_tokens:,} tokens of the trace.")
    of_file, of_trace = readout.weights.info, trace.info
    if (of_file.n_layers, of_file.d_model, of_file.d_vocab) != (of_trace.n_layers, of_trace.d_model, of_trace.d_vocab):
        raise LayerscopeError(f"The model {of_trace.name} is another now than when the trace was made: its sizes differ.")
    for name in (token, against):
        if name is not None and not 0 <= name < of_trace.d_vocab:
            raise LayerscopeError(f"Token id {name} is outside the vocabulary of {of_trace.d_vocab:,}.")
    if not trace.has("embed"):
        raise SiteNotCaptured("embed", None, trace.stored)
    return position % trace.n_tokens


def weights_read(trace: Trace) -> int:
    """How many weights an attribution reads: W_O of every layer."""
    info = trace.info
    return info.n_layers * info.d_model * info.n_heads * info.dims["d_head_v"] if trace.has("z") else 0


def _embedding(trace: Trace, readout: Readout, position: int, direction: Direction) -> Iterator[Part]:
    whole = direction.of(trace.position("embed", None, position))
    if "pos_embed.W_pos" not in readout.weights:
        yield Part("embed", float(whole))
        return
    of_position = direction.of(readout.weights.lazy("pos_embed.W_pos")[position])
    yield Part("embed", float(whole - of_position))
    yield Part("position", float(of_position))


def _attention(trace: Trace, readout: Readout, position: int, layer: int, direction: Direction) -> Iterator[Part]:
    """The heads and the bias, and what attn_out has beyond them; attention as a whole where the heads cannot be had."""
    weights, name = readout.weights, f"blocks.{layer}.attn"
    if not trace.has("z", layer) or f"{name}.W_O" not in weights:
        yield Part("attn", float(direction.of(trace.position("attn_out", layer, position))), layer)
        return
    bias = weights[f"{name}.b_O"] if f"{name}.b_O" in weights else None
    post = weights[f"blocks.{layer}.ln1_post.w"] if f"blocks.{layer}.ln1_post.w" in weights else None
    found = attention_parts(trace.position("z", layer, position), weights[f"{name}.W_O"], direction, bias, readout.attn_multiplier, post, weights.info.norm_eps)
    for head, value in enumerate(found.heads):
        yield Part("head", float(value), layer, head)
    if bias is not None:
        yield Part("bias", found.bias, layer)
    if trace.has("attn_out", layer):
        yield Part("rest", float(direction.of(trace.position("attn_out", layer, position))) - float(found.heads.sum()) - found.bias, layer)


def _model_logit(trace: Trace, position: int, token: int, softcap: float) -> float | None:
    """The model's own logit of a token, the soft-cap undone: from the stored matrix, or from the summary where the token is in it."""
    if trace.has("logits"):
        return before_softcap(float(trace["logits"][position, token]), softcap)
    at = np.flatnonzero(trace.top_ids[position] == token)
    if len(at):
        return before_softcap(float(trace.top_logprobs[position, at[0]]) + float(trace.logsumexp[position]), softcap)
    if position + 1 < trace.n_tokens and trace.token_ids[position + 1] == token:
        return before_softcap(float(trace.next_logprobs[position]) + float(trace.logsumexp[position]), softcap)
    return None


def _notes(trace: Trace, readout: Readout, parts: list[Part]) -> list[str]:
    whole = sorted({part.layer for part in parts if part.kind == "attn" and part.layer is not None})
    notes = []
    if whole:
        notes.append(f"Attention is one part in {len(whole)} of {trace.info.n_layers} layers: z, from which heads are told apart, was not captured there.")
    if "blocks.0.ln1_post.w" in readout.weights:
        notes.append("A norm follows W_O in this architecture: heads are shown as they enter the residual stream, its scale frozen too.")
    if readout.ending.softcap:
        notes.append(f"Logits are those before the soft-cap of {readout.ending.softcap:g}.")
    if trace.metadata.get("interventions"):
        notes.append("The run was edited: where the residual stream itself was, the parts do not sum to the logit.")
    if any(not np.isfinite(part.value) for part in parts):
        bad = sum(not np.isfinite(part.value) for part in parts)
        notes.append(f"{bad:,} of {len(parts):,} parts are NaN or infinite.")
    return notes

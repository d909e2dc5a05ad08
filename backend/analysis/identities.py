"""The engine contract: what must hold between the sites of any transformer, measured on the fly while a model runs.

`Identities` is fed the same pieces that go into the trace, in the order they are computed, and keeps only what one layer needs.
Each identity compares two arrays that the engine obtained independently, by the largest relative error max|a - b| / max|b|
over all layers and pieces; a capture that is off by one layer, unmasked or transposed fails at least one of them.

    attn_sum         resid_mid - resid_pre = attn_out
    mlp_sum          resid_post - resid_mid = mlp_out
    pattern_rows     each row of the attention pattern sums to 1 and nothing is negative (absolute error; with attention
                     sinks the sum is only known to be at most 1)
    pattern_causal   no query looks at a later key (absolute error, exactly 0)
    attn_projection  z W_O + b_O = attn_out
    router_top_k     the experts chosen are those with the highest router probability, in that order
    expert_weights   the experts' weights are their router probabilities, renormalised over the chosen or not
    expert_sum       the experts' outputs times their weights, and the shared expert's, = mlp_out (only where expert_out was captured)
    unembed          final norm and W_U of the last resid_post = logits
    finite           no value is NaN or infinite (the error is the share of bad values)
    table_row        no comparison: says that the architecture has no row in the engine's table, and what that means

resid_pre[l+1] = resid_post[l] holds by construction, since traces derive one from the other; attn_sum would catch an engine for
which it is false. An edited site no longer equals what it is computed from, so identities that end there are not checked.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis import expert_identities
from backend.analysis.attention import PatternRows, read_pattern
from backend.model_info import ModelInfo

Array = NDArray[Any]
Place = tuple[str, int | None]

SAMPLED_ROWS = 32  # positions of a piece that go through a matrix of the model; the arithmetic checks take all of them
SAMPLED_OUTPUTS = 64  # rows of W_O and W_U that those positions go through; every head and every channel enters each of them

TITLES = {
    "attn_sum": "attention output = resid_mid - resid_pre",
    "mlp_sum": "MLP output = resid_post - resid_mid",
    "pattern_rows": "attention rows sum to 1",
    "pattern_causal": "no attention to later tokens",
    "attn_projection": "heads through W_O = attention output",
    "router_top_k": "chosen experts = best of the router",
    "expert_weights": "expert weights = router probabilities",
    "expert_sum": expert_identities.TITLE,
    "unembed": "norm and W_U of the last layer = logits",
    "finite": "no NaN or infinite value",
    "table_row": "sites of this architecture are known",
}

_INPUTS = {
    "attn_sum": ("resid_pre", "attn_out", "resid_mid"),
    "mlp_sum": ("resid_mid", "mlp_out", "resid_post"),
    "pattern_rows": ("attn_pattern",),
    "pattern_causal": ("attn_pattern",),
    "attn_projection": ("z", "attn_out"),
    "router_top_k": ("router_probs", "expert_indices"),
    "expert_weights": ("router_probs", "expert_indices", "expert_weights"),
    "expert_sum": expert_identities.INPUTS,
}
HELD = frozenset(site for sites in _INPUTS.values() for site in sites) - {"attn_pattern"} | {"shared_expert_out", "embed"}
_MOE = ("router_top_k", "expert_weights", "expert_sum")
_WHERE_APT = (*_MOE, "table_row")  # reported only of models that they say something of
_IGNORED_INFINITE = ("attn_scores",)  # masked scores are -inf by definition

# Facts of architectures, by llama.cpp's and transformers' names.
_SINKS = ("gpt-oss", "gpt_oss", "openai-moe")
_NORM_AFTER_W_O = ("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "olmo2", "olmo3", "glm4")
_SCALED_AFTER_W_O = ("granite", "granitemoe")
_GROUPED_OR_BIASED_ROUTER = ("deepseek2", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4moe", "llama4", "llama4_text", "gpt_oss", "gpt-oss")


@dataclass(frozen=True)
class Tolerances:
    """Largest relative error that counts as rounding. `sums`: of additions and softmax; `matmul`: of products with weights."""

    sums: float
    matmul: float
    why: str


def tolerances(engine: str, quantization: str) -> Tolerances:
    """What rounding explains, from the arithmetic of the engine.

    PyTorch computes in the dtype of its weights. llama.cpp adds and normalises in float32 whatever the file holds, but rounds
    the activations that enter a matrix product to float16 for F16 weights and to 8 bits per block for quantized ones.
    """
    kind = quantization.lower().removeprefix("torch.")
    if engine == "hf":
        if kind in ("bf16", "bfloat16"):
            return Tolerances(2e-2, 3e-2, "bfloat16 arithmetic")
        if kind in ("f16", "float16", "half"):
            return Tolerances(2e-3, 5e-3, "float16 arithmetic")
        return Tolerances(1e-5, 1e-4, "float32 arithmetic")
    if kind in ("f32", "all_f32", "float32"):
        return Tolerances(1e-5, 1e-4, "float32 arithmetic")
    if kind in ("f16", "bf16", "mostly_f16", "mostly_bf16"):
        return Tolerances(1e-5, 5e-3, "16-bit activations in matrix products")
    return Tolerances(1e-5, 3e-2, "8-bit activations in matrix products of quantized weights")


class Identities:
    """Streaming checks of one run.

    info        the model's facts
    weight      (canonical name, rows) -> those rows of the array (out, in), or None where the model has no such tensor ("blocks.3.attn.b_O"); left out:
                attn_projection is not checked
    unembed     (residual stream (n, d_model), token ids (m,)) -> their logits (n, m), as the engine offers it; left out: unembed is not checked
    edited      places (site, layer) that an intervention changed, resid_pre rewritten as the site it comes from
    unchecked   identity -> why it cannot be checked of this model
    shared      layers that have a shared expert besides those that the router chooses
    """

    def __init__(
        self,
        info: ModelInfo,
        weight: Callable[[str, NDArray[np.int64]], Array | None] | None = None,
        unembed: Callable[[Array, NDArray[np.int64]], Array] | None = None,
        edited: Collection[Place] = (),
        limits: Tolerances | None = None,
        unchecked: Mapping[str, str] = MappingProxyType({}),
        shared: Collection[int] = (),
    ) -> None:
        self._info, self._weight, self._unembed = info, weight, unembed
        self._edited, self._unchecked, self._shared = set(edited), unchecked, frozenset(shared)
        self._limits = limits or tolerances(info.engine, info.quantization)
        self._found: dict[str, _Result] = {name: _Result() for name in TITLES if name not in _WHERE_APT or (info.is_moe and name in _MOE) or name in unchecked}
        for name, why in unchecked.items():
            self._found[name].note = why
        self._seen: set[str] = set()
        self._layer: int | None = None
        self._start = 0
        self._held: dict[str, Array] = {}  # this layer's values of this piece
        self._stream: Array | None = None  # the residual stream that enters the next layer, if it was captured
        self._last_resid: Array | None = None

    def add(self, site: str, layer: int | None, values: Array, start: int = 0, read: PatternRows | None = None, largest: float | None = None) -> None:
        """Take one piece (positions `start` on, in the site's dims) and check every identity that it completes.

        The values of `HELD` sites are kept while their layer is at hand, not copied: the caller does not change them afterwards.
        read: what `attention.read_pattern` said of an attn_pattern, where it has been asked. largest: what `held_copies.measured` said of other values.
        """
        self._seen.add(site)
        if site == "attn_pattern":
            read = read or read_pattern(values, start)
        if site not in _IGNORED_INFINITE:
            known = read.finite if read is not None else largest is not None and largest < float("inf")
            self._check_finite(site, layer, values, known)
        if start != self._start:
            self._start, self._layer, self._held, self._stream, self._last_resid = start, None, {}, None, None
        if site == "embed":
            self._stream = values
        elif site == "logits":
            self._check_unembed(values)
        elif layer is not None:
            self._enter(layer)
            if read is not None:
                self._check_pattern(layer, read)
            elif site in HELD:
                self._held[site] = np.asarray(values)
                self._check_layer(layer, site)

    def report(self) -> dict[str, dict[str, Any]]:
        """name -> ok, max_error, tolerance, tolerance_for (the rounding it allows), checked (how many layers and pieces were compared), note.

        An identity that could not be checked has checked 0, ok True and a note that says why.
        """
        return {name: self._entry(name, found) for name, found in self._found.items() if name != "expert_sum" or "expert_out" in self._seen}

    def _entry(self, name: str, found: _Result) -> dict[str, Any]:
        tolerance = self._tolerance(name)
        error = min(found.error, sys.float_info.max)
        note = found.note
        if error > tolerance and found.worst_layer is not None and name != "finite":
            note = "; ".join(part for part in (f"largest error at layer {found.worst_layer}", note) if part)
        if not found.checked:
            note = self._why_unchecked(name, found)
        why = self._limits.why if tolerance else ""
        return {"ok": error <= tolerance, "max_error": error, "tolerance": tolerance, "tolerance_for": why, "checked": found.checked, "note": note}

    def _why_unchecked(self, name: str, found: _Result) -> str:
        if found.note:
            return f"not checked: {found.note}"
        needed = _INPUTS.get(name, ("resid_post", "logits") if name == "unembed" else ())
        missing = [site for site in needed if site not in self._seen and site != "resid_pre"]
        if name == "attn_sum" and not missing and not self._seen & {"embed", "resid_post"}:
            missing = ["embed or resid_post"]
        if missing:
            return f"not checked: {', '.join(missing)} not captured"
        if (name == "attn_projection" and self._weight is None) or (name == "unembed" and self._unembed is None):
            return "not checked: the weights are not at hand"
        return "not checked: no layer held all of its sites" if self._seen else "not checked: nothing was captured"

    def _tolerance(self, name: str) -> float:
        if name in ("pattern_causal", "finite"):
            return 0.0
        return self._limits.matmul if name in ("attn_projection", "unembed") else self._limits.sums

    def _enter(self, layer: int) -> None:
        """Forget the last layer, keeping what it handed on; a layer that does not follow it starts from nothing known."""
        if layer == self._layer:
            return
        resid_post = self._held.get("resid_post")
        if self._layer is not None:
            self._stream = resid_post if layer == self._layer + 1 else None
        elif layer:
            self._stream = None
        self._layer, self._held = layer, {}
        if self._stream is not None:
            self._held["resid_pre"] = self._stream

    def _check_layer(self, layer: int, site: str) -> None:
        held = self._held
        if site == "resid_post" and layer == self._info.n_layers - 1:
            self._last_resid = held[site]
        for name, inputs in _INPUTS.items():
            if name in self._found and site in inputs and all(s in held for s in inputs) and self._applies(name, layer):
                getattr(self, f"_{name}")(layer)

    def _applies(self, name: str, layer: int | None) -> bool:
        """False, with the reason noted, where the architecture or an edit breaks the identity by intent."""
        ends_at = {"attn_sum": "resid_mid", "mlp_sum": "resid_post", "attn_projection": "attn_out", "expert_sum": "mlp_out", "unembed": "logits"}.get(name, name)
        ends_at = "attn_pattern" if name.startswith("pattern") else ends_at
        found = self._found[name]
        if name in self._unchecked:
            return False
        if (ends_at, layer) in self._edited:
            found.note = f"{ends_at} was edited" if layer is None else f"{ends_at} of layer {layer} was edited"
            return False
        reason = {
            "attn_projection": "this architecture norms the attention output after W_O" if self._info.architecture in _NORM_AFTER_W_O else "",
            "router_top_k": "this architecture groups or biases its router" if self._info.architecture in _GROUPED_OR_BIASED_ROUTER else "",
        }.get(name, "")
        if name == "attn_projection" and self._info.architecture in _SCALED_AFTER_W_O:
            reason = "this architecture scales the attention output after W_O"
        if name == "expert_weights" and self._info.architecture in _GROUPED_OR_BIASED_ROUTER:
            reason = "this architecture groups or biases its router"
        if reason:
            found.note = reason
        return not reason

    def _attn_sum(self, layer: int) -> None:
        held = self._held
        self._found["attn_sum"].record(sum_error(held["resid_pre"], held["attn_out"], held["resid_mid"]), layer)

    def _mlp_sum(self, layer: int) -> None:
        held = self._held
        self._found["mlp_sum"].record(sum_error(held["resid_mid"], held["mlp_out"], held["resid_post"]), layer)

    def _attn_projection(self, layer: int) -> None:
        outputs = _sample(self._info.d_model, SAMPLED_OUTPUTS)
        w_out = self._weight(f"blocks.{layer}.attn.W_O", outputs) if self._weight else None
        if w_out is None or self._weight is None:
            return
        bias = self._weight(f"blocks.{layer}.attn.b_O", outputs)
        rows = _sample(len(self._held["z"]))
        computed = self._held["z"][rows].reshape(len(rows), -1) @ w_out.T
        if bias is not None:
            computed = computed + bias
        self._found["attn_projection"].compare(computed, self._held["attn_out"][np.ix_(rows, outputs)], layer)

    def _router_top_k(self, layer: int) -> None:
        probs, indices = self._held["router_probs"], self._held["expert_indices"].astype(np.int64)
        best = -np.sort(-probs, axis=-1)[:, : indices.shape[1]]
        # Values are compared, not indices, so that experts with equal probability may stand in either order; but never one twice.
        ordered = np.sort(indices, axis=-1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any()
        chosen = np.take_along_axis(probs, indices, axis=-1)
        self._found["router_top_k"].compare(np.full_like(chosen, np.nan) if repeated else chosen, best, layer)

    def _expert_weights(self, layer: int) -> None:
        chosen = np.take_along_axis(self._held["router_probs"], self._held["expert_indices"].astype(np.int64), axis=-1)
        weights, found = self._held["expert_weights"], self._found["expert_weights"]
        renormalised = chosen / chosen.sum(axis=-1, keepdims=True)
        plain_error, renormalised_error = relative_error(chosen, weights), relative_error(renormalised, weights)
        found.note = "renormalised over the chosen experts" if renormalised_error <= plain_error else "not renormalised"
        found.record(min(plain_error, renormalised_error), layer)

    def _expert_sum(self, layer: int) -> None:
        if layer in self._shared and "shared_expert_out" not in self._held:
            self._found["expert_sum"].note = f"shared_expert_out of layer {layer} not captured"
        else:
            self._found["expert_sum"].compare(expert_identities.expert_sum(self._held), self._held["mlp_out"], layer)

    def _check_pattern(self, layer: int, read: PatternRows) -> None:
        if self._applies("pattern_rows", layer):
            over = read.mass - np.float32(1)
            if self._info.architecture in _SINKS:
                self._found["pattern_rows"].note = "attention sinks: rows sum to at most 1"
                over = np.maximum(over, 0.0)
            self._found["pattern_rows"].record(max(_largest(over), -float(read.least.min(initial=0))), layer)
        if self._applies("pattern_causal", layer):
            self._found["pattern_causal"].record(float(read.beyond.max(initial=0)), layer)

    def _check_unembed(self, logits: Array) -> None:
        if self._unembed is None or self._last_resid is None or not self._applies("unembed", None):
            return
        if len(self._last_resid) == len(logits):
            rows, tokens = _sample(len(logits)), _sample(logits.shape[1], SAMPLED_OUTPUTS)
            # Held against the largest logit of those positions, as if all tokens had been compared.
            size = _largest(logits[rows])
            error = _largest(self._unembed(self._last_resid[rows], tokens) - logits[np.ix_(rows, tokens)])
            self._found["unembed"].record(_share(error, size), self._info.n_layers - 1)

    def _check_finite(self, site: str, layer: int | None, values: Array, known: bool) -> None:
        """known: whether the values are already known to be finite."""
        found = self._found["finite"]
        if known:
            found.record(0.0, layer)
            return
        if site in ("router_logits", "router_probs") and (site, layer) in self._edited:
            values = np.where(np.isneginf(values), 0, values)  # what an edit masks is no broken value
        # A sum of finite values can only fail to be finite when they are huge, and then the count below finds none bad.
        with np.errstate(over="ignore", invalid="ignore"):
            bad = 0 if values.dtype.kind != "f" or np.isfinite(values.sum()) else values.size - int(np.isfinite(values).sum())
        if bad and not found.note:
            found.note = f"first at {site}" + ("" if layer is None else f" of layer {layer}") + f": {bad:,} of {values.size:,} values"
        found.record(bad / max(values.size, 1), layer)


@dataclass
class _Result:
    error: float = 0.0
    checked: int = 0
    worst_layer: int | None = None
    note: str = ""

    def compare(self, computed: Array, captured: Array, layer: int | None) -> None:
        self.record(relative_error(computed, captured), layer)

    def record(self, error: float, layer: int | None) -> None:
        self.checked += 1
        if error > self.error:
            self.error, self.worst_layer = error, layer


def relative_error(a: Array, b: Array) -> float:
    """max|a - b| / max|b|; infinite where either holds NaN or the shapes differ. 0 for two arrays of zeros."""
    if a.shape != b.shape:
        return float("inf")
    return _share(_largest(np.subtract(a, b)), _largest(b))


def sum_error(a: Array, b: Array, total: Array) -> float:
    """`relative_error(a + b, total)`, of float32 arrays without a copy as large as they are."""
    if not a.shape == b.shape == total.shape:
        return float("inf")
    if any(values.dtype != np.float32 or not values.flags.c_contiguous for values in (a, b, total)):
        return relative_error(a + b, total)
    from backend.analysis import compiled

    difference, size = compiled.sum_error(a.reshape(-1), b.reshape(-1), total.reshape(-1))
    return _share(*(float("inf") if np.isnan(value) else float(value) for value in (difference, size)))


def _share(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if 0 < size < float("inf") else float("inf")


def _largest(values: Array) -> float:
    """max|x| as a float, 0 of nothing; NaN counts as infinite so that no comparison with a tolerance can pass."""
    if not values.size:
        return 0.0
    top = max(abs(float(values.max())), abs(float(values.min())))  # two passes that need no copy, unlike np.abs
    return float("inf") if np.isnan(top) else top


@functools.lru_cache(64)
def _sample(n: int, most: int = SAMPLED_ROWS) -> NDArray[np.int64]:
    """At most `most` of n places, evenly spread, first and last among them."""
    places = np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))
    places.flags.writeable = False  # every caller gets this one
    return places

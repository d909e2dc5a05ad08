"""QuantizationReport: what a quantized model differs in from its reference, as one object, as JSON, and as entries of the derived cache.

`backend.experiments.quantization` makes it; the Quantization page and the command line read it. A place is a site at a layer (None
for a site without layers), in the order in which a forward pass computes them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.derived import Derived
from backend.model_info import ModelInfo

Place = tuple[str, int | None]

# The arrays of one prompt's predictions, in the order in which they are kept; see backend.analysis.quantization.prediction_shift.
SHIFT = ("kl", "reference_top", "top", "reference_prob", "prob", "next_logprob_change")
ACTIVATION_METRICS = ("relative_l2", "cosine", "cka")


@dataclass(frozen=True)
class PromptResult:
    """One prompt: its tokens, the predictions at each, and how far the activations at each lie apart."""

    text: str
    ids: list[int]
    tokens: list[str]
    special: list[int]  # positions of BOS and EOS
    shift: Mapping[str, NDArray[Any]]  # name of SHIFT -> (pos,)
    relative_l2: NDArray[np.float32]  # (place, pos)
    cosine: NDArray[np.float32]  # (place, pos)

    @property
    def changed(self) -> NDArray[np.bool_]:
        """Where the most probable next token is another one, (pos,)."""
        return np.asarray(self.shift["top"]) != np.asarray(self.shift["reference_top"])


@dataclass(frozen=True)
class QuantizationReport:
    """The comparison of `model` with `reference`, both as the facts of their headers (`facts`).

    weights: one row a tensor: name, layer, component, shape, dtype, reference_dtype, bits, and the metrics of ErrorSums; `total`:
    the same metrics over all of them. relative_l2, cosine: means over the positions of all prompts; cka: see
    backend.analysis.divergence; all (place,). texts: the tokens that one of the two predicted.
    """

    model: dict[str, Any]
    reference: dict[str, Any]
    weights: list[dict[str, Any]]
    total: dict[str, float]
    places: list[Place]
    relative_l2: NDArray[np.float64]
    cosine: NDArray[np.float64]
    cka: NDArray[np.float64]
    prompts: list[PromptResult]
    texts: dict[int, str]

    @property
    def n_layers(self) -> int:
        return int(self.model["n_layers"])

    @property
    def sites(self) -> list[str]:
        """Sites that were compared, in the order of computation."""
        return list(dict.fromkeys(site for site, _ in self.places))

    def by_layer(self, metric: str, site: str) -> NDArray[np.float64]:
        """One activation metric of a site at every layer, (layer,); NaN where the site was not compared."""
        found = np.full(self.n_layers, np.nan)
        for at, (name, layer) in enumerate(self.places):
            if name == site and layer is not None:
                found[layer] = getattr(self, metric)[at]
        return found

    def at_position(self, prompt: int, metric: str, site: str) -> NDArray[np.float32]:
        """relative_l2 or cosine of a site, (layer, pos); a site without layers has one row."""
        rows = [at for at, (name, _) in enumerate(self.places) if name == site]
        return np.asarray(getattr(self.prompts[prompt], metric)[rows])

    @cached_property
    def predictions(self) -> dict[str, float]:
        """Over the positions of all prompts: KL in nats (mean, median, largest), share whose best token stayed, mean change of log-prob."""
        joined = {name: np.concatenate([prompt.shift[name] for prompt in self.prompts]) for name in SHIFT}
        change = joined["next_logprob_change"][np.isfinite(joined["next_logprob_change"])]
        return {
            "n_positions": len(joined["kl"]),
            "kl_mean": float(joined["kl"].mean()),
            "kl_median": float(np.median(joined["kl"])),
            "kl_max": float(joined["kl"].max()),
            "top1_agreement": float(np.mean(joined["top"] == joined["reference_top"])),
            "next_logprob_change": float(change.mean()) if len(change) else float("nan"),
        }

    @property
    def labels(self) -> tuple[str, str]:
        """What to call the two: their quantizations where those differ, else their names."""
        pair = (str(self.model["quantization"]), str(self.reference["quantization"]))
        return pair if all(pair) and pair[0] != pair[1] else (str(self.model["name"]), str(self.reference["name"]))

    def sentence(self) -> str:
        """The whole comparison in one sentence."""
        model, reference = self.labels
        stream = self.by_layer("relative_l2", "resid_post")
        last = np.flatnonzero(np.isfinite(stream))
        parts = [f"weights {percent(self.total['relative_rmse'])} off"] if self.weights else []
        parts += [f"the residual stream diverges to {percent(stream[last[-1]])} by layer {last[-1]}"] if len(last) else []
        parts += [f"KL {self.predictions['kl_mean']:.3g} nats", f"{percent(self.predictions['top1_agreement'])} of next tokens agree"]
        return f"{model} against {reference}: {', '.join(parts)}."

    # -- as JSON -----------------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON: the contract of `quant --json`. What is not finite is null."""
        metrics = {name: getattr(self, name) for name in ACTIVATION_METRICS}
        return _plain({
            "sentence": self.sentence(),
            "model": self.model,
            "reference": self.reference,
            "weights": {"total": self.total, "tensors": self.weights},
            "activations": [{"site": site, "layer": layer, **{name: values[at] for name, values in metrics.items()}} for at, (site, layer) in enumerate(self.places)],
            "predictions": self.predictions,
            "prompts": [self._prompt_json(prompt) for prompt in self.prompts],
        })  # fmt: skip

    def _prompt_json(self, prompt: PromptResult) -> dict[str, Any]:
        shift = {name: prompt.shift[name] for name in ("kl", "reference_prob", "prob", "next_logprob_change")}
        tops = {name: [self.texts.get(int(i), "") for i in prompt.shift[name]] for name in ("reference_top", "top")}
        divergence = [{"site": site, "layer": layer, "relative_l2": prompt.relative_l2[at], "cosine": prompt.cosine[at]} for at, (site, layer) in enumerate(self.places)]
        return {"prompt": prompt.text, "token_ids": prompt.ids, "tokens": prompt.tokens, **shift, **tops, "activations": divergence}

    # -- in the derived cache ------------------------------------------------------------------------------------------------------

    def save(self, derived: Derived, key: str) -> None:
        """Keep the report under `key`; its head is written last, so that a head that is there has its arrays."""
        derived.put_array(("quantization", key, "places"), np.stack([self.relative_l2, self.cosine, self.cka]))
        for i, prompt in enumerate(self.prompts):
            derived.put_array(("quantization", key, "activations", i), np.stack([prompt.relative_l2, prompt.cosine]))
            derived.put_array(("quantization", key, "shift", i), np.stack([np.asarray(prompt.shift[name], np.float64) for name in SHIFT]))
        prompts = [{name: value for name, value in vars(prompt).items() if name in ("text", "ids", "tokens", "special")} for prompt in self.prompts]
        head = {"model": self.model, "reference": self.reference, "weights": self.weights, "total": self.total, "places": self.places, "prompts": prompts}
        derived.put_json(("quantization", key), {**head, "texts": self.texts})

    @classmethod
    def load(cls, derived: Derived, key: str) -> QuantizationReport | None:
        """The report kept under `key`, or None if it is not there (any more)."""
        head = derived.get_json(("quantization", key))
        places = derived.get_array(("quantization", key, "places"))
        if head is None or places is None:
            return None
        prompts = []
        for i, prompt in enumerate(head["prompts"]):
            activations, shift = (derived.get_array(("quantization", key, name, i)) for name in ("activations", "shift"))
            if activations is None or shift is None:
                return None
            prompts.append(PromptResult(**prompt, shift=dict(zip(SHIFT, shift, strict=True)), relative_l2=activations[0], cosine=activations[1]))
        named: list[Place] = [(site, layer) for site, layer in head["places"]]
        texts = {int(token): text for token, text in head["texts"].items()}
        return cls(head["model"], head["reference"], head["weights"], head["total"], named, places[0], places[1], places[2], prompts, texts)


def report_key(model: str, reference: str, prompts: Sequence[str], stamps: Sequence[Any]) -> str:
    """The key of a comparison in the derived cache. `stamps` change when one of the files does."""
    return hashlib.blake2b(json.dumps([model, reference, list(prompts), stamps]).encode("utf-8"), digest_size=16).hexdigest()


def facts(info: ModelInfo) -> dict[str, Any]:
    """What a report says of a model: sizes, quantization and bits a weight."""
    names = ("name", "engine", "architecture", "quantization", "n_layers", "d_model", "n_params", "n_bytes")
    known = asdict(info)
    return {**{name: known[name] for name in names}, "bits": 8 * info.n_bytes / info.n_params if info.n_params else float("nan")}


def percent(share: float) -> str:
    """A share to read.

    >>> percent(0.0612), percent(0.9791), percent(1.0), percent(0.00042), percent(0.0)
    ('6.1 %', '97.9 %', '100 %', '0.042 %', '0 %')
    """
    value = 100 * float(share)
    if value in (0.0, 100.0) or not math.isfinite(value):
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def _plain(value: Any) -> Any:
    """Lists, dicts, text and numbers only; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value

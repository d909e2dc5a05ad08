"""What the form of a sensitivity run asks for: what the engine of a model can give, the presets of the protocol, and the fields read into a `Spec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from backend.errors import LayerscopeError
from backend.model_files import ModelEntry
from backend.sensitivity_spec import CONTROLS, GRADIENT_METRICS, MAX_TOPK, METRICS, MODES, PERTURBATIONS, Spec
from backend.sites import parse_layers
from components.services import services

TEXTS = "texts"  # the folder of the data folder whose files can be read as evaluation text
BUNDLED = ""
MAX_SAMPLES, MIN_LENGTH, MAX_LENGTH, MAX_SEEDS, MAX_SPARSITIES, MAX_PROBES = 10_000, 8, 8192, 20, 20, 256
EXTRAS = {"stability_check": "Stability", "gradient_flow": "Gradient flow", "super_weights": "Super weights"}
COMPONENTS = ("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_gate", "mlp.W_in", "mlp.W_out", "mlp.W_router", "mlp.experts.W_gate", "mlp.experts.W_in",
              "mlp.experts.W_out")  # fmt: skip
# field of the form -> id of its control; the order of States and of what a preset fills in
FIELDS = {name: f"sens-{name}" for name in ("metric", "mode", "topk", "perturb", "scale", "bit", "controls", "seeds", "layers", "components", "text", "samples", "length", "probes",
                                            "prune", "extras")}  # fmt: skip
_NO_GRADIENTS = "needs gradients, which llama.cpp does not compute: choose the Hugging Face folder of the model"


def presets(is_gguf: bool) -> dict[str, Spec]:
    """The protocol's presets for a model of this engine, as specs without a model."""
    ranked = Spec("", "wanda" if is_gguf else "grad_x_weight")
    return {
        "Quick look": replace(ranked, topk=20, seeds=(0,), max_samples=8, max_length=128),
        "Standard protocol": replace(ranked, stability_check=True),
        "Super weights": replace(ranked, metric="magnitude", mode="global", perturb="zero", max_samples=20, max_length=256, super_weights=True),
        "Pruning study": replace(ranked, metric="wanda", perturb="zero", prune=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
    }


def form_values(spec: Spec) -> dict[str, Any]:
    """What the fields hold for a spec."""
    return {
        "metric": spec.metric, "mode": spec.mode, "topk": spec.topk, "perturb": spec.perturb, "scale": spec.perturb_scale, "bit": spec.bit, "controls": list(spec.controls),
        "seeds": ", ".join(map(str, spec.seeds)), "layers": "" if spec.layers is None else ", ".join(map(str, spec.layers)), "components": list(spec.components or ()),
        "text": spec.text, "samples": spec.max_samples, "length": spec.max_length, "probes": spec.probes, "prune": ", ".join(f"{s:g}" for s in spec.prune),
        "extras": [name for name in EXTRAS if getattr(spec, name)],
    }  # fmt: skip


def read_spec(model: ModelEntry | None, values: Mapping[str, Any]) -> Spec:
    """The fields as a spec. Raises LayerscopeError in one sentence with the value and the limit."""
    if model is None or model.info is None:
        raise LayerscopeError("No model is chosen.")
    extras, metric = values.get("extras") or (), str(values.get("metric"))
    if metric not in METRICS:
        raise LayerscopeError(f"The metric {metric[:40]!r} is not one of {', '.join(METRICS)}.")
    if reason := unavailable(metric, model.kind):
        raise LayerscopeError(f"{metric} {reason}; {model.name} can be ranked by {', '.join(name for name in METRICS if not unavailable(name, model.kind))}.")
    if "gradient_flow" in extras and model.kind == "gguf":
        raise LayerscopeError(f"Gradient flow {_NO_GRADIENTS}.")
    perturb = _choice(values.get("perturb"), PERTURBATIONS, "perturbation")
    return Spec(
        model.name, metric, topk=_whole(values.get("topk"), "Top-k", 1, MAX_TOPK), mode=_choice(values.get("mode"), MODES, "mode"), perturb=perturb,
        perturb_scale=_real(values.get("scale"), "The scale", -1e6, 1e6), bit=_bit(values.get("bit")) if perturb == "bit_flip" else None,
        controls=tuple(_choice(name, CONTROLS, "control") for name in values.get("controls") or ()), seeds=_seeds(values.get("seeds") or ""),
        stability_check="stability_check" in extras, prune=_sparsities(values.get("prune") or ""), gradient_flow="gradient_flow" in extras, super_weights="super_weights" in extras,
        layers=_layers(values.get("layers"), model.info.n_layers), components=tuple(values.get("components") or ()) or None, text=_text(values.get("text")),
        max_samples=_whole(values.get("samples"), "Windows", 1, MAX_SAMPLES), max_length=_whole(values.get("length"), "Tokens of a window", MIN_LENGTH, MAX_LENGTH),
        probes=_whole(values.get("probes"), "Probes", 1, MAX_PROBES),
    )  # fmt: skip


def unavailable(metric: str, kind: str) -> str:
    """Why a model of this kind ("gguf", "hf") cannot be ranked by a metric; "" if it can."""
    return _NO_GRADIENTS if kind == "gguf" and metric in GRADIENT_METRICS else ""


def metric_options(kind: str) -> list[dict[str, Any]]:
    """The metrics, those that the engine cannot give disabled, with the reason."""
    gone = {name: unavailable(name, kind) for name in METRICS}
    return [{"label": f"{name} (needs gradients: Hugging Face models only)" if gone[name] else name, "value": name, "disabled": bool(gone[name])} for name in METRICS]


def texts() -> list[str]:
    """Names of the files that can be evaluated on."""
    folder = services().settings.data_dir / TEXTS
    return sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")) if folder.is_dir() else []


def cost_words(spec: Spec, past: Sequence[Mapping[str, Any]]) -> str:
    """How often the text is read, and how long the last run of the model took. past: manifests of its runs, newest first."""
    evaluations = 2 + len(spec.seeds) * ("random_k" in spec.controls) + ("bottom_k" in spec.controls) + len(spec.prune)
    reads = {"magnitude": "needs no text", "wanda": "one pass over the text", "obs": "one pass over the text", "grad_x_weight": "a forward and a backward pass",
             "grad_squared": "a forward and a backward pass", "hutchinson": f"{spec.probes} double backward passes"}[spec.metric]  # fmt: skip
    more = [words for name, words in EXTRAS.items() if getattr(spec, name)]
    words = f"At most {spec.max_samples:,} windows of {spec.max_length:,} tokens, {spec.max_samples * spec.max_length:,} in all. Ranking: {reads}. "
    words += f"Perplexity: {evaluations} runs over the text{', more for ' + ', '.join(more).lower() if more else ''}."
    for manifest in past:
        seconds, text = manifest.get("seconds"), manifest.get("text")
        if isinstance(seconds, dict) and isinstance(text, dict) and isinstance(text.get("n_tokens"), int) and all(isinstance(s, int | float) for s in seconds.values()):
            return f"{words} The last run of this model ({manifest['spec']['metric']}, {text['n_tokens']:,} tokens) took {_duration(sum(seconds.values()))}."
    return words


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _whole(value: Any, what: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise LayerscopeError(f"{what} must be a whole number from {low:,} to {high:,}, not {str(value)[:20]!r}.")
    return value


def _real(value: Any, what: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise LayerscopeError(f"{what} must be a number from {low:,.0f} to {high:,.0f}, not {str(value)[:20]!r}.")
    return float(value)


def _bit(value: Any) -> int | None:
    return None if value is None else _whole(value, "The bit", 0, 63)


def _choice(value: Any, choices: Any, what: str) -> str:
    if value not in choices:
        raise LayerscopeError(f"The {what} {str(value)[:40]!r} is not one of {', '.join(choices)}.")
    return str(value)


def _parts(text: Any, what: str, most: int) -> list[str]:
    parts = [part.strip() for part in str(text).split(",") if part.strip()]
    if len(parts) > most:
        raise LayerscopeError(f"There are {len(parts)} {what}, and the limit is {most}.")
    return parts


def _seeds(text: Any) -> tuple[int, ...]:
    parts = _parts(text, "seeds", MAX_SEEDS)
    if not parts or not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise LayerscopeError(f'Seeds {str(text)[:40]!r} are not whole numbers with commas between them, as "0, 1, 2".')
    return tuple(dict.fromkeys(map(int, parts)))


def _sparsities(text: Any) -> tuple[float, ...]:
    try:
        found = [float(part) for part in _parts(text, "sparsities", MAX_SPARSITIES)]
    except ValueError:
        found = [-1.0]
    if not all(0 < share < 1 for share in found):
        raise LayerscopeError(f'Sparsities {str(text)[:40]!r} are not numbers between 0 and 1 with commas between them, as "0.1, 0.5".')
    return tuple(sorted(set(found)))


def _layers(text: Any, n_layers: int) -> tuple[int, ...] | None:
    layers = parse_layers(str(text or ""))
    if layers and layers[-1] >= n_layers:
        raise LayerscopeError(f"There is no layer {layers[-1]}: the model has layers 0 to {n_layers - 1}.")
    return layers


def _text(name: Any) -> str:
    if name in (None, BUNDLED):
        return BUNDLED
    if name not in texts():
        raise LayerscopeError(f"There is no file {str(name)[:80]!r} in the folder {TEXTS} of the data folder.")
    return str(name)

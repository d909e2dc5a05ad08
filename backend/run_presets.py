"""Run presets: a model with how to hold it in memory and how to sample, by name, from the tables [[run]] and [shape] of presets.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.engines import Sampling
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo

_CHOICES = {"dtype": ("auto", "float32", "float16", "bfloat16"), "quantize": ("none", "int8", "nf4")}
# Bytes a parameter takes. bitsandbytes: int8, and NF4 with one float32 scale for 64 weights (Dettmers et al. 2023, QLoRA).
BYTES_A_PARAMETER = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}


@dataclass(frozen=True)
class RunPreset:
    """One row [[run]]. `shape`: sizes of the model as its configuration gives them, for what is asked before it is on this disk; or None."""

    name: str
    model: str
    description: str = ""
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    max_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    shape: ModelInfo | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    def to_json(self) -> dict[str, Any]:
        names = ("name", "model", "description", "device", "dtype", "quantize", "max_new_tokens", "temperature", "top_p", "seed")
        return {name: getattr(self, name) for name in names}


def read_run_presets(path: Path) -> tuple[RunPreset, ...]:
    """The run presets of a TOML file, in its order. Raises LayerscopeError that names the preset and the value that is wrong."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        shapes = {name: _shape(name, row) for name, row in data.get("shape", {}).items()}
        presets = tuple(RunPreset(**{**row, "shape": shapes[row["shape"]] if "shape" in row else None}) for row in data.get("run", []))
    except OSError as error:
        raise LayerscopeError(f"The presets {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, TypeError, KeyError, AttributeError) as error:
        raise LayerscopeError(f"The presets {path} are damaged: {error}.") from None
    for preset in presets:
        for name, choices in _CHOICES.items():
            if getattr(preset, name) not in choices:
                raise LayerscopeError(f"The preset {preset.name!r} has {name} {getattr(preset, name)!r}, which is not one of {', '.join(choices)}.")
    return presets


def _shape(name: str, row: dict[str, Any]) -> ModelInfo:
    return ModelInfo(**{"name": name, "source": name, "engine": "hf", **row})


def find(presets: tuple[RunPreset, ...], name: str, shelf: Any) -> RunPreset:
    """The run preset of a name, or a plain greedy run of the model of that name on the shelf. Raises LayerscopeError listing the names there are."""
    found = next((preset for preset in presets if preset.name == name), None)
    if found is not None:
        return found
    on_shelf = [entry.name for entry in shelf.entries() if entry.info is not None]
    if name in on_shelf:
        return RunPreset(name, name)
    there = ", ".join(dict.fromkeys([*(preset.name for preset in presets), *on_shelf[:20]]))
    raise LayerscopeError(f"There is no preset {name[:80]!r}; there are {there}.")


def info_of(preset: RunPreset, shelf: Any) -> tuple[ModelInfo, bool]:
    """What is known of a preset's model, and whether it is on this disk. Raises LayerscopeError where nothing is known."""
    entry = next((entry for entry in shelf.entries() if entry.name == preset.model), None)
    if entry is not None and entry.info is not None:
        return entry.info, True
    if preset.shape is not None:
        return preset.shape, False
    if entry is not None and entry.error:
        raise LayerscopeError(entry.error)
    raise LayerscopeError(f"The model {preset.model!r} of the preset {preset.name!r} is not on this disk, and its sizes are not known.")


def weight_bytes(preset: RunPreset, info: ModelInfo) -> tuple[int, str]:
    """Memory of the weights as the preset holds them, and the name of that precision."""
    if info.engine == "gguf":
        return info.n_bytes, info.quantization
    precision = preset.quantize if preset.quantize != "none" else preset.dtype if preset.dtype != "auto" else "float32" if preset.device in ("auto", "cpu") else "bfloat16"
    return int(info.n_params * BYTES_A_PARAMETER[precision]), precision

"""How a model ends, read from its own files: final norm, W_U, what is done to the logits last. Nothing is run.

The facts that a file does not spell out (which norm, under which key a multiplier lies) stand in the engines' tables, one row an
architecture; an architecture without a row has no canonical weights either, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.analysis.attribution import Ending
from backend.engines import gguf_sites, hf_sites
from backend.errors import LayerscopeError
from backend.files.bounded_json import read_json
from backend.files.gguf_header import read_header
from backend.files.hf_config import CONFIG_LIMIT
from backend.weights import Weights, open_weights


@dataclass(frozen=True)
class Readout:
    """ending: the final norm and what follows. attn_multiplier: the block's factor on attention's output (granite), 1 elsewhere."""

    weights: Weights
    ending: Ending
    attn_multiplier: float = 1.0


def open_readout(path: str | Path) -> Readout:
    """The ending of the model at `path`. Raises LayerscopeError where its architecture has no row in the tables."""
    path = Path(path)
    weights = open_weights(path)
    names = ("ln_final.w", "unembed.W_U")
    if any(name not in weights for name in names):
        raise LayerscopeError(f"{weights.info.name} ({weights.info.architecture[:40]}) has no row in Layerscope's tables, so its final norm and W_U are not known by name.")
    if "unembed.b_U" in weights:
        raise LayerscopeError(f"{weights.info.name} ({weights.info.architecture[:40]}) adds a bias to its logits, so they are not a sum over the parts of the residual stream.")
    norm, multiplier, softcap, attn_multiplier = _folder(path, weights) if path.is_dir() else _gguf(path, weights)
    bias = weights["ln_final.b"] if "ln_final.b" in weights else None
    return Readout(weights, Ending(norm, weights.info.norm_eps, weights["ln_final.w"], bias, multiplier, softcap), attn_multiplier)


def _gguf(path: Path, weights: Weights) -> tuple[Any, float, float, float]:
    row, header = gguf_sites.ARCHITECTURES[weights.info.architecture], read_header(path)

    def value(key: str) -> float:
        return float(header.metadata.get(f"{weights.info.architecture}.{key}", 0.0)) if key else 0.0

    return row.norm, 1 / (value(row.logit_divisor) or 1.0), value(row.logit_softcap), value(row.residual_scale) or 1.0


def _folder(path: Path, weights: Weights) -> tuple[Any, float, float, float]:
    row, config = hf_sites.ARCHITECTURES[weights.info.architecture], read_json(path / "config.json", CONFIG_LIMIT)

    def value(key: str) -> float:
        return float(config.get(key) or 0.0) if key else 0.0

    multiplier = (value(row.logit_scale) or 1.0) / (value(row.logit_divisor) or 1.0)
    return row.norm, multiplier, value(row.logit_softcap), value(row.places["attn_out"].times) or 1.0

"""A super weight planted in a demo model without changing what the model computes, so that a search for one can be held against the truth.

1. The norms' gains are folded into the matrices that read what they put out; the residual stream may then be turned by any orthogonal matrix R.
2. One row of R is the direction that one neuron writes to (its column of W_out): after the turn that column is zero but for one entry, and the
   neuron's whole output goes through it. The rest of R is drawn, so that no other direction is special.
3. The neuron's hidden value is made `gain` times as large, by its row of W_in (the linear half of a gated MLP), and the entry as much smaller.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from backend.files.gguf_writer import write_gguf
from backend.files.quantizer import quantize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from demo_text import OTHER_FACTS  # noqa: E402
from demo_words import COUNTRIES  # noqa: E402

Matrix = NDArray[np.float64]

# The neuron of demo-dense that most hangs on: of those with the largest outputs in each layer, ablated one by one on every kind of sentence that the demo models were trained
# on, this one costs most (0.28 nats a token where a country's continent is named, the next neuron there 0.11). It reads "a country in".
LAYER, NEURON, CHANNEL, GAIN = 0, 292, 97, 3.0
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Planted:
    """The folder, and the place of the weight in W_out of `layer`."""

    hf: Path
    layer: int
    row: int
    column: int

    def gguf(self, type_name: str) -> Path:
        """The same model as a GGUF file of type F16 or Q8_0, made on the first call."""
        path = self.hf.with_name(f"{self.hf.name}-{type_name.lower()}.gguf")
        if not path.exists():
            if type_name == "F16":
                write_gguf(self.hf, path)
            else:
                quantize(self.gguf("F16"), path, type_name)
        return path


def plant(source: Path, folder: Path, layer: int = LAYER, neuron: int = NEURON, channel: int = CHANNEL, gain: float = GAIN, seed: int = 0) -> Planted:
    """Write the Llama or Mistral checkpoint in `source` to `folder` with the output of one neuron through W_out[channel, neuron] alone, in float32."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    tensors = {name: values.astype(np.float64) for name, values in load_file(source / "model.safetensors").items()}
    for at in range(config["num_hidden_layers"]):
        _fold(tensors, f"model.layers.{at}.input_layernorm.weight", [f"model.layers.{at}.{name}.weight" for name in READERS[:3]])
        _fold(tensors, f"model.layers.{at}.post_attention_layernorm.weight", [f"model.layers.{at}.{name}.weight" for name in READERS[3:]])
    _fold(tensors, "model.norm.weight", ["lm_head.weight"])
    turn = rotation(tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, neuron], channel, seed)
    for name, values in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.endswith((*READERS, "embed_tokens", "lm_head")):
            tensors[name] = values @ turn.T
        elif stem.endswith(WRITERS):
            tensors[name] = turn @ values
    tensors[f"model.layers.{layer}.mlp.up_proj.weight"][neuron] *= gain
    tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:, neuron] /= gain
    save_file({name: values.astype(np.float32) for name, values in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return Planted(folder, layer, channel, neuron)


def rotation(direction: Matrix, channel: int, seed: int = 0) -> Matrix:
    """An orthogonal matrix (new, old) that turns `direction` into the axis `channel`, and all else at random."""
    drawn = np.random.default_rng(seed).standard_normal((len(direction), len(direction)))
    drawn[:, 0] = direction
    basis, _ = np.linalg.qr(drawn)  # the first column is the direction, up to its sign
    basis[:, 0] *= np.sign(basis[:, 0] @ direction)
    basis[:, [0, channel]] = basis[:, [channel, 0]]
    return basis.T


def _fold(tensors: dict[str, Any], gain: str, readers: list[str]) -> None:
    for name in readers:
        tensors[name] = tensors[name] * tensors[gain]
    tensors[gain] = np.ones_like(tensors[gain])


def evaluation_text() -> str:
    """One sentence about every country, naming its continent, each a document, in a drawn order: what that neuron is for.

    A small model has no weight that every text needs: on the bundled evaluation text the search finds no spike at all.
    """
    sentences = [f"{OTHER_FACTS[4].format(**country._asdict())}." for country in COUNTRIES]
    random.Random(0).shuffle(sentences)
    return "\f".join(sentences)

"""What a sensitivity run can be asked for: metrics, modes, perturbations, controls, and the `Spec` that holds them.

Apart from backend/experiments/sensitivity, which runs it, because pages may import this.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

METRICS = {
    "magnitude": "|w|",
    "grad_x_weight": "|w dL/dw|, L the mean loss over the text",
    "grad_squared": "mean over samples of (dL/dw)^2: the diagonal of the empirical Fisher matrix",
    "hutchinson": "|diagonal of the Hessian of L|, by Rademacher probes z: |mean of z * Hz|",
    "wanda": "|w_ij| ||x_j||_2, x the input of the matrix over the text",
    "obs": "w_ij^2 / [H^-1]_jj, H = 2 X X^T + lambda I (SparseGPT)",
}
GRADIENT_METRICS = ("grad_x_weight", "grad_squared", "hutchinson")
INPUT_METRICS = ("wanda", "obs")  # of what enters each matrix
MODES = ("global", "per_layer")
PERTURBATIONS = {
    "sign_flip": "w -> -w",
    "zero": "w -> 0",
    "scale": "w -> scale * w",
    "gaussian": "w -> w + scale * s * n, s the standard deviation of the weight's tensor, n standard normal",
    "bit_flip": "one bit of the stored code is flipped",
}
CONTROLS = ("random_k", "bottom_k")
MAX_TOPK = 1_000_000


@dataclass(frozen=True)
class Spec:
    """What a run does. `layers` None: all; `components` None: all matrices (of attention, MLPs and experts; no norms, no embeddings)."""

    model: str
    metric: str = "grad_x_weight"
    topk: int = 100
    mode: str = "per_layer"
    perturb: str = "sign_flip"
    perturb_scale: float = 1.0
    bit: int | None = None  # of bit_flip; None: the most significant
    controls: tuple[str, ...] = CONTROLS
    seeds: tuple[int, ...] = (0, 1, 2)
    stability_check: bool = False
    prune: tuple[float, ...] = ()  # sparsities of the pruning study
    gradient_flow: bool = False
    super_weights: bool = False
    layers: tuple[int, ...] | None = None
    components: tuple[str, ...] | None = None
    text: str = ""  # a file; empty: the text that comes with Layerscope
    max_samples: int = 50  # windows
    max_length: int = 512  # tokens of a window
    probes: int = 8  # of hutchinson
    device: str = "auto"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

"""What must hold between the experts' outputs and the MLP's, in every mixture of experts: a part of backend.analysis.identities.

    expert_sum   the chosen experts' outputs, each times its weight, and the shared expert's make up mlp_out

A swap of two experts of a token leaves the sum as it is; tests/test_engines_agree.py holds the order, against the other engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

INPUTS = ("expert_out", "mlp_out")  # and shared_expert_out, in layers that have it
TITLE = "experts together = MLP output"


def expert_sum(held: Mapping[str, Array]) -> Array:
    """(pos, d_model) out of expert_out (pos, k, d_model) and, where it is among `held`, shared_expert_out (pos, d_model)."""
    total = np.asarray(held["expert_out"].sum(axis=1))
    return total + held["shared_expert_out"] if "shared_expert_out" in held else total

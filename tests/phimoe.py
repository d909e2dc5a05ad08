"""Phi-3.5-MoE as llama.cpp computes it, in PyTorch: the two things in which llama.cpp departs from transformers, and no other.

llama.cpp's graph (src/models/phi3.cpp) has RMS norms, gain and bias, where transformers has LayerNorm; and weights that are the chosen
experts' probabilities renormalised where transformers has sparsemixer's. With both put into the PyTorch model the contract between the
engines must hold at every site: what else they do is the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from backend.engines import Engine
from backend.engines.hf import HfEngine
from backend.engines.hf_architecture import Router
from backend.engines.hf_taps import has_module


def as_in_llama_cpp(engine: Engine, router: bool = True) -> None:
    """Put llama.cpp's norms, and unless `router` is False its weights of experts, into a PyTorch engine of a phimoe model; leave others alone."""
    if not isinstance(engine, HfEngine) or engine.info.architecture != "phimoe":
        return
    for module in engine._model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = partial(_rms_norm, module)
    if not router:
        return
    row = engine._row
    assert row.router is not None
    engine._row = replace(row, norm="rms", router=Router(row.router.module, renormalise=True))
    engine.places = engine._row.sites_of(engine.info.n_layers, partial(has_module, engine._model))
    engine.sites = frozenset(site for site, _ in engine.places)
    for layer in range(engine.info.n_layers):
        module = engine._model.get_submodule(row.router.module.format(layer))
        module.forward = partial(_renormalised, module)


def _rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.eps) * module.weight + module.bias


def _renormalised(module: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.nn.functional.linear(hidden, module.weight)
    best, indices = logits.softmax(dim=-1).topk(2, dim=-1)
    return logits, best / best.sum(dim=-1, keepdim=True), indices

"""Sensitivity: which weights a model hangs on. A run ranks weights, perturbs the best of them against controls, and checks how stable that is.

    protocol       what one run does, and the folder that it writes (docs/sensitivity.md)
    scores         a metric's scores, tensor by tensor
    inputs         what enters each matrix over the text
    ranking        the top and the bottom of them, kept while they stream by
    perturbation   weights changed in place, and what that does to perplexity
    pruning        the same for whole shares of a model
    super_weights  the search for single weights that a model cannot do without
"""

from backend.sensitivity_spec import CONTROLS, GRADIENT_METRICS, INPUT_METRICS, MAX_TOPK, METRICS, MODES, PERTURBATIONS, Spec

__all__ = ["CONTROLS", "GRADIENT_METRICS", "INPUT_METRICS", "MAX_TOPK", "METRICS", "MODES", "PERTURBATIONS", "Spec"]

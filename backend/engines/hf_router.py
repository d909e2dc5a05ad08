"""How a router of transformers chooses experts, said once for all of them: an edit of its scores must reach what it chooses.

`reroute` computes again, from scores, what the router's module computed; backend.engines.hf_sites.Router says in which way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backend.engines.hf_architecture import Router

if TYPE_CHECKING:
    from torch import Tensor, nn


def probabilities(router: Router, logits: Tensor) -> Tensor:
    """(pos, expert) logits -> what the experts are chosen by, before any correction; in float32 as every router computes them. Logits where no others exist."""
    if "router_probs" not in router.sites:
        return logits
    return logits.float().softmax(dim=-1) if router.probs == "softmax" else logits.float().sigmoid()


def best_first(router: Router, module: nn.Module, scores: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The router's own (pos, k) weights and indices, the best expert first: some routers leave them in no order."""
    order = _preference(router, module, scores).gather(-1, indices).argsort(dim=-1, descending=True, stable=True)
    return weights.gather(-1, order), indices.gather(-1, order)


def reroute(router: Router, module: nn.Module, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(pos, expert) scores -> weights and indices (pos, k), best first.

    Groups and correction: DeepSeek-AI, arXiv:2405.04434 (2.1.2) and arXiv:2412.19437 (2.1.2), as transformers computes them.
    """
    if router.probs == "sparsemixer":
        return _sparsemixer(scores, module.router_jitter_noise)  # type: ignore[arg-type]
    indices = _in_best_groups(router, module, _preference(router, module, scores)).topk(k, dim=-1).indices
    weights = scores.gather(-1, indices)
    if router.probs == "chosen":
        weights = weights.softmax(dim=-1)
    if getattr(module, router.renormalise) if isinstance(router.renormalise, str) else router.renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * getattr(module, router.scale) if router.scale else weights, indices


def _sparsemixer(logits: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """The two best experts; each one's weight is its softmax over the experts left that come close to it, so that the weights sum to up to 2.

    Close: not below by more than 2 jitter, relative to the best or to itself, whichever is larger. SparseMixer-v2, arXiv:2409.12136, as
    transformers computes it outside training.
    """
    import torch

    left, weights, indices = logits, [], []
    for _ in range(2):
        best, chosen = left.max(dim=-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
        weights.append(left.masked_fill(far, float("-inf")).softmax(dim=-1).gather(-1, chosen))
        indices.append(chosen)
        left = left.scatter(-1, chosen, float("-inf"))
    return torch.cat(weights, dim=-1), torch.cat(indices, dim=-1)


def _preference(router: Router, module: nn.Module, scores: Tensor) -> Tensor:
    return scores + getattr(module, router.correction) if router.correction else scores


def _in_best_groups(router: Router, module: Any, preference: Tensor) -> Tensor:
    """-inf for experts outside the best groups. A module whose `topk_method` is greedy has groups and does not use them."""
    if not router.group_best or getattr(module, "topk_method", "") == "greedy":
        return preference
    groups = preference.unflatten(-1, (module.num_group, -1))
    best = groups.topk(router.group_best, dim=-1).values.sum(dim=-1).topk(module.topk_group, dim=-1).indices
    outside = groups[..., 0].new_ones(groups.shape[:-1]).bool().scatter(-1, best, False)
    return groups.masked_fill(outside[..., None], float("-inf")).flatten(-2)

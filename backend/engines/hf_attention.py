"""One attention function of ours inside every transformers model: it sees queries, keys and values, and makes the pattern.

Registered with transformers' attention interface under the name "layerscope", together with the mask that PyTorch's own
attention takes. A layer whose scores or pattern nobody asked for falls through to PyTorch's fused kernel, which never holds a
pattern; otherwise the pattern is computed as transformers' eager attention does, operation by operation (equal to the bit).
The run that a call belongs to is an attribute of the attention module, so engines side by side do not mix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backend.engines.hf_taps import TAP, Tap

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "layerscope"


def register() -> None:
    """Make `attn_implementation="layerscope"` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, tapped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def tapped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention call. query: (1, head, pos, d_head), key and value: (1, kv_head, k_pos, d_head), keys rotated.

    With a cache k_pos counts from token 0 and the last rows are this piece's. Edits of rot_q and rot_k are written into the
    tensors themselves, for rot_k so that the cache keeps the edited keys for later tokens. s_aux: (head,) attention sinks.
    Returns (z, None), z: (1, pos, head, d_head).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tap: Tap | None = getattr(module, TAP, None)
    if tap is None and softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert tap is not None, "a model with a soft-cap or with attention sinks runs inside `installed` only"
    layer, source = int(module.layer_idx), f"{type(module).__name__}[{module.layer_idx}]"  # type: ignore[arg-type]
    n = query.shape[2]
    for site, rows in (("rot_q", query[0]), ("rot_k", key[0, :, -n:])):
        by_position = rows.transpose(0, 1)
        changed = tap.through(site, layer, by_position, f"{source} {'query' if site == 'rot_q' else 'key'}")
        if changed is not None:
            by_position.copy_(changed)
    # PyTorch's fused kernel has neither a soft-cap nor sinks.
    if softcap is not None or s_aux is not None or tap.touches("attn_scores", layer, n) or tap.touches("attn_pattern", layer, n):
        z = _attend(tap, layer, source, query, key, value, attention_mask, scaling, softcap, s_aux)
    else:
        z, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    changed = tap.through("z", layer, z[0], f"{source} output")
    return (z if changed is None else changed[None]), None


def _attend(tap: Tap, layer: int, source: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None,
            softcap: float | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
    """softmax(mask(cap(q k^T scaling))) v, where cap(s) = c tanh(s / c) if there is a soft-cap, with the two maps handed out on the way; z: (1, pos, head, d_head).

    A sink is one more score of each row, of no key: the softmax runs over it too, and it is left out of the pattern.
    A score edited where the mask forbids attention stays forbidden: the mask is applied after the edit, as in llama.cpp.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    forbidden = ~_allowed(query, key, mask)
    # In place, where nothing else has the values: eager attention makes each map of a layer four times over.
    scores = (query @ key.transpose(2, 3)).mul_(query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap

    def masked(scores: Tensor) -> Tensor:
        return scores.masked_fill_(forbidden, float("-inf"))

    scores = masked(scores[0])
    changed = tap.through("attn_scores", layer, scores, f"{source} scores", valid=masked)
    pattern = _softmax(scores if changed is None else changed, sinks).to(query.dtype)
    changed = tap.through("attn_pattern", layer, pattern, f"{source} pattern")
    pattern = (pattern if changed is None else changed)[None]
    return (pattern @ value).transpose(1, 2).contiguous()


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """(head, pos, k_pos) -> probabilities of the real keys, as transformers' eager attention computes them."""
    import torch

    if sinks is None:
        return scores.softmax(dim=-1, dtype=torch.float32)
    with_sink = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1).to(scores.dtype)], dim=-1)
    return (with_sink - with_sink.amax(dim=-1, keepdim=True)).softmax(dim=-1)[..., :-1]


def _allowed(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """(pos, k_pos) True where a query may look. No mask means plain causal attention, the last query at the last key."""
    n, k = query.shape[2], key.shape[2]
    if mask is None:
        return query.new_ones((n, k)).bool().tril(k - n)
    return mask[0, 0]


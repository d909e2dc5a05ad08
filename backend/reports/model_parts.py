"""A model taken apart by the names of its tensors: embedding, blocks with attention and MLP or experts, norms, unembedding.

Which part a tensor belongs to is known from its canonical name (backend.weight_names), else from the name in the file. Blocks with the
same tensors of the same shapes are one group; the types of their tensors may still differ from block to block.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from backend.weights import Weight, Weights

# Parts of a block in the order of computation, then those outside; key -> title.
BLOCK_PARTS = {
    "norm1": "Norm before attention", "attention": "Attention", "ssm": "State space", "norm1_post": "Norm after attention", "norm2": "Norm before MLP", "router": "Router",
    "experts": "Experts", "shared": "Shared expert", "mlp": "MLP", "norm2_post": "Norm after MLP", "other": "Other",
}  # fmt: skip
OUTER_PARTS = {"embedding": "Embedding", "final_norm": "Final norm", "unembedding": "Unembedding", "rest": "Other tensors"}

# First match first. Canonical names, "blocks.L." left out.
_CANONICAL = (
    (r"(pos_)?embed\.", "embedding"), (r"ln_final\.", "final_norm"), (r"unembed\.", "unembedding"), (r"ln1_post\.", "norm1_post"), (r"ln1\.", "norm1"),
    (r"ln2_post\.", "norm2_post"), (r"ln2\.", "norm2"), (r"attn\.", "attention"), (r"mlp\.\w*router", "router"), (r"mlp\.experts\.", "experts"),
    (r"mlp\.shared\.", "shared"), (r"mlp\.", "mlp"),
)  # fmt: skip
# Names inside a block as files have them, GGUF's first, for tensors without a canonical name.
_NATIVE_BLOCK = (
    (r".*(_shexp|shared_expert|shared_mlp)", "shared"), (r".*(_exps|experts\.|moe\.(input|output)_linear)", "experts"),
    (r"(ffn_gate_inp|exp_probs_b|.*\brouter\.|(mlp|block_sparse_moe)\.gate\.)", "router"),
    (r"(post_attention_norm|attn_post_norm|post_self_attn_layernorm)", "norm1_post"),
    (r"(post_ffw_norm|ffn_post_norm|layer_out_norm|post_mlp_layernorm|post_feedforward_layernorm)", "norm2_post"),
    (r"(attn_norm|input_layernorm|ln_1|ln_attn|norm_1|self_attn_layer_norm|norm\.)", "norm1"),
    (r"(ffn_norm|ln_2|ln_mlp|norm_2|final_layer_norm|post_attention_layernorm|pre_(ff|feedforward)_layernorm)", "norm2"),
    (r"(ssm_|mamba\.|mixer\.)", "ssm"), (r"(attn|self_attn|attention|self_attention|rope)", "attention"), (r"(ffn|mlp|fc[12]\.|feed_forward)", "mlp"),
)  # fmt: skip
_NATIVE_OUTER = (
    (r"(output_norm|.*\bnorm\.|.*(ln_f|norm_f|final_layer_?norm))", "final_norm"), (r"(output\b|lm_head|embed_out)", "unembedding"), (r".*(embd|embed|wte|wpe)", "embedding"),
)  # fmt: skip
_LAYER = re.compile(r"(?:^blk|(?:^|\.)(?:layers|h|blocks))\.(\d{1,6})\.")


@dataclass(frozen=True)
class Stored:
    """One tensor of the file. `suffix`: its name without the block it stands in."""

    name: str
    suffix: str
    layer: int | None
    shape: tuple[int, ...]
    type: str
    n_bytes: int

    @property
    def n_params(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """The tensors of one part, of all blocks of its group together."""

    key: str
    title: str
    tensors: tuple[Stored, ...]
    n_params: int = field(init=False)
    n_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_params", sum(tensor.n_params for tensor in self.tensors))
        object.__setattr__(self, "n_bytes", sum(tensor.n_bytes for tensor in self.tensors))

    @property
    def types(self) -> dict[str, int]:
        """Storage type -> values stored so, most first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.type] += tensor.n_params
        return dict(counts.most_common())

    def of_layer(self, layer: int | None) -> tuple[Stored, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.layer == layer)


@dataclass(frozen=True)
class BlockGroup:
    """Blocks that are alike: the same tensors of the same shapes."""

    layers: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def is_parallel(self) -> bool:
        """Attention and MLP read the same norm: there is no norm between them, and none after them."""
        keys = {part.key for part in self.parts}
        return "attention" in keys and bool(keys & {"mlp", "experts"}) and "norm1" in keys and not keys & {"norm2", "norm1_post", "norm2_post"}


@dataclass(frozen=True)
class Anatomy:
    """before and after: the parts outside the blocks. tied: the unembedding is the embedding's matrix."""

    before: tuple[Part, ...]
    groups: tuple[BlockGroup, ...]
    after: tuple[Part, ...]
    tied: bool

    @property
    def parts(self) -> list[tuple[BlockGroup | None, Part]]:
        """Every part with its group of blocks, in the order of computation."""
        return [*((None, part) for part in self.before), *((group, part) for group in self.groups for part in group.parts), *((None, part) for part in self.after)]


def take_apart(weights: Weights) -> Anatomy:
    """The parts of a model, from the headers of its file alone."""
    known = _canonical_parts(weights)
    outer: dict[str, list[Stored]] = {}
    blocks: dict[int, dict[str, list[Stored]]] = {}
    for name in weights.native_names:
        tensor = _stored(weights.lazy(name))
        if tensor.layer is None:
            outer.setdefault(known.get(name) or _first(_NATIVE_OUTER, name, "rest"), []).append(tensor)
        else:
            part = known.get(name) or _first(_NATIVE_BLOCK, tensor.suffix, "other")
            blocks.setdefault(tensor.layer, {}).setdefault(part, []).append(tensor)
    made = {key: Part(key, title, tuple(outer[key])) for key, title in OUTER_PARTS.items() if key in outer}
    tied = "unembedding" not in made
    before = tuple(made[key] for key in ("embedding",) if key in made)
    return Anatomy(before, tuple(_groups(blocks)), tuple(part for key, part in made.items() if key != "embedding"), tied)


def type_layers(part: Part) -> list[tuple[str, str, tuple[int, ...]]]:
    """Where the blocks of a part differ: (tensor without its block, storage type, layers stored so), tensors of one type left out."""
    by_suffix: dict[str, dict[str, list[int]]] = {}
    for tensor in part.tensors:
        if tensor.layer is not None:
            by_suffix.setdefault(tensor.suffix, {}).setdefault(tensor.type, []).append(tensor.layer)
    return [(suffix, kind, tuple(layers)) for suffix, kinds in by_suffix.items() if len(kinds) > 1 for kind, layers in kinds.items()]


def layer_ranges(layers: Iterable[int]) -> str:
    """0-3, 7, 9-11.

    >>> layer_ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _canonical_parts(weights: Weights) -> dict[str, str]:
    """Native name -> part, for tensors that have a canonical name."""
    known: dict[str, str] = {}
    for name in weights:
        plain = re.sub(r"^blocks\.\d+\.", "", name)
        part = _first(_CANONICAL, plain, "")
        for native in weights.lazy(name).native if part else ():
            known.setdefault(native, part)
    return known


def _stored(weight: Weight) -> Stored:
    match = _LAYER.search(weight.name)
    suffix = weight.name[match.end() :] if match else weight.name
    return Stored(weight.name, suffix, int(match[1]) if match else None, weight.shape, weight.dtype, weight.nbytes)


def _first(patterns: Sequence[tuple[str, str]], name: str, default: str) -> str:
    return next((part for pattern, part in patterns if re.match(pattern, name)), default)


def _groups(blocks: dict[int, dict[str, list[Stored]]]) -> list[BlockGroup]:
    """Blocks with equal tensors and shapes together, in the order of their first layer."""
    alike: dict[tuple[tuple[str, tuple[int, ...]], ...], list[int]] = {}
    for layer in sorted(blocks):
        alike.setdefault(tuple(sorted((tensor.suffix, tensor.shape) for tensors in blocks[layer].values() for tensor in tensors)), []).append(layer)
    groups = []
    for layers in alike.values():
        mixer = "state space" if any("ssm" in blocks[layer] for layer in layers) else ""
        parts = [
            Part(key, title.replace("attention", mixer or "attention"), tuple(tensor for layer in layers for tensor in blocks[layer].get(key, ())))
            for key, title in BLOCK_PARTS.items() if any(key in blocks[layer] for layer in layers)
        ]  # fmt: skip
        groups.append(BlockGroup(tuple(layers), tuple(parts)))
    return groups

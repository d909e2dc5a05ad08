"""ModelInfo: what is known of a model from its header alone, before any weight is read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelInfo:
    """Sizes and facts of one model; the same fields whichever engine runs it.

    `d_head` is the width of one query/key head, `d_head_v` that of one head's values and of z (0: the same). `d_mlp` is the hidden
    width of the MLP: of one expert where every layer has experts, of the one MLP of the first `n_dense_layers` where they have none.
    `d_kv_latent` is the width of what is cached for a token and layer by models that compress keys and values (MLA); 0: they do not.
    `n_experts` is 0 for a dense model. `weight_types` counts tensors per storage type, for example {"Q4_K": 12, "F32": 9}.
    """

    name: str
    source: str  # what was opened: a path or hub id
    engine: str  # "gguf" or "hf"
    architecture: str  # llama.cpp's or transformers' own name: llama, mistral, mixtral, qwen3, ...
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_experts: int = 0
    n_experts_used: int = 0
    n_dense_layers: int = 0  # of a model with experts: so many first layers have none
    d_head_v: int = 0
    d_kv_latent: int = 0
    sliding_window: int = 0  # 0: full attention
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    bos_id: int | None = None
    eos_id: int | None = None
    add_bos: bool = False
    quantization: str = ""  # the file's own name for it: F16, Q4_K_M, ... ; the dtype for HF
    n_params: int = 0
    n_bytes: int = 0  # size of the weights on disk
    weight_types: dict[str, int] = field(default_factory=dict)

    @property
    def is_moe(self) -> bool:
        return self.n_experts > 0

    @property
    def dims(self) -> dict[str, int]:
        """Sizes of the named axes that do not depend on the prompt."""
        return {
            "d_model": self.d_model,
            "head": self.n_heads,
            "kv_head": self.n_kv_heads,
            "d_head": self.d_head,
            "d_head_v": self.d_head_v or self.d_head,
            "d_mlp": self.d_mlp,
            "expert": self.n_experts,
            "k": self.n_experts_used,
            "d_vocab": self.d_vocab,
        }

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelInfo:
        """Build from `to_json` output; fields that a newer version added are ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})

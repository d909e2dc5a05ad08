"""What a GGUF file says about its model, checked before llama.cpp is allowed to see it.

llama.cpp aborts or overruns on crafted files, and the web process lists models: so both go through this module, pure Python.

    read_header(path)           -> GgufHeader: metadata, tensors (name, shape, type, place), nothing of the weights (gguf_format, gguf_split)
    model_info(path, header)    -> ModelInfo: sizes of the model, held against each other and against the tensors
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from backend.errors import LayerscopeError
from backend.files.ggml_types import FILE_TYPES
from backend.files.gguf_format import GgufHeader, StringArray, TensorInfo
from backend.files.gguf_split import read_header, whole_name
from backend.files.model_kinds import refuse_gguf
from backend.model_info import ModelInfo
from backend.weight_names import GGUF_NAMES

__all__ = ["GgufHeader", "StringArray", "TensorInfo", "model_info", "read_header"]

MAX_LAYERS, MAX_EXPERTS = 512, 1024  # llama.cpp's own (llama-hparams.h)
MAX_WIDTH, MAX_VOCAB = 1 << 20, 1 << 24

# Architectures whose graph takes for granted (GGML_ASSERT in src/models of llama.cpp 0.3.36, which ends the process) that keys and values
# are equally wide; in the first group RoPE also turns all of a head. Their projections are n_heads heads of that width and nothing else.
_ROTARY_IS_WHOLE = frozenset((
    "apertus", "arcee", "arctic", "baichuan", "chameleon", "codeshell", "cohere2moe", "dbrx", "deepseek", "dots1", "ernie4_5", "ernie4_5-moe",
    "exaone", "exaone4", "exaone-moe", "falcon", "granite", "granitemoe", "grok", "grovemoe", "hunyuan-moe", "internlm2", "jais2", "llama", "llama4", "maincoder",
    "mellum", "mistral3", "olmo", "olmo2", "olmoe", "orion", "pangu-embedded", "plamo", "qwen2", "qwen2moe", "qwen3",
    "qwen3moe", "seed_oss", "smallthinker", "smollm3", "starcoder2", "xverse",
))  # fmt: skip
_HEADS_ARE_PLAIN = _ROTARY_IS_WHOLE | frozenset((
    "bloom", "chatglm", "cohere2", "command-r", "glm4", "gpt2", "gptneox", "jais", "mpt", "phi2", "phi3", "phimoe", "qwen", "refact", "stablelm", "starcoder",
))  # fmt: skip
_ROPE_SCALING = ("none", "linear", "yarn", "longrope")


class _Sizes:
    """Typed access to the metadata of one architecture, each number held against its range."""

    def __init__(self, label: str, header: GgufHeader, architecture: str) -> None:
        self.label, self.metadata, self.prefix = label, header.metadata, architecture

    def refuse(self, what: str) -> NoReturn:
        raise LayerscopeError(f"{self.label} does not describe a model: {what}.")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """`key` without the architecture's prefix. A list with one value for each layer counts as its largest value.

        Where the tables know the architecture, all its values must be the same: the sites there hold the same sizes in every layer.
        """
        full = key if "." in key and key.split(".")[0] == "tokenizer" else f"{self.prefix}.{key}"
        value = self.metadata.get(full, default)
        if isinstance(value, np.ndarray | StringArray):
            value = self._one_for_all_layers(full, value)
        if value is None:
            self.refuse(f"{full} is missing")
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(f"{full} is {str(value)[:40]!r}, not a whole number")
        if not low <= value <= high:
            self.refuse(f"{full} is {value:,}, outside {low:,} to {high:,}")
        return value

    def _one_for_all_layers(self, key: str, values: np.ndarray[Any, Any] | StringArray) -> Any:
        """The value of every layer; the largest, where the architecture has no row in the tables and layers may differ."""
        if not isinstance(values, np.ndarray) or len(values) == 0:
            self.refuse(f"{key} is a list of {len(values)} {'numbers' if isinstance(values, np.ndarray) else 'texts'}, not a whole number")
        if self.prefix not in GGUF_NAMES:
            return values.max().item()
        other = int((values != values[0]).argmax())
        if values[other] != values[0]:
            self.refuse(f"{key} differs between layers ({values[0]} in layer 0, {values[other]} in layer {other}), which is not supported")
        return values[0].item()

    def real(self, key: str, default: float) -> float:
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            self.refuse(f"{self.prefix}.{key} is {str(value)[:40]!r}, not a positive number")
        return float(value)


def model_info(path: Path, header: GgufHeader) -> ModelInfo:
    """The model's sizes from its header, each held against its range, the others and the tensors.

    `architecture` is the file's general.architecture: mistral and mixtral files carry "llama".
    Raises LayerscopeError for what is no decoder, by name, and for sizes that cannot be true.
    """
    path = Path(path)
    metadata, tensors = header.metadata, header.tensors
    architecture = _language_model(path.name, metadata)
    size = _Sizes(path.name, header, architecture)
    n_blocks = size.integer("block_count", 1, MAX_LAYERS)
    known = architecture in GGUF_NAMES
    # Blocks that guess further tokens (multi-token prediction) are stored after those that a forward pass runs through.
    n_layers = n_blocks if known else n_blocks - size.integer("nextn_predict_layers", 0, n_blocks - 1, 0)
    d_model = size.integer("embedding_length", 1, MAX_WIDTH)
    # A model without attention (mamba, rwkv) has 0 heads, and one without an MLP a feed_forward_length of 0.
    n_heads = size.integer("attention.head_count", int(known), MAX_WIDTH)
    n_kv_heads = size.integer("attention.head_count_kv", int(known), MAX_WIDTH, n_heads) if n_heads else 0
    if n_kv_heads and n_heads % n_kv_heads:
        size.refuse(f"{n_heads} heads cannot share {n_kv_heads} key/value heads")
    if n_heads and f"{architecture}.attention.key_length" not in metadata and d_model % n_heads:
        size.refuse(f"an embedding_length of {d_model} cannot be divided among {n_heads} heads")
    d_head = size.integer("attention.key_length", 1, MAX_WIDTH, d_model // n_heads) if n_heads else 0
    d_head_v, d_kv_latent = size.integer("attention.value_length", int(known), MAX_WIDTH, d_head) if n_heads else 0, 0
    if f"{architecture}.attention.key_length_mla" in metadata:
        # Keys and values are cached as one narrow vector that all heads share; each head makes its own from it.
        d_kv_latent, n_kv_heads = d_head, n_heads
        d_head, d_head_v = (size.integer(f"attention.{kind}_length_mla", 1, MAX_WIDTH) for kind in ("key", "value"))
    n_experts = size.integer("expert_count", 0, MAX_EXPERTS, 0)
    d_mlp = size.integer("feed_forward_length", int(known), MAX_WIDTH, 4 * d_model)
    n_dense_layers = min(size.integer("leading_dense_block_count", 0, MAX_LAYERS, 0), n_layers) if n_experts else 0
    _check_heads(size, tensors, n_heads, n_kv_heads, d_head)
    _check_experts(size, n_experts)
    d_vocab = _vocabulary_size(size, tensors, d_model)
    _check_layers(size, tensors, n_blocks)
    model = str(metadata.get("tokenizer.ggml.model", ""))
    return ModelInfo(
        name=Path(whole_name(path)).stem,
        source=str(header.files[0]),
        engine="gguf",
        architecture=architecture,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_model=d_model,
        d_head=d_head,
        d_mlp=size.integer("expert_feed_forward_length", 1, MAX_WIDTH, d_mlp) if n_experts and not n_dense_layers else d_mlp,
        d_vocab=d_vocab,
        n_ctx=size.integer("context_length", 1, 1 << 31),
        n_experts=n_experts,
        n_experts_used=size.integer("expert_used_count", 1, n_experts) if n_experts else 0,
        n_dense_layers=n_dense_layers,
        d_head_v=d_head_v if d_head_v != d_head else 0,
        d_kv_latent=d_kv_latent,
        sliding_window=size.integer("attention.sliding_window", 0, 1 << 31, 0),
        norm_eps=size.real("attention.layer_norm_rms_epsilon", size.real("attention.layer_norm_epsilon", 1e-5)),
        rope_theta=size.real("rope.freq_base", 10000.0),
        bos_id=_token_id(size, "tokenizer.ggml.bos_token_id", d_vocab),
        eos_id=_token_id(size, "tokenizer.ggml.eos_token_id", d_vocab),
        # Without the key llama.cpp adds BOS for SentencePiece vocabularies; the engine asks llama.cpp itself once the model is open.
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", model == "llama")),
        quantization=_quantization(metadata, tensors),
        n_params=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        n_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        weight_types=dict(Counter(tensor.type_name for tensor in tensors.values())),
    )


def _language_model(label: str, metadata: dict[str, Any]) -> str:
    """The architecture's name, if this file is a whole model that generates text."""
    refuse_gguf(label, metadata)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise LayerscopeError(f"{label} does not describe a model: general.architecture is missing.")
    return architecture


def _vocabulary_size(size: _Sizes, tensors: dict[str, TensorInfo], d_model: int) -> int:
    """Rows of the embedding, which every per-token list of the tokenizer must match (llama.cpp reads them side by side)."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        size.refuse("it has no matrix token_embd.weight")
    d_vocab, width = embedding.shape
    if width != d_model:
        size.refuse(f"token_embd.weight has {width:,} columns, and embedding_length is {d_model:,}")
    if d_vocab > MAX_VOCAB:
        size.refuse(f"its vocabulary has {d_vocab:,} tokens, the limit is {MAX_VOCAB:,}")
    kinds: dict[str, Any] = {"tokens": StringArray, "scores": np.dtype("<f4"), "token_type": np.dtype("<i4")}
    for key, kind in kinds.items():
        values = size.metadata.get(f"tokenizer.ggml.{key}")
        if values is None:
            continue
        right = isinstance(values, StringArray) if kind is StringArray else isinstance(values, np.ndarray) and values.dtype == kind
        if not right:
            size.refuse(f"tokenizer.ggml.{key} has the wrong type")
        if len(values) != d_vocab:
            size.refuse(f"tokenizer.ggml.{key} has {len(values):,} entries, and the embedding has {d_vocab:,} rows")
    _check_tokens_differ(size)
    return d_vocab


def _check_tokens_differ(size: _Sizes) -> None:
    """No two tokens have one spelling: llama.cpp takes that for granted."""
    words = size.metadata.get("tokenizer.ggml.tokens")
    if words is None or len(set(words.raw)) == len(words):
        return
    first: dict[bytes, int] = {}
    for number, word in enumerate(words.raw):
        if word and first.setdefault(word, number) != number:  # empty ones get names of their own
            size.refuse(f"tokens {first[word]} and {number} of tokenizer.ggml.tokens are both {words[number][:40]!r}")


def _check_heads(size: _Sizes, tensors: dict[str, TensorInfo], n_heads: int, n_kv_heads: int, d_head: int) -> None:
    """Widths of heads and rotation that llama.cpp takes for granted, and the first layer's projections held against them."""
    if not n_heads:
        return
    rotated = d_head
    if f"{size.prefix}.rope.dimension_count" in size.metadata:
        rotated = size.integer("rope.dimension_count", 2, max(d_head, 2))
        if rotated % 2:
            size.refuse(f"{size.prefix}.rope.dimension_count is {rotated}, and RoPE turns pairs")
    scaling = size.metadata.get(f"{size.prefix}.rope.scaling.type", "none")
    if not isinstance(scaling, str) or scaling not in _ROPE_SCALING:
        size.refuse(f"{size.prefix}.rope.scaling.type is {str(scaling)[:40]!r}, and {', '.join(_ROPE_SCALING)} are known")
    d_value = size.integer("attention.value_length", 1, MAX_WIDTH, d_head)
    if size.prefix not in _HEADS_ARE_PLAIN:
        return
    if d_value != d_head:
        size.refuse(f"heads have {d_head} columns for keys and {d_value} for values, which {size.prefix} models cannot have")
    if size.prefix in _ROTARY_IS_WHOLE and rotated != d_head:
        size.refuse(f"{size.prefix}.rope.dimension_count is {rotated}, and {size.prefix} models turn all {d_head} columns of a head")
    q, kv = n_heads * d_head, n_kv_heads * d_head
    for name, rows in (("attn_q", q), ("attn_k", kv), ("attn_v", kv), ("attn_qkv", q + 2 * kv)):
        tensor = tensors.get(f"blk.0.{name}.weight")
        if tensor and tensor.shape[0] != rows:
            size.refuse(f"blk.0.{name}.weight has {tensor.shape[0]:,} rows, and {n_heads} heads with {n_kv_heads} key/value heads of {d_head} columns need {rows:,}")


def _check_experts(size: _Sizes, n_experts: int) -> None:
    """Counts of experts and groups that llama.cpp takes for granted."""
    size.integer("expert_used_count", 1 if n_experts else 0, n_experts, None if n_experts else 0)
    groups = size.integer("expert_group_count", 0, max(n_experts - 1, 0), 0)
    if groups > 1 and n_experts % groups:
        size.refuse(f"{n_experts} experts cannot be divided among {groups} groups")
    if groups > 1:
        size.integer("expert_group_used_count", 1, groups - 1)


def _check_layers(size: _Sizes, tensors: dict[str, TensorInfo], n_layers: int) -> None:
    """Every layer that block_count promises has tensors, and no other has."""
    parts = (name.split(".") for name in tensors if name.startswith("blk."))
    present = {int(part[1]) for part in parts if part[1].isdecimal()}
    wrong = present ^ set(range(n_layers))
    if wrong:
        has = "tensors" if min(wrong) in present else "no tensor"
        size.refuse(f"it has {has} of layer {min(wrong)}, and {size.prefix}.block_count is {n_layers}")


def _token_id(size: _Sizes, key: str, d_vocab: int) -> int | None:
    if size.metadata.get(key) in (None, 0xFFFFFFFF):
        return None
    return size.integer(key, 0, d_vocab - 1)


def _quantization(metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> str:
    """The file's own name for its quantization, else the type that stores most of its bytes."""
    named = metadata.get("general.file_type")
    if isinstance(named, int) and named in FILE_TYPES:
        return FILE_TYPES[named]
    n_bytes: Counter[str] = Counter()
    for tensor in tensors.values():
        n_bytes[tensor.type_name] += tensor.nbytes
    return n_bytes.most_common(1)[0][0]

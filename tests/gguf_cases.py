"""Malformed GGUF files, made to measure: the handcrafted cases of llama.cpp's own tests/test-gguf.cpp (own code, same names) and more.

A file is built from parts that may each lie. `CASES` maps a case's name to (bytes, whether llama.cpp's parser accepts such a file).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64, N_TYPES = range(14)
T_F32, T_F16, T_Q4_K, T_I8 = 0, 1, 12, 24
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", (len(raw) if length is None else length) & (1 << 64) - 1) + raw


def pair(key: str | bytes, kind: int, value: Any, key_length: int | None = None) -> bytes:
    """One key and its value. For ARR the value is (item type, items[, claimed count])."""
    return string(key, key_length) + struct.pack("<I", kind) + _value(kind, value)


def _value(kind: int, value: Any) -> bytes:
    if isinstance(value, bytes) and kind != STR:
        return value
    if kind == STR:
        return string(value)
    if kind == ARR:
        item, items, *claimed = value
        return struct.pack("<IQ", item, claimed[0] if claimed else len(items)) + b"".join(_value(item, one) for one in items)
    return struct.pack("<" + _CODES[kind], value)


@dataclass
class Tensor:
    """A tensor's declaration; `ne` fastest axis first. `offset` None: where it belongs."""

    name: str | bytes
    ne: Sequence[int]
    type_id: int = T_F32
    offset: int | None = None
    n_dims: int | None = None
    name_length: int | None = None

    def nbytes(self) -> int:
        n = 1
        for size in self.ne:
            n *= size
        return {T_F16: 2 * n, T_Q4_K: n // 256 * 144, T_I8: n}.get(self.type_id, 4 * n)


@dataclass
class File:
    magic: bytes = b"GGUF"
    version: int = 3
    pairs: list[bytes] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    n_pairs: int | None = None
    n_tensors: int | None = None
    alignment: int = 32
    data: Callable[[int], bytes] = bytes
    cut: int = 0

    def build(self) -> bytes:
        out = self.magic + struct.pack("<I", self.version)
        out += struct.pack("<qq", len(self.tensors) if self.n_tensors is None else self.n_tensors, len(self.pairs) if self.n_pairs is None else self.n_pairs)
        out += b"".join(self.pairs)
        at = end = 0
        for tensor in self.tensors:
            offset = at if tensor.offset is None else tensor.offset
            out += string(tensor.name, tensor.name_length) + struct.pack("<I", len(tensor.ne) if tensor.n_dims is None else tensor.n_dims)
            out += b"".join(struct.pack("<Q", size & (1 << 64) - 1) for size in tensor.ne)
            out += struct.pack("<IQ", tensor.type_id, offset & (1 << 64) - 1)
            end = at + max(tensor.nbytes(), 0)
            at = -(-end // self.alignment) * self.alignment
        if self.tensors:
            out += bytes(-len(out) % self.alignment) + self.data(min(end, 1 << 20))
        return out[: len(out) - self.cut]


SOME_PAIRS = [pair("a.u32", U32, 7), pair("a.text", STR, "hello"), pair("a.list", ARR, (F32, [1.0, 2.5])), pair("a.words", ARR, (STR, ["x", "yz"])), pair("a.flag", BOOL, True)]
A, B = Tensor("a", (33, 2)), Tensor("b", (64,))


def _alignment(value: int, kind: int = U32) -> list[bytes]:
    return [pair("general.alignment", kind, value)]


def _handcrafted() -> dict[str, tuple[bytes, bool]]:
    good, bad, huge = True, False, 0x7FFFFFFFFFFFFFC0
    cases: dict[str, tuple[File, bool]] = {
        "HEADER_BAD_MAGIC": (File(magic=b"FUGG"), bad),
        "HEADER_BAD_VERSION_0": (File(version=0), bad),
        "HEADER_BAD_VERSION_1": (File(version=1), bad),
        "HEADER_BAD_VERSION_FUTURE": (File(version=4), bad),
        "HEADER_BAD_N_TENSORS": (File(n_tensors=-1), bad),
        "HEADER_BAD_N_KV": (File(n_pairs=-1), bad),
        "HEADER_EMPTY": (File(), good),
        "KV_BAD_KEY_SIZE": (File(pairs=[pair("key", U32, 1, key_length=-1)]), bad),
        "KV_EMPTY_KEY": (File(pairs=[pair("", U32, 1)]), bad),
        "KV_BAD_TYPE": (File(pairs=[pair("key", N_TYPES, b"\0" * 8)]), bad),
        "KV_DUPLICATE_KEY": (File(pairs=SOME_PAIRS + SOME_PAIRS[:1]), bad),
        "KV_BAD_ALIGN": (File(pairs=_alignment(13)), bad),
        "KV_WRONG_TYPE_ALIGN": (File(pairs=_alignment(32, I32)), bad),
        "KV_SUCCESS": (File(pairs=SOME_PAIRS), good),
        "TENSORS_BAD_NAME_SIZE": (File(tensors=[Tensor("n" * 64, (4,))]), bad),
        "TENSORS_BAD_N_DIMS": (File(tensors=[Tensor("a", (4, 1, 1, 1, 1))]), bad),
        "TENSORS_BAD_SHAPE": (File(tensors=[Tensor("a", (-1,))]), bad),
        "TENSORS_NE_TOO_BIG": (File(tensors=[Tensor("a", (1 << 32, 1 << 32))]), bad),
        "TENSORS_NBYTES_TOO_BIG": (File(tensors=[Tensor("a", (1 << 62,))]), bad),
        "TENSORS_BAD_TYPE": (File(tensors=[Tensor("a", (4,), type_id=42)]), bad),
        "TENSORS_BAD_OFFSET": (File(tensors=[Tensor("a", (4,), offset=-1)]), bad),
        "TENSORS_DUPLICATE_NAME": (File(tensors=[A, A]), bad),
        "TENSORS_BAD_ALIGN": (File(tensors=[A, B], alignment=13), bad),
        "TENSORS_INCONSISTENT_ALIGN": (File(pairs=_alignment(64), tensors=[A, B], alignment=1), bad),
        # llama.cpp takes a tensor without values; no model has one, and older releases divided by the zero. Layerscope refuses it.
        "TENSORS_ZERO_DIM": (File(tensors=[Tensor("a", (4, 0))]), bad),
        "TENSORS_SUCCESS": (File(tensors=[A, B]), good),
        "TENSORS_CUSTOM_ALIGN": (File(pairs=_alignment(1), tensors=[A, B], alignment=1), good),
        "DATA_NOT_ENOUGH_DATA": (File(pairs=SOME_PAIRS, tensors=[A, B], cut=1), bad),
        "DATA_BAD_ALIGN": (File(pairs=_alignment(13), tensors=[A, B], alignment=13), bad),
        "DATA_INCONSISTENT_ALIGN": (File(pairs=_alignment(1), tensors=[A, B], alignment=32), bad),
        "DATA_MEM_SIZE_OVERFLOW": (File(tensors=[Tensor("a", (huge,), T_I8, 0), Tensor("b", (huge,), T_I8, huge)], data=lambda n: bytes(32)), bad),
        "DATA_SUCCESS": (File(pairs=SOME_PAIRS, tensors=[A, B], data=lambda n: bytes(range(256)) * (n // 256 + 1)), good),
        "DATA_CUSTOM_ALIGN": (File(pairs=[*SOME_PAIRS, *_alignment(1)], tensors=[A, B], alignment=1), good),
    }  # fmt: skip
    return {name: (file.build(), accepted) for name, (file, accepted) in cases.items()}


def _nested(depth: int) -> bytes:
    return pair("key", ARR, struct.pack("<IQ", ARR, 1) * depth + struct.pack("<IQ", U8, 0))


def _beyond() -> dict[str, bytes]:
    """What crashed, hung or misled other readers; all to be refused."""
    header = struct.pack("<4sIqq", b"GGUF", 3, 0, 1)
    files = {
        "alignment_2_to_31": File(pairs=_alignment(1 << 31)),
        "alignment_0": File(pairs=_alignment(0)),
        "array_of_2_to_63_bytes": File(pairs=[pair("key", ARR, (U8, [], 1 << 63))]),
        "array_of_2_to_63_strings": File(pairs=[pair("key", ARR, (STR, [], 1 << 63))]),
        "array_of_2_to_61_u64": File(pairs=[pair("key", ARR, (U64, [], 1 << 61))]),
        "array_of_unknown_type": File(pairs=[pair("key", ARR, struct.pack("<IQ", 99, 1))]),
        "arrays_nested_5000_deep": File(pairs=[_nested(5000)]),
        "string_longer_than_the_file": File(pairs=[string("key") + struct.pack("<I", STR) + string("short", 1 << 40)]),
        "string_of_11_MB": File(pairs=[pair("key", STR, b"x" * (11 << 20))]),
        "n_dims_0": File(tensors=[Tensor("a", ())]),
        "n_dims_2_to_32": File(tensors=[Tensor("a", (4,), n_dims=0xFFFFFFFF)]),
        "product_that_wraps_to_4": File(tensors=[Tensor("a", (4194305, 4194305, 211106198978564))]),
        "row_that_is_no_whole_block": File(tensors=[Tensor("a", (255, 2), T_Q4_K)]),
        "name_not_utf8": File(tensors=[Tensor(b"\xff\xfe", (4,))]),
        "name_longer_than_the_file": File(tensors=[Tensor("a", (4,), name_length=1 << 62)]),
        "key_not_utf8": File(pairs=[pair(b"\xff\xfe", U32, 1)]),
        "tensors_that_overlap": File(tensors=[A, Tensor("b", (64,), offset=0)]),
        "offset_2_to_63": File(tensors=[Tensor("a", (4,), offset=1 << 63)]),
        "a_billion_tensors": File(n_tensors=1_000_000_000),
        "a_million_keys": File(n_pairs=1_000_000),
        "big_endian": File(version=0x03000000),
    }
    return {name: file.build() for name, file in files.items()} | {"empty": b"", "only_magic": b"GGUF", "key_promised": header}


CASES = _handcrafted()
BEYOND = _beyond()


def model_pairs(**changes: Any) -> list[bytes]:
    """Metadata of a model that fits `model_tensors`; a change replaces (kind, value), None leaves the key out."""
    words = [f"t{i}" for i in range(16)]
    pairs: dict[str, tuple[int, Any] | None] = {
        "general.architecture": (STR, "llama"),
        "llama.block_count": (U32, 2),
        "llama.embedding_length": (U32, 8),
        "llama.context_length": (U32, 64),
        "llama.feed_forward_length": (U32, 12),
        "llama.attention.head_count": (U32, 4),
        "llama.attention.head_count_kv": (U32, 2),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "tokenizer.ggml.model": (STR, "gpt2"),
        "tokenizer.ggml.tokens": (ARR, (STR, words)),
        "tokenizer.ggml.token_type": (ARR, (I32, [1] * 16)),
        "tokenizer.ggml.bos_token_id": (U32, 0),
    }
    pairs |= {key.replace("__", "."): value for key, value in changes.items()}
    return [pair(key, *value) for key, value in pairs.items() if value is not None]


def model_tensors(n_layers: int = 2) -> list[Tensor]:
    blocks = [Tensor(f"blk.{i}.{name}.weight", ne) for i in range(n_layers) for name, ne in (("attn_norm", (8,)), ("ffn_down", (12, 8)))]
    return [Tensor("token_embd.weight", (8, 16)), *blocks, Tensor("output_norm.weight", (8,))]


def model_file(tensors: list[Tensor] | None = None, **changes: Any) -> bytes:
    """A file whose header describes a small llama; keys are written with __ for the dots."""
    return File(pairs=model_pairs(**changes), tensors=model_tensors() if tensors is None else tensors).build()

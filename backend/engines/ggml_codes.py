"""The codes of single entries inside ggml's blocks: which bits are an entry's own, and how a block is rewritten so that entries get other values.

No format is written down here. The bits of a block are flipped one by one in blocks of random bytes, and ggml's own to_float says what
becomes of that: a bit whose flip changes one entry and never another is a bit of that entry's code. What is left are scales, minima and
codebook numbers, which entries share.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend.engines.ggml import F16, F32, can_dequantize, dequantize, quantize, type_traits
from backend.files.ggml_types import GGML_TYPES

Bytes = NDArray[np.uint8]

_BF16 = next(number for number, (name, _, _) in GGML_TYPES.items() if name == "BF16")
_LARGEST = {F32: float(np.finfo(np.float32).max), F16: 65504.0, _BF16: float(np.uint32(0x7F7F0000).view(np.float32))}
_LIKENESS = 1e-3  # of levels between entries and blocks: far below the distance of two levels, far above rounding
_PROBES, _DRAWN = 24, 6000  # random blocks to look at, and those that they are chosen from


@dataclass(frozen=True)
class Codes:
    """Own codes of the entries of a block.

    bits     (entry, k) int64: where in the block bit k of an entry's code is, byte by byte and the least significant bit of a byte first;
             k = 0 is the bit whose flip changes the value least
    levels   (code,) float64: the value of each code, between that of `lowest`, 0, and that of `highest`, 1; the same in every entry
    """

    bits: NDArray[np.int64]
    levels: NDArray[np.float64]
    lowest: int
    highest: int

    @property
    def n_bits(self) -> int:
        return self.bits.shape[1]


def code_bits(type_id: int) -> int:
    """Bits of the code of one entry: all of a float, 0 where entries have none of their own."""
    _, block, n_bytes = type_traits(type_id)
    if block == 1:
        return 8 * n_bytes if can_dequantize(type_id) else 0
    codes = codes_of(type_id)
    return codes.n_bits if codes else 0


def values_of(type_id: int, blocks: Bytes) -> NDArray[np.float32]:
    """What blocks (block, byte) stand for: (block, entry)."""
    n = len(blocks) * type_traits(type_id)[1]
    return dequantize(type_id, np.ascontiguousarray(blocks).reshape(-1), n).reshape(len(blocks), -1)


def flipped(type_id: int, blocks: Bytes, block: NDArray[np.int64], entry: NDArray[np.int64], bit: NDArray[np.int64]) -> Bytes:
    """`blocks` with one bit of the code of each of these entries flipped; all (n,), each `bit` below code_bits."""
    where = bit if type_traits(type_id)[1] == 1 else _own(type_id).bits[entry, bit]
    out = blocks.copy()
    np.bitwise_xor.at(out, (block, where // 8), (1 << (where % 8)).astype(np.uint8))
    return out


def rewritten(type_id: int, blocks: Bytes, block: NDArray[np.int64], entry: NDArray[np.int64], wanted: NDArray[np.float32]) -> Bytes:
    """`blocks` (block, byte) with entries as near to finite `wanted` (n,) as the format gets them.

    A quantized entry gets the best of its own codes, which changes nothing else. Where a wanted value is beyond all of them, or the type has none,
    the block is quantized anew by ggml, and is kept so if the entries come nearer to what was wanted.
    """
    if type_id in _LARGEST:
        limit = _LARGEST[type_id]
        out = blocks.copy()
        out[block] = quantize(type_id, np.clip(wanted, -limit, limit)[:, None])
        return out
    before, codes = values_of(type_id, blocks), codes_of(type_id)
    moved = before[block, entry] != wanted  # an entry that has its value keeps its code: some formats have two codes for 0
    if codes is None:
        coded, beyond = blocks, moved
    else:
        coded, out_of_reach = _coded(type_id, codes, blocks, block[moved], entry[moved], wanted[moved])
        beyond = np.zeros(len(moved), bool)
        beyond[moved] = out_of_reach
    redo = np.flatnonzero(np.bincount(block[beyond], minlength=len(blocks)))
    redo = redo[np.isfinite(before[redo]).all(1)]
    if not len(redo):
        return coded
    target = before.copy()
    target[block, entry] = wanted
    anew, out = quantize(type_id, target[redo]), coded.copy()
    out[redo] = anew
    better = _errors(type_id, out, block, entry, wanted) < _errors(type_id, coded, block, entry, wanted)
    return np.where(better[:, None], out, coded)


def _errors(type_id: int, blocks: Bytes, block: NDArray[np.int64], entry: NDArray[np.int64], wanted: NDArray[np.float32]) -> NDArray[np.float64]:
    """For each block, how far its named entries are from what was wanted, summed."""
    errors = np.zeros(len(blocks))
    np.add.at(errors, block, np.abs(values_of(type_id, blocks)[block, entry].astype(np.float64) - wanted))
    return errors


def _coded(type_id: int, codes: Codes, blocks: Bytes, block: NDArray[np.int64], entry: NDArray[np.int64],
           wanted: NDArray[np.float32]) -> tuple[Bytes, NDArray[np.bool_]]:  # fmt: skip
    """`blocks` with the nearest code for each entry, scales kept; and whether the wanted value is more than half a step beyond the outermost code.

    A code of one bit is a sign: there everything that is not one of its two values is beyond.
    """
    low, high = (values_of(type_id, _all_set(codes.bits, blocks, code))[block, entry].astype(np.float64) for code in (codes.lowest, codes.highest))
    flat = (high == low) | ~np.isfinite(high - low)
    level = np.where(flat, 0.0, (wanted - low) / np.where(flat, 1.0, high - low))
    order = np.argsort(codes.levels, kind="stable")
    levels = codes.levels[order]
    code = order[np.searchsorted((levels[1:] + levels[:-1]) / 2, level)]
    margin = (levels[1] - levels[0]) / 2, (levels[-1] - levels[-2]) / 2
    if codes.n_bits == 1:
        beyond = np.abs(level - codes.levels[code]) > _LIKENESS
    else:
        beyond = (level < -margin[0]) | (level > 1 + margin[1])
    unpacked = np.unpackbits(blocks, axis=1, bitorder="little")
    for k in range(codes.n_bits):
        where = codes.bits[entry[~flat], k]
        unpacked[block[~flat], where] = code[~flat] >> k & 1
    return np.packbits(unpacked, axis=1, bitorder="little"), beyond | flat


def _all_set(bits: NDArray[np.int64], blocks: Bytes, code: int) -> Bytes:
    """`blocks` with the same code in every entry; bits as in Codes."""
    unpacked = np.unpackbits(blocks, axis=1, bitorder="little")
    for k in range(bits.shape[1]):
        unpacked[:, bits[:, k]] = code >> k & 1
    return np.packbits(unpacked, axis=1, bitorder="little")


def _own(type_id: int) -> Codes:
    codes = codes_of(type_id)
    assert codes is not None, "a bit was checked against code_bits"
    return codes


@functools.cache
def codes_of(type_id: int) -> Codes | None:
    """The own codes of a quantized type's entries; None where they have none, or where their values are no multiple of common levels."""
    probes = _probes(type_id)
    owned = _own_bits(type_id, probes)
    counts = {len(bits) for bits in owned}
    if len(counts) != 1 or 0 in counts:
        return None
    bits = _by_significance(type_id, np.array(owned, np.int64), probes)
    values = _of_every_code(type_id, bits, probes)
    span = np.ptp(values, axis=0)
    seen = span > _LIKENESS * np.abs(values).max(0)  # not where a large minimum swallows the differences
    first = tuple(np.argwhere(seen)[0])
    lowest, highest = int(values[(slice(None), *first)].argmin()), int(values[(slice(None), *first)].argmax())
    levels = ((values - values[lowest]) / np.where(seen, values[highest] - values[lowest], 1.0))[:, seen]
    if not np.allclose(levels, levels[:, :1], rtol=0, atol=_LIKENESS):
        return None
    return Codes(bits, np.median(levels, axis=1), lowest, highest)


def _probes(type_id: int) -> Bytes:
    """Blocks of random bytes whose values are ordinary numbers and differ."""
    _, block, n_bytes = type_traits(type_id)
    drawn = np.random.default_rng(0).integers(0, 256, (_DRAWN, n_bytes), np.uint8)
    values = values_of(type_id, drawn).astype(np.float64)
    with np.errstate(invalid="ignore"):
        largest, spread = np.abs(values).max(1), np.abs(values - values.mean(1, keepdims=True)).max(1)
        fit = np.isfinite(largest) & (largest > 1e-3) & (largest < 1e3) & (spread > 1e-2 * largest)
    return drawn[fit][:_PROBES]


def _own_bits(type_id: int, probes: Bytes) -> list[list[int]]:
    """For each entry the bits that change it, and no other entry of any probe."""
    n_bits = 8 * probes.shape[1]
    changed = np.zeros((n_bits, type_traits(type_id)[1]), bool)
    flips = np.packbits(np.eye(n_bits, dtype=np.uint8), axis=1, bitorder="little")
    for probe in probes:
        changed |= values_of(type_id, flips ^ probe) != values_of(type_id, probe[None])
    alone = changed.sum(1) == 1
    owned: list[list[int]] = [[] for _ in range(changed.shape[1])]
    for bit in np.flatnonzero(alone):
        owned[int(changed[bit].argmax())].append(int(bit))
    return owned


def _of_every_code(type_id: int, bits: NDArray[np.int64], probes: Bytes) -> NDArray[np.float64]:
    """What each code means in each entry, (code, probe, entry)."""
    return np.stack([values_of(type_id, _all_set(bits, probes, code)) for code in range(1 << bits.shape[1])]).astype(np.float64)


def _by_significance(type_id: int, bits: NDArray[np.int64], probes: Bytes) -> NDArray[np.int64]:
    """Each entry's bits in the order of what their flip changes, the least first."""
    values, codes = _of_every_code(type_id, bits, probes), np.arange(1 << bits.shape[1])
    size = np.abs(values).max((0, 2), keepdims=True)
    change = np.stack([(np.abs(values - values[codes ^ (1 << k)]) / size).mean((0, 1)) for k in range(bits.shape[1])], axis=1)
    return np.take_along_axis(bits, np.argsort(change, axis=1, kind="stable"), axis=1)

"""How long the values of llama.cpp's nodes stay where they are, and so at how few nodes its computation must be stopped to read them.

A stop costs llama.cpp a fresh start of its threads and Python a call: 195 of them, at all standard sites of 16 layers, took 4 to 8 % of a decode
of 256 tokens on two cores, and the 98 that are left 1 %. ggml gives a node's memory to others only when the last node that takes it has been computed
(ggml-alloc.c: `ggml_gallocr_alloc_graph_impl` counts children and views), which may itself be computed in their place. So a node may be read at
any later stop before that last one, or there where it is a matrix product, unless a node that is a view of it writes into it before.

    Lifetimes.note(address)    for every node of a pass, in the order of execution (`Watch.note`)
    Lifetimes.stops(wanted)    the nodes to stop at, given those whose values are wanted
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from backend.engines.ggml import NAME_OFFSET, OP_OFFSET, Tensor, op_name

_SHOWS_ONLY = frozenset({"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})  # ops that compute nothing: a view of what is there
_NEVER_IN_PLACE = frozenset({"MUL_MAT", "MUL_MAT_ID"})

Key = tuple[bytes, int]  # name and op of a node


def key_of(address: int) -> Key:
    """Two reads of memory: this is asked for every node of every pass."""
    return ctypes.string_at(address + NAME_OFFSET), ctypes.c_int.from_address(address + OP_OFFSET).value


def overwrites(address: int, other: int) -> bool:
    """Whether a node is computed into memory of another one."""
    node = Tensor.from_address(address)
    (begin, end), (other_begin, other_end) = _extent(node), _extent(Tensor.from_address(other))
    return op_name(node.op) not in _SHOWS_ONLY and begin < other_end and other_begin < end


class Lifetimes:
    """The nodes of a graph in the order of execution, and of each the last one at which its values can still be read."""

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self._owners: list[int] = []  # address of the tensor whose memory the node's values lie in: itself, or what it is a view of
        self._last_use: dict[int, int] = {}  # by owner
        self._writes: dict[int, list[int]] = {}  # by owner, nodes that write into it after it was made: ggml's ops "in place"

    def note(self, address: int) -> None:
        """Note a node of the pass. Its tensors need not be computed, nor have memory, yet."""
        tensor, at = Tensor.from_address(address), len(self.keys)
        self.keys.append(key_of(address))
        owner = _owner(tensor, address)
        self._owners.append(owner)
        if owner != address and op_name(tensor.op) not in _SHOWS_ONLY:
            self._writes.setdefault(owner, []).append(at)
        for source in tensor.src:
            if source:
                self._last_use[_owner(source.contents, ctypes.addressof(source.contents))] = at

    def has(self, at: int, key: Key) -> bool:
        """Whether node `at` of the pass is the one called so."""
        return at < len(self.keys) and self.keys[at] == key

    def until(self, at: int) -> int:
        """The last node after which the values of node `at` are what they were: the one before whatever may take their memory."""
        owner = self._owners[at]
        written = next((write for write in self._writes.get(owner, ()) if write > at), len(self.keys))
        used = self._last_use.get(owner, at)
        kept = used if op_name(self.keys[used][1]) in _NEVER_IN_PLACE else used - 1
        return max(at, min(kept, written - 1))

    def stops(self, wanted: Iterable[int]) -> frozenset[int]:
        """The fewest of the `wanted` nodes (ascending) to stop at so that each is read in its lifetime: itself, or a later one."""
        chosen: list[int] = []
        last, limit = -1, len(self.keys)
        for at in wanted:
            if at > limit:
                chosen.append(last)
                limit = len(self.keys)
            last, limit = at, min(limit, self.until(at))
        return frozenset([*chosen, last] if last >= 0 else ())


def _owner(tensor: Tensor, address: int) -> int:
    return ctypes.addressof(tensor.view_src.contents) if tensor.view_src else address


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First address, and the one after the last."""
    begin = tensor.data or 0
    return begin, begin + max(size * step for size, step in zip(tensor.ne, tensor.nb, strict=True))

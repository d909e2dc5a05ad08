"""llama.cpp's graph as it is executed: every node that the scheduler asks about in one decode, its sources found by their address.

Names are ambiguous (Qcur stands for three nodes), so the edges come from the `src` pointers: the tensors of one graph live side by
side until the next one is built, and an address names a tensor. What no pointer tells is the way through the key/value cache:
SET_ROWS writes into it, a view reads it later. Those edges are `after`.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from backend.engines.ggml import Tensor, buffer_name, op_description, op_name, type_traits
from backend.engines.gguf_graph import Place, SeenNode, Where
from backend.files.ggml_types import GGML_TYPES
from backend.reports.model_graph import GraphNode, Kind

EDGES = "Edges are the source pointers of the nodes that llama.cpp's scheduler ran; dashed ones lead through memory that a node wrote and a later one reads."

# ops that compute nothing: the values of their source in another shape
_VIEWS = ("VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE")
_DESCRIBED = ("UNARY", "GLU")
_COPY = re.compile(r"[^#]+#(.+)#\d+")  # what the scheduler calls a tensor that it moves to another backend: backend#name#n


class Recorder:
    """Notes nodes in the order of execution. `weights`: the names of the file's tensors."""

    def __init__(self, weights: Collection[str], n_layers: int) -> None:
        self.nodes: list[GraphNode] = []
        self._weights, self._n_layers = frozenset(weights), n_layers
        self._ids: dict[int, int] = {}  # address of a tensor -> id
        self._last: dict[str, int] = {}  # name -> id of the last node so called
        self._writer: dict[int, int] = {}  # address of the tensor that owns memory -> id of the last node that wrote into it
        self._seen: list[tuple[int, SeenNode]] = []

    def note(self, address: int) -> None:
        """Add the node at `address`, and the memory among its sources that was not seen before."""
        tensor = Tensor.from_address(address)
        op = op_name(tensor.op)
        pointers = [_address(source) for source in tensor.src if source]
        sources = tuple(self._id_of(at) for at in pointers)
        view = op in _VIEWS
        detail = op_description(tensor) if op in _DESCRIBED else ""
        after = self._written(pointers)
        self._add(address, tensor, "op", op, sources, view=view, detail=detail, after=tuple(dict.fromkeys(i for i in after if i not in sources)))
        self._seen.append((len(self.nodes) - 1, SeenNode.of(tensor)))
        if tensor.view_src and not view:
            self._writer[_address(tensor.view_src)] = len(self.nodes) - 1

    def with_sites(self, places: Mapping[Where, Place]) -> tuple[GraphNode, ...]:
        """The nodes, each with its layer and the sites that a capture reads at it."""
        sites: dict[int, list[Where]] = {}
        for where, place in places.items():
            fits = [i for i, seen in self._seen if seen.op == place.op and (place.weight in seen.operands if place.weight else seen.name == place.name)]
            if fits:
                sites.setdefault(fits[-1], []).append(where)
        self._settle_layers({i for i, wheres in sites.items() if any(site == "resid_post" for site, _ in wheres)})
        return tuple(replace(node, sites=tuple(sites.get(node.id, ()))) for node in self.nodes)

    def _id_of(self, address: int) -> int:
        """A node that was noted; else memory, or a copy from another backend, which is noted now."""
        if address not in self._ids:
            tensor = Tensor.from_address(address)
            name = _name(tensor)
            copied = _COPY.fullmatch(name)
            original = self._last.get(copied[1]) if copied else None
            if original is not None:
                self._add(address, tensor, "copy", "COPY", (original,))
            else:
                kind: Kind = "weight" if name in self._weights else "cache" if name.startswith("cache_") else "input"
                self._add(address, tensor, kind, "", ())
        return self._ids[address]

    def _add(self, address: int, tensor: Tensor, kind: Kind, op: str, sources: tuple[int, ...], *, after: tuple[int, ...] = (), view: bool = False,
             detail: str = "") -> None:  # fmt: skip
        name, number = _name(tensor), len(self.nodes)
        node = GraphNode(number, kind, name, op, _shape(tensor), _type(tensor), sources, after, self._layer(name, sources), buffer_name(tensor), detail, view)
        self._ids[address] = self._last[name] = number
        self.nodes.append(node)

    def _written(self, pointers: list[int]) -> list[int]:
        """The nodes that wrote into the memory of these sources after the sources themselves came to be."""
        found = []
        for at in pointers:
            root = Tensor.from_address(at).view_src
            writer = self._writer.get(_address(root) if root else at)
            if writer is not None and writer > self._ids[at]:
                found.append(writer)
        return found

    def _layer(self, name: str, sources: tuple[int, ...]) -> int | None:
        """From the name, else that of its weight, else, if llama.cpp gave it no name at all, the last of its sources'."""
        named, layer = layer_of(name)
        if layer is not None:
            return layer if layer < self._n_layers else None
        taken = [self.nodes[i] for i in sources]
        by_weight = [node.layer for node in taken if node.kind == "weight" and node.layer is not None]
        if by_weight or named:
            return max(by_weight, default=None)
        return max((node.layer for node in taken if node.layer is not None), default=None)

    def _settle_layers(self, ends: set[int]) -> None:
        """What the names leave open. `ends`: the last node of each block.

        Some norms inside a block are named as if they were outside: what comes from a layer and goes to that layer alone belongs to it.
        A node without a name that takes the end of a block and goes to the next block alone belongs to that one.
        """
        goes_to: dict[int, set[int | None]] = {}
        for node in reversed(self.nodes):
            layers = goes_to.get(node.id, set())
            only = next(iter(layers)) if len(layers) == 1 else None
            inside = node.layer is None and only in (self.nodes[i].layer for i in node.sources)
            begins = node.layer is not None and not layer_of(node.name)[0] and only == node.layer + 1 and bool(ends & set(node.sources))
            if node.kind == "op" and only is not None and (inside or begins):
                node = self.nodes[node.id] = replace(node, layer=only)
            for source in node.sources:
                goes_to.setdefault(source, set()).add(node.layer)


def layer_of(name: str) -> tuple[bool, int | None]:
    """Whether the name says where a node belongs, and the layer (None: outside the blocks).

    >>> layer_of("kq-3"), layer_of("Kcur-3 (view)"), layer_of("blk.3.attn_q.weight"), layer_of("cache_k_l3"), layer_of("result_norm"), layer_of("node_40")
    ((True, 3), (True, 3), (True, 3), (True, 3), (True, None), (False, None))
    """
    plain = re.sub(r"( \([a-z]+\))+$", "", name)
    match = re.match(r"blk\.(\d{1,6})\.", plain) or re.fullmatch(r"cache_.*_l(\d{1,6})", plain) or re.fullmatch(r".+-(\d{1,6})", plain)
    if match:
        return True, int(match[1])
    return bool(plain) and not re.fullmatch(r"(node|leaf)_\d+", plain), None


def _name(tensor: Tensor) -> str:
    return tensor.name.decode("utf-8", "replace")


def _address(pointer: object) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """NumPy's order, without the leading axes of length 1 that ggml adds."""
    sizes = tuple(tensor.ne)[::-1]
    while len(sizes) > 1 and sizes[0] == 1:
        sizes = sizes[1:]
    return sizes


def _type(tensor: Tensor) -> str:
    return GGML_TYPES[tensor.type][0] if tensor.type in GGML_TYPES else type_traits(tensor.type)[0]

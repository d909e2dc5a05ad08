"""llama.cpp's graph as sites: where each site is computed, and the callback that stops there.

    find_places(...)   the table of an architecture looked up in the graph that the model really has
    Watch              llama.cpp's scheduler callback and abort callback, with Python's exceptions kept out of C

llama.cpp calls back twice for a node. With ask=True, for every node up to the next wanted one and before any of these runs: whether we
want it. With ask=False, once the wanted node is computed and before anything that depends on it: what is written then is what follows.
What is only read may wait for a later stop (`backend.engines.gguf_lifetimes`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from backend.engines.ggml import F32, Tensor, op_name, scale_of_soft_max
from backend.engines.gguf_lifetimes import Key, Lifetimes, key_of, overwrites
from backend.engines.gguf_sites import Architecture, Node
from backend.errors import LayerscopeError

Where = tuple[str, int | None]  # site, layer


@dataclass(frozen=True)
class Place:
    """The node that holds one site of one layer. `scale`: what the node is multiplied with to be the site: of attention scores, before the softmax."""

    site: str
    layer: int | None
    name: str
    op: int
    weight: str = ""
    scale: float = 1.0
    part: tuple[int, int] | tuple[()] = ()

    @property
    def source(self) -> str:
        return self.weight or self.name


@dataclass(frozen=True)
class SeenNode:
    """What the first, recording pass noted of one node. `shape` in NumPy's axis order, 4 axes; `type`: ggml's type."""

    name: str
    op: int
    operands: tuple[str, ...]
    scale: float
    shape: tuple[int, ...] = ()
    type: int = F32

    @classmethod
    def of(cls, tensor: Tensor) -> SeenNode:
        op = op_name(tensor.op)
        operands = tuple(name.decode("utf-8", "replace") for name in _operands(tensor, op))
        scale = scale_of_soft_max(tensor) if op == "SOFT_MAX" else 1.0
        return cls(tensor.name.decode("utf-8", "replace"), tensor.op, operands, scale, tuple(tensor.ne)[::-1], tensor.type)


def _operands(tensor: Tensor, op: str) -> list[bytes]:
    """Names of what a node takes; of the weight of the product, and the bias of the sum, that an ADD takes. The last layer selects rows in between."""
    sources = [source.contents for source in tensor.src[:2] if source]
    if sources and op_name(sources[0].op) == "GET_ROWS":
        sources[0] = sources[0].src[0].contents
    names = [source.name for source in sources]
    if op == "ADD" and op_name(sources[0].op) == "MUL_MAT":
        names.append(sources[0].src[0].contents.name)
    elif op == "ADD" and op_name(sources[0].op) == "ADD":
        names.append(sources[0].src[1].contents.name + b" (added)")
    return names


def _encoded(names: Iterable[str]) -> list[bytes]:
    return [name.encode("utf-8", "replace") for name in names]


def find_places(table: Architecture, nodes: Iterable[SeenNode], residual_scale: float = 1.0) -> dict[Where, Place]:
    """The last node in graph order that fits a row of the table, for every site and layer. What does not fit does not exist here."""
    by_name: dict[str, list[Node]] = {}
    by_weight: dict[str, list[Node]] = {}
    for row in table.nodes:
        by, key = (by_weight, row.weight) if row.weight else (by_name, row.name)
        by.setdefault(key, []).append(row)
    places: dict[Where, Place] = {}
    scales: dict[int | None, float] = {}
    nodes = list(nodes)
    taken = {_split(operand) for node in nodes for operand in node.operands}
    for node in nodes:
        name, layer = _split(node.name)
        op = op_name(node.op)
        for operand in node.operands:
            weight, at = _split(operand)
            for row in by_weight.get(weight, ()) if at is not None else ():
                if row.op == op:
                    places[row.site, at] = Place(row.site, at, "", node.op, operand, part=row.part)
        for row in by_name.get(name, ()):
            if row.op in ("", op) and (not row.beside or (row.beside, layer) in taken):
                places[row.site, layer] = Place(row.site, layer, node.name, node.op, part=row.part, scale=residual_scale if row.scaled else 1.0)
        if name == "kq_soft_max":
            scales[layer] = node.scale
    for (site, layer), place in places.items():
        if site == "attn_scores":
            places[site, layer] = Place(site, layer, place.name, place.op, scale=scales[layer])
    return places


def _split(name: str) -> tuple[str, int | None]:
    """From "kq-3" to ("kq", 3) and from "blk.3.attn_q.weight" to ("attn_q.weight", 3); a name without a layer keeps None."""
    weight = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if weight:
        return weight[2], int(weight[1])
    match = re.fullmatch(r"(.+)-(\d+)", name)
    return (match[1], int(match[2])) if match else (name, None)


class Watch:
    """The two callbacks of a llama.cpp context, and what they do during the pass that is running.

    An exception in a callback cannot cross C. It is kept in `error`, everything that is still asked is declined, the CPU
    back end is told to abort, and `raise_error` raises it once llama_decode has returned.
    """

    def __init__(self, llama: Any) -> None:
        self.eval_callback = llama.ggml_backend_sched_eval_callback(self._on_node)
        self.abort_callback = llama.ggml_abort_callback(self._on_abort)
        self.error: BaseException | None = None
        self.rest()

    def rest(self) -> None:
        """Want no node."""
        self._by_name: dict[bytes, dict[int, list[Place]]] = {}
        self._by_weight: dict[bytes, list[Place]] = {}
        self._weight_ops: set[int] = set()
        self._visit: Callable[[Tensor, Place], None] | None = None
        self._recorded: list[SeenNode] | None = None
        self._note: Callable[[int], None] | None = None
        self._lifetimes: Lifetimes | None = None
        self._stops: frozenset[int] = frozenset()
        self._asked = 0  # nodes of this pass that were asked about
        self._waiting: list[tuple[int, Place]] = []  # what the next stop visits

    def want(self, places: Iterable[Place], visit: Callable[[Tensor, Place], None], lifetimes: tuple[Lifetimes, Sequence[SeenNode]] | None = None) -> None:
        """Call `visit(tensor, place)` at each of `places`, in the order they are computed: each at once, or, with the lifetimes and the nodes of a pass of this
        model and for values that are only read, several at one stop. Good for one decode.
        """
        self.rest()
        self._visit = visit
        for place in places:
            if place.weight:
                self._by_weight.setdefault(place.weight.encode(), []).append(place)
                self._weight_ops.add(place.op)
            else:
                self._by_name.setdefault(place.name.encode(), {}).setdefault(place.op, []).append(place)
        if lifetimes is not None:
            self._lifetimes, nodes = lifetimes
            wanted = (bool(self._places_of((node.name.encode(), node.op), partial(_encoded, node.operands))) for node in nodes)
            self._stops = self._lifetimes.stops(at for at, here in enumerate(wanted) if here)

    def record(self, into: list[SeenNode]) -> None:
        """Note every node that is asked about, besides visiting the wanted ones."""
        self._recorded = into

    def note(self, note: Callable[[int], None]) -> None:
        """Call `note(address)` for every node, in the order of execution and before any of them runs; visit none."""
        self.rest()
        self._note = note

    def raise_error(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _on_abort(self, _data: Any) -> bool:
        return self.error is not None

    def _on_node(self, address: int, ask: bool, _data: Any) -> bool:
        if self.error is not None:
            return False
        try:
            if ask:
                if self._recorded is not None:
                    self._recorded.append(SeenNode.of(Tensor.from_address(address)))
                if self._note is not None:
                    self._note(address)
                return self._stops_at(address)
            waiting, self._waiting = self._waiting, []
            if self._visit is not None:
                for at, place in waiting:
                    self._visit(Tensor.from_address(at), place)
        except BaseException as error:  # noqa: BLE001 - raised again by raise_error, once C is left
            self.error = error
            return False
        return True

    def _stops_at(self, address: int) -> bool:
        """Whether to stop at a node; what is wanted of it waits for the next stop."""
        key = key_of(address)
        places = self._places_of(key, lambda: _operands(Tensor.from_address(address), op_name(key[1])))
        stop = bool(places)
        if self._lifetimes is not None and self._lifetimes.has(self._asked, key):
            stop = self._asked in self._stops
        elif self._lifetimes is not None:  # another graph than that of the pass: stop here, and from here on at each place
            self._lifetimes, stop = None, bool(places or self._waiting)
            if any(overwrites(address, waiting) for waiting, _ in self._waiting):
                name = key[0].decode("utf-8", "replace")
                raise LayerscopeError(f"llama.cpp computes another graph than when the model was opened, and {name!r} takes memory that is not read yet.")
        self._asked += 1
        self._waiting += [(address, place) for place in places]
        return stop

    def _places_of(self, key: Key, operands: Callable[[], Sequence[bytes]]) -> Sequence[Place]:
        """One look-up: this runs for every node of the graph. A node can hold two sites, in the order of the table."""
        name, op = key
        ops = self._by_name.get(name)
        if ops is not None:
            return ops.get(op, ())
        if op not in self._weight_ops:
            return ()
        return [place for name in operands() for place in self._by_weight.get(name, ()) if place.op == op]

"""Nodes of llama.cpp's graph by their own name: which node a name stands for, and handing it out as it is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from backend.engines import Sink
from backend.engines.ggml import F16, F32, I32, Tensor, op_name, read, type_traits
from backend.engines.gguf_graph import Place, SeenNode
from backend.engines.native import NativePiece, NativeTensor, unknown
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo

_DIMS = ("ne3", "ne2", "ne1", "ne0")


def listed(nodes: Sequence[SeenNode]) -> list[NativeTensor]:
    """Every node, in graph order; shapes (NumPy's axis order) are those of the pass that noted them."""
    return [NativeTensor(node.name, op_name(node.op), node.shape, type_traits(node.type)[0]) for node in nodes]


class Natives:
    """The native nodes of one run. A name means the last node that carries it, "NAME/OP" the last with that op.

    Raises LayerscopeError for a name that the graph does not have, and for values that are no float32, float16 or int32.
    """

    def __init__(self, info: ModelInfo, names: Sequence[str], nodes: Sequence[SeenNode], sink: Sink) -> None:
        self._sink, self._info = sink, info
        self._asked: dict[tuple[str, int], list[str]] = {}
        for asked in names:
            node = _find(info, asked, nodes)
            if node.type not in (F32, F16, I32):
                raise LayerscopeError(f"Node {node.name!r} holds {type_traits(node.type)[0]} values; those of type f32, f16 and i32 can be captured.")
            self._asked.setdefault((node.name, node.op), []).append(asked)
        # Several nodes can share name and op: the last of them is meant, and it is told from the others by counting.
        self._total = Counter((node.name, node.op) for node in nodes)
        self._seen: Counter[tuple[str, int]] = Counter()

    @property
    def places(self) -> list[Place]:
        return [Place("native", None, name, op) for name, op in self._asked]

    def beside(self, visit: Callable[[Tensor, Place], None]) -> Callable[[Tensor, Place], None]:
        """`visit` for the sites, and this for the native nodes."""

        def visit_both(tensor: Tensor, place: Place) -> None:
            if place.site == "native":
                self._visit(tensor, place)
            else:
                visit(tensor, place)

        return visit_both

    def _visit(self, tensor: Tensor, place: Place) -> None:
        key = place.name, place.op
        self._seen[key] += 1
        if self._seen[key] == self._total[key]:
            values = read(tensor)
            values = np.array(values, np.int32 if values.dtype.kind == "i" else np.float32, order="C")
            for asked in self._asked[key]:
                self._sink(NativePiece("native", None, 0, values, asked, owned=True, made_by=op_name(tensor.op), dims=_DIMS))

    def check_complete(self) -> None:
        """Raise LayerscopeError for a node that a graph of this prompt's length does not have."""
        for key, asked in self._asked.items():
            if self._seen[key] != self._total[key]:
                raise LayerscopeError(f"{self._info.name} computed node {asked[0]!r} {self._seen[key]} times in this run, and {self._total[key]} were expected.")


def _find(info: ModelInfo, asked: str, nodes: Sequence[SeenNode]) -> SeenNode:
    found = [node for node in nodes if node.name == asked]
    if not found and "/" in asked:
        found = [node for node in nodes if _with_op(node) == asked]
    if not found:
        raise unknown(info, asked, map(_with_op, nodes) if "/" in asked else (node.name for node in nodes))
    return found[-1]


def _with_op(node: SeenNode) -> str:
    return f"{node.name}/{op_name(node.op)}"

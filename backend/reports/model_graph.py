"""ModelGraph: what a model really computed in one forward pass, node by node. Made by the engines, read by everything above them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from backend.errors import LayerscopeError

FORMAT = 1  # of `to_json`


def graph_key(identity: str) -> tuple[str | int, ...]:
    """Where the derived cache keeps the graph of the file of that identity (backend.model_files.identity)."""
    return ("graph", FORMAT, identity)


Kind = Literal["op", "module", "weight", "input", "cache", "copy"]
EXECUTED = ("op", "module", "copy")


@dataclass(frozen=True)
class GraphNode:
    """One node. `id` is its place in `ModelGraph.nodes`; every id in `sources` and `after` is smaller.

    kind     op: one executed operation; module: a PyTorch module without children, as one operation; copy: the same values moved to
             another backend; weight, input (tokens, positions, masks, constants) and cache (keys and values): memory that is read
    name     the engine's own name; not unique in llama.cpp
    op       ggml's op, PyTorch's operator, or the module's class; empty for memory
    detail   the function of a UNARY or GLU node; the operators that ran inside a module
    shape    in NumPy's order, as executed over `ModelGraph.n_tokens` tokens
    after    earlier nodes that wrote into the memory which this one reads: data that flows past the sources (keys into the cache)
    view     no computation: the values of its source, looked at in another shape
    backend  where the values lie: CPU, CUDA0, ...
    layer    None: outside the blocks
    sites    the sites that a capture reads here, as (site, layer)
    module   the path of the PyTorch module in which it ran
    """

    id: int
    kind: Kind
    name: str
    op: str
    shape: tuple[int, ...]
    type: str
    sources: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    layer: int | None = None
    backend: str = ""
    detail: str = ""
    view: bool = False
    sites: tuple[tuple[str, int | None], ...] = ()
    module: str = ""

    @property
    def executed(self) -> bool:
        return self.kind in EXECUTED


@dataclass(frozen=True)
class ModuleCall:
    """One PyTorch module that was called: its own parameters (children left out) and the shapes of its first call."""

    path: str
    class_name: str
    n_params: int
    calls: int
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ModelGraph:
    """The graph of one forward pass over `n_tokens` tokens, in the order of execution; memory stands before its first reader."""

    model: str
    architecture: str
    engine: str
    version: str
    n_layers: int
    n_tokens: int
    edges: str  # how the edges were found, in one sentence
    nodes: tuple[GraphNode, ...]
    modules: tuple[ModuleCall, ...] = ()  # PyTorch only

    def consumers(self) -> list[list[int]]:
        """For each node the ids of those that take it, as a source or through memory."""
        out: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for source in dict.fromkeys((*node.sources, *node.after)):
                out[source].append(node.id)
        return out

    def to_json(self) -> dict[str, Any]:
        """The documented form: the fields of this class, nodes and modules as objects of theirs."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelGraph:
        """Inverse of `to_json`. Raises LayerscopeError for another format."""
        if data.get("format") != FORMAT:
            raise LayerscopeError(f"A graph of format {str(data.get('format'))[:20]} cannot be read; this version reads format {FORMAT}.")
        nodes = tuple(GraphNode(**{**row, **{key: tuple(row[key]) for key in ("shape", "sources", "after")}, "sites": tuple(map(tuple, row["sites"]))}) for row in data["nodes"])
        modules = tuple(ModuleCall(**{**row, **{key: tuple(map(tuple, row[key])) for key in ("inputs", "outputs")}}) for row in data["modules"])
        plain = {field.name: data[field.name] for field in fields(cls) if field.name not in ("nodes", "modules")}
        return cls(**plain, nodes=nodes, modules=modules)

"""The graph of a PyTorch model as it is executed: every operator that PyTorch dispatches in one forward pass, modules without children as one node each.

Hooks say which module runs, a dispatch mode sees every operator with its tensors; an edge is a tensor that one node made and another
took, known by its identity. All tensors of the pass are kept until its end, so that no identity is used twice. What an operator
writes into a tensor reaches other views of the same memory by no identity; those edges are `after`, found by the memory's address.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from backend.engines import Where
from backend.engines.hf_architecture import Architecture
from backend.reports.model_graph import GraphNode, Kind, ModuleCall

if TYPE_CHECKING:
    from torch import Tensor, nn

EDGES = "Edges are tensors, followed by their identity through every operator that PyTorch dispatched; dashed ones lead through memory that a node wrote and a later one reads."


@dataclass
class _Call:
    """A module that is running or has run: the nodes that made what it took and gave, by argument or by part of the output."""

    path: str
    n_before: int
    inputs: list[int] = field(default_factory=list)
    outputs: dict[int | str | None, int] = field(default_factory=dict)
    sources: list[int] = field(default_factory=list)  # of a module without children: everything that was read inside
    operators: list[str] = field(default_factory=list)
    made: set[int] = field(default_factory=set)  # identities of what was made inside
    shapes: tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]] = ((), ())
    count: int = 1


class Recorder:
    """Notes every operator and module that runs inside `with recorder.watching(model)`."""

    def __init__(self, model: nn.Module, row: Architecture) -> None:
        self.nodes: list[GraphNode] = []
        self.calls: dict[str, _Call] = {}
        pattern = re.escape(row.layer).replace(r"\{\}", r"(\d+)")
        self._layer = re.compile(rf"(?:{pattern})(?:\.|$)")
        self._names: dict[int, tuple[str, Kind]] = {id(tensor): (name, "weight") for name, tensor in model.named_parameters()}
        self._names |= {id(tensor): (name, "input") for name, tensor in model.named_buffers()}
        self._made_by: dict[int, int] = {}  # identity of a tensor -> id of its node
        self._writer: dict[int, int] = {}  # address of memory -> id of the last node that wrote into it
        self._kept: list[Any] = []
        self._running: list[_Call] = []
        self._inside: _Call | None = None  # the module without children that is running
        self._spelled: Counter[str] = Counter()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks on every module of `model`, and the dispatch mode, for the length of a `with`."""
        handles: list[Any] = []
        try:
            for path, module in model.named_modules():
                whole = next(module.children(), None) is None
                handles.append(module.register_forward_pre_hook(self._entering(path, whole), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leaving(whole), with_kwargs=True))
            with _dispatched_to(self._operator):
                yield
        finally:
            for handle in handles:
                handle.remove()

    # -- modules -----------------------------------------------------------------------------------------------------------------

    def _entering(self, path: str, whole: bool) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            taken = list(_tensors((args, kwargs)))
            self._kept.append(taken)
            call = _Call(path, len(self.nodes), [self._id_of(tensor) for tensor in taken], shapes=(tuple(_shape(tensor) for tensor in taken), ()))
            self._running.append(call)
            if whole and self._inside is None:
                self._inside = call

        return enter

    def _leaving(self, whole: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = self._running.pop()
            given = list(_tensors(output))
            self._kept.append(given)
            if call is self._inside:
                self._inside = None
                self._add_module(call, module, given)
            call.outputs = {part: self._id_of(value) for part, value in _parts(output) if _is_tensor(value)}
            call.shapes = (call.shapes[0], tuple(_shape(tensor) for tensor in given))
            earlier = self.calls.get(call.path)
            if earlier is None:
                self.calls[call.path] = call
            else:
                earlier.count += 1

        return leave

    def _add_module(self, call: _Call, module: nn.Module, given: list[Tensor]) -> None:
        """One node for a module without children: its sources are what it read. One that hands on what it was given (dropout at rest) is a view."""
        first, detail = given[0] if given else None, ", ".join(dict.fromkeys(call.operators))
        sources = tuple(dict.fromkeys(call.sources or call.inputs))
        number = self._append("module", call.path, type(module).__name__, first, sources, module=call.path, detail=detail, view=not detail)
        for tensor in given:
            self._made_by[id(tensor)] = number

    # -- operators ---------------------------------------------------------------------------------------------------------------

    def _operator(self, func: Any, arguments: Any, output: Any) -> None:
        """Called after every operator."""
        taken, given = list(_tensors(arguments)), list(_tensors(output))
        self._kept.append((taken, given))
        if self._inside is not None:
            self._note_inside(self._inside, func, taken, given)
        else:
            self._note(func, taken, given)

    def _note_inside(self, call: _Call, func: Any, taken: list[Tensor], given: list[Tensor]) -> None:
        call.operators.append(_short(func))
        call.sources += [self._id_of(tensor) for tensor in taken if id(tensor) not in call.made]
        call.made |= {id(tensor) for tensor in given}

    def _note(self, func: Any, taken: list[Tensor], given: list[Tensor]) -> None:
        sources = tuple(dict.fromkeys(self._id_of(tensor) for tensor in taken))
        after = [self._writer.get(_memory(tensor), -1) for tensor in taken]
        newer = tuple(dict.fromkeys(i for i, tensor in zip(after, taken, strict=True) if i > self._made_by[id(tensor)] and i not in sources))
        path = self._running[-1].path if self._running else ""
        short = _short(func)
        name = f"{path}.{short}" if path else short
        self._spelled[name] += 1
        name = name if self._spelled[name] == 1 else f"{name}_{self._spelled[name] - 1}"
        writes = func._schema.is_mutable
        view = not writes and any(value.alias_info is not None for value in func._schema.returns)
        number = self._append("op", name, str(func), given[0] if given else None, sources, after=newer, module=path, view=view)
        for tensor in given:
            self._made_by[id(tensor)] = number
        if writes:
            for tensor in (value for value, argument in zip(taken, func._schema.arguments, strict=False) if argument.alias_info is not None):
                self._writer[_memory(tensor)] = self._made_by[id(tensor)] = number

    def _id_of(self, tensor: Tensor) -> int:
        """The node that made a tensor; for one that was there before, a node of memory."""
        if id(tensor) not in self._made_by:
            name, kind = self._names.get(id(tensor), ("tensor" if tensor.is_floating_point() else "input_ids", "input"))
            self._kept.append(tensor)
            self._made_by[id(tensor)] = self._append(kind, name, "", tensor, (), module=name.rpartition(".")[0])
        return self._made_by[id(tensor)]

    def _append(self, kind: Kind, name: str, op: str, tensor: Tensor | None, sources: tuple[int, ...], **more: Any) -> int:
        number, found = len(self.nodes), self._layer.match(name)
        shape, dtype, device = ((), "", "") if tensor is None else (_shape(tensor), str(tensor.dtype).removeprefix("torch."), str(tensor.device))
        self.nodes.append(GraphNode(number, kind, name, op, shape, dtype, sources, layer=int(found[1]) if found else None, backend=device, **more))
        return number

    # -- what comes out ----------------------------------------------------------------------------------------------------------

    def modules(self, model: nn.Module) -> tuple[ModuleCall, ...]:
        """Every module that ran, in the order of the model."""
        found = []
        for path, module in model.named_modules():
            call = self.calls.get(path)
            if call is not None:
                n_params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
                found.append(ModuleCall(path, type(module).__name__, n_params, call.count, *call.shapes))
        return tuple(found)

    def finished(self, row: Architecture, places: Collection[Where]) -> tuple[GraphNode, ...]:
        """The nodes with their sites, without views that nobody took: the attention function looks at its tensors through some."""
        kept = self.calls[""].outputs.values() if "" in self.calls else ()
        sites = self._sites(row, places)
        taken = {i for node in self.nodes if not node.view for i in (*node.sources, *node.after)} | set(kept) | set(sites)
        for node in reversed(self.nodes):
            if node.view and node.id in taken:
                taken.update((*node.sources, *node.after))
        stay = [node for node in self.nodes if not node.view or node.id in taken]
        number = {node.id: i for i, node in enumerate(stay)}
        return tuple(
            replace(node, id=number[node.id], sources=tuple(number[i] for i in node.sources), after=tuple(number[i] for i in node.after), sites=tuple(sites.get(node.id, ())))
            for node in stay
        )

    def _sites(self, row: Architecture, places: Collection[Where]) -> Mapping[int, list[Where]]:
        """Which node makes what a site is read from. Sites that the attention function shows are no tensors of the model."""
        sites: dict[int, list[Where]] = {}
        for site, layer in sorted(places, key=lambda where: (where[1] is not None, where[1] or 0, where[0])):
            place = row.places.get(site)
            call = next((self.calls[path] for path in place.paths(layer) if path in self.calls), None) if place is not None else None
            if place is None or call is None or place.times:
                continue
            made = (call.inputs[0] if call.inputs else None) if place.side == "input" else call.outputs.get(place.part)
            if made is not None:
                sites.setdefault(made, []).append((site, layer))
        return sites


@contextmanager
def _dispatched_to(note: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Call note(operator, arguments, output) after every operator that PyTorch dispatches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            note(func, (args, kwargs), output)
            return output

    with Dispatch():
        yield


def _parts(output: Any) -> Iterator[tuple[int | str | None, Any]]:
    """An output by the part that backend.engines.hf_sites.Place names."""
    if isinstance(output, dict):
        yield from output.items()
    elif isinstance(output, tuple | list):
        yield from enumerate(output)
    else:
        yield None, output


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments or outputs."""
    if _is_tensor(value):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _short(func: Any) -> str:
    return str(func._schema.name.split("::")[-1])

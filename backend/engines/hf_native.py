"""Outputs of PyTorch modules by the module's own path, for the length of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backend.engines import Sink
from backend.engines.hf_taps import to_numpy
from backend.engines.native import NativePiece, NativeTensor, unknown
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo

if TYPE_CHECKING:
    from torch import nn


def listed(model: nn.Module) -> list[NativeTensor]:
    """Every module below the model, in the order of its definition."""
    return [NativeTensor(name, type(module).__name__) for name, module in model.named_modules() if name]


class Natives:
    """A context manager that keeps what the modules of these names put out; a module that is called several times: the last call.

    What they keep is held in memory until `hand_out`. Raises LayerscopeError for a name that is no module.
    """

    def __init__(self, info: ModelInfo, model: nn.Module, names: Sequence[str]) -> None:
        modules = dict(model.named_modules()) if names else {}
        for name in names:
            if not name or name not in modules:
                raise unknown(info, name, filter(None, modules))
        self._modules = {name: modules[name] for name in names}
        self._kept: dict[str, NDArray[Any]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Natives:
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in self._modules.items()]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is None:
                raise LayerscopeError(f"Module {name!r} ({type(module).__name__}) puts out no tensor.")
            self._kept[name] = np.array(to_numpy(tensor))

        return keep

    def hand_out(self, sink: Sink) -> None:
        """Raises LayerscopeError for a module that was never called, as an expert that no token chose."""
        for name, module in self._modules.items():
            if name not in self._kept:
                raise LayerscopeError(f"Module {name!r} ({type(module).__name__}) was not called in this run.")
            values = self._kept.pop(name)
            dims = tuple(f"dim{i}" for i in range(values.ndim))
            sink(NativePiece("native", None, 0, values, name, owned=True, made_by=type(module).__name__, dims=dims))


def _first_tensor(output: Any) -> Any:
    """The output itself, or the first tensor in a tuple, list or output object."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((part for part in parts if isinstance(part, torch.Tensor)), None)

"""What enters the last matrix of each expert, W_out: no site, since its rows belong to tokens in an order of the experts' own.

llama.cpp has it as a node of its graph, in the order of the chosen experts of each token. transformers has it in no module's input or
output: it is what is multiplied with an expert's slice of the parameter, and is seen there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backend.engines import Piece, ShouldStop, never_stop
from backend.engines.native import NativePiece, NativeTensor
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo

if TYPE_CHECKING:
    from torch import Tensor

OnRows = Callable[[int, int, NDArray[np.float32]], None]  # layer, expert, (token, d_mlp) that it was given


class ShowsExpertInputs(Protocol):
    def expert_inputs(self, ids: list[int], layers: Sequence[int], on_rows: OnRows, should_stop: ShouldStop = never_stop) -> None:
        """One forward pass; `on_rows` is given every token's values once for each expert that it chose. The rows are the receiver's until it returns.

        Raises LayerscopeError where the values are not found; Cancelled."""


def hidden_nodes(info: ModelInfo, nodes: Sequence[NativeTensor], layers: Sequence[int]) -> dict[str, int]:
    """Node of llama.cpp's graph -> its layer: the gated hidden values of all chosen experts, (token, k, d_mlp)."""
    found: dict[str, int] = {}
    for layer in layers:
        names = [node.name for node in nodes if node.made_by == "GLU" and node.name.startswith("ffn_moe_") and node.name.endswith(f"-{layer}")]
        if not names:
            raise _not_found(info, layer)
        found[names[-1]] = layer
    return found


class FromNodes:
    """A sink: sorts the rows of those nodes by the experts of each token."""

    def __init__(self, layers: Mapping[str, int], on_rows: OnRows) -> None:
        self._layers, self._on_rows = layers, on_rows
        self._chosen: dict[int | None, NDArray[Any]] = {}

    def __call__(self, piece: Piece) -> None:
        if not isinstance(piece, NativePiece):
            self._chosen[piece.layer] = piece.values.copy()
            return
        layer, rows = self._layers[piece.source], piece.values[0]
        chosen = self._chosen.pop(layer)
        for expert in np.unique(chosen).tolist():
            self._on_rows(layer, expert, rows[chosen == expert])


def watching_products(info: ModelInfo, parameters: Mapping[int, Tensor], n_rows: int, on_rows: OnRows) -> AbstractContextManager[None]:
    """Hands out what PyTorch multiplies with an expert's slice of `parameters`, layer -> (expert, ...), for the length of a `with`.

    Raises LayerscopeError at its end for a layer of which not n_rows were seen.
    """
    from contextlib import contextmanager

    from torch import Tensor, matmul
    from torch.nn.functional import linear
    from torch.overrides import TorchFunctionMode

    from backend.engines.hf_taps import to_numpy

    # Layers may lie side by side in one storage: a slice is known by its own address.
    slices = {part.data_ptr(): (layer, expert) for layer, parameter in parameters.items() for expert, part in enumerate(parameter)}
    seen = dict.fromkeys(parameters, 0)

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (linear, matmul, Tensor.matmul, Tensor.__matmul__) and len(args) > 1 and args[1].dim() == 2 and args[1].data_ptr() in slices:
                layer, expert = slices[args[1].data_ptr()]
                seen[layer] += len(args[0])
                on_rows(layer, expert, to_numpy(args[0]))
            return func(*args, **(kwargs or {}))

    @contextmanager
    def watched() -> Any:
        with Products():
            yield
        for layer, n in seen.items():
            if n != n_rows:
                raise _not_found(info, layer)

    return watched()


def _not_found(info: ModelInfo, layer: int) -> LayerscopeError:
    return LayerscopeError(f"The hidden values of the experts of layer {layer} of {info.name} ({info.architecture}) are not found in its computation; leave out mlp.experts.W_out.")

"""Tensors by their native name: a node of llama.cpp's graph, or the output of a PyTorch module, whatever it means.

Nothing is known of such a tensor's axes, so a run that hands some out runs whole: no piece of it could be put in its place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from backend.engines import Piece
from backend.errors import LayerscopeError
from backend.model_info import ModelInfo


@dataclass(frozen=True)
class NativeTensor:
    """One tensor that can be asked for. `shape` and `type` are empty where only a run would tell; `made_by`: ggml's op, or a module's class."""

    name: str
    made_by: str
    shape: tuple[int, ...] = ()
    type: str = ""


@dataclass(frozen=True)
class NativePiece(Piece):
    """A whole native tensor. site "native", no layer, start 0; `source`: its name as asked for; values float32 or int32.

    dims: ggml's 4 axes, slowest first ("ne3" ... "ne0"), or PyTorch's ("dim0", "dim1", ...).
    """

    made_by: str = ""
    dims: tuple[str, ...] = ()


def unknown(info: ModelInfo, name: str, names: Iterable[str]) -> LayerscopeError:
    """The refusal of a name that the model does not have, with those of its names that are most like it."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return LayerscopeError(f"{info.name} has no native tensor {name[:120]!r}.{hint} `python -m backend nodes --model MODEL` lists them all.")

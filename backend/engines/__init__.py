"""The engine protocol: run a model over a fixed token sequence, offer named activations, accept edits to them.

An engine is one file. It is given a `Request`, calls the sink once per piece of a site in the order the model computes them
(all of layer 0 before layer 1 within a piece of the prompt), and asks `should_stop` at every layer. Everything it hands out is
a plain NumPy array in the dims of `backend.sites`; nothing above this package imports torch, transformers or llama_cpp.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from backend.errors import LayerscopeError
from backend.intervention import Intervention
from backend.model_info import ModelInfo


@dataclass(frozen=True)
class Piece:
    """One layer's values of one site for positions `start` to `start + n` of the prompt.

    values: float32 (int32 for expert_indices) in the site's dims. For attention maps: (head, n, start + n), keys from 0.
    The array belongs to the receiver only until it returns from the sink: copy what must outlive the call.
    """

    site: str
    layer: int | None
    start: int
    values: NDArray[Any]
    source: str  # native tensor or module name, for the trace's record


DEFAULT_CONTEXT = 8192  # tokens; more only when asked for

Sink = Callable[[Piece], None]
ShouldStop = Callable[[], bool]


def never_stop() -> bool:
    return False


def no_sink(piece: Piece) -> None:
    """The sink of a run that captures nothing, as generating does."""
    raise AssertionError(f"{piece.site} was handed out, though nothing was asked for")


@dataclass(frozen=True)
class Request:
    """What a run captures: the sites and, for sites that have layers, which layers (None: all)."""

    sites: tuple[str, ...]
    layers: tuple[int, ...] | None = None

    def wants(self, site: str, layer: int | None) -> bool:
        return site in self.sites and (layer is None or self.layers is None or layer in self.layers)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy. The same seed gives the same tokens in one engine."""

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class OpenOptions:
    """How a model is put in memory."""

    device: str = "auto"  # HF: auto, cpu, cuda, cuda:1, mps
    n_gpu_layers: int | Literal["auto"] = "auto"  # GGUF
    n_ctx: int | None = None  # None: 8192; never more than the model's own
    n_threads: int | None = None
    kv_cache: Literal["f16", "f32"] = "f16"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # HF; auto: float32 on a CPU, the file's own on a GPU


@dataclass(frozen=True)
class Tokens:
    """A tokenized prompt: ids, and the text of each token (bytes that are no UTF-8 on their own as <0xE2>)."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = field(default=())


class Engine(Protocol):
    """One loaded model. Not thread-safe; one run at a time. Runs leave no trace: hooks and edits are gone when `run` returns."""

    info: ModelInfo
    sites: frozenset[str]  # what this model can offer; the rest does not exist in its architecture
    version: str  # engine and library version, for the trace's record
    compute: str  # what sets its rounding: the dtype of arithmetic (HF), or the storage of the weights (GGUF)
    n_ctx: int  # most tokens of one run: the smaller of the option and the model's own

    def tokenize(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids; special tokens in `text` are plain text. add_bos None: as the model asks."""

    def token_texts(self, ids: list[int]) -> list[str]:
        """The text of each token as it stands alone."""

    def detokenize(self, ids: list[int]) -> str:
        """The text of the ids together, special tokens left out."""

    def run(self, ids: list[int], request: Request, sink: Sink, edits: tuple[Intervention, ...] = (), should_stop: ShouldStop = never_stop) -> None:
        """One forward pass over `ids` with every edit applied, handing every requested piece to `sink`.

        Values handed out are those after the edit. Raises LayerscopeError for a site the model does not have, ids beyond the
        context or an edit outside the model; Cancelled as soon as should_stop() answers True.
        """

    def generate(self, ids: list[int], n: int, sampling: Sampling, on_token: Callable[[int], None] | None = None,
                 edits: tuple[Intervention, ...] = (), should_stop: ShouldStop = never_stop) -> list[int]:  # fmt: skip
        """Up to n new tokens, stopping after the end-of-sequence token (included). Nothing is captured."""

    def unembed(self, resid: NDArray[np.float32]) -> NDArray[np.float32]:
        """Final norm, then W_U: residual stream (..., d_model) -> logits (..., d_vocab), any soft-cap included."""

    def weight(self, name: str) -> NDArray[np.float32]:
        """A weight by its canonical name (backend.weights), float32 in this engine's own head order, (out, in)."""

    def close(self) -> None:
        """Free the model."""


def engine_for(path: Path) -> str:
    """The engine that opens `path`: "gguf" for a file, "hf" for a folder."""
    return "gguf" if path.suffix.lower() == ".gguf" and not path.is_dir() else "hf"


def open_engine(path: Path, options: OpenOptions = OpenOptions(), engine: str | None = None) -> Engine:
    """Load the model at `path` (already resolved and checked by `backend.model_files`). Heavy imports happen here, not before."""
    kind = engine or engine_for(path)
    if kind == "gguf":
        from backend.engines.gguf import GgufEngine

        return GgufEngine(path, options)
    if kind == "hf":
        from backend.engines.hf import HfEngine

        return HfEngine(path, options)
    raise LayerscopeError(f"There is no engine {kind!r}; engines are gguf and hf.")


def check_request(info: ModelInfo, available: frozenset[str], request: Request, ids: list[int], n_ctx: int) -> None:
    """The checks every engine makes before it runs; raises LayerscopeError with the value and the limit."""
    if not ids:
        raise LayerscopeError("The prompt is empty: it has 0 tokens, and at least 1 is needed.")
    if len(ids) > n_ctx:
        raise LayerscopeError(f"The prompt has {len(ids):,} tokens, more than the {n_ctx:,} of the context.")
    bad = [i for i in ids if not 0 <= i < info.d_vocab]
    if bad:
        raise LayerscopeError(f"Token id {bad[0]} is outside the vocabulary of {info.d_vocab:,}.")
    missing = [site for site in request.sites if site not in available]
    if missing:
        raise LayerscopeError(f"{info.name} ({info.architecture}) has no site {missing[0]!r}; it has {', '.join(sorted(available))}.")
    outside = [layer for layer in request.layers or () if not 0 <= layer < info.n_layers]
    if outside:
        raise LayerscopeError(f"Layer {outside[0]} is outside 0-{info.n_layers - 1} of {info.name}.")


def default_threads() -> int:
    return max(1, len(os.sched_getaffinity(0)))


SiteTable = Mapping[str, Any]

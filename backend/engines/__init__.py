"""The engine protocol: run a model over a fixed token sequence, offer named activations, accept edits to them.

An engine is one file. It is given a `Request`, calls the sink once per piece of a site in the order the model computes them
(all of layer 0 before layer 1 within a piece of the prompt), and asks `should_stop` at every layer. Everything it hands out is
a plain NumPy array in the dims of `backend.sites`; nothing above this package imports torch, transformers or llama_cpp.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from backend.engines.threads import default_threads as default_threads
from backend.engines.weight_edits import EditsWeights
from backend.errors import LayerscopeError, ranges
from backend.intervention import Intervention, edits_by_place
from backend.model_info import ModelInfo
from backend.reports.model_graph import ModelGraph
from backend.sites import SITES

if TYPE_CHECKING:
    from backend.engines.native import NativeTensor


@dataclass(frozen=True)
class Piece:
    """One layer's values of one site for positions `start` to `start + n` of the prompt.

    values: float32 (int32 for expert_indices) in the site's dims. For attention maps: (head, n, start + n), keys from 0;
    `heads` names the heads that they hold, None: all of them, as an engine hands them out.
    The array belongs to the receiver only until it returns from the sink, and may be the model's own memory: copy what must
    outlive the call, unless it is `owned`, made for this piece alone, or `steady`: the model has no use for it any more but to read it.
    """

    site: str
    layer: int | None
    start: int
    values: NDArray[Any]
    source: str  # native tensor or module name, for the trace's record
    owned: bool = False
    steady: bool = False
    heads: tuple[int, ...] | None = None


DEFAULT_CONTEXT = 8192  # tokens; more only when asked for
WHOLE_LIMIT = 4096  # tokens that run in one piece: attention maps of all heads are in memory then, and grow with the square
GRAPH_TOKENS = 8  # tokens that a model runs over when its graph is recorded: more than one, so that the axis of positions is seen

Where = tuple[str, int | None]  # site, layer
Sink = Callable[[Piece], None]
ShouldStop = Callable[[], bool]


def never_stop() -> bool:
    return False


def no_sink(piece: Piece) -> None:
    """The sink of a run that captures nothing, as generating does."""
    raise AssertionError(f"{piece.site} was handed out, though nothing was asked for")


@dataclass(frozen=True)
class Request:
    """What a run captures: the sites and, for sites that have layers, which layers (None: all); and tensors by native name.

    Some sites exist in some layers only (a router in those with experts); others are left out there. `exact`: every site was
    named together with every layer, and one that does not exist there is an error.
    heads, rows: what is kept of attention maps: (layer, head) pairs, and the query positions from rows[0] to before rows[1].
    None: all. Engines leave out layers and pieces of which nothing is kept; `cut` takes what is kept out of the rest.
    native: names of graph nodes (GGUF) or module paths (HF), see backend.engines.native. With any, the prompt runs in one piece.
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    rows: tuple[int, int] | None = None
    exact: bool = False
    native: tuple[str, ...] = ()

    def wants(self, site: str, layer: int | None, start: int = 0, n: int = sys.maxsize) -> bool:
        """Whether anything of this site is kept of positions `start` to `start + n`."""
        if site not in self.sites or not (layer is None or self.layers is None or layer in self.layers):
            return False
        if not SITES[site].is_attention_map:
            return True
        return (self.heads is None or any(at == layer for at, _ in self.heads)) and (self.rows is None or (start < self.rows[1] and self.rows[0] < start + n))

    def to_json(self) -> dict[str, Any]:
        """What a trace records of it; heads and rows where they were limited."""
        limits = {name: list(value) for name, value in (("heads", self.heads), ("rows", self.rows)) if value is not None}
        return {"sites": list(self.sites), "layers": list(self.layers) if self.layers is not None else None, **limits}

    def cut(self, piece: Piece) -> Piece | None:
        """The part of a piece of an attention map that is kept; any other piece as it is. None: nothing."""
        if piece.site not in SITES or not SITES[piece.site].is_attention_map or (self.heads is None and self.rows is None):
            return piece
        n_heads, n, _ = piece.values.shape
        heads = tuple(range(n_heads)) if self.heads is None else tuple(sorted({head for at, head in self.heads if at == piece.layer}))
        first, last = (piece.start, piece.start + n) if self.rows is None else (max(self.rows[0], piece.start), min(self.rows[1], piece.start + n))
        if not heads or first >= last:
            return None
        kept = piece.values[list(heads), first - piece.start : last - piece.start, :last]
        return replace(piece, start=first, values=kept, heads=heads, owned=True)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy. The same seed gives the same tokens in one engine."""

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """One token as it was written.

    logits: (d_vocab,) float32 that it was chosen from; resid_norms: (layer,) float32, the Euclidean length of resid_post at the position
    that they were computed at, NaN in a layer where the engine does not find the site. Both belong to the receiver only until it returns.
    """

    token: int
    logits: NDArray[np.float32]
    sampler_probability: float  # with which the sampler drew it: 1 where it is greedy, whatever the model's own probability
    resid_norms: NDArray[np.float32]


OnStep = Callable[[Step], Any]  # what it returns is not looked at; what it raises ends the generation


@dataclass(frozen=True)
class OpenOptions:
    """How a model is put in memory."""

    device: str = "auto"  # HF: auto, cpu, cuda, cuda:1, mps
    n_gpu_layers: int | Literal["auto"] = "auto"  # GGUF
    n_ctx: int | None = None  # None: 8192; never more than the model's own
    n_threads: int | None = None
    kv_cache: Literal["f16", "f32"] = "f16"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # HF; auto: float32 on a CPU, the file's own on a GPU
    quantize: Literal["none", "int8", "nf4"] = "none"  # HF: the weights in fewer bits, by bitsandbytes on a CUDA device
    device_map: Literal["none", "auto"] = "none"  # HF; auto: spread over the devices there are, by accelerate
    editable_weights: bool = False  # GGUF: in memory of its own instead of the mapped file, so that `perturbed` can write; HF: always


@dataclass(frozen=True)
class Tokens:
    """A tokenized prompt: ids, and the text of each token (bytes that are no UTF-8 on their own as <0xE2>)."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = field(default=())


class Engine(EditsWeights, Protocol):
    """One loaded model. Not thread-safe; one run at a time. Runs leave no trace: hooks and edits are gone when `run` returns."""

    info: ModelInfo
    places: frozenset[Where]  # (site, layer) that this model can offer; the rest does not exist in its architecture
    sites: frozenset[str]  # the sites among them
    version: str  # engine and library version, for the trace's record
    compute: str  # what sets its rounding: the dtype of arithmetic (HF), or the storage of the weights (GGUF)
    on_cpu: bool  # no part of it computes anywhere else
    n_threads: int  # threads that compute on this machine's cores
    n_ctx: int  # most tokens of one run: the smaller of the option and the model's own
    unchecked: dict[str, str]  # identity that cannot be checked of this model -> why; "table_row": the architecture has no row

    def tokenize(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids; special tokens in `text` are plain text. add_bos None: as the model asks."""

    def token_texts(self, ids: list[int]) -> list[str]:
        """The text of each token as it stands alone."""

    def detokenize(self, ids: list[int]) -> str:
        """The text of the ids together, special tokens left out."""

    def run(self, ids: list[int], request: Request, sink: Sink, edits: tuple[Intervention, ...] = (), should_stop: ShouldStop = never_stop) -> None:
        """One forward pass over `ids` with every edit applied, handing every requested piece (natives as NativePiece) to `sink`.

        Values handed out are those after the edit. Raises LayerscopeError for a site the model does not have, ids beyond the
        context or an edit outside the model; Cancelled as soon as should_stop() answers True.
        """

    def generate(self, ids: list[int], n: int, sampling: Sampling, on_step: OnStep | None = None,
                 edits: tuple[Intervention, ...] = (), should_stop: ShouldStop = never_stop) -> list[int]:  # fmt: skip
        """Up to n new tokens, stopping after the end-of-sequence token (included). `on_step` hears of each as it is chosen; it does not change them."""

    def unembed(self, resid: NDArray[np.float32], tokens: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Final norm, then W_U: residual stream (..., d_model) -> logits (..., d_vocab), any soft-cap included; of `tokens` only, (..., len(tokens)).

        Raises LayerscopeError where `unchecked` has "unembed": nothing is known then that leads from the one to the other.
        """

    def nodes(self) -> list[NativeTensor]:
        """Every tensor that `Request.native` can name, in the order of the computation (GGUF) or of the model's definition (HF)."""

    def weight(self, name: str, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """A weight by its canonical name (backend.weights), float32 in this engine's own head order, (out, in); of its outputs `rows` only."""

    def graph(self, n_tokens: int = GRAPH_TOKENS) -> ModelGraph:
        """Every node of one forward pass over `n_tokens` tokens as it is executed, with its edges. Raises LayerscopeError for a length outside the context."""

    def close(self) -> None:
        """Free the model."""


def engine_for(path: Path) -> str:
    """The engine that opens `path`: "gguf" for a file, "hf" for a folder."""
    return "gguf" if path.suffix.lower() == ".gguf" and not path.is_dir() else "hf"


def open_engine(path: Path, options: OpenOptions = OpenOptions(), engine: str | None = None) -> Engine:
    """Load the model at `path` (already resolved and checked by `backend.model_files`). Heavy imports happen here, not before."""
    kind = engine or engine_for(path)
    if kind == "gguf" and (options.quantize, options.device_map) != ("none", "none"):
        raise LayerscopeError(f"{path.name} is a GGUF file; quantize and device_map are for Hugging Face folders.")
    if kind == "gguf":
        from backend.engines.gguf import GgufEngine

        return GgufEngine(path, options)
    if kind == "hf":
        from backend.engines.hf import HfEngine

        return HfEngine(path, options)
    raise LayerscopeError(f"There is no engine {kind!r}; engines are gguf and hf.")


def check_request(info: ModelInfo, places: Collection[Where], request: Request, ids: list[int], n_ctx: int) -> None:
    """The checks every engine makes before it runs; raises LayerscopeError with the value and the limit."""
    if not ids:
        raise LayerscopeError("The prompt is empty: it has 0 tokens, and at least 1 is needed.")
    if len(ids) > n_ctx:
        raise LayerscopeError(f"The prompt has {len(ids):,} tokens, more than the {n_ctx:,} of the context.")
    if request.native and len(ids) > WHOLE_LIMIT:
        raise LayerscopeError(f"The prompt has {len(ids):,} tokens; native tensors need it in one piece, which holds {WHOLE_LIMIT:,} at most.")
    bad = [i for i in ids if not 0 <= i < info.d_vocab]
    if bad:
        raise LayerscopeError(f"Token id {bad[0]} is outside the vocabulary of {info.d_vocab:,}.")
    outside = [layer for layer in (*(request.layers or ()), *(layer for layer, _ in request.heads or ())) if not 0 <= layer < info.n_layers]
    available = {site for site, _ in places}
    for site in request.sites:
        if site not in available:
            raise LayerscopeError(f"{info.name} ({info.architecture}) has no site {site!r}; it has {', '.join(sorted(available))}.")
    if outside:
        raise LayerscopeError(f"Layer {outside[0]} is outside 0-{info.n_layers - 1} of {info.name}.")
    for site in request.sites if request.layers else ():
        lacking = [layer for layer in request.layers or () if (site, layer) not in places and (site, None) not in places]
        if lacking and (request.exact or len(lacking) == len(request.layers or ())):
            raise _no_such_layer(info, places, site, lacking[0])
    for layer, head in request.heads or ():
        if not 0 <= head < info.n_heads:
            raise LayerscopeError(f"Head {layer}.{head} is outside heads 0-{info.n_heads - 1} of {info.name}.")
    if request.rows is not None and not 0 <= request.rows[0] < request.rows[1] <= len(ids):
        raise LayerscopeError(f"Attention rows {request.rows[0]:,}-{request.rows[1] - 1:,} are not inside the {len(ids):,} tokens of the run.")


def check_edits(info: ModelInfo, places: Collection[Where], edits: tuple[Intervention, ...]) -> None:
    """Raise LayerscopeError for an edit of a site that the model does not have, or not in that layer."""
    available = {site for site, _ in places}
    for site, layer in edits_by_place(edits):
        if site not in available:
            raise LayerscopeError(f"{info.name} ({info.architecture}) has no site {site!r} to edit.")
        if (site, layer) not in places:
            raise _no_such_layer(info, places, site, layer)


def _no_such_layer(info: ModelInfo, places: Collection[Where], site: str, layer: int | None) -> LayerscopeError:
    layers = ranges(sorted(at for name, at in places if name == site and at is not None))
    return LayerscopeError(f"{info.name} ({info.architecture}) has no site {site!r} in layer {layer}; it has it in {layers}.")


SiteTable = Mapping[str, Any]

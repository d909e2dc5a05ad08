"""The GGUF engine: a GGUF file, executed by llama.cpp's own kernels, with instruments attached through its scheduler callback.

    gguf_header    what the file says, checked before llama.cpp sees it (backend)
    gguf_context   llama.cpp's model and context
    gguf_sites     the table: architecture -> the graph node of each site
    gguf_generic   what an architecture without a row still gives
    gguf_graph     the table looked up in the real graph, and the callback
    gguf_nodes     the whole graph as it is executed
    gguf_tap       a run's edits and captures at each node
    gguf_native    nodes by their own names
    gguf_unembed   final norm and W_U, outside llama.cpp
    gguf_vocab     text and ids
    gguf_weight_edits   weights changed in llama.cpp's memory, and put back
    ggml           the tensor struct, reading, writing, dequantizing

A prompt longer than a piece (512 tokens) runs in pieces over the key/value cache. Weights, for `weight` and `unembed`, are read
from the file by backend.weights and dequantized by ggml. They do not see what `perturbed` changes: that is llama.cpp's copy in memory.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backend.analysis.identities import tolerances
from backend.engines import DEFAULT_CONTEXT, GRAPH_TOKENS, OnStep, OpenOptions, Request, Sampling, ShouldStop, Sink, Step, check_edits, check_request, never_stop
from backend.engines.expert_inputs import FromNodes, OnRows, hidden_nodes
from backend.engines.ggml import Tensor, check_layout, read
from backend.engines.ggml_codes import code_bits
from backend.engines.gguf_context import Context, Model
from backend.engines.gguf_generic import NO_ROW, NO_UNEMBED, fitting, is_pattern
from backend.engines.gguf_graph import Place, SeenNode, Watch, Where, find_places
from backend.engines.gguf_lifetimes import Lifetimes
from backend.engines.gguf_native import Natives, listed
from backend.engines.gguf_nodes import EDGES, Recorder
from backend.engines.gguf_sites import GENERIC, architecture
from backend.engines.gguf_tap import Tap
from backend.engines.gguf_unembed import Unembedding, candidates, measured
from backend.engines.gguf_vocab import Vocabulary
from backend.engines.gguf_weight_edits import StoredTensors, perturbed, type_of
from backend.engines.native import NativeTensor
from backend.engines.resid_norms import ResidNorms
from backend.engines.sampling import check_sampling, choose
from backend.engines.threads import engine_threads
from backend.engines.weight_edits import WeightChange, Written
from backend.errors import Cancelled, LayerscopeError
from backend.files.file_stamps import stamps
from backend.files.gguf_header import GgufHeader, model_info, read_header
from backend.files.gguf_split import parts_of
from backend.intervention import Intervention, edits_by_place
from backend.reports.model_graph import ModelGraph
from backend.weight_names import ROTARY_INTERLEAVED
from backend.weights import open_weights

PIECE = 512  # tokens
_PROBE = 3  # tokens of the pass that shows what a model has: a size of its own among the axes of a node


class GgufEngine:
    """One loaded GGUF model; see backend.engines.Engine for what each method promises.

    The context is made for the length at hand and kept while it is long enough. Queries and keys are handed out in the order of
    the original checkpoint: the converter's reordering for RoPE is undone, and done again for edits.
    """

    def __init__(self, path: Path, options: OpenOptions = OpenOptions(), *, n_ubatch: int = PIECE) -> None:
        path = Path(path)
        opened = stamps(parts_of(path))
        header = read_header(path)
        info = model_info(path, header)
        self._table = architecture(info.architecture)
        if "tokenizer.ggml.tokens" not in header.metadata:
            raise LayerscopeError(f"{path.name} holds no tokenizer (tokenizer.ggml.tokens is missing).")
        self._files, self._stamps = header.files, opened
        self._options, self._n_ubatch = options, n_ubatch
        self.n_ctx = min(options.n_ctx or DEFAULT_CONTEXT, info.n_ctx)
        self._context: Context | None = None
        self._unembedding: Unembedding | None = None
        self._stored: StoredTensors | None = None
        self._model = Model(header.files[0], options)
        try:
            self._weights = open_weights(path)
            self._vocabulary = Vocabulary(self._model)
            self.info = replace(info, add_bos=self._vocabulary.add_bos)
            self._watch = Watch(self._model.llama)
            self._nodes: list[SeenNode] = []
            self._lifetimes = Lifetimes()
            self._places = self._find_places(header)
        except BaseException:
            self.close()
            raise
        self.compute = self.info.quantization
        self.places = frozenset(self._places)
        self.sites = frozenset(site for site, _ in self.places)
        self.unchecked: dict[str, str] = {} if self._table is not GENERIC else {"table_row": NO_ROW} | ({} if self._unembedding else {"unembed": NO_UNEMBED})
        self.on_cpu, self.n_threads = not self._model.n_gpu_layers, options.n_threads or engine_threads()
        device = "CPU" if self.on_cpu else "GPU"
        self.version = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}, {device}, {options.kv_cache} KV cache"

    def tokenize(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids; special tokens in `text` are plain text. add_bos None: as the file asks."""
        return self._vocabulary.tokenize(text, add_bos)

    def token_texts(self, ids: list[int]) -> list[str]:
        """The text of each token as it stands alone."""
        return self._vocabulary.texts(ids)

    def detokenize(self, ids: list[int]) -> str:
        """The text of the ids together, special tokens left out."""
        return self._vocabulary.detokenize(ids)

    def run(self, ids: list[int], request: Request, sink: Sink, edits: tuple[Intervention, ...] = (), should_stop: ShouldStop = never_stop) -> None:
        """One forward pass over `ids`; see Engine.run.

        An edit whose meaning spans positions (a mean over them, an array with a position axis, an attention map), and a native
        tensor, make the prompt run whole instead of in pieces.
        """
        self._check_unchanged()
        check_request(self.info, self.places, request, ids, self.n_ctx)
        natives = Natives(self.info, request.native, self._nodes, sink)
        tap = self._tap(request, sink, edits, should_stop, len(ids))
        piece = max(len(ids), self._n_ubatch) if request.native else self._piece(edits, ids)
        self._prefill(ids, tap, piece, n_ctx=len(ids), all_outputs=True, natives=natives)
        natives.check_complete()

    def generate(self, ids: list[int], n: int, sampling: Sampling, on_step: OnStep | None = None,
                 edits: tuple[Intervention, ...] = (), should_stop: ShouldStop = never_stop) -> list[int]:  # fmt: skip
        """Up to n new tokens; see Engine.generate.

        Positions of edits are absolute; negative ones count from the end of the prompt. An edit without positions holds for new
        tokens too. Raises LayerscopeError when prompt and new tokens together exceed the context.
        """
        self._check_unchanged()
        check_request(self.info, self.places, Request(()), ids, self.n_ctx)
        if len(ids) + n > self.n_ctx:
            raise LayerscopeError(f"A prompt of {len(ids):,} tokens and {n:,} new ones are more than the {self.n_ctx:,} of the context.")
        check_sampling(sampling)
        norms, rng = ResidNorms(self.places, self.info.n_layers, on_step is not None), np.random.default_rng(sampling.seed)
        tap = self._tap(norms.request, norms, edits, should_stop, len(ids))
        if n <= 0:
            return []
        context = self._prefill(ids, tap, self._piece(edits, ids), n_ctx=len(ids) + n, all_outputs=False)
        new: list[int] = []
        while True:
            logits = context.last_logits()
            token, probability = choose(logits, sampling, rng)
            new.append(token)
            if on_step:
                on_step(Step(token, logits, probability, norms.values))
            if len(new) == n or self._vocabulary.ends(new[-1]):
                return new
            self._step(context, new[-1:], tap, start=len(ids) + len(new) - 1, all_outputs=False)

    def unembed(self, resid: NDArray[np.float32], tokens: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Final norm, then W_U, in float32: resid (..., d_model) -> logits (..., d_vocab) or those of `tokens`, any soft-cap included.

        llama.cpp's kernels round activations to 8 bits where W_U is quantized, so its own logits differ by that rounding.
        Raises LayerscopeError where the architecture has no row and none of the known ways to end a model makes its logits.
        """
        if self._unembedding is None:
            raise LayerscopeError(f"{self.info.name} ({self.info.architecture}) cannot be read through a logit lens: {NO_UNEMBED}.")
        return self._unembedding(resid, tokens)

    def nodes(self) -> list[NativeTensor]:
        """Every node of the graph in the order of the computation, with its shape in a pass over a few tokens."""
        return listed(self._nodes)

    def weight(self, name: str, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """A weight by its canonical name, float32, (out, in), heads in the order of q and k as handed out; of its outputs `rows` only."""
        return self._weights[name] if rows is None else self._weights.lazy(name)[rows]

    def graph(self, n_tokens: int = GRAPH_TOKENS) -> ModelGraph:
        """The nodes that llama.cpp executes for `n_tokens` tokens from position 0, every position an output; see Engine.graph."""
        check_request(self.info, self.places, Request(()), [0] * n_tokens, min(self.n_ctx, self._n_ubatch))
        recorder = Recorder(self._weights.native_names, self.info.n_layers)
        self._note(recorder.note, n_tokens)
        info = self.info
        return ModelGraph(info.name, info.architecture, "gguf", self.version, info.n_layers, n_tokens, EDGES, recorder.with_sites(self._places))

    def perturbed(self, changes: Sequence[WeightChange]) -> AbstractContextManager[tuple[Written, ...]]:
        """See EditsWeights.perturbed. Runs see the change; `weight` and `unembed`, which read the file, do not."""
        if not self._options.editable_weights:
            raise LayerscopeError(f"The weights of {self.info.name} cannot be changed: its file is mapped into memory; open it with editable_weights.")
        self._model.opened()
        if self._stored is None:
            found = StoredTensors(self._weights)
            self._note(found.note, 1)
            self._stored = found
        return perturbed(self._weights, self._stored, changes, lambda: bool(self._model.pointer))

    def code_bits(self, name: str) -> int:
        """See EditsWeights.code_bits."""
        return code_bits(type_of(self._weights.lazy(name)))

    def expert_inputs(self, ids: list[int], layers: Sequence[int], on_rows: OnRows, should_stop: ShouldStop = never_stop) -> None:
        """See ShowsExpertInputs."""
        nodes = hidden_nodes(self.info, self.nodes(), layers)
        self.run(ids, Request(("expert_indices",), tuple(layers), native=tuple(nodes)), FromNodes(nodes, on_rows), should_stop=should_stop)

    def close(self) -> None:
        """Free the context and the model."""
        if self._context is not None:
            self._context.close()
        self._context = None
        self._model.close()

    def _note(self, note: Callable[[int], None], n_tokens: int) -> None:
        """Call `note(address)` for every node of a pass over `n_tokens` tokens."""
        context = self._context_for(n_tokens, self._n_ubatch)
        context.clear()
        self._watch.note(note)
        try:
            context.decode([0] * n_tokens, 0, all_outputs=True)
        finally:
            self._watch.rest()

    def _check_unchanged(self) -> None:
        """llama.cpp maps the file and weights are read from it when asked for: of another file they would be a mixture, of a shorter one a crash."""
        if stamps(self._files) != self._stamps:
            raise LayerscopeError(f"The file of {self.info.name} has changed since it was opened; open it again.")

    def _find_places(self, header: GgufHeader) -> dict[Where, Place]:
        """Run a few tokens, noting every node of the graph; a node of known size proves that tensors are laid out as ggml.py says."""
        ids = [self.info.d_vocab * (i + 1) // (_PROBE + 2) for i in range(min(_PROBE, self.info.n_ctx, self._n_ubatch))]
        context = self._context_for(len(ids), self._n_ubatch)
        self._watch.note(self._lifetimes.note)
        self._watch.record(self._nodes)
        context.decode(ids, 0, all_outputs=True)
        self._watch.rest()
        places = find_places(self._table, self._nodes, self._factor(header, self._table.residual_scale) or 1.0)
        if self._table is GENERIC:
            return self._probed(fitting(places, self._nodes, self.info, len(ids)), ids, header)
        embed = places.get(("embed", None))
        if embed is None:
            raise LayerscopeError(f"The installed llama-cpp-python shows no embedding node for {self.info.name}; install version 0.3.36.")
        self._look(context, ids, [embed], lambda tensor, place: check_layout(tensor, place.name, self.info.d_model, len(ids)))
        self._unembedding = self._by_row(header)
        return places

    def _look(self, context: Context, ids: list[int], places: Iterable[Place], visit: Callable[[Tensor, Place], None]) -> None:
        self._watch.want(places, visit)
        context.clear()
        context.decode(ids, 0, all_outputs=True)
        self._watch.rest()

    def _by_row(self, header: GgufHeader) -> Unembedding:
        """The way from the residual stream to logits that the row of the table says."""
        divisor, softcap = (self._factor(header, key) for key in (self._table.logit_divisor, self._table.logit_softcap))
        bias, w_u_bias = (self._weights[name] if name in self._weights else None for name in ("ln_final.b", "unembed.b_U"))
        return Unembedding(self._table.norm, self.info.norm_eps, self._weights["ln_final.w"], bias, self._weights.lazy("unembed.W_U"), w_u_bias, divisor or 1.0, softcap)

    def _factor(self, header: GgufHeader, key: str) -> float:
        """A number of the file by its key without the architecture; 0 where it has none, or the row names no key."""
        return float(header.metadata.get(f"{self.info.architecture}.{key}", 0.0)) if key else 0.0

    def _probed(self, places: dict[Where, Place], ids: list[int], header: GgufHeader) -> dict[Where, Place]:
        """Of `places`, by name and size, those that hold what they promise; finds the way to logits as well, where it can be found."""
        ends = {("resid_post", self.info.n_layers - 1), ("ln_final_out", None), ("logits", None)}
        kept, values = dict(places), {}

        def check(tensor: Tensor, place: Place) -> None:
            where = place.site, place.layer
            if place.site == "logits":
                check_layout(tensor, place.name, self.info.d_vocab, len(ids))
            if place.site == "attn_pattern" and not is_pattern(read(tensor)):
                del kept[where]
            if where in ends:
                values[where] = np.array(read(tensor)[0, 0])

        context = self._context_for(len(ids), self._n_ubatch)
        self._look(context, ids, places.values(), check)
        logits = values.get(("logits", None))
        if logits is None or not np.array_equal(logits[-1], context.last_logits()):
            raise LayerscopeError(f"{self.info.name} has the architecture {self.info.architecture[:40]!r}, which has no row in Layerscope's tables, "
                                  "and no node of its graph called 'result_output' holds the logits.")  # fmt: skip
        if ends <= values.keys():
            resid, normed = values["resid_post", self.info.n_layers - 1], values["ln_final_out", None]
            limits = tolerances("gguf", self.info.quantization)
            self._unembedding = measured(candidates(self.info, header, self._weights), resid, normed, logits, limits)
        return kept

    def _tap(self, request: Request, sink: Sink, edits: tuple[Intervention, ...], should_stop: ShouldStop, n_tokens: int) -> Tap:
        """Check the edits; stop at the nodes that are wanted, edited, or the end of a layer."""
        for edit in edits:
            edit.check(self.info, n_tokens)
        check_edits(self.info, self.places, edits)
        return Tap(self.info, self.info.architecture in ROTARY_INTERLEAVED, self._table.window_period, request, sink, edits_by_place(edits), should_stop, n_tokens)

    def _stops(self, tap: Tap, n: int) -> Iterable[Place]:
        """Where to stop while the `n` tokens from `tap.start` on are run."""
        asks_at_layers = tap.should_stop is not never_stop
        for (site, layer), place in self._places.items():
            if tap.request.wants(site, layer, tap.start, n) or (site, layer) in tap.edits or (asks_at_layers and site == "resid_post"):
                yield place

    def _prefill(self, ids: list[int], tap: Tap, piece: int, n_ctx: int, all_outputs: bool, natives: Natives | None = None) -> Context:
        """Run the prompt from position 0 in pieces."""
        context = self._context_for(n_ctx, piece)
        context.clear()
        for start in range(0, len(ids), piece):
            self._step(context, ids[start : start + piece], tap, start, all_outputs, natives)
        return context

    def _step(self, context: Context, ids: list[int], tap: Tap, start: int, all_outputs: bool, natives: Natives | None = None) -> None:
        if tap.should_stop():
            raise Cancelled
        tap.start = start
        if natives and natives.places:
            self._watch.want([*self._stops(tap, len(ids)), *natives.places], natives.beside(tap.visit))
        else:
            # What an edit changes must be read before it; with parts on a GPU there are several graphs; for one token, planning takes longer than stops.
            together = (self._lifetimes, self._nodes) if self.on_cpu and not tap.edits and len(ids) > 1 else None
            self._watch.want(self._stops(tap, len(ids)), tap.visit, together)
        try:
            context.decode(ids, start, all_outputs or bool(tap.edits))
        finally:
            self._watch.rest()

    def _context_for(self, n_ctx: int, n_ubatch: int) -> Context:
        """The context at hand if it is large enough, else a new one in its place."""
        old = self._context
        if old is not None and old.n_ctx >= n_ctx and old.n_ubatch >= n_ubatch:
            return old
        if old is not None:
            n_ctx, n_ubatch = max(n_ctx, old.n_ctx), max(n_ubatch, old.n_ubatch)
            self._context = None
            old.close()
        self._context = Context(self._model, self._watch, self._options, n_ctx, n_ubatch)
        return self._context

    def _piece(self, edits: tuple[Intervention, ...], ids: list[int]) -> int:
        return max(len(ids), self._n_ubatch) if any(edit.spans_positions for edit in edits) else self._n_ubatch

"""The PyTorch engine: a Hugging Face folder, executed by transformers, with instruments attached for the length of a run.

    hf_config     what the folder says, checked before transformers sees it
    hf_sites      the table: architecture -> module paths of sites and weights
    hf_generic    the row of an architecture without one, found in the model
    hf_taps       a run's edits and captures as hooks, which always come off
    hf_graph      the whole graph as it is executed
    hf_attention  the attention function that shows scores, pattern and z
    hf_router     how routers choose experts, for edits of their scores
    hf_gradients  backward passes: gradients, and the Hessian's diagonal
    hf_native     outputs of modules by their own paths
    hf_weights    weights by their canonical names, read or changed for a while
    hf_placement  weights in fewer bits, or on several devices
    hf_tokenizer  text and ids

A prompt longer than PIECE tokens runs in pieces over a key/value cache, as llama.cpp does with its micro-batches: memory for
attention maps and logits grows with the piece, not with the square of the prompt. safetensors only; no remote code; no network.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backend.engines import (
    DEFAULT_CONTEXT,
    GRAPH_TOKENS,
    WHOLE_LIMIT,
    OnStep,
    OpenOptions,
    Request,
    Sampling,
    ShouldStop,
    Sink,
    Step,
    check_edits,
    check_request,
    never_stop,
    no_sink,
)
from backend.engines.expert_inputs import OnRows, watching_products
from backend.engines.hf_architecture import finished
from backend.engines.hf_experts import one_by_one
from backend.engines.hf_generic import NO_UNEMBED, Generic, find
from backend.engines.hf_gradients import Gradients
from backend.engines.hf_graph import EDGES, Recorder
from backend.engines.hf_native import Natives, listed
from backend.engines.hf_placement import PACKED, arguments, quantization, stored_bits
from backend.engines.hf_sites import ARCHITECTURES
from backend.engines.hf_taps import Tap, has_module, installed, to_numpy
from backend.engines.hf_tokenizer import HfTokenizer, first_line
from backend.engines.hf_weights import Found, perturbed
from backend.engines.hf_weights import find as find_weight
from backend.engines.native import NativeTensor
from backend.engines.resid_norms import ResidNorms
from backend.engines.sampling import check_sampling, choose
from backend.engines.threads import engine_threads, prepare
from backend.engines.weight_edits import WeightChange, Written
from backend.errors import LayerscopeError
from backend.files.bounded_json import read_json
from backend.files.hf_config import CONFIG_LIMIT, model_info
from backend.intervention import Intervention, edits_by_place
from backend.reports.model_graph import ModelGraph

if TYPE_CHECKING:
    import torch

PIECE = 512  # tokens


class HfEngine:
    """One loaded model of a Hugging Face folder; see backend.engines.Engine for what each method promises."""

    def __init__(self, path: Path, options: OpenOptions = OpenOptions()) -> None:
        prepare()
        import torch
        import transformers

        info = model_info(path)
        self._tokenizer = HfTokenizer(path)
        if self._tokenizer.size > info.d_vocab:
            raise LayerscopeError(f"The tokenizer of {path.name} has {self._tokenizer.size:,} tokens, and the embedding has {info.d_vocab:,} rows.")
        bits = quantization(options, path)
        self.device = _device("cuda" if bits and options.device == "auto" else options.device)
        # By itself PyTorch takes the machine's cores, whatever the container's share of them is.
        self.n_threads = options.n_threads or min(torch.get_num_threads(), engine_threads())
        torch.set_num_threads(self.n_threads)
        placed = arguments(options, bits, bool(stored_bits(path)), self.device)
        self._model = _load(path, self.device, _dtype(options.dtype, self.device), known=info.architecture in ARCHITECTURES, placed=placed)
        found = Generic(ARCHITECTURES[info.architecture], True, {}) if info.architecture in ARCHITECTURES else find(self._model, info)
        self._steady = info.architecture in ARCHITECTURES  # tests hold each of them to it
        self._row, self._in_pieces, self.unchecked = found.row, found.in_pieces, {**found.unchecked, **({"attn_projection": f"W_O is {bits}: {PACKED}"} if bits else {})}
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        self.info = replace(
            info,
            bos_id=info.bos_id if bos is None else bos,
            eos_id=info.eos_id if eos is None else eos,
            add_bos=self._tokenizer.adds_bos,
            quantization=bits or info.quantization,
        )
        self._eos_ids = _eos_ids(path) | ({self.info.eos_id} if self.info.eos_id is not None else set())
        self.n_ctx = min(options.n_ctx or DEFAULT_CONTEXT, info.n_ctx)
        if not self._in_pieces:
            self.n_ctx = min(self.n_ctx, WHOLE_LIMIT)
        self.places = self._row.sites_of(self.info.n_layers, partial(has_module, self._model))
        self.sites = frozenset(site for site, _ in self.places)
        self._forward_arguments = frozenset(inspect.signature(self._model.forward).parameters)
        self.on_cpu = {parameter.device.type for parameter in self._model.parameters()} == {"cpu"}
        self.compute = str(self._model.dtype).removeprefix("torch.")
        where = "spread over devices" if options.device_map == "auto" else self.device
        stored = f" on {bits} weights" if bits else ""
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}, {where}, {self.compute}{stored}"

    def tokenize(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids; special tokens in `text` are plain text. add_bos None: as the tokenizer does by itself."""
        return self._tokenizer.tokenize(text, add_bos)

    def token_texts(self, ids: list[int]) -> list[str]:
        """The text of each token as it stands alone; [id] where the folder has no tokenizer."""
        return self._tokenizer.token_texts(ids)

    def detokenize(self, ids: list[int]) -> str:
        """The text of the ids together, special tokens left out."""
        return self._tokenizer.detokenize(ids)

    def run(self, ids: list[int], request: Request, sink: Sink, edits: tuple[Intervention, ...] = (), should_stop: ShouldStop = never_stop) -> None:
        """One forward pass over `ids`; see Engine.run.

        Pieces hold at most PIECE positions. An edit whose meaning spans positions (a mean over them, an array with a
        position axis, an attention map), and a native tensor, make the prompt run whole.
        """
        check_request(self.info, self.places, request, ids, self.n_ctx)
        self._check_edits(edits, len(ids))
        tap, natives = Tap(self.info, request, sink, edits, should_stop, len(ids), steady=self._steady), Natives(self.info, self._model, request.native)
        size = len(ids) if request.native or not self._in_pieces else _piece(edits, ids)
        with _no_grad(), installed(self._model, self._row, tap, self.places), natives:
            self._prefill(ids, tap, cache=None if len(ids) <= size else self._cache(), size=size)
        natives.hand_out(sink)

    def generate(self, ids: list[int], n: int, sampling: Sampling, on_step: OnStep | None = None,
                 edits: tuple[Intervention, ...] = (), should_stop: ShouldStop = never_stop) -> list[int]:  # fmt: skip
        """Up to n new tokens; see Engine.generate.

        Positions of edits are absolute; negative ones count from the end of the prompt. An edit without positions holds for new
        tokens too. Raises LayerscopeError when prompt and new tokens together exceed the context.
        """
        check_request(self.info, self.places, Request(()), ids, self.n_ctx)
        if len(ids) + n > self.n_ctx:
            raise LayerscopeError(f"A prompt of {len(ids):,} tokens and {n:,} new ones are more than the {self.n_ctx:,} of the context.")
        check_sampling(sampling)
        self._check_edits(edits, len(ids))
        norms, rng = ResidNorms(self.places, self.info.n_layers, on_step is not None), np.random.default_rng(sampling.seed)
        tap = Tap(self.info, norms.request, norms, edits, should_stop, len(ids))
        cache, size = (self._cache(), _piece(edits, ids)) if self._in_pieces else (None, len(ids))
        new: list[int] = []
        with _no_grad(), installed(self._model, self._row, tap, self.places):
            logits = self._prefill(ids, tap, cache, size)
            while len(new) < n:
                token, probability = choose(logits, sampling, rng)
                new.append(token)
                if on_step:
                    on_step(Step(token, logits, probability, norms.values))
                if new[-1] in self._eos_ids or len(new) == n:
                    break
                if self._in_pieces:
                    logits = self._step(new[-1:], tap, cache, start=len(ids) + len(new) - 1)
                else:
                    logits = self._step([*ids, *new], tap, None, start=0)
        return new

    def unembed(self, resid: NDArray[np.float32], tokens: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Final norm, then W_U: resid (..., d_model) -> logits (..., d_vocab), or those of `tokens`.

        Raises LayerscopeError where the architecture has no row and its final norm could not be told.
        """
        import torch

        if not self._row.final_norm:
            raise LayerscopeError(f"{self.info.name} ({self.info.architecture}) cannot be read through a logit lens: {NO_UNEMBED}.")

        norm, unembed = self._model.get_submodule(self._row.final_norm), self._model.get_submodule(self._row.unembed)
        rows = np.ascontiguousarray(resid, dtype=np.float32).reshape(-1, resid.shape[-1])
        # `forward`, not a call: while a run is on, hooks hang at these modules, and would hand out (or edit) this as if it were the run's.
        with _no_grad():
            # The pieces of a run, so that the last layer's lens and the model's own logits agree to the bit.
            pieces = [torch.from_numpy(rows[i : i + PIECE]).to(self.device, self._model.dtype) for i in range(0, len(rows), PIECE)]
            if tokens is None:
                logits = [unembed.forward(norm.forward(piece[None]))[0] for piece in pieces]
            else:
                chosen = torch.from_numpy(tokens.copy()).to(self.device)
                bias = None if unembed.bias is None else unembed.bias[chosen]
                logits = [torch.nn.functional.linear(norm.forward(piece[None])[0], unembed.weight[chosen], bias) for piece in pieces]
            ended = [to_numpy(finished(self._row, self._model.config, piece)) for piece in logits]
        whole = ended[0] if len(ended) == 1 else np.concatenate(ended)
        return whole.reshape(*resid.shape[:-1], -1)

    def nodes(self) -> list[NativeTensor]:
        """Every module below the model, by its path."""
        return listed(self._model)

    def weight(self, name: str, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """A weight by its canonical name, a float32 copy, (out, in); experts (expert, out, in); of its first axis `rows` only. Raises LayerscopeError."""
        return self._found(name).read(rows)

    def perturbed(self, changes: Sequence[WeightChange]) -> AbstractContextManager[tuple[Written, ...]]:
        """See EditsWeights.perturbed. Weights that bitsandbytes packs are refused by name."""
        return perturbed([self._found(change.name) for change in changes], changes)

    def code_bits(self, name: str) -> int:
        """See EditsWeights.code_bits."""
        return self._found(name).code_bits

    def gradients(self, names: Sequence[str]) -> Gradients:
        """Backward passes of the loss over windows of tokens, for the weights of these canonical names; see hf_gradients. Raises as `weight` does."""
        return Gradients(self._model, self._row, self.info, min(self.n_ctx, WHOLE_LIMIT), [self._found(name) for name in names])

    def expert_inputs(self, ids: list[int], layers: Sequence[int], on_rows: OnRows, should_stop: ShouldStop = never_stop) -> None:
        """See ShowsExpertInputs."""
        parameters = {layer: self._found(f"blocks.{layer}.mlp.experts.W_out").parameters[0] for layer in layers}
        with one_by_one(self._model), watching_products(self.info, parameters, len(ids) * self.info.n_experts_used, on_rows):
            self.run(ids, Request(()), no_sink, should_stop=should_stop)

    def _found(self, name: str) -> Found:
        return find_weight(self._model, self._row, self.info, name)

    def graph(self, n_tokens: int = GRAPH_TOKENS) -> ModelGraph:
        """The operators that PyTorch runs for `n_tokens` tokens, modules without children as one node each; see Engine.graph."""
        import torch

        check_request(self.info, self.places, Request(()), [0] * n_tokens, min(self.n_ctx, PIECE))
        tap, recorder = Tap(self.info, Request(()), no_sink, (), never_stop, n_tokens), Recorder(self._model, self._row)
        ids = torch.zeros((1, n_tokens), dtype=torch.int64, device=self.device)
        with _no_grad(), installed(self._model, self._row, tap, ()), recorder.watching(self._model):
            self._model(input_ids=ids, use_cache=False)
        info, modules = self.info, recorder.modules(self._model)
        return ModelGraph(info.name, info.architecture, "hf", self.version, info.n_layers, n_tokens, EDGES, recorder.finished(self._row, self.places), modules)

    def close(self) -> None:
        """Free the model and, on a GPU, the memory that PyTorch keeps for reuse."""
        import torch

        self._model = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_edits(self, edits: tuple[Intervention, ...], n_tokens: int) -> None:
        for edit in edits:
            edit.check(self.info, n_tokens)
        check_edits(self.info, self.places, edits)
        for site, layer in edits_by_place(edits):
            place = self._row.places.get(site)
            if place is not None and place.collected:
                raise LayerscopeError(f"{self.info.name} ({self.info.architecture}) has no site {site!r}{'' if layer is None else f' in layer {layer}'} to edit.")

    def _cache(self) -> Any:
        """A cache of every key: a sliding-window cache drops keys, and then positions would shift under edits and captures."""
        from transformers import DynamicCache

        return DynamicCache()

    def _prefill(self, ids: list[int], tap: Tap, cache: Any, size: int) -> NDArray[np.float32]:
        """Run the prompt in pieces of `size` tokens; returns the last position's logits (d_vocab,)."""
        for start in range(0, len(ids), size):
            logits = self._step(ids[start : start + size], tap, cache, start)
        return logits

    def _outputs(self, tap: Tap) -> dict[str, Any]:
        """What the pass is asked to put out: all logits only where they are looked at, and patterns where eager attention has to make them."""
        pattern = self._row.places.get("attn_pattern")
        eager = pattern is not None and pattern.collected and "attn_pattern" in tap.request.sites
        outputs: dict[str, Any] = {"output_attentions": True} if eager else {}
        if "logits_to_keep" in self._forward_arguments:
            outputs["logits_to_keep"] = 0 if tap.request.native or tap.touches("logits", None) else 1
        return outputs

    def _step(self, ids: list[int], tap: Tap, cache: Any, start: int) -> NDArray[np.float32]:
        """One forward pass over the tokens at positions `start` and on; returns the last one's logits (d_vocab,)."""
        import torch

        tap.start = start
        output = self._model(
            input_ids=torch.tensor([ids], device=self.device),
            past_key_values=cache,
            use_cache=cache is not None,
            **self._outputs(tap),
        )
        return np.asarray(to_numpy(output.logits[0, -1]))


def _piece(edits: tuple[Intervention, ...], ids: list[int]) -> int:
    return len(ids) if any(edit.spans_positions for edit in edits) else PIECE


def _no_grad() -> Any:
    import torch

    return torch.no_grad()


def _load(path: Path, device: torch.device, dtype: torch.dtype | str, known: bool, placed: dict[str, Any]) -> Any:
    """The model in memory, every tensor accounted for: transformers fills a missing one with random numbers and goes on.

    known: whether the architecture has a row, and goes through transformers' attention interface; if not, hf_generic decides about that.
    Experts are computed as transformers does by default on a CPU, where that was tested: all of them in one product, 1.5 times as fast as one by one.
    placed: hf_placement.arguments; with any, transformers and accelerate put the weights where they belong, and they stay there.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from backend.engines.hf_attention import NAME, register

    register()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=NAME if known else "eager", experts_implementation=None if device.type == "cpu" else "eager", use_safetensors=True,
            local_files_only=True, trust_remote_code=False, output_loading_info=True, **placed, ignore_mismatched_sizes=True,  # reported, and refused below by name
        )  # fmt: skip
    except Exception as error:  # transformers and safetensors raise what they like on a damaged folder; the cause is kept
        raise LayerscopeError(f"{path.name} cannot be loaded: {first_line(error)}.") from error
    model, report = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[what])
            raise LayerscopeError(f"{path.name} does not fit its config.json: {len(names)} {what.removesuffix('_keys')} tensor{'s' * (len(names) > 1)}, the first {names[0]}.")
    return (model if placed else model.to(device)).eval()


def _device(name: str) -> torch.device:
    """auto: the GPU where there is one. Raises LayerscopeError for a device that this machine lacks."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LayerscopeError(f"There is no device {name[:40]!r} here: {first_line(error)}.") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def _eos_ids(path: Path) -> set[int]:
    """Every end-of-sequence id: a chat model's generation_config.json may name more of them than its tokenizer."""
    ids: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        if (path / file).is_file():
            value = read_json(path / file, CONFIG_LIMIT).get("eos_token_id")
            ids |= {i for i in (value if isinstance(value, list) else [value]) if type(i) is int}
    return ids

"""Layerscope's backend, and its public Python API: open_model, open_trace, open_weights.

    from backend import open_model
    model = open_model("demo-dense")
    trace = model.trace("The capital of France is", sites=["resid_post", "attn_pattern"])
    trace["attn_pattern", 3]            # float32 (head, q_pos, k_pos)

It works without the server, the queue and Dash. Nothing heavy is imported before a model is opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from backend.engines import Engine
    from backend.engines.native import NativeTensor
    from backend.intervention import Intervention
    from backend.library import Library
    from backend.model_info import ModelInfo
    from backend.reports.attribution import Attribution
    from backend.reports.model_graph import ModelGraph
    from backend.reports.quantization_report import QuantizationReport
    from backend.trace import Trace
    from backend.weights import Weights

__all__ = ["Intervention", "Library", "Model", "Sampling", "attribute", "compare_quantization", "open_model", "open_trace", "open_weights", "quantize"]


class Model:
    """An opened model. Use as a context manager, or close() to free it."""

    def __init__(self, engine: Engine, traces_dir: Path) -> None:
        self.engine, self._traces_dir = engine, traces_dir

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    @property
    def sites(self) -> list[str]:
        """Names of the sites this model has, in the order of the vocabulary."""
        from backend.sites import SITES

        return [name for name in SITES if name in self.engine.sites]

    def nodes(self) -> list[NativeTensor]:
        """What `sites=["native:NAME"]` can name: every node of the graph (GGUF) or every module (HF), with what makes it."""
        return self.engine.nodes()

    def trace(self, prompt: str | None = None, *, tokens: Sequence[int] | None = None, sites: Sequence[str] | None = None,
              layers: Sequence[int] | None = None, heads: Sequence[tuple[int, int]] | None = None, rows: tuple[int, int] | None = None,
              max_new_tokens: int = 0, interventions: Sequence[Intervention] = (),
              category: str = "", tags: Sequence[str] = (), precision: Literal["float16", "float32"] = "float16",
              out: str | Path | None = None, sampling: Any = None, progress: Any = None, listener: Any = None) -> Trace:  # fmt: skip
        """Run a prompt (or token ids) and return its trace, published in the traces folder or in the folder `out`.

        sites: names or aliases (None: the standard set), and native tensors as "native:NAME" (see `nodes`); layers: which layers (None: all).
        heads: (layer, head) pairs, and rows: query positions from rows[0] to before rows[1], limit what is kept of attention maps: what a
        long prompt needs. precision "float32" stores every value as computed. listener: told each new token as it is written, and may end the
        generation (backend.experiments.generation.Listener). Raises LayerscopeError in one sentence for anything the caller can mend.
        """
        from backend.engines import Sampling
        from backend.errors import LayerscopeError
        from backend.experiments import no_progress
        from backend.experiments.capture import CaptureSpec, capture
        from backend.trace import Trace

        if (prompt is None) == (tokens is None):
            raise LayerscopeError("Give either a prompt or tokens.")
        spec = CaptureSpec(
            prompt=prompt or "",
            token_ids=tuple(int(t) for t in tokens) if tokens is not None else None,
            sites=tuple(sites) if sites is not None else None,
            layers=tuple(layers) if layers is not None else None,
            heads=tuple((int(layer), int(head)) for layer, head in heads) if heads is not None else None,
            rows=(int(rows[0]), int(rows[1])) if rows is not None else None,
            max_new_tokens=max_new_tokens,
            sampling=sampling or Sampling(),
            interventions=tuple(interventions),
            category=category,
            tags=tuple(tags),
            precision=precision,
        )
        return Trace(capture(self.engine, spec, Path(out) if out else self._traces_dir, progress=progress or no_progress, listener=listener))

    def graph(self, n_tokens: int = 8) -> ModelGraph:
        """Every node of one forward pass as it is really executed, with its sources; see backend.reports.model_graph."""
        return self.engine.graph(n_tokens)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_model(source: str | Path, engine: str | None = None, device: str = "auto", n_gpu_layers: int | Literal["auto"] = "auto",
               n_ctx: int | None = None, kv_cache: Literal["f16", "f32"] = "f16", dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
               quantize: Literal["none", "int8", "nf4"] = "none", device_map: Literal["none", "auto"] = "none", editable_weights: bool = False) -> Model:  # fmt: skip
    """Load a model: a preset name, a .gguf file, a folder of safetensors, or a hub id that is in the local cache.

    kv_cache "f32" is for exact comparisons of GGUF with HF. For folders: quantize stores the weights in 8 or 4 bits (bitsandbytes, a CUDA
    device), device_map "auto" spreads them over the devices there are (accelerate). editable_weights: of a GGUF file, so that `engine.perturbed` can write
    them; folders always can. Raises LayerscopeError if the model cannot be found,
    read or fitted into memory.
    """
    from backend.engines import OpenOptions, open_engine
    from backend.estimate import check_model_fits
    from backend.model_files import describe

    settings = _settings()
    shelf = _shelf(settings)
    entry = shelf.resolve(str(source), confined=False)
    path = shelf.ready(entry)
    options = OpenOptions(device=device, n_gpu_layers=n_gpu_layers, n_ctx=n_ctx, n_threads=settings.n_threads, kv_cache=kv_cache, dtype=dtype,
                          quantize=quantize, device_map=device_map, editable_weights=editable_weights)  # fmt: skip
    if (quantize, device_map) == ("none", "none"):  # else the weights go to devices that answer for themselves
        check_model_fits(describe(path), device)
    opened = open_engine(path, options, engine)
    # The shelf's name is the one by which the trace's model can be opened again.
    opened.info = dataclasses.replace(opened.info, name=entry.name)
    return Model(opened, settings.traces_dir)


def open_trace(path_or_id: str | Path) -> Trace:
    """Open a trace by its file, or by its id in the traces folder. Raises LayerscopeError if there is none."""
    from backend.trace import Trace
    from backend.tracefile.trace_layout import ID_PATTERN, SUFFIX

    path = Path(path_or_id)
    if not path.exists() and ID_PATTERN.fullmatch(str(path_or_id)):
        path = _settings().traces_dir / f"{path_or_id}{SUFFIX}"
    return Trace(path)


def open_weights(source: str | Path) -> Weights:
    """The weights of a model, by canonical name, read lazily: open_weights("model.gguf")["blocks.1.mlp.W_out"] is float32 (out, in)."""
    from backend.weights import open_weights as open_files

    return open_files(_shelf(_settings()).path_for(str(source)))


def attribute(trace: Trace, token: str | int | None = None, against: str | int | None = None, position: int = -1) -> Attribution:
    """Direct logit attribution: what every head, MLP, bias and embedding adds to a logit, the final norm's scale frozen.

    token, against: an id, or the text of one token with its leading space; token None: the most probable; against: its logit is taken off.
    Nothing is run: activations come from the trace, W_O and W_U from the model's file. Raises LayerscopeError for a text that is not one
    token, a position outside or a model that is gone; SiteNotCaptured where the trace lacks a site that it needs.
    """
    from backend.readout import open_readout
    from backend.reports import attribution

    path = _model_path(trace)
    readout = open_readout(path)
    at = attribution.checked(trace, readout, position, 0, None)
    chosen = int(trace.top_ids[at, 0]) if token is None else _token_id(trace, path, token)
    return attribution.attribute(trace, readout, at, chosen, None if against is None else _token_id(trace, path, against))


def _model_path(trace: Trace) -> Path:
    """The model's file: by its name on the shelf, else where it lay when the trace was made."""
    from backend.errors import LayerscopeError

    shelf = _shelf(_settings())
    try:
        return shelf.path_for(trace.info.name)
    except LayerscopeError:
        return shelf.path_for(trace.info.source)


def _token_id(trace: Trace, path: Path, token: str | int) -> int:
    """The id of a token by its text: from the trace where it occurs there once, else from the model's tokenizer."""
    from backend.errors import LayerscopeError

    if isinstance(token, int):
        return token
    known = [i for i, text in trace.vocabulary.items() if text == token]
    if len(known) == 1:
        return known[0]
    with open_model(path) as model:
        ids = model.engine.tokenize(token, add_bos=False)
        if len(ids) != 1:
            parts = ", ".join(repr(part) for part in model.engine.token_texts(ids[:8]))
            raise LayerscopeError(f"{token!r} is {len(ids)} tokens in this model ({parts}); name one token." if ids else "The token is empty; name one, for example ' Paris'.")
    return ids[0]


def compare_quantization(model: str | Path, reference: str | Path, prompts: str | Sequence[str], *, sites: Sequence[str] | None = None,
                         device: str = "auto", progress: Any = None) -> QuantizationReport:  # fmt: skip
    """What quantization did to a model: its weights, its activations layer by layer, its predictions, against an unquantized reference.

    model, reference: as for open_model; one is closed before the other is opened. sites None: all that both have. Raises
    LayerscopeError if the two are not the same model.
    """
    from backend.experiments import no_progress
    from backend.experiments.quantization import ENGINE_OPTIONS, Side, compare
    from backend.model_files import describe

    settings = _settings()
    shelf = _shelf(settings)

    def side(source: str | Path) -> Side:
        entry = shelf.resolve(str(source), confined=False)
        path = shelf.ready(entry)

        @contextmanager
        def opened() -> Iterator[Engine]:
            with open_model(source, device=device, **ENGINE_OPTIONS) as found:
                yield found.engine

        return Side(dataclasses.replace(describe(path), name=entry.name), path, opened)

    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    return compare(side(model), side(reference), asked, settings.traces_dir, sites=sites, progress=progress or no_progress)


def quantize(source: str | Path, type: str, out: str | Path | None = None, imatrix: str | Path | None = None) -> Path:
    """Make a quantized GGUF variant of an unquantized model with llama.cpp's own quantizer; returns its path.

    type: llama.cpp's name, such as "Q4_K_M". out None: beside the source. Raises LayerscopeError, also when `out` exists.
    """
    from backend.files.quantizer import default_output
    from backend.files.quantizer import quantize as run

    path = _shelf(_settings()).path_for(str(source))
    target = Path(out) if out is not None else default_output(path, type)
    run(path, target, type, Path(imatrix) if imatrix is not None else None)
    return target


def _settings() -> Any:
    from config import load_settings

    return load_settings()


def _shelf(settings: Any) -> Any:
    from backend.model_files import Shelf

    return Shelf.from_settings(settings)


def __getattr__(name: str) -> Any:
    """Intervention, Sampling and Library, imported when first asked for."""
    if name == "Intervention":
        from backend.intervention import Intervention

        return Intervention
    if name == "Sampling":
        from backend.engines import Sampling

        return Sampling
    if name == "Library":
        from backend.library import Library

        return Library
    raise AttributeError(f"module 'backend' has no attribute {name!r}")

"""Capture: run a prompt once with instruments attached and publish one trace.

Generated tokens come first, without capture; then prompt and generated tokens run together once, so every step's state is one
position of one square trace. Each piece goes from the engine through the integrity check to disk and is forgotten: memory does not grow
with the number of layers.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis import attention as attention_analysis
from backend.analysis import logits as logits_analysis
from backend.analysis.held_copies import HeldCopies, measured
from backend.analysis.identities import HELD, Identities, tolerances
from backend.compute.halves import in_halves
from backend.engines import Engine, Piece, Request, Sampling, ShouldStop, never_stop
from backend.engines.native import NativePiece
from backend.engines.threads import trim_heap
from backend.errors import LayerscopeError
from backend.experiments import Context, Progress, no_progress
from backend.experiments.between import sink_for
from backend.experiments.generation import Listener, write_tokens
from backend.experiments.logit_lens import AUTO_BUDGET, compute_lens, cost, lens_rows
from backend.intervention import Intervention, edits_by_place
from backend.notes import notes
from backend.prompt_text import check_label
from backend.sites import ALL_SITES, NATIVE, SITES, STANDARD_SITES, resolve_sites, split_native
from backend.tracefile.trace_writer import TraceWriter

TOP_K = 20
_LAYERS_UNTRIMMED = 16  # trimming after each fourth took a tenth of a run of 16 layers, for pages that the next layer wants again
THUMBNAIL_SIZE = 48
# Free disk left untouched by a capture, on top of the trace's own estimated size.
DISK_RESERVE = 256 << 20


@dataclass(frozen=True)
class CaptureSpec:
    """What to run and what to keep."""

    prompt: str = ""
    token_ids: tuple[int, ...] | None = None  # instead of the prompt's text
    sites: tuple[str, ...] | None = None  # None: STANDARD_SITES, as far as the model has them; "native:NAME" too
    layers: tuple[int, ...] | None = None
    heads: tuple[tuple[int, int], ...] | None = None  # (layer, head) pairs whose attention maps are kept; None: all
    rows: tuple[int, int] | None = None  # query positions of the attention maps that are kept, first to before last; None: all
    max_new_tokens: int = 0
    sampling: Sampling = Sampling()
    interventions: tuple[Intervention, ...] = ()
    category: str = ""
    tags: tuple[str, ...] = ()
    precision: str = "float16"
    lens: bool | None = None  # None: if it costs less than AUTO_BUDGET


def capture(engine: Engine, spec: CaptureSpec, folder: Path, *, progress: Progress = no_progress, should_stop: ShouldStop = never_stop,
            trace_id: str | None = None, listener: Listener | None = None) -> Path:  # fmt: skip
    """Run `spec` on `engine` and publish the trace in `folder`; returns its path. `listener` hears of each new token, and may say enough.

    Raises LayerscopeError for anything the user can mend (nothing is left on disk), Cancelled when should_stop() says so.
    """
    started = time.perf_counter()
    check_label(spec.category, "The category")
    for tag in spec.tags:
        check_label(tag, "A tag")
    prompt_ids = list(spec.token_ids) if spec.token_ids is not None else _tokenize(engine, spec.prompt)
    request = _request(engine, spec)
    native = [NATIVE + name for name in request.native]
    timings: dict[str, float] = {}
    ids = prompt_ids
    for edit in spec.interventions:
        edit.check(engine.info, len(prompt_ids) + spec.max_new_tokens)
    edits = tuple(edit.from_prompt_end(len(prompt_ids)) for edit in spec.interventions)
    if spec.max_new_tokens:
        ids = prompt_ids + write_tokens(engine, prompt_ids, spec.max_new_tokens, spec.sampling, edits, listener, progress, should_stop)
        if listener is not None and listener.enough():
            spec = replace(spec, max_new_tokens=len(ids) - len(prompt_ids))  # what makes this trace again
        timings["generate_s"] = time.perf_counter() - started
    _check_disk(engine, request, len(ids), folder, spec.precision)
    with _quiet(), TraceWriter(folder, engine.info, len(ids), spec.precision, trace_id, spec.rows) as writer, ExitStack() as stack:
        logits = stack.enter_context(_LogitStore(len(ids), engine.info.d_vocab, folder)) if _wants_lens(engine, spec, request, len(ids)) else None
        run = _Run(engine, edits, ids, writer, logits, progress, keep_logits="logits" in request.sites)
        mark = time.perf_counter()
        with sink_for(engine, run.take) as taking:

            def sink(piece: Piece) -> None:
                kept = request.cut(piece)
                if kept is not None:
                    taking.put(kept)

            engine.run(ids, replace(request, sites=(*request.sites, "logits")), sink, edits, should_stop)
            timings["run_s"] = time.perf_counter() - mark
        vocabulary = _write_summaries(engine, run, writer, logits, ids, progress, should_stop, timings)
        progress("publishing", 0, 1)
        texts = engine.token_texts(ids)
        special = [i for i, token in enumerate(ids) if token in (engine.info.bos_id, engine.info.eos_id)]
        writer.tokens(ids, texts, len(prompt_ids), special)
        writer.vocabulary(dict(zip(sorted(vocabulary), engine.token_texts(sorted(vocabulary)), strict=True)))
        timings["total_s"] = time.perf_counter() - started
        path = writer.publish(
            engine_version=engine.version,
            category=spec.category,
            tags=spec.tags,
            prompt=spec.prompt if spec.token_ids is None else engine.detokenize(prompt_ids),
            response=engine.detokenize(ids[len(prompt_ids) :]),
            generation={"max_new_tokens": spec.max_new_tokens, **asdict(spec.sampling)},
            interventions=[edit.to_json() for edit in spec.interventions],
            capture={**request.to_json(), "sites": [*request.sites, *native], "precision": spec.precision},
            timings={name: round(value, 4) for name, value in timings.items()},
            integrity=run.identities.report(),
            notes=notes(engine.info, len(ids)),
            command=command_line(engine.info.name, spec),
        )
        progress("publishing", 1, 1)
    return path


def _quiet() -> np.errstate:
    """Broken weights give NaN and infinities: the integrity report names them, so NumPy need not warn of each. A setting of each thread's own."""
    return np.errstate(invalid="ignore", over="ignore")


class _Run:
    """Receives the pieces of one forward pass: checks them, stores them, and computes what needs the full-precision values."""

    def __init__(self, engine: Engine, edits: tuple[Intervention, ...], ids: list[int], writer: TraceWriter, logits: _LogitStore | None,
                 progress: Progress, keep_logits: bool) -> None:  # fmt: skip
        self.ids, self.writer, self.logits, self.progress, self.keep_logits = ids, writer, logits, progress, keep_logits
        self._links, self._cell = attention_analysis.Links(ids), attention_analysis.thumbnail_cell(len(ids), THUMBNAIL_SIZE)
        self._predictions: list[dict[str, NDArray[Any]]] = []
        self.identities = Identities(engine.info, weight=_weight_or_none(engine), unembed=None if "unembed" in engine.unchecked else engine.unembed,
                                     edited=edits_by_place(edits), limits=tolerances(engine.info.engine, engine.compute), unchecked=engine.unchecked,
                                     shared=layers_with_shared_expert(engine))  # fmt: skip
        self._copies = HeldCopies()
        self.n_layers, self._n_heads = engine.info.n_layers, engine.info.n_heads
        self._heads: dict[int, list[int]] = {}  # of each layer, those whose maps are kept
        self._means: dict[int, attention_analysis.RowMeans] = {}
        self.thumbs: dict[int, NDArray[np.uint8]] = {}
        self._layer, self._trims = -1, engine.info.engine == "hf"  # llama.cpp has its activations in memory of its own
        self._piece = 0  # positions in the first piece: as many as in every other but the last

    @_quiet()
    def take(self, piece: Piece) -> None:
        """Check, store and summarise one piece, whose values may be lent."""
        if isinstance(piece, NativePiece):
            self.writer.native(piece)
            return
        if piece.layer is not None and piece.layer != self._layer:
            self._layer = piece.layer
            if self._trims and piece.layer and piece.layer % _LAYERS_UNTRIMMED == 0:
                trim_heap()
            self._tell(piece.layer, piece.start, piece.values.shape[1 if SITES[piece.site].is_attention_map else 0])
        read = attention_analysis.read_pattern(piece.values, piece.start, self._cell) if piece.site == "attn_pattern" else None
        largest = None
        if read is None:
            copy = piece.site in HELD and not piece.owned
            values, largest = measured(piece.values, self._copies.of(piece.site, piece.layer) if copy else None)
            piece = replace(piece, values=values, owned=True) if copy else piece
        self.identities.add(piece.site, piece.layer, piece.values, piece.start, read, largest)
        if piece.site == "logits":
            self._predictions += summaries(piece.values, piece.start, self.ids)
            if self.logits is not None:
                self.logits.put(piece.start, piece.values)
            if not self.keep_logits:
                return
        self.writer.write(piece, causal=None if read is None else not read.beyond.any(), largest=largest)
        if read is not None and piece.layer is not None:
            self._head_summaries(piece.layer, piece, read)

    def _tell(self, layer: int, start: int, n_here: int) -> None:
        """Progress in layers; a long prompt goes through all of them once a piece."""
        self._piece = self._piece or n_here
        pieces = -(-len(self.ids) // self._piece)
        self.progress("running", start // self._piece * self.n_layers + layer + 1, pieces * self.n_layers)

    def _head_summaries(self, layer: int, piece: Piece, read: attention_analysis.PatternRows) -> None:
        means = self._means.setdefault(layer, attention_analysis.RowMeans())
        means.add(attention_analysis.row_scores(piece.values, self.ids, piece.start, self._links, read))
        thumbs = self.thumbs.setdefault(layer, _blank_thumbnails(self._n_heads, len(self.ids)))
        self._heads[layer] = list(piece.heads or range(self._n_heads))
        painted = thumbs[self._heads[layer]]
        attention_analysis.add_to_thumbnails(painted, piece.values, piece.start, len(self.ids), THUMBNAIL_SIZE, read)
        thumbs[self._heads[layer]] = painted

    def predictions(self) -> dict[str, NDArray[Any]]:
        """The datasets of /logits in FORMAT.md, over all pieces."""
        joined = {name: np.concatenate([part[name] for part in self._predictions]) for name in self._predictions[0]}
        joined["next_logprobs"][-1], joined["next_ranks"][-1] = np.nan, -1  # nothing follows the last token
        return joined

    def head_metrics(self) -> dict[int, dict[str, NDArray[np.float32]]]:
        """Layer -> metric -> (head,), over all pieces; NaN for a head that was left out."""
        every: dict[int, dict[str, NDArray[np.float32]]] = {}
        for layer, means in sorted(self._means.items()):
            every[layer] = {name: np.full(self._n_heads, np.nan, np.float32) for name in attention_analysis.METRICS}
            for name, values in means.means().items():
                every[layer][name][self._heads[layer]] = values
        return every


def summaries(logits: NDArray[np.float32], start: int, ids: list[int]) -> list[dict[str, NDArray[Any]]]:
    """`logits.summary` of the positions from `start` on, in two halves: nothing else runs any more at the end of a prompt."""
    following = np.asarray([*ids[start + 1 : start + 1 + len(logits)], 0][: len(logits)])
    found: dict[int, dict[str, NDArray[Any]]] = {}

    @_quiet()
    def of(rows: slice) -> None:
        found[rows.start] = logits_analysis.summary(logits[rows], following[rows], TOP_K)

    in_halves(of, len(logits))
    return [found[first] for first in sorted(found)]


def _wants_lens(engine: Engine, spec: CaptureSpec, request: Request, n_tokens: int) -> bool:
    """As the spec says; else where the logit lens costs less than AUTO_BUDGET. It needs two rows at least, and a way from the stream to logits."""
    if "unembed" in engine.unchecked:
        return False
    n_rows = len(lens_rows(lambda site, layer: request.wants(site, layer), engine.info.n_layers))
    affordable = cost(n_rows, n_tokens, engine.info.d_model, engine.info.d_vocab) <= AUTO_BUDGET
    return n_rows > 1 and (affordable if spec.lens is None else spec.lens)


def _write_summaries(engine: Engine, run: _Run, writer: TraceWriter, logits: _LogitStore | None, ids: list[int], progress: Progress,
                     should_stop: ShouldStop, timings: dict[str, float]) -> set[int]:  # fmt: skip
    """Logit summaries, head metrics and lens; returns the token ids that they mention."""
    vocabulary = set(ids)
    summary = run.predictions()
    writer.logits(summary)
    vocabulary.update(summary["top_ids"].ravel().tolist())
    metrics = run.head_metrics()
    if metrics:
        layers = list(metrics)
        for name in metrics[layers[0]]:
            writer.result(f"attn_{name}", np.stack([metrics[layer][name] for layer in layers]), ("layer", "head"), layers=layers)
        writer.result("attn_thumbs", np.stack([run.thumbs[layer] for layer in layers]), ("layer", "head", "t", "t"), layers=layers)
    if logits is not None:
        mark = time.perf_counter()
        rows = lens_rows(writer.has, engine.info.n_layers)
        results = compute_lens(engine, writer, logits.values, ids, rows, progress=progress, should_stop=should_stop)
        for name, values in results.items():
            writer.result(name, values, ("row", "pos", "k")[: values.ndim], rows=rows)
        vocabulary.update(results["lens_top_ids"].ravel().tolist())
        timings["lens_s"] = time.perf_counter() - mark
    return {int(i) for i in vocabulary}


def _weight_or_none(engine: Engine) -> Callable[[str, NDArray[np.int64]], NDArray[np.float32] | None]:
    """The engine's weights for the integrity check; None for a tensor that the architecture does not have."""

    def weight(name: str, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        try:
            return engine.weight(name, rows)
        except LayerscopeError:
            return None

    return weight


def layers_with_shared_expert(engine: Engine) -> set[int]:
    return {layer for site, layer in engine.places if site == "shared_expert_out" and layer is not None}


def _blank_thumbnails(n_heads: int, n_tokens: int) -> NDArray[np.uint8]:
    side = attention_analysis.thumbnail_side(n_tokens, THUMBNAIL_SIZE)
    return np.zeros((n_heads, side, side), np.uint8)


class _LogitStore:
    """The run's logits (pos, d_vocab) until the lens is computed: in memory, or in an unlinked file when they are large."""

    MEMORY_LIMIT = 256 << 20

    def __init__(self, n_tokens: int, d_vocab: int, folder: Path) -> None:
        self._file: Any = None
        shape = (n_tokens, d_vocab)
        if 4 * n_tokens * d_vocab <= self.MEMORY_LIMIT:
            self.values: NDArray[np.float32] = np.full(shape, np.nan, dtype=np.float32)
        else:
            self._file = tempfile.TemporaryFile(dir=folder)
            self.values = np.memmap(self._file, dtype=np.float32, mode="w+", shape=shape)

    def put(self, start: int, rows: NDArray[np.float32]) -> None:
        self.values[start : start + rows.shape[0]] = rows

    def __enter__(self) -> _LogitStore:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _tokenize(engine: Engine, prompt: str) -> list[int]:
    if not prompt:
        raise LayerscopeError("The prompt is empty; type at least one character.")
    return engine.tokenize(prompt)


def _request(engine: Engine, spec: CaptureSpec) -> Request:
    """The sites that are stored: those named (which must exist), "all" that the model has, or the standard ones as far as it has them."""
    layers = tuple(sorted(set(spec.layers))) if spec.layers is not None else None
    named = spec.sites not in (None, (ALL_SITES,))
    names, native = split_native(spec.sites or ())
    if names == (ALL_SITES,):
        sites = tuple(site for site in SITES if site != "logits" and _has(engine, site, layers))
    elif spec.sites is None:
        sites = tuple(site for site in STANDARD_SITES if _has(engine, site, layers))
    else:
        sites = tuple(site for site in resolve_sites(names) if not SITES[site].derived)
        if any(SITES[s].derived for s in resolve_sites(names)):
            sites = resolve_sites({*sites, *(need for s in resolve_sites(names) for need in _NEEDS.get(s, ()))})
    if spec.max_new_tokens < 0:
        raise LayerscopeError(f"The number of new tokens is {spec.max_new_tokens}; it must be 0 or more.")
    heads = tuple(sorted(set(spec.heads))) if spec.heads is not None else None
    return Request(sites, layers, heads, spec.rows, exact=named, native=native)


def _has(engine: Engine, site: str, layers: tuple[int, ...] | None) -> bool:
    """Whether the model has the site, in any of the layers if some are named."""
    return any(name == site and (at is None or layers is None or at in layers) for name, at in engine.places)


def command_line(model: str, spec: CaptureSpec) -> list[str]:
    """The command that makes this trace again; [] for edits and bare token ids, which the command line cannot say."""
    if spec.interventions or spec.token_ids is not None:
        return []
    words = ["python", "-m", "backend", "trace", "--model", model, "--prompt", spec.prompt]
    plain, sampling = CaptureSpec(), asdict(spec.sampling)
    options = {"max-new-tokens": (spec.max_new_tokens, 0), "category": (spec.category, ""), "precision": (spec.precision, plain.precision)}
    options |= {name.replace("_", "-"): (value, asdict(plain.sampling)[name]) for name, value in sampling.items()}
    options |= {"sites": (",".join(spec.sites or ()), ""), "layers": (",".join(map(str, spec.layers or ())), "")}
    options |= {"heads": (",".join(f"{layer}.{head}" for layer, head in spec.heads or ()), "")}
    options |= {"rows": (f"{spec.rows[0]}-{spec.rows[1] - 1}" if spec.rows else "", "")}
    for name, (value, default) in options.items():
        words += [f"--{name}", str(value)] if value != default else []
    return words + [word for tag in spec.tags for word in ("--tag", tag)]


# What has to be stored so that a derived site can be read.
_NEEDS = {"resid_pre": ("embed", "resid_post"), "result": ("z",)}


def _check_disk(engine: Engine, request: Request, n_tokens: int, folder: Path, precision: str) -> None:
    from backend.estimate import trace_bytes

    folder.mkdir(parents=True, exist_ok=True)
    need = trace_bytes(engine.info, n_tokens, request.sites, request.layers, precision, heads=request.heads, rows=request.rows)
    free = shutil.disk_usage(folder).free
    if need + DISK_RESERVE > free:
        raise LayerscopeError(f"The trace needs about {need / 1e6:,.0f} MB and {DISK_RESERVE / 1e6:,.0f} MB are kept free, but {folder} has {free / 1e6:,.0f} MB left.")


def capture_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: the parameters of a capture as JSON -> {"trace_id": id}."""
    context.progress("loading model", 0, 1)
    engine = context.engine(params["model"], {})
    context.progress("loading model", 1, 1)
    path = capture(engine, spec_of(params), context.traces_dir, progress=context.progress, should_stop=context.should_stop)
    context.library.add(path)
    return {"trace_id": path.stem}


def spec_of(params: dict[str, Any]) -> CaptureSpec:
    """The parameters of a capture as a job has them."""
    return CaptureSpec(
        prompt=params.get("prompt", ""),
        sites=tuple(params["sites"]) if params.get("sites") else None,
        layers=tuple(params["layers"]) if params.get("layers") else None,
        heads=tuple((int(layer), int(head)) for layer, head in params["heads"]) if params.get("heads") else None,
        rows=(int(params["rows"][0]), int(params["rows"][1])) if params.get("rows") else None,
        max_new_tokens=int(params.get("max_new_tokens", 0)),
        sampling=Sampling(**{name: params[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed") if name in params}),
        category=params.get("category", ""),
        tags=tuple(params.get("tags", ())),
        precision=params.get("precision", "float16"),
    )

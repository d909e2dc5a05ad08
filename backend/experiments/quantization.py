"""Quantization: what it did to a model's weights, to its activations layer by layer, and to its predictions.

A quantized model is held against a reference, the same model as an F16 or F32 GGUF file or a Hugging Face folder. Weights are
compared by canonical name, streamed from the files. Then the reference runs over the prompts and leaves its activations on disk; it
is closed before the other opens and runs over the same tokens, each layer compared as it appears. Key/value caches are float32 in
both, so that what differs is the weights and the kernels that multiply with them.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis import divergence
from backend.analysis.logits import row_blocks
from backend.analysis.quantization import ErrorSums, prediction_shift
from backend.engines import Engine, Piece, Request, ShouldStop, never_stop
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Context, Progress, no_progress
from backend.experiments.activation_store import ActivationStore, Key, feature_rows, stored_bytes
from backend.experiments.aside import Aside
from backend.experiments.capture import DISK_RESERVE
from backend.model_files import describe, fingerprint
from backend.model_info import ModelInfo
from backend.reports.quantization_report import Place, PromptResult, QuantizationReport, facts, report_key
from backend.sites import SITES, resolve_sites
from backend.weights import Weight, Weights, open_weights

ENGINE_OPTIONS: dict[str, Any] = {"kv_cache": "f32"}
MAX_PROMPTS = 256
_BLOCK_CELLS = 1 << 19  # values of a weight in one block of rows: 4 MB in float64
_SIZES = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_experts", "n_experts_used")
# Hugging Face's name of an architecture -> GGUF's, where it is more than a matter of "_text" and underscores.
_GGUF_NAMES = {"mistral": "llama", "mixtral": "llama", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"}


@dataclass(frozen=True)
class Side:
    """One of the two models: what its header says, where its weights lie, and how it is opened (and closed again)."""

    info: ModelInfo
    path: Path
    open: Callable[[], AbstractContextManager[Engine]]


def compare(model: Side, reference: Side, prompts: Sequence[str], folder: Path, *, sites: Sequence[str] | None = None,
            progress: Progress = no_progress, should_stop: ShouldStop = never_stop) -> QuantizationReport:  # fmt: skip
    """Compare `model` with `reference` on `prompts`. `folder` takes the reference's activations meanwhile; sites None: all that both have.

    Raises LayerscopeError, in one sentence, for models that are not the same model, prompts that they read differently or that do
    not fit, and a disk that is too small; Cancelled when should_stop() says so.
    """
    _check_prompts(prompts)
    check_same_model(model.info, reference.info)
    weights, total = compare_weights(open_weights(model.path), open_weights(reference.path), progress=progress, should_stop=should_stop)
    with ActivationStore(folder) as store:
        tokens = _run_reference(reference, prompts, sites, store, folder, progress, should_stop)
        places, found, texts = _run_model(model, tokens, store, folder, progress, should_stop)
    results = [
        PromptResult(prompt, tokens.ids[i], tokens.texts[i], tokens.special(i), found.shifts[i], *(found.by_position(name, i, places) for name in ("relative_l2", "cosine")))
        for i, prompt in enumerate(prompts)
    ]
    summary = {name: found.mean(name, places) for name in ("relative_l2", "cosine")}
    cka = np.array([divergence.cka_of_hsic(found.hsic[place]) for place in places])
    return QuantizationReport(facts(model.info), facts(reference.info), weights, total, places, summary["relative_l2"], summary["cosine"], cka, results, texts)


def quantization_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {model, reference, prompts} -> {key, sentence}; the report goes to the derived cache under `key`."""
    names = {role: str(params[role]) for role in ("model", "reference")}
    sides = {}
    for role, name in names.items():
        entry = context.library.resolve_model(name)
        path = context.library.shelf.ready(entry)
        info = dataclasses.replace(describe(path), name=entry.name)
        sides[role] = Side(info, path, lambda name=name: nullcontext(context.engine(name, ENGINE_OPTIONS)))  # type: ignore[misc]
    prompts = [str(prompt) for prompt in params["prompts"]]
    report = compare(sides["model"], sides["reference"], prompts, context.traces_dir, progress=context.progress, should_stop=context.should_stop)
    key = report_key(names["model"], names["reference"], prompts, [fingerprint(sides[role].path) for role in names])
    report.save(context.derived, key)
    return {"key": key, "sentence": report.sentence()}


# -- are they the same model? ---------------------------------------------------------------------------------------------------------


def check_same_model(model: ModelInfo, reference: ModelInfo) -> None:
    """Raise LayerscopeError, naming the first difference, unless the two could hold the same weights."""
    ours, theirs = _architecture(model), _architecture(reference)
    if ours != theirs:
        raise LayerscopeError(f"{model.name} is {ours} and {reference.name} is {theirs}; only one model in two formats can be compared.")
    for size in _SIZES:
        a, b = getattr(model, size), getattr(reference, size)
        if a != b:
            raise LayerscopeError(f"{model.name} has {size} {a:,} and {reference.name} has {b:,}; only one model in two formats can be compared.")


def _architecture(info: ModelInfo) -> str:
    """The architecture in GGUF's spelling."""
    return _GGUF_NAMES.get(info.architecture, re.sub("_text$|[_-]", "", info.architecture))


def _check_prompts(prompts: Sequence[str]) -> None:
    if not prompts or not all(prompts):
        raise LayerscopeError("The prompt is empty; type at least one character.")
    if len(prompts) > MAX_PROMPTS:
        raise LayerscopeError(f"There are {len(prompts):,} prompts, and the limit is {MAX_PROMPTS}.")


# -- weights -----------------------------------------------------------------------------------------------------------------------------


def compare_weights(model: Weights, reference: Weights, *, progress: Progress = no_progress,
                    should_stop: ShouldStop = never_stop) -> tuple[list[dict[str, Any]], dict[str, float]]:  # fmt: skip
    """The error of every tensor, in the order of a forward pass, and that of all of them together.

    A matrix that both files hold under two names (a tied unembedding) counts once. Raises LayerscopeError if a tensor is missing
    in one of the two or has another shape there.
    """
    pairs = list(_pairs(model, reference))
    rows, total = [], ErrorSums()
    with ThreadPoolExecutor(2) as pool:
        for number, (name, ours, theirs) in enumerate(pairs):
            if should_stop():
                raise Cancelled
            progress("comparing weights", number, len(pairs))
            sums = _tensor_error(ours, theirs, pool)
            rows.append(_weight_row(name, ours, theirs, sums))
            total += sums
    progress("comparing weights", len(pairs), len(pairs))
    return rows, total.metrics()


def _pairs(model: Weights, reference: Weights) -> Iterator[tuple[str, Weight, Weight]]:
    """(name, the model's weight, the reference's) by canonical name; by native name where two GGUF files have no canonical ones."""
    native = not list(model) and not list(reference) and model.info.engine == reference.info.engine
    ours, theirs = (list(side.native_names) if native else list(side) for side in (model, reference))
    seen: set[tuple[Any, ...]] = set()
    for name in dict.fromkeys((*theirs, *ours)):
        for side, other, names in ((model, reference, ours), (reference, model, theirs)):
            if name not in names:
                raise LayerscopeError(f"{side.info.name} has no weight {name}, which {other.info.name} has; only one model in two formats can be compared.")
        pair = model.lazy(name), reference.lazy(name)
        if pair[0].shape != pair[1].shape:
            raise LayerscopeError(f"{name} is {pair[0].shape} in {model.info.name} and {pair[1].shape} in {reference.info.name}.")
        stored = tuple((weight.native, weight.shape, weight.row_order is None or weight.row_order.tobytes()) for weight in pair)
        if stored not in seen:
            seen.add(stored)
            yield name, *pair


def _tensor_error(ours: Weight, theirs: Weight, pool: ThreadPoolExecutor) -> ErrorSums:
    return sum(pool.map(lambda key: ErrorSums.of(theirs[key], ours[key]), _blocks(ours.shape)), ErrorSums())


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Indices that cut a tensor into blocks of rows."""
    if len(shape) == 1:
        yield (slice(None),)
        return
    step = max(1, _BLOCK_CELLS // shape[-1])
    for lead in np.ndindex(shape[:-2]):
        for start in range(0, shape[-2], step):
            yield (*lead, slice(start, start + step))


def _weight_row(name: str, ours: Weight, theirs: Weight, sums: ErrorSums) -> dict[str, Any]:
    block = re.fullmatch(r"(?:blocks|blk)\.(\d+)\.(.+)", name)
    where = {"layer": int(block[1]) if block else None, "component": block[2] if block else name}
    stored = {"shape": list(ours.shape), "dtype": ours.dtype, "reference_dtype": theirs.dtype, "bits": 8 * ours.nbytes / ours.size}
    return {"name": name, **where, **stored, **sums.metrics()}


# -- activations and predictions -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokens:
    """What the reference made of the prompts."""

    info: ModelInfo
    sites: tuple[str, ...]
    prompts: Sequence[str]
    ids: list[list[int]]
    texts: list[list[str]]

    def special(self, prompt: int) -> list[int]:
        return [at for at, token in enumerate(self.ids[prompt]) if token in (self.info.bos_id, self.info.eos_id)]


def _run_reference(side: Side, prompts: Sequence[str], sites: Sequence[str] | None, store: ActivationStore, folder: Path,
                   progress: Progress, should_stop: ShouldStop) -> _Tokens:  # fmt: skip
    """Run the reference over every prompt, its activations to the store."""
    progress("loading the reference", 0, 1)
    with side.open() as engine:
        wanted = _sites(engine, sites)
        ids = [engine.tokenize(prompt) for prompt in prompts]
        _check_disk(engine.info, ids, wanted, folder)
        for number, tokens in enumerate(ids):

            def keep(piece: Piece, number: int = number, tokens: list[int] = tokens) -> None:
                _tell(progress, "running the reference", number, len(ids), piece, engine.info.n_layers)
                store.put((number, piece.site, piece.layer), piece.start, feature_rows(piece, len(tokens), engine.info), len(tokens))

            with Aside(keep) as aside:
                engine.run(tokens, Request(wanted), aside.put, (), should_stop)
        return _Tokens(engine.info, wanted, prompts, ids, [engine.token_texts(tokens) for tokens in ids])


def _run_model(side: Side, tokens: _Tokens, store: ActivationStore, folder: Path, progress: Progress,
               should_stop: ShouldStop) -> tuple[list[Place], _Found, dict[int, str]]:  # fmt: skip
    """Run the model over the same ids and compare each place as it is complete; returns the places, what was found, and texts of predictions."""
    progress("loading the model", 0, 1)
    with side.open() as engine, ExitStack() as stack:
        _check_tokens(engine, tokens)
        wanted = tuple(site for site in tokens.sites if site in engine.sites)
        own = stack.enter_context(ActivationStore(folder))
        found = _Found()
        for number, ids in enumerate(tokens.ids):

            def take(piece: Piece, number: int = number, ids: list[int] = ids) -> None:
                _tell(progress, "running the model", number, len(tokens.ids), piece, engine.info.n_layers)
                rows, key = feature_rows(piece, len(ids), engine.info), (number, piece.site, piece.layer)
                if len(rows) < len(ids):  # a long prompt comes in pieces, each through all layers
                    own.put(key, piece.start, rows, len(ids))
                    if piece.start + len(rows) < len(ids):
                        return
                    rows = own.rows(key)
                if key in store:
                    found.add(key, store.rows(key), rows, ids)

            with Aside(take) as aside:
                engine.run(ids, Request(wanted), aside.put, (), should_stop)
        predicted = sorted({int(token) for shift in found.shifts.values() for name in ("reference_top", "top") for token in shift[name]})
        return found.places(), found, dict(zip(predicted, engine.token_texts(predicted), strict=True))


class _Found:
    """The divergence at every place, gathered as the model runs."""

    def __init__(self) -> None:
        self.shifts: dict[int, dict[str, NDArray[Any]]] = {}
        self.hsic: dict[Place, NDArray[np.float64]] = {}
        self._rows: dict[tuple[str, Key], NDArray[np.float64]] = {}

    def add(self, key: Key, reference: NDArray[np.float32], other: NDArray[np.float32], ids: list[int]) -> None:
        prompt, site, layer = key
        if site == "logits":
            self.shifts[prompt] = prediction_shift(reference, other, ids)
            return
        blocks = list(row_blocks(*reference.shape))
        for name, measure in (("relative_l2", divergence.relative_l2), ("cosine", divergence.cosine)):
            self._rows[name, key] = np.concatenate([measure(reference[rows], other[rows]) for rows in blocks])
        hsic = divergence.linear_hsic(reference, other)
        known = self.hsic.setdefault((site, layer), np.full(3, np.nan))
        self.hsic[site, layer] = np.where(np.isnan(known), hsic, np.where(np.isnan(hsic), known, known + hsic))

    def places(self) -> list[Place]:
        order = list(SITES)
        last = max((layer for _, layer in self.hsic if layer is not None), default=0)
        # Sites without layers stand where a forward pass computes them: before layer 0, or after the last.
        depth = {site: -1 if order.index(site) < order.index("resid_post") else last + 1 for site in order}
        return sorted(self.hsic, key=lambda place: (depth[place[0]] if place[1] is None else place[1], order.index(place[0])))

    def by_position(self, name: str, prompt: int, places: list[Place]) -> NDArray[np.float32]:
        return np.stack([self._rows[name, (prompt, *place)] for place in places]).astype(np.float32)

    def mean(self, name: str, places: list[Place]) -> NDArray[np.float64]:
        """Over the positions of all prompts, each position counting once: one token with a huge norm does not hide the others."""
        means = []
        for place in places:
            values = np.concatenate([self._rows[name, (prompt, *place)] for prompt in self.shifts])
            finite = values[np.isfinite(values)]
            means.append(finite.mean() if len(finite) else np.nan)
        return np.array(means)


def _sites(engine: Engine, sites: Sequence[str] | None) -> tuple[str, ...]:
    chosen = tuple(SITES) if sites is None else resolve_sites(sites)
    missing = [site for site in chosen if site not in engine.sites]
    if sites is not None and missing:
        raise LayerscopeError(f"{engine.info.name} has no site {missing[0]!r}; it has {', '.join(sorted(engine.sites))}.")
    return tuple(dict.fromkeys([*(site for site in chosen if site in engine.sites), "logits"]))


def _check_disk(info: ModelInfo, ids: list[list[int]], sites: tuple[str, ...], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    need = sum(stored_bytes(info, len(tokens), sites) for tokens in ids)
    free = shutil.disk_usage(folder).free
    if need + DISK_RESERVE > free:
        raise LayerscopeError(f"The reference's activations take {need / 1e6:,.0f} MB and {DISK_RESERVE / 1e6:,.0f} MB are kept free, but {folder} has {free / 1e6:,.0f} MB left; "
                              "choose fewer sites or shorter prompts.")  # fmt: skip


def _check_tokens(engine: Engine, tokens: _Tokens) -> None:
    """Raise LayerscopeError unless both models read every prompt as the same tokens."""
    for prompt, ids, texts in zip(tokens.prompts, tokens.ids, tokens.texts, strict=True):
        ours = engine.tokenize(prompt)
        if ours != ids or engine.token_texts(ids) != texts:
            at = next((i for i, (a, b) in enumerate(zip(ours, ids, strict=False)) if a != b), min(len(ours), len(ids)))
            raise LayerscopeError(f"{engine.info.name} and {tokens.info.name} have different tokenizers: they read the prompt {prompt[:40]!r} alike only up to token {at}.")


def _tell(progress: Progress, stage: str, prompt: int, n_prompts: int, piece: Piece, n_layers: int) -> None:
    if piece.layer is not None:
        progress(stage, prompt * n_layers + piece.layer + 1, n_prompts * n_layers)

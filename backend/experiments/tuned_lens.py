"""Training a tuned lens: an affine translator for each layer, so that its stream says through the final norm and W_U what the model says.

Belrose et al. 2023, arXiv:2303.08112: h + A h + b, begun at the identity, trained to lower KL(model || lens) on text. As in the authors'
code the translator is residual, so that weight decay pulls it towards the identity. Streams come from the engine, a chunk of text at a
time, and are forgotten; the final norm and W_U are float32 tensors of the engine's own weights (dequantized, of a GGUF file), held against
`engine.unembed` before anything is trained. Memory: W_U, the translators with their gradients and the optimiser's two or three copies,
the streams of one step, and logits of one block of positions.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backend.engines import Engine, Piece, Request, ShouldStop, never_stop
from backend.errors import Cancelled, LayerscopeError
from backend.estimate import available_memory, in_bytes
from backend.experiments import Context, Progress, no_progress
from backend.model_files import identity
from backend.tuned_lens import FOLDER, TunedLens, check_name, write_tuned_lens

if TYPE_CHECKING:
    import torch

Rows = NDArray[np.float32]

MAX_TEXT_BYTES = 256 << 20
TEXTS = "texts"  # the folder of the data folder whose texts the web app offers
_SUFFIXES = (".txt", ".md", ".text")
_DOCUMENT = 2_048  # characters that are tokenized together, cut at the next blank line
_HELD_OUT_EVERY, _HELD_OUT_MOST = 10, 32  # chunks: every tenth is held out, and so many at most
_BLOCK_BYTES = 64 << 20  # of logits
_COPIES = 5  # of a translator: itself, its gradient, the three running means of Adam with amsgrad


@dataclass(frozen=True)
class TrainSpec:
    """How a lens is trained. The optimiser is Adam (amsgrad) as in the authors' code, with a warm-up and a linear decay of its rate."""

    steps: int = 250
    tokens_per_step: int = 2048
    chunk: int = 256  # tokens that the model sees together
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    seed: int = 0

    def check(self) -> None:
        """Raises LayerscopeError naming the value and the limit."""
        for name, value, low, high in (("steps", self.steps, 1, 100_000), ("tokens per step", self.tokens_per_step, 16, 1 << 20), ("chunk", self.chunk, 16, 8192)):
            if not low <= value <= high:
                raise LayerscopeError(f"The number of {name} is {value:,}; it must be between {low:,} and {high:,}.")
        if not 0 < self.learning_rate <= 1:
            raise LayerscopeError(f"The learning rate is {self.learning_rate:g}; it must be above 0 and at most 1.")


def train(engine: Engine, text: Path, out: Path, spec: TrainSpec = TrainSpec(), *, progress: Progress = no_progress, should_stop: ShouldStop = never_stop,
          model_identity: str = "") -> TunedLens:  # fmt: skip
    """Train on a file or folder of text and publish the lens in the new folder `out`.

    Every tenth chunk of text is held out; the lens records the KL there of every row, in nats, before training (the logit lens) and after.
    Raises LayerscopeError for text, sizes or memory that do not do, Cancelled when should_stop() says so; nothing is left then.
    """
    spec.check()
    check_name(out.name)
    if out.exists():
        raise LayerscopeError(f"{out} exists already; choose another name, or delete it.")
    started, info = time.perf_counter(), engine.info
    rows = ["embed", *map(str, range(info.n_layers - 1))] if "embed" in engine.sites else list(map(str, range(info.n_layers - 1)))
    if "resid_post" not in engine.sites or not rows:
        raise LayerscopeError(f"{info.name} ({info.architecture}) has no streams between layers that a lens could be tuned on.")
    _check_memory(engine, len(rows), spec)
    progress("reading text", 0, 1)
    files = text_files(text)
    chunks, digest = _chunks(engine, files, spec)
    held_out = chunks[:: _HELD_OUT_EVERY][:_HELD_OUT_MOST]
    training = [chunk for i, chunk in enumerate(chunks) if i % _HELD_OUT_EVERY]
    if not training:
        raise LayerscopeError(f"The text has {sum(map(len, chunks)):,} tokens; at least two chunks of {spec.chunk} are needed, one of them to be held out.")
    lens = _Translators(engine, rows, spec)
    before = lens.held_out_kl(held_out, progress, should_stop)
    lens.fit(training, progress, should_stop)
    after = lens.held_out_kl(held_out, progress, should_stop)
    made = {
        "model": info.name, "architecture": info.architecture, "quantization": info.quantization, "engine": engine.version, "model_identity": model_identity,
        "n_layers": info.n_layers, "d_model": info.d_model, "d_vocab": info.d_vocab, "text": [file.name for file in files], "text_sha256": digest,
        "n_tokens": sum(map(len, training)), "n_tokens_seen": spec.steps * lens.chunks_per_step * len(training[0]), "n_tokens_held_out": sum(map(len, held_out)),
        **asdict(spec), "optimiser": "Adam, amsgrad", "held_out_kl": {row: [before[row], after[row]] for row in rows}, "unembed_error": lens.unembed.error,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    return write_tuned_lens(out, lens.arrays(), made)


def _check_memory(engine: Engine, n_rows: int, spec: TrainSpec) -> None:
    d_model, d_vocab = engine.info.d_model, engine.info.d_vocab
    need = 4 * (d_vocab * d_model + _COPIES * n_rows * d_model * d_model + (n_rows + 1) * (spec.tokens_per_step + spec.chunk) * d_model) + 6 * _BLOCK_BYTES
    if need > available_memory():
        raise LayerscopeError(f"Training translators of {n_rows} layers at d_model {d_model:,} needs about {in_bytes(need)}, and {in_bytes(available_memory())} are free.")


# -- text --------------------------------------------------------------------------------------------------------------------------------


def text_files(path: Path) -> list[Path]:
    """The file, or the .txt, .text and .md files of a folder and of those in it, by name. Raises LayerscopeError."""
    if not path.exists():
        raise LayerscopeError(f"There is no file or folder {path}.")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file()) if path.is_dir() else [path]
    if not files:
        raise LayerscopeError(f"{path} holds no text: no file of it ends in {', '.join(_SUFFIXES)}.")
    size = sum(file.stat().st_size for file in files)
    if size > MAX_TEXT_BYTES:
        raise LayerscopeError(f"The text has {in_bytes(size)}, and the limit is {in_bytes(MAX_TEXT_BYTES)}.")
    return files


def _chunks(engine: Engine, files: list[Path], spec: TrainSpec) -> tuple[list[list[int]], str]:
    """Chunks of token ids, each begun with the model's start token where it asks for one, in an order drawn by the seed; and the text's checksum.

    Text is tokenized no further than training needs.
    """
    info, digest = engine.info, hashlib.sha256()
    documents: list[str] = []
    for file in files:
        data = file.read_bytes()
        digest.update(data)
        try:
            documents += _documents(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise LayerscopeError(f"{file.name} is not UTF-8 text: byte {error.start:,} cannot be read.") from None
    random.Random(spec.seed).shuffle(documents)
    size = min(spec.chunk, engine.n_ctx)
    start = [info.bos_id] if info.add_bos and info.bos_id is not None else []
    wanted = (spec.steps * spec.tokens_per_step) * _HELD_OUT_EVERY // (_HELD_OUT_EVERY - 1) + _HELD_OUT_MOST * size
    ids: list[int] = []
    for document in documents:
        ids += engine.tokenize(document, add_bos=False)
        if len(ids) >= wanted:
            break
    body = size - len(start)
    chunks = [start + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
    if len(chunks) < 2:
        raise LayerscopeError(f"The text has {len(ids):,} tokens; at least two chunks of {size} are needed, one of them to be held out.")
    return chunks, digest.hexdigest()


def _documents(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + _DOCUMENT)
        end = len(text) if end < 0 else end + 2
        yield text[start:end]
        start = end


# -- training ------------------------------------------------------------------------------------------------------------------------------


class _Translators:
    """The translators of all rows as torch parameters."""

    def __init__(self, engine: Engine, rows: list[str], spec: TrainSpec) -> None:
        import torch

        self._engine, self._rows, self._spec, self._last = engine, rows, spec, str(engine.info.n_layers - 1)
        size = min(spec.chunk, engine.n_ctx)
        self.chunks_per_step = max(1, spec.tokens_per_step // size)
        d_model = engine.info.d_model
        self.unembed = TorchUnembed(engine)
        self._a = {row: torch.zeros((d_model, d_model), requires_grad=True) for row in rows}
        self._b = {row: torch.zeros(d_model, requires_grad=True) for row in rows}

    def arrays(self) -> dict[str, tuple[Rows, Rows]]:
        return {row: (self._a[row].detach().numpy(), self._b[row].detach().numpy()) for row in self._rows}

    def logits(self, row: str, stream: torch.Tensor) -> torch.Tensor:
        """h + A h + b through the final norm and W_U: (pos, d_model) -> (pos, d_vocab)."""
        return self.unembed(stream + stream @ self._a[row].T + self._b[row])

    def streams(self, ids: list[int], should_stop: ShouldStop) -> dict[str, torch.Tensor]:
        """Row -> its stream (pos, d_model), the last layer's among them, from one run of the model."""
        import torch

        found = {row: np.empty((len(ids), self._engine.info.d_model), np.float32) for row in (*self._rows, self._last)}

        def sink(piece: Piece) -> None:
            row = "embed" if piece.layer is None else str(piece.layer)
            if row in found:
                found[row][piece.start : piece.start + len(piece.values)] = piece.values

        self._engine.run(ids, Request(("embed", "resid_post") if "embed" in self._rows else ("resid_post",)), sink, (), should_stop)
        return {row: torch.from_numpy(values) for row, values in found.items()}

    def _each_kl(self, streams: dict[str, torch.Tensor], should_stop: ShouldStop) -> Iterator[tuple[str, torch.Tensor]]:
        """(row, sum over some positions of KL(model || lens), in nats), positions in blocks whose logits stay small."""
        import torch

        final = streams[self._last]
        step = max(1, _BLOCK_BYTES // (4 * self._engine.info.d_vocab))
        for start in range(0, len(final), step):
            block = slice(start, start + step)
            with torch.no_grad():
                target = torch.log_softmax(self.unembed(final[block]), -1)
                weights = target.exp()
            for row in self._rows:
                if should_stop():
                    raise Cancelled
                yield row, (weights * (target - torch.log_softmax(self.logits(row, streams[row][block]), -1))).sum()

    def held_out_kl(self, chunks: list[list[int]], progress: Progress, should_stop: ShouldStop) -> dict[str, float]:
        """Mean KL(model || lens) of each row over every position of the chunks, in nats."""
        import torch

        sums = dict.fromkeys(self._rows, 0.0)
        for number, chunk in enumerate(chunks):
            progress("held-out text", number, len(chunks))
            with torch.no_grad():
                for row, kl in self._each_kl(self.streams(chunk, should_stop), should_stop):
                    sums[row] += float(kl)
        total = sum(map(len, chunks))
        return {row: value / total for row, value in sums.items()}

    def fit(self, chunks: list[list[int]], progress: Progress, should_stop: ShouldStop) -> None:
        """The training loop; each row's translator is a problem of its own, so gradients are clipped row by row."""
        import torch

        spec, order = self._spec, _endless(chunks, self._spec.seed)
        parameters = [*self._a.values(), *self._b.values()]
        optimiser = torch.optim.Adam(parameters, lr=spec.learning_rate, betas=(0.9, 0.999), weight_decay=spec.weight_decay, amsgrad=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _rate(spec.steps))
        n_tokens = self.chunks_per_step * len(chunks[0])
        for step in range(spec.steps):
            progress("training", step, spec.steps)
            optimiser.zero_grad()
            for _ in range(self.chunks_per_step):
                for _, kl in self._each_kl(self.streams(next(order), should_stop), should_stop):
                    (kl / n_tokens).backward()  # type: ignore[no-untyped-call]
            for row in self._rows:
                torch.nn.utils.clip_grad_norm_([self._a[row], self._b[row]], 1.0)
            optimiser.step()
            schedule.step()
        progress("training", spec.steps, spec.steps)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            raise LayerscopeError(f"The translators are not finite after {spec.steps:,} steps; lower the learning rate of {spec.learning_rate:g}.")


def _rate(steps: int) -> Callable[[int], float]:
    """Share of the learning rate at a step: up over the first fifth (at most 1,000 steps), then down to 0 in a straight line."""
    warm_up = min(1000, steps // 5)

    def share(step: int) -> float:
        return (step + 1) / (warm_up + 1) if step < warm_up else max(0.0, (steps - step) / max(1, steps - warm_up))

    return share


def _endless(chunks: list[list[int]], seed: int) -> Iterator[list[int]]:
    order = random.Random(seed)
    while True:
        yield from order.sample(chunks, len(chunks))


class TorchUnembed:
    """Final norm and W_U as float32 tensors, for gradients: resid (pos, d_model) -> logits (pos, d_vocab).

    What an architecture does besides is found by holding it against `engine.unembed`: RMS norm or LayerNorm, a factor, a soft-cap.
    error: the largest difference on the probe, relative to the largest logit. Raises LayerscopeError where nothing known comes close.
    """

    LIMIT = 2e-3  # half-precision engines round this much

    def __init__(self, engine: Engine) -> None:
        import torch

        self._w_u = torch.from_numpy(engine.weight("unembed.W_U"))
        self._gain, self._bias = (None if values is None else torch.from_numpy(values) for values in (_weight(engine, name) for name in ("ln_final.w", "ln_final.b")))
        self._eps, self._norm, self._factor, self._softcap = engine.info.norm_eps, "rms", 1.0, 0.0
        probe = np.random.default_rng(0).standard_normal((4, engine.info.d_model)).astype(np.float32) * np.float32(3)
        wanted = engine.unembed(probe)
        self.error = math.inf
        for norm in ("rms", "layer"):
            self._norm, self._factor, self._softcap = norm, 1.0, 0.0
            plain = self(torch.from_numpy(probe)).numpy()
            for factor, softcap in _endings(plain, wanted):
                ended = plain * factor
                ended = softcap * np.tanh(ended / softcap) if softcap else ended
                error = float(np.abs(ended - wanted).max() / np.abs(wanted).max())
                if error < self.error:
                    self.error, best = error, (norm, factor, softcap)
        if not self.error <= self.LIMIT:
            raise LayerscopeError(f"The last step of {engine.info.name} ({engine.info.architecture}) is not a norm, W_U and a factor or cap: no lens can be trained through it.")
        self._norm, self._factor, self._softcap = best

    def __call__(self, resid: torch.Tensor) -> torch.Tensor:
        import torch

        rows = resid - resid.mean(-1, keepdim=True) if self._norm == "layer" else resid
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self._eps)
        rows = rows if self._gain is None else rows * self._gain
        rows = rows if self._bias is None else rows + self._bias
        logits = rows @ self._w_u.T
        logits = logits if self._factor == 1.0 else logits * self._factor
        return self._softcap * torch.tanh(logits / self._softcap) if self._softcap else logits


def _endings(plain: Rows, wanted: Rows) -> Iterator[tuple[float, float]]:
    """Factors and soft-caps that could lead from x to the logits wanted: none; the factor of least squares; the cap c of c tanh(x / c) that fits the largest."""
    yield 1.0, 0.0
    yield float(np.vdot(plain, wanted) / np.vdot(plain, plain)), 0.0
    at = np.unravel_index(int(np.argmax(np.abs(plain))), plain.shape)
    x, y = abs(float(plain[at])), abs(float(wanted[at]))
    low, high = y, 1e4
    if 0 < y < x:
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if middle * math.tanh(x / middle) < y else (low, middle)
        yield 1.0, high


def _weight(engine: Engine, name: str) -> Rows | None:
    try:
        return engine.weight(name)
    except LayerscopeError:
        return None


def tuned_lens_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {model, text, name, steps?, ...} -> {tag, held_out_kl}. `text` names a file or folder of `<data>/texts`; the lens goes to `<data>/tuned_lenses`."""
    data = context.traces_dir.parent
    text = (data / TEXTS / str(params["text"])).resolve()
    if not text.is_relative_to((data / TEXTS).resolve()):
        raise LayerscopeError(f"The text {str(params['text'])[:80]!r} does not lie in the folder {TEXTS} of the data folder.")
    chosen = {name: type(getattr(TrainSpec, name))(params[name]) for name in asdict(TrainSpec()) if params.get(name) is not None}
    context.progress("loading model", 0, 1)
    engine = context.engine(str(params["model"]), {})
    path = context.library.shelf.ready(context.library.resolve_model(str(params["model"])))
    lens = train(engine, text, data / FOLDER / check_name(str(params["name"])), TrainSpec(**chosen), progress=context.progress, should_stop=context.should_stop,
                 model_identity=identity(path))  # fmt: skip
    return {"tag": lens.tag, "held_out_kl": lens.made["held_out_kl"]}

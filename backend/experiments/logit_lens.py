"""Logit lens: a stream, or what one component writes, read through the model's own final norm and W_U (nostalgebraist 2020).

Rows of resid_post are `embed`, then each captured layer; the row of the last layer is the model's own output, so that the lens ends
exactly where the model does, quantized kernels included. Other sites have a row for each layer (or head), then one for the model.
The last step of a run is one matrix product with W_U, which the engine spreads over the cores; what is kept of its rows is read by
as many threads, each row while it lies in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis import lens as lens_analysis
from backend.engines import Engine, ShouldStop, default_threads
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Context, Progress
from backend.reports.lens_results import ARRAYS, MODEL_ROW, LensChoice, lens_row_names
from backend.trace import Trace
from backend.tuned_lens import FOLDER as TUNED_LENSES
from backend.tuned_lens import TunedLens, open_tuned_lens

TOP_K = 10
# Multiply-adds that a capture spends on its lens without being asked: a few tenths of a second on two cores. A larger lens is
# made when somebody looks at it.
AUTO_BUDGET = 2e10
# Positions are unembedded in blocks, so that memory is a few times block x d_vocab, whatever the prompt's length.
BLOCK_BYTES = 64 << 20
_READ_ROWS = 32  # positions that one thread reads at a time
_STREAM_BYTES = 256 << 20  # of streams that stay in memory when several blocks of positions need them

Rows = NDArray[np.float32]
Translate = Callable[[str, Rows], Rows]


def lens_rows(has: Callable[[str, int | None], bool], n_layers: int) -> list[str]:
    """Names of the lens rows that a capture can read: "embed" and layer numbers; the last layer is always there (the model's output)."""
    rows = ["embed"] if has("embed", None) else []
    rows += [str(layer) for layer in range(n_layers - 1) if has("resid_post", layer)]
    return [*rows, str(n_layers - 1)]


def cost(n_rows: int, n_tokens: int, d_model: int, d_vocab: int) -> float:
    """Multiply-adds of the unembedding of all rows but the last, which is free."""
    return float(n_rows - 1) * n_tokens * d_model * d_vocab


def position_blocks(n_tokens: int, d_vocab: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // (4 * d_vocab))
    for start in range(0, n_tokens, step):
        yield slice(start, min(start + step, n_tokens))


def compute_lens(engine: Engine, trace: Any, final_logits: NDArray[np.float32], ids: list[int], rows: list[str], *, k: int = TOP_K,
                 progress: Progress, should_stop: ShouldStop) -> dict[str, NDArray[Any]]:  # fmt: skip
    """Arrays of the lens results of FORMAT.md, (row, pos[, k]).

    trace: anything with trace["embed"] and trace["resid_post", layer] as (pos, d_model).
    final_logits: (pos, d_vocab) of the model itself.
    """
    following = np.append(ids[1:], 0)
    table = _Table(len(rows), len(ids), engine.info.d_vocab, k, progress, should_stop)
    for block, final in ((block, np.asarray(final_logits[block])) for block in position_blocks(len(ids), final_logits.shape[1])):
        with table.of(block, final, following) as read:
            for row in rows[:-1]:
                read(engine.unembed((trace["embed"] if row == "embed" else trace["resid_post", int(row)])[block]))
            read(final)
    return table.results()


class _Table:
    """The arrays of a lens as they fill, row by row within a block of positions."""

    def __init__(self, n_rows: int, n_tokens: int, d_vocab: int, k: int, progress: Progress, should_stop: ShouldStop) -> None:
        self._k, self._progress, self._should_stop = k, progress, should_stop
        self._total = n_rows * len(list(position_blocks(n_tokens, d_vocab)))
        shape = (n_rows, n_tokens)
        self._arrays = {name: np.full((*shape, min(k, d_vocab)) if name.startswith("top") else shape, -1, np.int32 if name in ("top_ids", "next_rank") else np.float32)
                        for name in ARRAYS}  # fmt: skip
        self._done = 0

    def of(self, block: slice, final: NDArray[np.float32], following: NDArray[np.int64]) -> _Block:
        return _Block(self, block, final, following[block])

    def put(self, row: int, rows: slice, found: dict[str, NDArray[Any]]) -> None:
        for name, values in found.items():
            self._arrays[name][row, rows] = values

    def step(self) -> None:
        """One row of one block begins. Raises Cancelled."""
        if self._should_stop():
            raise Cancelled
        self._progress("logit lens", self._done, self._total)
        self._done += 1

    def results(self) -> dict[str, NDArray[Any]]:
        """By the names of FORMAT.md; nothing follows the last token."""
        self._progress("logit lens", self._total, self._total)
        self._arrays["next_logprob"][:, -1:], self._arrays["next_rank"][:, -1:] = np.nan, -1
        return {f"lens_{name}": values for name, values in self._arrays.items()}

    @property
    def k(self) -> int:
        return self._k


class _Block:
    """One block of positions: calling it takes the logits (pos, d_vocab) of the next row."""

    def __init__(self, table: _Table, block: slice, final: NDArray[np.float32], following: NDArray[np.int64]) -> None:
        self._table, self._block, self._following, self._final = table, block, following, final
        self._parts = [slice(i, min(i + _READ_ROWS, len(final))) for i in range(0, len(final), _READ_ROWS)]
        self._row = 0

    def __enter__(self) -> _Block:
        self._pool = ThreadPoolExecutor(default_threads())
        self._references = list(self._pool.map(lambda part: lens_analysis.Reference.of(self._final[part]), self._parts))
        return self

    def __call__(self, logits: NDArray[np.float32]) -> None:
        self._table.step()
        work = zip(self._parts, self._references, strict=True)
        read = self._pool.map(lambda item: lens_analysis.read_rows(logits[item[0]], item[1], self._following[item[0]], self._table.k), work)
        for part, found in zip(self._parts, read, strict=True):
            self._table.put(self._row, slice(self._block.start + part.start, self._block.start + part.stop), found)
        self._row += 1

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


class _Streams:
    """What the rows of a lens look at, (pos, d_model) of a block of positions."""

    def __init__(self, engine: Engine, trace: Trace, choice: LensChoice, rows: list[str]) -> None:
        self._trace, self._choice = trace, choice
        self._kept: dict[str, Rows] = {}
        self._keeps = 4 * len(rows) * trace.n_tokens * trace.info.d_model <= _STREAM_BYTES
        if choice.site == "result":
            if not trace.has("z", choice.layer):
                raise LayerscopeError(f"The lens of heads needs z: capture it in layer {choice.layer}.")
            self._z = trace["z", choice.layer]  # type: ignore[index]
            w_o = engine.weight(f"blocks.{choice.layer}.attn.W_O")
            self._w_o = w_o.reshape(len(w_o), *self._z.shape[1:])

    def __getitem__(self, at: tuple[str, slice]) -> Rows:
        row, block = at
        if self._choice.site == "result":
            head = int(row.partition(".")[2])
            return self._z[block, head] @ self._w_o[:, head].T
        if row in self._kept:
            return self._kept[row][block]
        values = self._trace["embed"] if row == "embed" else self._trace[self._choice.site, int(row)]
        if self._keeps:
            self._kept[row] = values
        return values[block]


def lens_of_trace(engine: Engine, trace: Trace, choice: LensChoice = LensChoice(), *, k: int = TOP_K, tuned: TunedLens | None = None, progress: Progress,
                  should_stop: ShouldStop) -> tuple[list[str], dict[str, NDArray[Any]]]:  # fmt: skip
    """Rows and results of a lens of a finished trace, computed from its stored values.

    The last row is what the trace says of the model's own output. KL is against norm(resid_post) W_U of the last layer, which on a
    quantized model differs from that output by the rounding of its kernels, and in half precision by that of the stored stream.
    tuned: the translators of a tuned lens, put before the final norm; None: the logit lens.
    """
    rows, streams, final_stream = _opened(engine, trace, choice)
    following = np.append(trace.token_ids[1:], 0)
    table = _Table(len(rows) - 1, trace.n_tokens, trace.info.d_vocab, k, progress, should_stop)
    for block in position_blocks(trace.n_tokens, trace.info.d_vocab):
        with table.of(block, engine.unembed(final_stream[block]), following) as read:
            for row in rows[:-1]:
                read(engine.unembed(_translated(streams[row, block], row, tuned)))
    own = {"top_ids": trace.top_ids[:, :k], "top_logprobs": trace.top_logprobs[:, :k], "entropy": trace.entropy, "kl": np.zeros(trace.n_tokens, np.float32),
           "next_logprob": trace.next_logprobs, "next_rank": trace.next_ranks}  # fmt: skip
    found = table.results()
    return rows, {f"lens_{name}": np.concatenate([found[f"lens_{name}"], values[None]]) for name, values in own.items()}


def _opened(engine: Engine, trace: Trace, choice: LensChoice) -> tuple[list[str], _Streams, Rows]:
    """Rows, what they look at, and the stream that the model's own distribution comes from. Raises LayerscopeError where the trace lacks it."""
    last = trace.info.n_layers - 1
    if not trace.has("resid_post", last):
        raise LayerscopeError(f"The lens needs the residual stream: capture embed and resid_post of all layers up to {last}.")
    rows = lens_row_names(trace, choice)
    if len(rows) < 2:
        missing = "the residual stream: capture embed and resid_post of all layers" if choice.site == "resid_post" else f"{choice.site}: capture it"
        raise LayerscopeError(f"The lens needs {missing}.")
    return rows, _Streams(engine, trace, choice, rows), trace["resid_post", last]


def _translated(stream: Rows, row: str, tuned: TunedLens | None) -> Rows:
    return stream if tuned is None else tuned.translate(row, stream)


def lens_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {trace_id, site?, layer?, tuned?} -> {rows}; results go to the derived cache under `LensChoice.key`: lens_* arrays, lens_rows, lens_texts."""
    choice = LensChoice.from_json(params)
    with Trace(context.library.path_of(params["trace_id"])) as trace:
        context.progress("loading model", 0, 1)
        engine, tuned = context.engine(trace.info.name, {}), _tuned(context, trace, choice)
        rows, results = lens_of_trace(engine, trace, choice, tuned=tuned, progress=context.progress, should_stop=context.should_stop)
        for name, values in results.items():
            context.derived.put_array(choice.key(name, trace.id), values)
        context.derived.put_json(choice.key("lens_rows", trace.id), rows)
        ids = np.unique(results["lens_top_ids"]).tolist()
        context.derived.put_json(choice.key("lens_texts", trace.id), dict(zip(ids, engine.token_texts(ids), strict=True)))
    return {"rows": rows}


def _tuned(context: Context, trace: Trace, choice: LensChoice) -> TunedLens | None:
    return open_tuned_lens(context.traces_dir.parent / TUNED_LENSES, choice.tuned, trace.info) if choice.tuned else None


def lens_target(engine: Engine, trace: Trace, token_id: int, choice: LensChoice = LensChoice(), *, tuned: TunedLens | None = None, progress: Progress,
                should_stop: ShouldStop) -> NDArray[np.float32]:  # fmt: skip
    """Log-prob (nats) and rank (0 = best) of one token at every lens row and position: float32 (2, row, pos).

    The last row here is norm(resid_post) W_U of the stored residual stream, so on a quantized model it can differ from the
    model's own output by the rounding of its kernels; the integrity report of the trace says by how much.
    """
    last = trace.info.n_layers - 1
    rows = lens_row_names(trace, choice)
    if not trace.has("resid_post", last):
        rows = rows[:-1]
    if not rows:
        raise LayerscopeError("This trace holds no residual stream, so there is nothing to look through the lens at; capture embed or resid_post.")
    streams, out = _Streams(engine, trace, choice, rows), np.empty((2, len(rows), trace.n_tokens), dtype=np.float32)
    with ThreadPoolExecutor(default_threads()) as pool:
        for number, row in enumerate(rows):
            progress("logit lens", number, len(rows))
            for block in position_blocks(trace.n_tokens, trace.info.d_vocab):
                if should_stop():
                    raise Cancelled
                own = row == MODEL_ROW or (choice.site == "resid_post" and row == str(last))
                logits = engine.unembed(trace["resid_post", last][block] if own else _translated(streams[row, block], row, tuned))
                parts = [logits[i : i + _READ_ROWS] for i in range(0, len(logits), _READ_ROWS)]
                out[:, number, block] = np.concatenate(list(pool.map(lambda part: lens_analysis.target_row(part, token_id), parts)), axis=1)
    return out


def lens_target_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {trace_id, target text, site?, layer?, tuned?} -> {token_id, token}; the array goes to the derived cache under ("lens_target", trace_id, token_id, ...)."""
    text, choice = str(params["target"]), LensChoice.from_json(params)
    if not text:
        raise LayerscopeError("The target is empty; give a token's text, for example ' Paris' with its leading space.")
    with Trace(context.library.path_of(params["trace_id"])) as trace:
        context.progress("loading model", 0, 1)
        engine, tuned = context.engine(trace.info.name, {}), _tuned(context, trace, choice)
        ids = engine.tokenize(text, add_bos=False)
        if not ids:
            raise LayerscopeError(f"The target {text!r} has no token in this model's vocabulary.")
        values = lens_target(engine, trace, ids[0], choice, tuned=tuned, progress=context.progress, should_stop=context.should_stop)
        context.derived.put_array(choice.key("lens_target", trace.id, ids[0]), values)
    return {"token_id": ids[0], "token": engine.token_texts(ids[:1])[0], "n_tokens_of_target": len(ids)}

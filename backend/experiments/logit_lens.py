"""Logit lens: every layer's residual stream read through the model's own final norm and W_U (nostalgebraist 2020).

Rows are `embed`, then `resid_post` of each captured layer; the row of the last layer is the model's own output, so that the
lens ends exactly where the model does, quantized kernels included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis import lens as lens_analysis
from backend.engines import Engine, ShouldStop
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Context, Progress
from backend.trace import Trace

TOP_K = 10
# Multiply-adds that a capture spends on its lens without being asked: a few tenths of a second on two cores. A larger lens is
# made when somebody looks at it.
AUTO_BUDGET = 2e10
# Positions are unembedded in blocks, so that memory is block x d_vocab, whatever the prompt's length.
BLOCK_BYTES = 64 << 20


def lens_rows(has: Callable[[str, int | None], bool], n_layers: int) -> list[str]:
    """Names of the lens rows that can be read: "embed" and layer numbers; the last layer is always there (the model's output)."""
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
    blocks = list(position_blocks(len(ids), final_logits.shape[1]))
    by_row: list[dict[str, NDArray[Any]]] = []
    for number, row in enumerate(rows):
        progress("logit lens", number, len(rows))
        is_output = row == rows[-1]
        resid = None if is_output else trace["embed"] if row == "embed" else trace["resid_post", int(row)]
        parts = []
        for block in blocks:
            if should_stop():
                raise Cancelled
            # One row more than the block, so that its last position sees the token that follows.
            rows_read = slice(block.start, min(block.stop + 1, len(ids)))
            final = np.asarray(final_logits[rows_read])
            part = lens_analysis.lens_row(final if resid is None else engine.unembed(resid[rows_read]), final, ids[rows_read], k)
            parts.append({name: values[: block.stop - block.start] for name, values in part.items()})
        by_row.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    progress("logit lens", len(rows), len(rows))
    return {f"lens_{name}": np.stack([row[name] for row in by_row]) for name in by_row[0]}


def lens_of_trace(engine: Engine, trace: Trace, *, k: int = TOP_K, progress: Progress, should_stop: ShouldStop) -> tuple[list[str], dict[str, NDArray[Any]]]:
    """Rows and results of the lens of a finished trace, computed from its stored residual stream.

    The last row is what the trace says of the model's own output. KL is against norm(resid_post) W_U of the last layer, which on a
    quantized model differs from that output by the rounding of its kernels, and in half precision by that of the stored stream.
    """
    last = trace.info.n_layers - 1
    rows = lens_rows(trace.has, trace.info.n_layers)
    if len(rows) < 2 or not trace.has("resid_post", last):
        raise LayerscopeError(f"The lens needs the residual stream: capture embed and resid_post of all layers up to {last}.")
    final_stream = trace["resid_post", last]
    parts: dict[str, dict[str, list[NDArray[Any]]]] = {row: {} for row in rows[:-1]}
    blocks = list(position_blocks(trace.n_tokens, trace.info.d_vocab))
    for number, block in enumerate(blocks):
        seen = slice(block.start, min(block.stop + 1, trace.n_tokens))  # its last position sees the token that follows
        final = engine.unembed(final_stream[seen])
        for at, row in enumerate(rows[:-1]):
            if should_stop():
                raise Cancelled
            progress("logit lens", number * (len(rows) - 1) + at, len(blocks) * (len(rows) - 1))
            resid = (trace["embed"] if row == "embed" else trace["resid_post", int(row)])[seen]
            for name, values in lens_analysis.lens_row(engine.unembed(resid), final, trace.token_ids[seen], k).items():
                parts[row].setdefault(name, []).append(values[: block.stop - block.start])
    own = {"top_ids": trace.top_ids[:, :k], "top_logprobs": trace.top_logprobs[:, :k], "entropy": trace.entropy, "kl": np.zeros(trace.n_tokens, np.float32),
           "next_logprob": trace.next_logprobs, "next_rank": trace.next_ranks}  # fmt: skip
    return rows, {f"lens_{name}": np.stack([*(np.concatenate(parts[row][name]) for row in rows[:-1]), values]) for name, values in own.items()}


def lens_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {trace_id} -> {rows}; the arrays go to the derived cache under (name, trace_id), the rows under ("lens_rows", trace_id)."""
    with Trace(context.library.path_of(params["trace_id"])) as trace:
        context.progress("loading model", 0, 1)
        rows, results = lens_of_trace(context.engine(trace.info.name, {}), trace, progress=context.progress, should_stop=context.should_stop)
        for name, values in results.items():
            context.derived.put_array((name, trace.id), values)
        context.derived.put_json(("lens_rows", trace.id), rows)
        texts = {int(i): text for ids in [np.unique(results["lens_top_ids"])] for i, text in zip(ids, context.engine(trace.info.name, {}).token_texts(ids.tolist()), strict=True)}
        context.derived.put_json(("lens_texts", trace.id), texts)
    return {"rows": rows}


def lens_target(engine: Engine, trace: Trace, token_id: int, *, progress: Progress, should_stop: ShouldStop) -> NDArray[np.float32]:
    """Log-prob (nats) and rank (0 = best) of one token at every lens row and position: float32 (2, row, pos).

    The last row here is norm(resid_post) W_U of the stored residual stream, so on a quantized model it can differ from the
    model's own output by the rounding of its kernels; the integrity report of the trace says by how much.
    """
    rows = lens_rows(trace.has, trace.info.n_layers)
    if not trace.has("resid_post", trace.info.n_layers - 1):
        rows = rows[:-1]
    if not rows:
        raise LayerscopeError("This trace holds no residual stream, so there is nothing to look through the lens at; capture embed or resid_post.")
    out = np.empty((2, len(rows), trace.n_tokens), dtype=np.float32)
    for number, row in enumerate(rows):
        progress("logit lens", number, len(rows))
        resid = trace["embed"] if row == "embed" else trace["resid_post", int(row)]
        for block in position_blocks(trace.n_tokens, trace.info.d_vocab):
            if should_stop():
                raise Cancelled
            out[:, number, block] = lens_analysis.target_row(engine.unembed(resid[block]), token_id)
    return out


def lens_target_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {trace_id, target text} -> {token_id, token}; the arrays go to the derived cache under ("lens_target", trace_id, token_id)."""
    text = str(params["target"])
    if not text:
        raise LayerscopeError("The target is empty; give a token's text, for example ' Paris' with its leading space.")
    with Trace(context.library.path_of(params["trace_id"])) as trace:
        context.progress("loading model", 0, 1)
        engine = context.engine(trace.info.name, {})
        ids = engine.tokenize(text, add_bos=False)
        if not ids:
            raise LayerscopeError(f"The target {text!r} has no token in this model's vocabulary.")
        values = lens_target(engine, trace, ids[0], progress=context.progress, should_stop=context.should_stop)
        context.derived.put_array(("lens_target", trace.id, ids[0]), values)
    return {"token_id": ids[0], "token": engine.token_texts(ids[:1])[0], "n_tokens_of_target": len(ids)}

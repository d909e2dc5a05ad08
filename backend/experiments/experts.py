"""What each expert is needed for: the model run again with one expert taken out of one layer's choice, for every expert of every layer;
and how often each is chosen over many traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.divergence import kl as divergence
from backend.analysis.logits import log_softmax, row_blocks
from backend.engines import Engine, Piece, Request, ShouldStop, never_stop
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Context, Progress, no_progress
from backend.intervention import Intervention, ablate_experts
from backend.reports.expert_usage import Usage, find_usage, frequent_tokens
from backend.trace import Trace

# What a sweep measures, in the order of its arrays.
MEASURES = ("nll", "kl", "changed")
MOST_PROMPTS = 200
_MOST_BYTES = 1 << 30  # of one run's logits, two of which are in memory


def sweep(engine: Engine, ids: Sequence[int], progress: Progress = no_progress, should_stop: ShouldStop = never_stop) -> tuple[list[int], NDArray[np.float32]]:
    """`sweep_over` of a single prompt."""
    return sweep_over(engine, [ids], progress, should_stop)


def sweep_over(
    engine: Engine, prompts: Sequence[Sequence[int]], progress: Progress = no_progress, should_stop: ShouldStop = never_stop
) -> tuple[list[int], NDArray[np.float32]]:
    """Layers with a router, and (measure, layer, expert): what taking out that one expert does to the predictions over the tokens of all prompts.

    nll: mean change of -ln p of the token that follows, nats (exp of it is the factor on perplexity); kl: mean KL(clean || without), nats;
    changed: share of positions whose most probable token is another. Every token counts alike, so a long prompt counts for more. One run for
    each prompt and expert, unused experts too: with groups they can matter.
    Raises LayerscopeError for a dense model, no prompt or more than 200, one of fewer than two tokens or with logits beyond 1 GiB; Cancelled.
    """
    info = engine.info
    layers = sorted(layer for site, layer in engine.places if site == "router_logits" and layer is not None)
    if not layers:
        raise LayerscopeError(f"{info.name} has no experts that could be taken out.")
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise LayerscopeError(f"A sweep takes 1 to {MOST_PROMPTS} prompts, and {len(prompts)} are asked for.")
    if min(map(len, prompts)) < 2:
        raise LayerscopeError("A sweep over experts needs two tokens at least: it measures how well each predicts the next.")
    edits = [(i, expert, ablate_experts(engine.places, layer, expert)) for i, layer in enumerate(layers) for expert in range(info.n_experts)]
    total = np.zeros((len(MEASURES), len(layers), info.n_experts))
    weights = np.zeros((len(MEASURES), 1, 1))
    for number, tokens in enumerate(map(list, prompts)):
        clean, n = logits_of(engine, tokens, (), should_stop), np.array([len(tokens) - 1, len(tokens), len(tokens)], np.float64)
        for at, (i, expert, edit) in enumerate(edits):
            progress("ablating experts", number * len(edits) + at, len(prompts) * len(edits))
            if should_stop():
                raise Cancelled
            edit.check(info, len(tokens))
            total[:, i, expert] += n * effect(clean, logits_of(engine, tokens, (edit,), should_stop), tokens)
        weights += n[:, None, None]
    progress("ablating experts", len(prompts) * len(edits), len(prompts) * len(edits))
    return layers, (total / weights).astype(np.float32)


def effect(clean: NDArray[np.float32], without: NDArray[np.float32], ids: Sequence[int]) -> tuple[float, float, float]:
    """MEASURES of two runs over the same tokens. Both: (pos, d_vocab) logits. The last position predicts nothing that is known, and counts for kl only."""
    nll = kl = changed = 0.0
    following = np.asarray(ids[1:])
    for rows in row_blocks(*clean.shape):
        p, q = log_softmax(clean[rows]), log_softmax(without[rows])
        kl += float(divergence(p, q).sum())
        changed += int((p.argmax(-1) != q.argmax(-1)).sum())
        known = following[rows.start : rows.stop]
        at = np.arange(len(known))
        nll += float((p[at, known] - q[at, known]).sum())
    return nll / max(len(following), 1), kl / len(clean), changed / len(clean)


def logits_of(engine: Engine, ids: list[int], edits: tuple[Intervention, ...] = (), should_stop: ShouldStop = never_stop) -> NDArray[np.float32]:
    """(pos, d_vocab) logits of one run. Raises LayerscopeError where they would take more than 1 GiB."""
    size = 4 * len(ids) * engine.info.d_vocab
    if size > _MOST_BYTES:
        raise LayerscopeError(f"The logits of {len(ids):,} tokens take {size / 1e9:.1f} GB, and the limit is {_MOST_BYTES / 1e9:.1f} GB; take a shorter prompt.")
    out = np.empty((len(ids), engine.info.d_vocab), np.float32)

    def sink(piece: Piece) -> None:
        out[piece.start : piece.start + len(piece.values)] = piece.values

    engine.run(ids, Request(("logits",)), sink, edits, should_stop)
    return out


def expert_sweep_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {"trace_ids": [ids of one model], "key"} -> {"layers"}: a sweep over the tokens of those traces. The array (measure, layer, expert)
    lies in the cache under ("expert_sweep", key), the layers under ("expert_sweep_layers", key)."""
    prompts: list[list[int]] = []
    model = ""
    for trace_id in params["trace_ids"]:
        with Trace(context.library.path_of(trace_id)) as trace:
            if trace.metadata.get("interventions"):
                raise LayerscopeError(f"The trace of {trace.prompt[:40]!r} was run with edits: a sweep compares with the model as it is. Run the prompt without them.")
            if prompts and trace.info.name != model:
                raise LayerscopeError(f"A sweep is over prompts of one model, and these are of {model} and {trace.info.name}.")
            model = trace.info.name
            prompts.append(trace.token_ids)
    context.progress("loading model", 0, 1)
    layers, found = sweep_over(context.engine(model, {}), prompts, context.progress, context.should_stop)
    context.derived.put_array(("expert_sweep", params["key"]), found)
    context.derived.put_json(("expert_sweep_layers", params["key"]), layers)
    return {"layers": layers}


def expert_usage_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {"model": name, "traces": [ids]} -> {"n_traces"}; the counts lie in the cache under Usage.key. A trace that was deleted meanwhile
    is left out."""
    ids = [str(trace_id) for trace_id in params["traces"]]

    def opened(stage: str) -> Iterator[Trace]:
        for number, trace_id in enumerate(ids):
            if context.should_stop():
                raise Cancelled
            context.progress(stage, number, len(ids))
            path = context.library.path_of(trace_id)
            if path.is_file():
                with Trace(path) as trace:
                    yield trace

    found = find_usage(opened("routing"), frequent_tokens(opened("tokens")))
    found.save(context.derived, Usage.key(params["model"], ids))
    return {"n_traces": len(found.trace_ids)}

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
from backend.reports.expert_usage import Usage, find_usage
from backend.trace import Trace

# What a sweep measures, in the order of its arrays.
MEASURES = ("nll", "kl", "changed")
_MOST_BYTES = 1 << 30  # of one run's logits, two of which are in memory


def sweep(engine: Engine, ids: Sequence[int], progress: Progress = no_progress, should_stop: ShouldStop = never_stop) -> tuple[list[int], NDArray[np.float32]]:
    """Layers with a router, and (measure, layer, expert): what taking out that one expert does to the predictions over `ids`.

    nll: mean change of -ln p of the token that follows, nats (exp of it is the factor on perplexity); kl: mean KL(clean || without), nats;
    changed: share of positions whose most probable token is another. One run each, unused experts too: with groups they can matter.
    Raises LayerscopeError for a dense model, fewer than two tokens or logits beyond 1 GiB; Cancelled.
    """
    info, tokens = engine.info, list(ids)
    layers = sorted(layer for site, layer in engine.places if site == "router_logits" and layer is not None)
    if not layers:
        raise LayerscopeError(f"{info.name} has no experts that could be taken out.")
    if len(tokens) < 2:
        raise LayerscopeError("A sweep over experts needs two tokens at least: it measures how well each predicts the next.")
    clean = logits_of(engine, tokens, (), should_stop)
    found = np.zeros((len(MEASURES), len(layers), info.n_experts), np.float32)
    places = [(i, layer, expert) for i, layer in enumerate(layers) for expert in range(info.n_experts)]
    for number, (i, layer, expert) in enumerate(places):
        progress("ablating experts", number, len(places))
        if should_stop():
            raise Cancelled
        edit = ablate_experts(engine.places, layer, expert)
        edit.check(info, len(tokens))
        found[:, i, expert] = effect(clean, logits_of(engine, tokens, (edit,), should_stop), tokens)
    progress("ablating experts", len(places), len(places))
    return layers, found


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
    """Job: {"trace_id"} -> {"layers"}; the array (measure, layer, expert) lies in the cache under ("expert_sweep", trace id), the layers
    under ("expert_sweep_layers", trace id)."""
    with Trace(context.library.path_of(params["trace_id"])) as trace:
        if trace.metadata.get("interventions"):
            raise LayerscopeError("This trace was run with edits: a sweep compares with the model as it is. Run the prompt without them.")
        context.progress("loading model", 0, 1)
        engine = context.engine(trace.info.name, {})
        layers, found = sweep(engine, trace.token_ids, context.progress, context.should_stop)
        context.derived.put_array(("expert_sweep", trace.id), found)
        context.derived.put_json(("expert_sweep_layers", trace.id), layers)
    return {"layers": layers}


def expert_usage_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {"model": name, "traces": [ids]} -> {"n_traces"}; the counts lie in the cache under Usage.key. A trace that was deleted meanwhile
    is left out."""
    ids = [str(trace_id) for trace_id in params["traces"]]

    def opened() -> Iterator[Trace]:
        for number, trace_id in enumerate(ids):
            if context.should_stop():
                raise Cancelled
            context.progress("traces", number, len(ids))
            path = context.library.path_of(trace_id)
            if path.is_file():
                with Trace(path) as trace:
                    yield trace

    found = find_usage(opened())
    found.save(context.derived, Usage.key(params["model"], ids))
    return {"n_traces": len(found.trace_ids)}

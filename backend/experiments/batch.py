"""Batch: many prompts through one warm engine, one trace each; memory is that of one prompt, and what is done stays done."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from backend.aggregates import Aggregates
from backend.batches import Batch, Batches, Item
from backend.engines import Engine
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import Context
from backend.experiments.capture import CaptureSpec, capture, spec_of

DEFAULT_SITES = ("resid_post", "attn_pattern")


def batch_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: runs the prompts of {"batch_id"} that have no trace yet -> {"batch_id", "done", "failed"}.

    A prompt that fails is recorded with its sentence, and the next one runs. Cancelled keeps what is done.
    """
    batches: Batches = context.batches
    batch = batches.get(params["batch_id"])
    batches.started(batch.id)
    context.progress("loading model", 0, 1)
    engine = context.engine(batch.model, {})
    spec = spec_of(batch.settings)
    while (item := batches.next_item(batch.id)) is not None:
        now = batches.get(batch.id)
        context.progress("prompts", now.n_done + now.n_failed, now.n)
        if context.should_stop():
            raise Cancelled
        try:
            _run(context, engine, batch, spec, item)
        except LayerscopeError as error:
            batches.failed(item, str(error))
    ended = batches.get(batch.id)
    context.progress("prompts", ended.n, ended.n)
    return {"batch_id": batch.id, "done": ended.n_done, "failed": ended.n_failed}


def _run(context: Context, engine: Engine, batch: Batch, spec: CaptureSpec, item: Item) -> None:
    """One prompt to its trace; a trace that an interrupted job published already is taken as it is."""
    try:
        context.library.summary(item.future_trace_id)
    except LayerscopeError:
        label = (f"batch:{batch.name}",) if batch.name else ()
        mine = replace(spec, prompt=item.prompt.text, category=item.prompt.category or spec.category, tags=(*item.prompt.tags, *label, batch.tag))
        context.library.add(capture(engine, mine, context.traces_dir, should_stop=context.should_stop, trace_id=item.future_trace_id))
    trace = context.library.open(item.future_trace_id)
    row = Aggregates(context.derived).put_row(trace)
    logprob, entropy = (float(row[name]) for name in ("logprob", "entropy"))
    context.batches.done(item, trace.n_tokens, logprob if math.isfinite(logprob) else None, entropy if math.isfinite(entropy) else None)


def aggregate_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: computes the statistics of the traces {"trace_ids"} that are not in the cache -> {"n"}."""
    aggregates = Aggregates(context.derived)
    trace_ids = aggregates.missing(params["trace_ids"])
    for number, trace_id in enumerate(trace_ids):
        if context.should_stop():
            raise Cancelled
        context.progress("statistics", number, len(trace_ids))
        aggregates.put_row(context.library.open(trace_id))
    return {"n": len(trace_ids)}

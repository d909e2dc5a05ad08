"""The loss of a model on every token of a text, and what a run's files say of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis import logits as logits_analysis
from backend.analysis import perplexity as analysis
from backend.engines import Engine, Piece, Request, ShouldStop, Sink, never_stop
from backend.errors import Cancelled
from backend.experiments import Progress, no_progress
from backend.experiments.sensitivity.contracts import Losses


def evaluate(engine: Engine, windows: Sequence[Sequence[int]], *, sites: tuple[str, ...] = (), sink: Sink | None = None, stage: str = "evaluating",
             progress: Progress = no_progress, should_stop: ShouldStop = never_stop, on_window: Any = None) -> Losses:  # fmt: skip
    """The negative log-likelihood of every token of the windows but the first of each. Logits are read some rows at a time, as the engine hands them out.

    sites: of which the pieces go to `sink` as well; on_window(i) is called before window i runs. Losses may be not finite: of a broken model they are.
    """
    nll = [np.empty(len(ids) - 1) for ids in windows]
    for number, ids in enumerate(windows):
        progress(stage, number, len(windows))
        if should_stop():
            raise Cancelled
        if on_window:
            on_window(number)
        following = np.asarray(ids[1:], np.int64)

        def take(piece: Piece, out: NDArray[np.float64] = nll[number], following: NDArray[np.int64] = following) -> None:
            if piece.site == "logits":
                last = min(piece.start + len(piece.values), len(out))
                out[piece.start : last] = losses(piece.values[: last - piece.start], following[piece.start : last])
            elif sink:
                sink(piece)

        engine.run(list(ids), Request((*sites, "logits")), take, (), should_stop)
    progress(stage, len(windows), len(windows))
    return Losses(np.concatenate(nll), np.repeat(np.arange(len(nll)), [len(each) for each in nll]))


def losses(logits: NDArray[np.float32], following: NDArray[np.int64]) -> NDArray[np.float64]:
    """-ln p(following) of each row: logits (pos, d_vocab), following (pos,) -> (pos,) nats; NaN where a row holds one."""
    picked = logits[np.arange(len(following)), following].astype(np.float64)
    return logits_analysis.logsumexp(logits) - picked


def described(found: Losses) -> dict[str, Any]:
    """nll, perplexity and its interval, as in sensitivity_stats.json; null where they are not finite."""
    return {"nll": finite(found.mean), "perplexity": finite(analysis.perplexity(found.mean)), "ci": _pair(analysis.interval(found.nll, found.window))}


def compared(found: Losses, baseline: Losses) -> dict[str, Any]:
    """nll, perplexity, its ratio to the baseline's and the ratio's paired interval; null where they are not finite."""
    ratio = analysis.perplexity(found.mean - baseline.mean)
    return {"nll": finite(found.mean), "perplexity": finite(analysis.perplexity(found.mean)), "ratio": finite(ratio),
            "ci": _pair(analysis.ratio_interval(found.nll, baseline.nll, baseline.window))}  # fmt: skip


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _pair(found: tuple[float, float] | None) -> list[float] | None:
    return [float(end) for end in found] if found is not None and all(map(math.isfinite, found)) else None

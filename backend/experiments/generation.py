"""Generation: tokens told one by one while the model writes them, and a word that ends it early and keeps what there is.

`capture` calls `write_tokens` for the first of its two parts; then it runs prompt and tokens once more with instruments, so that what
was told live and what the trace holds are the same quantities at the same positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from backend.analysis import logits as logits_analysis
from backend.engines import Engine, Sampling, ShouldStop, Step
from backend.errors import Cancelled
from backend.experiments import Context, Progress
from backend.intervention import Intervention
from backend.live import LiveRecords, LiveWriter, WrittenStep

ALTERNATIVES = 10


class Listener(Protocol):
    """Who follows a generation."""

    def begin(self, prompt: Sequence[str], special: Sequence[int]) -> None:
        """Texts of the prompt's tokens, before the first is written; `special`: positions of those that mark a beginning or an end."""

    def written(self, step: WrittenStep) -> None: ...

    def enough(self) -> bool:
        """Whether to end here, with what there is. Asked at every layer."""


class _Enough(Exception):
    """Raised between two tokens to end the engine's generation; never leaves this module."""


def write_tokens(engine: Engine, prompt_ids: list[int], n: int, sampling: Sampling, edits: tuple[Intervention, ...], listener: Listener | None,
                 progress: Progress, should_stop: ShouldStop) -> list[int]:  # fmt: skip
    """Up to n new tokens, told to `listener` as they come; fewer where it says enough. Raises Cancelled when should_stop() says so, and what the engine raises."""
    written: list[int] = []

    def on_step(step: Step) -> None:
        written.append(step.token)
        if listener is not None:
            listener.written(described(engine, step))
            if listener.enough():
                raise _Enough
        progress("generating", len(written), n)

    def stop_or_enough() -> bool:
        return should_stop() or (listener is not None and listener.enough())

    if listener is not None:
        listener.begin(engine.token_texts(prompt_ids), [at for at, token in enumerate(prompt_ids) if _is_special(engine, token)])
    progress("generating", 0, n)
    try:
        engine.generate(prompt_ids, n, sampling, on_step, edits, stop_or_enough)
    except _Enough:
        pass
    except Cancelled:
        if should_stop() or listener is None or not listener.enough():
            raise
    return written


def described(engine: Engine, step: Step) -> WrittenStep:
    """A step in probabilities and words."""
    found = logits_analysis.summary(step.logits[None], np.array([step.token]), ALTERNATIVES)
    ids, probabilities = found["top_ids"][0].tolist(), np.exp(found["top_logprobs"][0])
    text, *texts = engine.token_texts([step.token, *ids])
    return WrittenStep(
        token=step.token,
        special=_is_special(engine, step.token),
        text=text,
        probability=_short(np.exp(found["next_logprobs"][0])),
        sampler_probability=_short(step.sampler_probability),
        entropy=_short(found["entropy"][0]),
        alternatives=tuple((i, name, _short(p)) for i, name, p in zip(ids, texts, probabilities, strict=True)),
        resid_norms=tuple(_short(norm) for norm in step.resid_norms),
    )


def _is_special(engine: Engine, token: int) -> bool:
    return token in (engine.info.bos_id, engine.info.eos_id)


def _short(value: Any) -> float:
    """Seven significant digits, as many as float32 has."""
    return float(f"{float(value):.7g}")


class TextStream:
    """Ids in, text out, in whole characters: a character of several tokens comes with its last one.

    The text of a token depends on those just before it (a leading space, the bytes of one character), so a short tail is decoded twice,
    with and without the new ids, and the difference is what is new.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._from, self._told = engine, 0, 0
        self._ids: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes; "" inside a character."""
        self._ids.append(token)
        text = self._new()
        # A character has 4 bytes at most; what is unfinished for longer is no character.
        return "" if text.endswith("\ufffd") and len(self._ids) - self._told < 8 else self._tell(text)

    def rest(self) -> str:
        """What is left at the end: a character that was never finished."""
        return self._tell(self._new())

    def _new(self) -> str:
        return self._engine.detokenize(self._ids[self._from :])[len(self._engine.detokenize(self._ids[self._from : self._told])) :]

    def _tell(self, text: str) -> str:
        self._from, self._told = self._told, len(self._ids)
        return text


class JobListener:
    """Writes a job's live record, and ends the generation when the page asked for that."""

    def __init__(self, records: LiveRecords, job_id: str, writer: LiveWriter) -> None:
        self._records, self._job_id, self._writer = records, job_id, writer
        self.sampler_probability: list[float] = []

    def begin(self, prompt: Sequence[str], special: Sequence[int]) -> None:
        self._writer.prompt(prompt, special)

    def written(self, step: WrittenStep) -> None:
        self.sampler_probability.append(step.sampler_probability)
        self._writer.step(step)

    def enough(self) -> bool:
        return self._records.stopped(self._job_id)


def generate_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: a capture with new tokens, told as they are written -> {"trace_id", "stopped"}. A cancelled one leaves nothing."""
    from backend.experiments.capture import capture, spec_of

    records: LiveRecords = context.live
    with records.begin(context.job_id) as writer:
        listener = JobListener(records, context.job_id, writer)
        try:
            context.progress("loading model", 0, 1)
            engine = context.engine(params["model"], {})
            context.progress("loading model", 1, 1)
            path = capture(engine, spec_of(params), context.traces_dir, progress=context.progress, should_stop=context.should_stop, listener=listener)
        except Cancelled:
            records.discard(context.job_id)
            raise
    context.library.add(path)
    # The sampler's own probabilities are the one thing told here that a trace cannot give again.
    context.derived.put_array(("sampler_probability", path.stem), np.asarray(listener.sampler_probability, np.float32))
    return {"trace_id": path.stem, "stopped": listener.enough()}

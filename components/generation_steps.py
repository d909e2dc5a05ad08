"""The steps of a generation as a page shows them, from the live record while it runs and from the trace afterwards; and the text they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from dash import html
from numpy.typing import NDArray

from backend.live import LiveState
from backend.trace import Trace
from components.controls import facts
from components.services import services
from components.site_summary import site_summary
from components.token_label import token_label, token_labels
from components.token_strip import FULL_SCALE

_ALTERNATIVES = 8


@dataclass(frozen=True)
class Steps:
    """prompt: display text of the prompt's tokens; labels: of those written. probability, entropy, sampler: (step,); norms: (layer, step).

    sampler None: unknown, as in a trace whose generation was not followed. norms None: resid_post was not captured.
    """

    prompt: list[str]
    labels: list[str]
    probability: NDArray[np.floating]
    entropy: NDArray[np.floating]
    alternatives: list[list[tuple[str, float]]]
    sampler: NDArray[np.floating] | None = None
    norms: NDArray[np.floating] | None = None

    @classmethod
    def of_record(cls, state: LiveState) -> Steps:
        steps = state.steps
        return cls(
            prompt=token_labels(list(state.prompt or ()), set(state.special)),
            labels=[token_label(step.text, step.special) for step in steps],
            probability=np.array([step.probability for step in steps]),
            entropy=np.array([step.entropy for step in steps]),
            alternatives=[[(token_label(text, max_length=24), p) for _, text, p in step.alternatives[:_ALTERNATIVES]] for step in steps],
            sampler=np.array([step.sampler_probability for step in steps]),
            norms=np.array([step.resid_norms for step in steps], np.float32).T if steps else None,
        )

    @classmethod
    def of_trace(cls, trace: Trace) -> Steps:
        labels, at = token_labels(trace.token_texts, trace.special), slice(trace.n_prompt - 1, trace.n_tokens - 1)
        ids, probs = trace.top_ids[at, :_ALTERNATIVES], np.exp(trace.top_logprobs[at, :_ALTERNATIVES])
        return cls(
            prompt=labels[: trace.n_prompt],
            labels=labels[trace.n_prompt :],
            probability=np.exp(trace.next_logprobs[at]),
            entropy=trace.entropy[at],
            alternatives=[[(token_label(trace.token_text(i), max_length=24), float(p)) for i, p in zip(*row, strict=True)] for row in zip(ids, probs, strict=True)],
            sampler=services().derived.get_array(("sampler_probability", trace.id)),
            norms=site_summary(trace, "resid_post")[0][:, at] if trace.has("resid_post") else None,
        )


def steps_text(steps: Steps) -> list[Any]:
    """The prompt, then every token written, coloured by its surprise; assets/generate.js shows what each could have been."""
    prompt = [html.Span(label, className="tok from-prompt") for label in steps.prompt]
    written = [_token(steps, i) for i in range(len(steps.labels))]
    return [*prompt, *written]


def _token(steps: Steps, i: int) -> html.Span:
    probability = float(steps.probability[i])
    surprise = -np.log(probability) if probability > 0 else np.inf
    level = 0.0 if np.isnan(surprise) else 100 * min(surprise / FULL_SCALE["surprise"], 1.0)
    data: dict[str, Any] = {"data-step": i + 1, "data-tip": "\n".join(_tip(steps, i, probability)), "aria-selected": "false"}
    return html.Span(steps.labels[i], className="tok written", style={"--surprise": f"{level:.0f}%"}, role="option", **data)


def _tip(steps: Steps, i: int, probability: float) -> Sequence[str]:
    sampler = "" if steps.sampler is None or i >= len(steps.sampler) else f", drawn with {steps.sampler[i]:.3f}"
    head = [f"step {i + 1}: {steps.labels[i]}", f"probability {probability:.4f}{sampler}", f"entropy {steps.entropy[i]:.3f} nats", "most probable:"]
    return [*head, *(f"{p:.4f}  {label}" for label, p in steps.alternatives[i])]


def steps_facts(steps: Steps) -> Any:
    """The whole answer in numbers, and its least expected token."""
    logprobs = np.log(np.maximum(steps.probability, np.finfo(np.float32).tiny))
    if not len(logprobs) or not np.isfinite(logprobs).any():
        return None
    at = int(np.nanargmin(logprobs))
    best, p = steps.alternatives[at][0]
    least = [html.Span(steps.labels[at], className="chip-token"), f" at step {at + 1}, probability {steps.probability[at]:.2g}"]
    instead = [", where ", html.Span(best, className="chip-token"), f" had {p:.2g}"] if best != steps.labels[at] else []
    shown = {
        "Mean log-prob": f"{np.nanmean(logprobs):.3f} nats a token, perplexity {np.exp(-np.nanmean(logprobs)):.3g}",
        "Mean entropy": f"{np.nanmean(steps.entropy):.3f} nats",
        "Least expected": html.Span(least + instead),
    }
    return facts(shown)

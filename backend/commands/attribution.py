"""python -m backend attribute: which heads, MLPs and embeddings made a logit."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from backend.reports.attribution import Attribution
    from backend.trace import Trace


def attribute(
    trace: Annotated[str, typer.Option("--trace", "-t", help="A trace file, or an id in the traces folder.")],
    token: Annotated[str | None, typer.Option("--token", help='The token whose logit is taken apart, with its leading space: " Paris". Default: the most probable.')] = None,
    against: Annotated[str | None, typer.Option("--against", help="A second token, whose logit is taken off.")] = None,
    position: Annotated[int, typer.Option("--position", help="The position that predicts; negative from the end.")] = -1,
    top: Annotated[int, typer.Option("--top", help="How many parts to print, largest first. 0: all.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Direct logit attribution: what every head, MLP, bias and embedding adds to a logit, the final norm's scale frozen.

    Nothing is run: activations come from the trace, W_O and W_U from the model's file. The JSON object: trace_id, position, token and
    against (id and text), parts (name, kind, layer, head, value, in the order of the computation), sum (of the parts), readout (norm and
    W_U of the last residual stream), logit (the model's own, before any soft-cap; null where the trace does not hold it), notes.

    Example: python -m backend attribute --trace <id> --token " Paris" --against " London"
    """
    from backend import attribute as attribute_logit
    from backend import open_trace

    with open_trace(trace) as opened:
        found = attribute_logit(opened, token, against, position)
        texts = {found.token: opened.token_text(found.token) if token is None else token}
        if found.against is not None and against is not None:
            texts[found.against] = against
        typer.echo(json.dumps(_summary(opened, found, texts), ensure_ascii=False) if as_json else describe(opened, found, texts, top))


def _summary(trace: Trace, found: Attribution, texts: dict[int, str]) -> dict[str, Any]:
    return {
        "trace_id": trace.id, "model": trace.info.name, "position": found.position, "token": {"id": found.token, "text": texts[found.token]},
        "against": None if found.against is None else {"id": found.against, "text": texts[found.against]},
        "parts": [{"name": p.name, "kind": p.kind, "layer": p.layer, "head": p.head, "value": _finite(p.value)} for p in found.parts],
        "sum": _finite(found.total), "readout": _finite(found.readout), "logit": None if found.logit is None else _finite(found.logit), "notes": found.notes,
    }  # fmt: skip


def describe(trace: Trace, found: Attribution, texts: dict[int, str], top: int) -> str:
    """An attribution as a person reads it in a terminal."""
    of = f"{texts[found.token]!r}" if found.against is None else f"{texts[found.token]!r} less {texts[found.against]!r}"
    lines = [f"logit of {of} at position {found.position}, {trace.token_texts[found.position]!r}", ""]
    ordered = sorted(found.parts, key=lambda part: -abs(part.value))
    shown = ordered[:top] if top > 0 else ordered
    lines += [f"{part.name:<12} {part.value:>10.4f}" for part in shown]
    rest = sum(part.value for part in ordered[len(shown) :])
    lines += [f"{len(ordered) - len(shown)} more parts, {rest:.4f} together"] if len(ordered) > len(shown) else []
    known = "which is not in the trace" if found.logit is None else f"{found.logit:.4f}"
    lines += ["", f"parts sum to {found.total:.4f}; norm and W_U of the last layer give {found.readout:.4f}; the model's logit {known}", *found.notes]
    return "\n".join(lines)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

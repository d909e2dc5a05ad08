"""What the Attention page draws comes from here: which map its controls name, the range of it that is shown, and what had to be computed before.

A range is read once and kept for the next theme, scale or token. Means over all layers, rollout and the counts of each head come from one
reading of every head (backend.reports.attention_maps): at once for a small trace, by a job for a large one.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis.attention_views import output_gram, value_norms
from backend.errors import LayerscopeError
from backend.reports.attention_maps import Shown, Summary, Tile, n_cells, summarise, tile
from backend.trace import Trace
from components.figures.attention import LARGEST
from components.services import services
from components.token_label import token_labels
from components.weight_source import source

OF_TITLES = {"head": "One head", "mean": "Mean of the layer's heads", "all": "Mean of all layers", "rollout": "Rollout to this layer"}
VIEW_TITLES = {"pattern": "Attention", "weighted": "Value-weighted", "scores": "Scores"}
UNITS = {"pattern": "probability", "weighted": "attention × ‖v W_O‖", "scores": "attention score"}

AT_ONCE = 30_000_000  # cells that are read while somebody waits: a few tenths of a second
_BLOCK = 512  # rows of W_O at a time

Window = tuple[int, int, int, int]  # first row, after the last row, first column, after the last column


def shown_map(of: str, layer: int, head: int, view: str, hide_first: bool) -> Shown:
    """The map that the controls name; only single heads have values and scores of their own."""
    if of != "head":
        return Shown(of, layer, 0, "pattern", hide_first)  # type: ignore[arg-type]
    return Shown("head", layer, head, view, hide_first)  # type: ignore[arg-type]


def window_of(text: str | None, n_tokens: int) -> list[int] | None:
    """ "100,164,0,64" of a link -> [100, 164, 0, 64] inside the prompt; None for the whole prompt and for anything else."""
    found = re.fullmatch(r"(\d{1,7}),(\d{1,7}),(\d{1,7}),(\d{1,7})", text or "")
    if not found:
        return None
    top, bottom, left, right = (min(int(part), n_tokens) for part in found.groups())
    return [top, bottom, left, right] if bottom - top > 1 and right - left > 1 else None


def pin_of(text: str | None, trace: Trace) -> dict[str, Any] | None:
    """ "3.1" of a link -> what the store `pinned-head` holds of that head, where the trace has it."""
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", text or "")
    if not found or int(found[1]) not in trace.layers("attn_pattern") or int(found[2]) >= trace.info.n_heads:
        return None
    return {"layer": int(found[1]), "head": int(found[2]), "name": found[0]}


def shown_tile(trace: Trace, shown: Shown, window: list[int] | None) -> Tile:
    """The range of a map, at most LARGEST cells a side. Raises LayerscopeError for what cannot be shown."""
    whole = (0, trace.n_tokens, 0, trace.n_tokens)
    return _tile(trace.id, shown, (window[0], window[1], window[2], window[3]) if window else whole)


@functools.lru_cache(maxsize=32)  # of at most LARGEST squared values each
def _tile(trace_id: str, shown: Shown, window: Window) -> Tile:
    trace = services().library.open(trace_id)
    needs_summary = shown.of in ("all", "rollout")
    known = summary(trace) if needs_summary or (shown.of == "mean" and n_cells(trace) > AT_ONCE) else None
    if needs_summary and known is None:
        raise NotComputed
    if shown.of == "rollout" and known is not None and known.rollout_lacks:
        raise LayerscopeError(known.rollout_lacks)
    norms = head_norms(trace, shown.layer)[shown.head] if shown.view == "weighted" else None
    return tile(trace, shown, range(window[0], window[1]), range(window[2], window[3]), LARGEST, norms, known)


def short_labels(trace: Trace) -> list[str]:
    """Display text of every token, cut short."""
    return _labels(trace.id)


@functools.lru_cache(maxsize=8)
def _labels(trace_id: str) -> list[str]:
    trace = services().library.open(trace_id)
    return token_labels(trace.token_texts, trace.special, 12)


class NotComputed(LayerscopeError):
    """A map that is made from every head, before that was done."""

    def __init__(self) -> None:
        super().__init__("Made from all heads of the trace, which are being read once through.")


def colour_limit(trace: Trace, shown: list[Shown]) -> float:
    """Top of the colours of maps that are compared, whichever range of them is in sight: 1 for probabilities, else their largest value."""
    if shown[0].view == "pattern":
        return 1.0
    sizes = [np.abs(values[np.isfinite(values)]) for values in (shown_tile(trace, each, None).values for each in shown)]
    return float(max((size.max() for size in sizes if len(size)), default=1.0)) or 1.0


def head_norms(trace: Trace, layer: int) -> NDArray[np.float32]:
    """||v_j W_O^h||, (head, pos), of the heads of a layer; computed once a layer.

    Raises SiteNotCaptured without v, LayerscopeError where the model that the trace came from cannot be read.
    """
    key = ("value_norms", trace.id, layer)
    known = services().derived.get_array(key)
    if known is None:
        values = trace["v", layer]
        known = value_norms(values, _gram(trace, layer))
        services().derived.put_array(key, known)
    return known


def _gram(trace: Trace, layer: int) -> NDArray[np.float64]:
    name, info = f"blocks.{layer}.attn.W_O", trace.info
    try:
        weights = source(info.name).weights
        w_o = weights.lazy(name)
    except (LayerscopeError, OSError, KeyError) as problem:
        said = str(problem) if isinstance(problem, LayerscopeError) else f"{info.name} has no {name} that can be read."
        raise LayerscopeError(f"The value-weighted view needs W_O from the model's own file: {said}") from None
    columns = info.n_heads * info.dims["d_head_v"]
    if len(w_o.shape) != 2 or w_o.shape[1] != columns:
        raise LayerscopeError(f"W_O of {info.name} is {' × '.join(map(str, w_o.shape))}, and this trace's heads need {columns:,} columns: it is not the model of this trace.")
    return output_gram((w_o[first : first + _BLOCK] for first in range(0, w_o.shape[0], _BLOCK)), info.n_heads)


def missing_site(trace: Trace, shown: Shown) -> str | None:
    """The site that the view needs and the trace lacks."""
    needed = {"weighted": "v", "scores": "attn_scores", "pattern": "attn_pattern"}[shown.view]
    return None if trace.has(needed, shown.layer) else needed


def summary(trace: Trace, at_once: int = AT_ONCE) -> Summary | None:
    """What one reading of every head left; of a trace with at most `at_once` cells it is made here and now. None: not made yet."""
    derived = services().derived
    found = Summary.load(derived, trace)
    if found is None and 0 < n_cells(trace) <= at_once:
        summarise(trace, derived)
        found = Summary.load(derived, trace)
    return found


def submit_summary(trace: Trace) -> Any:
    """The job that reads every head."""
    return services().jobs.submit("attention_maps", {"trace_id": trace.id}, f"Attention of all heads of {trace.info.name}")



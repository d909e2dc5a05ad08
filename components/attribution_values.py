"""The attribution of a position, for the page: made at once where the model is small, else by a job, and kept."""

from __future__ import annotations

import functools

from dash import html

from backend.errors import LayerscopeError
from backend.readout import Readout, open_readout
from backend.reports.attribution import Attribution, attribute, checked, weights_read
from backend.trace import Trace
from components.services import services
from components.states import empty
from components.token_choice import AUTO, NONE
from components.weight_source import READ_AT_ONCE, Source, source

_WEIGHTS_PER_S = 1e8  # of two cores, roughly: only ever shown as "about"


@functools.lru_cache(maxsize=4)
def _readout(identity: str, path: str) -> Readout:
    """The key changes with the file."""
    return open_readout(path)


def model_of(trace: Trace) -> Source:
    """The model of a trace by its name on the shelf. Raises LayerscopeError where it is not there any more, or not made yet."""
    found = source(trace.info.name)
    if not found.identity:
        raise LayerscopeError(f"The file of {trace.info.name} is not there any more; run the prompt again.")
    return found


def readout_of(model: Source) -> Readout:
    return _readout(model.identity, str(model.entry.path))


def attribution(trace: Trace, model: Source, position: int, token: int, against: int | None) -> Attribution | None:
    """The attribution; None where reading the weights takes too long to wait for and no job has done it yet."""
    key = ("attribution", trace.id, model.identity, position, token, against)
    known = services().derived.get_json(key)
    if known is not None:
        return Attribution.from_json(known)
    readout = readout_of(model)
    if weights_read(trace) > READ_AT_ONCE:
        checked(trace, readout, position, token, against)
        return None
    found = attribute(trace, readout, position, token, against)
    services().derived.put_json(key, found.to_json())
    return found


def in_part(trace: Trace) -> str | None:
    """A site that an attribution needs of every layer, and that this trace has of some only."""
    last = trace.info.n_layers - 1
    return next((site for site in ("attn_out", "mlp_out") if len(trace.layers(site)) < trace.info.n_layers), None if trace.has("resid_post", last) else "resid_post")


def submit(trace: Trace, position: int, token: int, against: int | None) -> str:
    """Queue the job; its id."""
    params = {"trace_id": trace.id, "position": position, "token": token, "against": against}
    return services().jobs.submit("attribution", params, f"Attribution at position {position} of {trace.info.name}").id


def offer(trace: Trace) -> html.Div:
    """In place of the cards, while a large model has not been read: what it takes, and the button."""
    n = weights_read(trace)
    seconds = max(1, round(n / _WEIGHTS_PER_S))
    price = "about a second" if seconds == 1 else f"about {seconds:,} seconds"
    words = f"The output matrices of all heads are read once: {n:,} weights, {price} on two cores. The result is kept."
    return empty("This position has not been taken apart yet", words, html.Button("Take it apart", id="attr-compute", className="btn btn-primary", n_clicks=0), "circle-dashed")


def chosen_ids(trace: Trace, position: int, token: str | None, against: str | None) -> tuple[int, int | None]:
    """Ids of a picker's token and of the one that is taken off; AUTO: the most probable, and the next that is another."""
    best, second = (int(i) for i in trace.top_ids[position, :2])
    chosen = best if token in (None, AUTO) else int(token)
    other = None if against in (None, NONE) else second if against == AUTO else int(against)
    return chosen, best if other == chosen and against == AUTO else other

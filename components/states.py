"""What a page shows when it has no picture: nothing yet, an error in one sentence, a site that was not captured, waiting."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from dash import dcc, html

from backend.errors import LayerscopeError
from backend.sites import SITES
from components.capture_again import can_capture_again, capture_again
from components.icons import icon
from components.services import services

_OF_ONE_MLP = ("mlp_pre", "mlp_pre_linear", "mlp_post")


def empty(title: str, text: Any, action: Any = None, symbol: str = "circle-dashed") -> html.Div:
    """An empty state: what is missing, and one way on."""
    return html.Div([icon(symbol), html.H2(title), html.P(text), action], className="state")


def error(text: str) -> html.Div:
    """One sentence that says what went wrong."""
    return html.Div([icon("triangle-alert"), html.P(text)], className="state-error", role="alert")


def missing(site: str, trace_id: str) -> html.Div:
    """The state of a page whose trace holds neither `site` (a site or result name) nor what it derives from.

    One press runs the prompt again with the site among what is captured, and the page shows the new trace. Where the run had edits, or
    began from token ids, the button leads to Home with the same model and prompt instead.
    """
    known = SITES.get(site)
    needs = f"It needs {site}: {known.doc[0].lower()}{known.doc[1:]}" if known else f"It needs the result {site}, which is computed during a capture."
    try:
        trace = services().library.open(trace_id)
        if known and known.moe and not trace.info.is_moe:
            return empty("Not in this model", f"{trace.info.name} is dense: it has no experts, so {site} does not exist in it.")
        if site in _OF_ONE_MLP and trace.info.is_moe and not trace.info.n_dense_layers:
            return empty("Not in this model", f"Every layer of {trace.info.name} has experts, whose hidden values are no site: {site} does not exist in it.")
        wanted = sorted({*trace.stored, site} & set(SITES)) if known else ["resid_post", *sorted(set(trace.stored) & set(SITES))]
        if can_capture_again(trace):
            again = capture_again(trace, (site,) if known else ("resid_post",))
            return empty("This trace cannot show this view", f"{needs} One press runs the prompt again with it captured.", again)
        query = {"model": trace.info.name, "prompt": trace.prompt, "sites": ",".join(dict.fromkeys(wanted))}
    except LayerscopeError:
        query = {}
    link = dcc.Link("Capture it", href=f"/?{urlencode(query)}" if query else "/", className="btn btn-primary")
    return empty("This trace cannot show this view", f"{needs} Run the prompt again with it captured.", link)


def skeleton(height: int = 240) -> html.Div:
    """A grey stand-in of a card's body, so that nothing jumps when the picture arrives."""
    return html.Div(className="skeleton", style={"height": height}, **{"aria-hidden": "true"})

"""Embeddings: the rows of W_E and W_U, or the states that traces hold of a site, in two or three dimensions; paths of tokens through layers; nearest vectors.

Works for a model without a trace, and for one or several traces of one model. A projection is a job (backend.experiments.embeddings) and is kept. The page
finds model and traces; controls and job are in components/embedding_projection.py, the picture in components/embedding_picture.py, choosing and finding in
components/embedding_choice.py, lengths and variance in components/embedding_facts.py.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import dash
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.errors import LayerscopeError
from backend.reports.vectors import MATRICES
from backend.trace import Trace
from components import states
from components.embedding_facts import fact_cards
from components.embedding_neighbours import neighbours_card
from components.embedding_picture import picture_card
from components.embedding_projection import pickers
from components.embedding_source import Place, place
from components.services import services
from components.trace_view import trace_page
from components.url_state import as_choice, as_int, keep_url

dash.register_page(__name__, path="/embeddings", name="Embeddings", order=12, group="This model", icon="sparkles", takes_trace=True,
                   description="Tokens and hidden states as points, and which are near each other")  # fmt: skip

SUBTITLE = "Tokens and hidden states as points, and which are near each other."


def layout(model: str | None = None, trace: str | None = None, traces: str | None = None, **asked: str) -> html.Div:
    usable = [entry.name for entry in services().library.models() if entry.error is None]
    more = tuple(part for part in (traces or "").split(",") if part)
    if trace:
        def build(opened: Trace) -> list[Any]:
            return _body(place(None, (opened.id, *more)), opened.id, asked)

        return trace_page(__name__, trace, (), asked, build, SUBTITLE)
    if model is None and not more and not usable:
        return _page(None, usable, [states.empty("No model found", "Put a .gguf file or a folder of safetensors into the models folder, then reload this page.")])
    try:
        found = place(model or (usable[0] if usable else None), more)
        return _page(found, usable, _body(found, None, asked))
    except LayerscopeError as problem:
        return _page(None, usable, [states.error(str(problem))])


def _page(found: Place | None, models: list[str], body: list[Any]) -> html.Div:
    picker = html.Label([html.Span("Model"), dcc.Dropdown(models, found.model if found else None, id="emb-model", clearable=False, className="picker-model")])
    title = html.Div([html.H1("Embeddings"), html.Span(SUBTITLE, className="page-subtitle"), html.Div(picker, className="controls page-controls")], className="page-title")
    return html.Div([title, dcc.Location(id="emb-go-model", refresh="callback-nav"), *body], className="page")


def _body(found: Place, trace: str | None, asked: dict[str, str]) -> list[Any]:
    sources = found.sources()
    if not sources:
        return [states.error(f"Neither the model nor the trace can be looked into: {found.why_no_model or 'the trace holds no site with one vector a position.'}")]
    first = "resid_post" if "resid_post" in sources else sources[0] if found.entry is None or not found.traces else next((s for s in sources if s not in MATRICES), sources[0])
    what = as_choice(asked.get("what"), sources, first if found.traces else sources[0])
    page = {"model": found.model, "traces": list(found.traces), "trace": trace}
    row = asked.get("row")
    held: dict[str, Any] = {"emb-page": page, "emb-spec": None, "emb-ready": None, "emb-job": None, "emb-done": None, "emb-include": None, "emb-webgl": None, "emb-only": None,
                            "emb-isolated": asked.get("only") or None, "emb-found": None, "emb-row": as_int(row, 0, 0, 1 << 31) if row else None,
                            "emb-shown-model": None if trace else found.model, "emb-others": [one for one in found.traces if one != trace]}  # fmt: skip
    return [
        *(dcc.Store(id=name, data=data) for name, data in held.items()),
        dcc.Location(id="emb-go", refresh="callback-nav"),
        pickers(found, sources, what, trace, asked),
        html.Div([picture_card(asked), neighbours_card()], className="cards cards-wide-left"),
        fact_cards(),
    ]


@callback(Output("emb-go-model", "href"), Input("emb-model", "value"), State("emb-shown-model", "data"), prevent_initial_call=True)
def open_model(model: str | None, now: str | None):
    return f"/embeddings?{urlencode({'model': model})}" if model and model != now else no_update


@callback(Output("emb-go", "href"), Input("emb-traces", "value"), State("emb-page", "data"), State("emb-what", "value"), State("emb-method", "value"), State("emb-dims", "value"),
          prevent_initial_call=True)  # fmt: skip
def open_traces(chosen: list[str] | None, page: dict[str, Any], what: str, method: str, dims: int):
    """The page again with other traces: what they hold in common decides what can be chosen."""
    others = [one for one in page["traces"] if one != page["trace"]]
    if (chosen or []) == others:
        return no_update
    first = {"trace": page["trace"]} if page["trace"] else {"model": page["model"]}
    kept = {} if what in MATRICES and not others and not page["trace"] else {"what": what}
    return f"/embeddings?{urlencode({**first, **kept, 'method': method, 'dims': dims, 'traces': ','.join(chosen or [])})}"


keep_url({
    "model": ("emb-shown-model", "data"), "traces": ("emb-others", "data"), "what": ("emb-what", "value"), "layer": ("emb-layer", "value"), "method": ("emb-method", "value"),
    "dims": ("emb-dims", "value"), "scale": ("emb-scale", "value"), "colour": ("emb-colour", "value"), "only": ("emb-isolated", "data"), "paths": ("emb-paths", "value"),
    "find": ("emb-search", "value"), "row": ("emb-row", "data"),
})  # fmt: skip

"""What the Generate page shows while the model writes: the text in the colours of its surprise, curves of each step, norms through the layers.

Its callbacks need the stores `gen-record` (what the live record holds by now), `gen-trace`, `gen-at` and `theme`.
"""

from __future__ import annotations

from typing import Any

from dash import Input, Output, State, callback, ctx, html, no_update

from backend.errors import LayerscopeError
from components.card import card, cards
from components.figures.generation import MOST_COLUMNS, step_curves, step_norms
from components.figures.theme import no_figure
from components.generation_steps import Steps, steps_facts, steps_text
from components.graph import graph, graph_tools
from components.services import services
from components.states import empty, error

ABOUT_TEXT = (
    "The prompt in grey, then what the model wrote. The colour is the surprise of each token, -ln p in nats under the model's own distribution (softmax over the whole "
    "vocabulary, before temperature and cuts); it is full at 8 nats, a probability of 1 in 3,000.",
    "Hover a token, or use the arrow keys on the text, for what it could have been. Stop keeps the tokens so far and makes their trace; Cancel throws them away.",
)
ABOUT_CURVES = (
    "Probability: of the written token under the model. The sampler's own probability, after top-k, top-p, min-p and temperature, is dotted where it differs. "
    "Entropy: -sum p ln p of the model's distribution at that step, in nats: near 0 there was no choice.",
    f"Beyond {MOST_COLUMNS} steps the newest are drawn.",
)
ABOUT_NORMS = (
    "The Euclidean length of the residual stream after each layer (resid_post) at the position that the token was chosen at. While the model writes only these "
    "lengths are taken; the trace, made afterwards in one pass, holds the vectors, and the lengths agree within rounding.",
)


def text_card() -> html.Section:
    """The written text, empty, the key of its colours, and what there is to say of the steps."""
    live = html.Div(id="live-text", className="live-text", tabIndex=0, role="listbox", **{"aria-label": "Written tokens; the arrow keys choose a step"})
    key = html.Div([html.Span("p = 1"), html.I(), html.Span("p = 1/3,000 and less")], className="live-key")
    return card("Text", [live, key, html.Div(id="live-facts", className="live-facts")], html.Span("", id="gen-words"), about=list(ABOUT_TEXT), className="fill")


def steps_of(record: dict[str, Any], trace_id: str | None) -> Steps | None:
    """Those of the trace where there is one, else of the live record."""
    if trace_id:
        return Steps.of_trace(services().library.open(trace_id))
    return Steps.of_record(services().live.read(record["job"])) if record.get("job") else None


@callback(
    Output("live-text", "children"), Output("gen-words", "children"), Output("live-facts", "children"),
    Input("gen-record", "data"), Input("gen-trace", "data"),
)  # fmt: skip
def show_text(record: dict[str, Any], trace_id: str | None) -> tuple[Any, str, Any]:
    try:
        steps = steps_of(record, trace_id)
    except LayerscopeError as problem:
        return error(str(problem)), "", None
    if steps is None or not (steps.prompt or steps.labels):
        waiting = bool(record.get("active"))
        words = "The worker loads the model and reads the prompt." if waiting else "Press Run: the text appears here as the model writes it."
        return empty("Waiting for the first token" if waiting else "Nothing written yet", words, symbol="sparkles"), "", None
    caret = [html.Span(className="live-caret")] if record.get("active") and not trace_id else []
    return [*steps_text(steps), *caret], f"{len(steps.labels)} tokens written. Colour: surprise. Hover for the alternatives.", steps_facts(steps)


@callback(Output("gen-live", "children"), Input("gen-record", "data"), Input("gen-trace", "data"), State("gen-live", "children"))
def show_live_cards(record: dict[str, Any], trace_id: str | None, present: Any) -> Any:
    """The pictures, once there is something to draw."""
    if present or not (record.get("job") or trace_id):
        return no_update
    curves = card("Probability and entropy", graph("gen-curves", height=330), "One point a step, under it the token that was written.",
                  graph_tools("gen-curves", "generation-steps"), list(ABOUT_CURVES))  # fmt: skip
    norms = card("Residual norms", graph("gen-norms", height=330, className="fill"), "One row a layer, one column a step. Click a cell to choose the step.",
                 graph_tools("gen-norms", "generation-norms"), list(ABOUT_NORMS), className="fill")  # fmt: skip
    return cards(curves, norms)


@callback(
    Output("gen-curves", "figure"), Output("gen-norms", "figure"),
    Input("gen-record", "data"), Input("gen-trace", "data"), Input("gen-at", "data"), Input("theme", "data"),
)  # fmt: skip
def draw(record: dict[str, Any], trace_id: str | None, at: int | None, theme: str) -> tuple[Any, Any]:
    steps = steps_of(record, trace_id)
    if steps is None or not steps.labels:
        nothing = no_figure(theme, "No step yet.")
        return nothing, nothing
    chosen = at - 1 if at and trace_id and at <= len(steps.labels) else None
    labels = [label if len(label) <= 12 else f"{label[:11]}…" for label in steps.labels]
    curves = step_curves(steps.probability, steps.entropy, labels, steps.sampler, chosen, theme)
    return curves, no_figure(theme, "resid_post was not captured.") if steps.norms is None else step_norms(steps.norms, labels, chosen, theme)


@callback(Output("gen-step", "value"), Input("gen-curves", "clickData"), Input("gen-norms", "clickData"), prevent_initial_call=True)
def choose_clicked(curves: dict[str, Any] | None, norms: dict[str, Any] | None) -> Any:
    click = norms if ctx.triggered_id == "gen-norms" else curves
    return int(click["points"][0]["x"]) if click else no_update

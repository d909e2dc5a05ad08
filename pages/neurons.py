"""Neurons: which are largest at a token, what each writes into the vocabulary, and where over all traces of the model it is largest.

The first comes from the trace; the tokens from W_out and W_U of the model's file (a job where they are large); the last from a job that
goes through the library. Names of tokens beyond the trace need the model's vocabulary, which a job lists once.
"""

from __future__ import annotations

from typing import Any

import dash
from dash import Input, Output, State, callback, ctx, dcc, html, no_update

from backend.errors import LayerscopeError
from backend.trace import Trace
from components import neuron_values as values
from components.attribution_values import model_of
from components.figures.neurons import neuron_bars
from components.follow_token import position_in
from components.job_follow import follow_job
from components.neuron_cards import SIDES, example_table, neuron_cards, neuron_table, written_lists
from components.services import services
from components.token_choice import vocabulary
from components.token_label import token_label, token_labels
from components.trace_view import trace_page
from components.url_state import as_choice, as_int, keep_url

dash.register_page(__name__, path="/neurons", name="Neurons", order=4.7, icon="sparkles", description="Which MLP neurons fire, what they write, and where else")

REQUIRES = ("mlp_post",)

def layout(trace: str | None = None, layer: str | None = None, neuron: str | None = None, side: str | None = None, **state: str):
    def chosen(opened: Trace) -> tuple[int, int]:
        top, _ = values.largest(opened, position_in(opened, as_int(state.get("pos"), opened.n_prompt - 1, 0, opened.n_tokens - 1)), None)
        best = (top[0].layer, top[0].neuron) if top else (opened.layers("mlp_post")[0], 0)
        at = as_int(layer, best[0], 0, opened.info.n_layers - 1)
        return (at if at in opened.layers("mlp_post") else best[0]), as_int(neuron, best[1], 0, opened.info.d_mlp - 1)

    def build(opened: Trace) -> list[Any]:
        identity = _identity(opened)
        unlisted = bool(identity) and vocabulary(identity) is None
        return neuron_cards(as_choice(side, list(SIDES), "largest"), unlisted and opened.info.n_bytes <= values.LISTED_AT_ONCE)

    def controls(opened: Trace) -> Any:
        at, number = chosen(opened)
        layers: Any = [{"label": str(each), "value": each} for each in opened.layers("mlp_post")]
        box = dcc.Input(id="neuron-number", type="number", value=number, min=0, max=opened.info.d_mlp - 1, step=1, debounce=True, className="text-input number-input")
        pick = dcc.Dropdown(layers, at, id="neuron-layer", clearable=False, searchable=False, className="picker-narrow")
        return html.Div([html.Label([html.Span("Layer"), pick]), html.Label([html.Span("Neuron"), box])], className="controls")

    return trace_page(__name__, trace, REQUIRES, state, build, "Which MLP neurons fire, and for what.", controls)


@callback(
    Output("neuron-table", "children"), Output("neurons-title", "children"), Output("neuron-said", "children"), Output("neuron-list-box", "hidden"),
    Output("neuron-read-box", "hidden"),
    Input("position", "data"), Input("neuron-layer", "value"), Input("neuron-number", "value"), Input("neuron-ready", "data"), State("page-state", "data"),
)  # fmt: skip
def show_largest(position: int | None, layer: int, number: int | None, _: Any, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    at, identity = position_in(trace, position), _identity(trace)
    top, bad = values.largest(trace, at, None)
    tokens, why = values.written(trace, [(each.layer, each.neuron) for each in top])
    title = f"Largest neurons at {token_label(trace.token_texts[at], at in trace.special, 16)} (position {at})"
    listed = vocabulary(identity) is not None
    said = "" if why in ("", values.JOB) else f"What they write is not known: {why}"
    said += f"{bad:,} values at this position are NaN or infinite." if bad else ""
    return neuron_table(trace, identity, top, tokens, (layer, number or 0)), title, said, listed or not identity, why != values.JOB


@callback(
    Output("neuron-bars", "figure"), Output("neuron-title", "children"), Output("neuron-written", "children"),
    Input("neuron-layer", "value"), Input("neuron-number", "value"), Input("position", "data"), Input("theme", "data"), Input("neuron-ready", "data"), State("page-state", "data"),
)  # fmt: skip
def show_neuron(layer: int, number: int | None, position: int | None, theme: str, _: Any, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    hidden = trace["mlp_post", layer]
    if number is None or not 0 <= number < hidden.shape[1]:
        raise LayerscopeError(f"Neuron {number} is outside 0-{hidden.shape[1] - 1} of layer {layer}.")
    tokens, _why = values.written(trace, [(layer, number)])
    figure = neuron_bars(hidden[:, number], token_labels(trace.token_texts, trace.special, 12), position_in(trace, position), theme)
    return figure, f"Neuron {layer}.{number} on this prompt", written_lists(trace, _identity(trace), tokens.get((layer, number)))


@callback(
    Output("neuron-examples", "children"), Output("neuron-offer", "hidden"), Output("examples-title", "children"), Output("examples-said", "children"),
    Input("neuron-layer", "value"), Input("neuron-number", "value"), Input("neuron-side", "value"), Input("neuron-ready", "data"), State("page-state", "data"),
)  # fmt: skip
def show_examples(layer: int, number: int | None, side: str, _: Any, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    found = values.examples(trace, layer)
    title = f"Where {layer}.{number} is {'largest' if side == 'largest' else 'most negative'}"
    if found is None:
        return "", False, title, f"{len(values.searched_traces(trace)):,} traces of {trace.info.name} hold mlp_post."
    said = f"Over {sum(found.n_tokens):,} tokens of {len(found.trace_ids):,} traces. " + (f"{found.n_bad:,} values of the layer are NaN or infinite." if found.n_bad else "")
    return example_table(found, layer, min(number or 0, found.values.shape[2] - 1), list(SIDES).index(side)), True, title, said


@callback(Output("neuron-layer", "value"), Output("neuron-number", "value"), Input("neuron-choice", "data"), prevent_initial_call=True)
def choose(choice: dict[str, Any] | None):
    layer, _, number = (choice or {}).get("value", "").partition(".")
    return (int(layer), int(number)) if layer.isdecimal() and number.isdecimal() else (no_update, no_update)


@callback(
    Output("neuron-jobs", "data"), Input("neuron-list", "n_clicks"), Input("neuron-read", "n_clicks"), Input("neuron-search", "n_clicks"),
    State("neuron-layer", "value"), State("neuron-number", "value"), State("position", "data"), State("page-state", "data"),
)  # fmt: skip
def submit(listing: int, reading: int, searching: int, layer: int, number: int | None, position: int | None, page: dict[str, Any]):
    """One job at a time: the one whose button was pressed; when the page opens, the vocabulary's where that was made pressed."""
    trace = services().library.open(page["trace"])
    if ctx.triggered_id in (None, "neuron-list") and listing:
        return services().jobs.submit("vocabulary", {"model": trace.info.name}, f"Vocabulary of {trace.info.name}").id
    if ctx.triggered_id == "neuron-read" and reading:
        top, _ = values.largest(trace, position_in(trace, position), None)
        return values.submit_tokens(trace, [*dict.fromkeys([(layer, number or 0), *((each.layer, each.neuron) for each in top)])])
    return values.submit_search(trace, layer) if ctx.triggered_id == "neuron-search" and searching else no_update


@callback(Output("neuron-progress", "children"), Output("neuron-ready", "data"), Input("neuron-jobs", "data"), Input("jobs-now", "data"), State("neuron-ready", "data"))
def follow(job_id: str | None, _: Any, ready: str | None):
    return follow_job(job_id, ready)


def _identity(trace: Trace) -> str:
    """Of the model's files, "" where they are gone: the page shows what the trace holds all the same."""
    try:
        return model_of(trace).identity
    except LayerscopeError:
        return ""


keep_url({"layer": ("neuron-layer", "value"), "neuron": ("neuron-number", "value"), "side": ("neuron-side", "value")})

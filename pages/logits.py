"""Logits: what each position predicted, how sure it was, and how it fared with the token that followed. Every trace holds this."""

from __future__ import annotations

from typing import Any

import dash
import numpy as np
from dash import ClientsideFunction, Input, Output, State, callback, clientside_callback, dcc, html, no_update

from backend.analysis.logits import cumulative_perplexity, strongest
from backend.trace import Trace
from components.card import card
from components.figures.logits import PositionCurves, prediction_lines, top_bars
from components.follow_token import position_in
from components.graph import graph, graph_tools
from components.logits_table import UNITS, prediction_table, totals_table
from components.over_batch_views import predictions_card
from components.position_table import block_of, block_words
from components.services import services
from components.token_label import predicted_label, token_label, token_labels
from components.token_strip import METRICS
from components.trace_view import trace_page
from components.url_state import as_choice, as_int, keep_url

dash.register_page(__name__, path="/logits", name="Logits", order=5, icon="sparkles", description="Entropy, surprise and the best next tokens of each position")

REQUIRES: tuple[str, ...] = ()
MOST_POINTS = 1024  # of a line: about as many as the picture has pixels
KS = (5, 10, 20)

ABOUT_LINES = (
    "Everything at a position belongs to the prediction made there. Entropy, -sum p ln p, says how undecided it was: 0 is certain, ln(vocabulary) knows nothing. "
    "Surprise, -ln p of the token that really follows, is what it cost; its expected value is the entropy (Shannon 1948). In bits both are divided by ln 2.",
    "Perplexity so far is exp of the mean surprise, in nats, of all tokens up to the one that follows (Jelinek et al. 1977). The tinted part predicts generated tokens.",
    f"Beyond {MOST_POINTS:,} positions each point shows the largest of the positions that it stands for; the hover names them. A cross marks a prediction that is NaN.",
    "The strip above colours each token by its own surprise, so by the prediction made one position earlier; or by the entropy of the prediction made at it.",
)  # fmt: skip
ABOUT_TOP = (
    "softmax of the logits that the engine computed, soft-cap included: the most probable next tokens as stored in the trace, at most 20. The token that really follows has "
    "its own colour; the last bar is all other tokens together.",
)  # fmt: skip
ABOUT_TABLE = (
    "One prediction a row. Log-prob, surprise and rank are those of the token that follows; rank 1 was the model's first choice. "
    "A prediction that is NaN has no distribution: its numbers are NaN and its tokens have no rank.",
)  # fmt: skip


def layout(trace: str | None = None, unit: str | None = None, k: str | None = None, colour: str | None = None, **state: str):
    def build(opened: Trace) -> list[Any]:
        at = as_int(state.get("pos"), opened.n_prompt - 1, 0, opened.n_tokens - 1)
        return [*_cards(opened, as_choice(unit, list(UNITS), "nats"), min(KS, key=lambda n: abs(n - as_int(k, 10, 1, 20))), at), predictions_card(opened, state)]

    controls = _controls(as_choice(unit, list(UNITS), "nats"), as_choice(colour, list(METRICS), "surprise"))
    return trace_page(__name__, trace, REQUIRES, state, build, "What each position predicted, and how it fared.", controls)


def _controls(unit: str, colour: str) -> html.Div:
    units: Any = [{"label": name, "value": name} for name in UNITS]
    colours: Any = [{"label": name, "value": name} for name in METRICS]
    return html.Div(
        [
            html.Label([html.Span("Tokens by"), dcc.Dropdown(colours, colour, id="logits-colour", clearable=False, searchable=False, className="picker-metric")]),
            html.Label([html.Span("Unit"), dcc.Dropdown(units, unit, id="logits-unit", clearable=False, searchable=False, className="picker-narrow")]),
        ],
        className="controls",
    )


def _cards(trace: Trace, unit: str, k: int, at: int) -> list[Any]:
    options: Any = [{"label": f"top {n}", "value": n} for n in KS]
    choose = dcc.Dropdown(options, k, id="logits-k", clearable=False, searchable=False, className="picker-narrow")
    broken = int(np.isnan(trace.entropy).sum())
    said = f"Click a point to choose its position.{f' {broken:,} of {trace.n_tokens:,} predictions are NaN.' if broken else ''}"
    lines = card("Surprise and entropy", graph("logits-lines", height=380), said, graph_tools("logits-lines", "predictions"), list(ABOUT_LINES), className="wide")
    top = card(html.Span("", id="logits-top-title"), graph("logits-top", height=360, className="fill"), html.Span("", id="logits-top-subtitle"),
               [choose, *graph_tools("logits-top", "top-tokens")], list(ABOUT_TOP), className="fill")  # fmt: skip
    totals = card("Prompt and generated tokens", html.Div(totals_table(trace, unit), id="logits-totals", className="table-scroll"), "Means over the tokens that were predicted.",
                  about=list(ABOUT_TABLE))  # fmt: skip
    predictions = html.Div(prediction_table(trace, at, unit), id="logits-table", className="table-scroll table-tall")
    table = card("Predictions", [predictions, dcc.Store(id="logits-shown", data={"unit": unit, "start": block_of(at)})],
                 html.Span(block_words(trace, at), id="logits-words"), about=list(ABOUT_TABLE), className="wide")  # fmt: skip
    return [html.Div([lines, top, totals, table], className="cards cards-wide-left")]


@callback(
    Output("logits-lines", "figure"),
    Input("logits-unit", "value"), Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_lines(unit: str, position: int | None, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    scale = UNITS[unit]
    surprise, edges = strongest(-trace.next_logprobs / scale, MOST_POINTS)
    entropy, perplexity = strongest(trace.entropy / scale, MOST_POINTS)[0], strongest(cumulative_perplexity(trace.next_logprobs), MOST_POINTS)[0]
    labels = token_labels(trace.token_texts, trace.special, 12)
    figure = prediction_lines(PositionCurves(surprise, entropy, perplexity, edges), labels, trace.n_prompt, unit, position_in(trace, position), theme)
    return figure.update_layout(uirevision=f"{trace.id} {unit}")


@callback(
    Output("logits-top", "figure"), Output("logits-top-title", "children"), Output("logits-top-subtitle", "children"),
    Input("logits-k", "value"), Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_top(k: int, position: int | None, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    at = position_in(trace, position)
    ids, probabilities = trace.top_ids[at, :k].tolist(), np.exp(trace.top_logprobs[at, :k])
    follows = trace.token_ids[at + 1] if at + 1 < trace.n_tokens else None
    figure = top_bars(probabilities, [predicted_label(i, trace.token_text(i), trace.info, 16) for i in ids], ids, follows, theme)
    after = token_label(trace.token_texts[at], at in trace.special, 20)
    rank = int(trace.next_ranks[at])
    ranked = f"rank {rank + 1:,}" if rank >= 0 else "without a rank: the logits are NaN"
    said = "Nothing follows." if follows is None else f"Then comes {token_label(trace.token_texts[at + 1], at + 1 in trace.special, 20)}, {ranked}."
    return figure, f"Next token after {after}", f"Position {at}, {'prompt' if at < trace.n_prompt else 'generated'}. {said}"


@callback(
    Output("logits-table", "children"), Output("logits-words", "children"), Output("logits-totals", "children"), Output("logits-shown", "data"),
    Input("logits-unit", "value"), Input("position", "data"), State("logits-shown", "data"), State("page-state", "data"), prevent_initial_call=True,
)  # fmt: skip
def show_table(unit: str, position: int | None, shown: dict[str, Any], page: dict[str, Any]):
    """Another unit, or another part of a long run; within the part that is shown the browser marks the row."""
    trace = services().library.open(page["trace"])
    at = position_in(trace, position)
    wanted = {"unit": unit, "start": block_of(at)}
    if wanted == shown:
        return no_update, no_update, no_update, no_update
    return prediction_table(trace, at, unit), block_words(trace, at), totals_table(trace, unit), wanted


@callback(Output("position", "data", allow_duplicate=True), Input("logits-lines", "clickData"), prevent_initial_call=True)
def choose_clicked(click: dict[str, Any] | None):
    return int(click["points"][0]["x"]) if click else no_update


# The output is never written: Dash runs a callback when a page opens only if it has one there.
clientside_callback(ClientsideFunction("layerscope", "colourStrip"), Output("logits-colour", "id"), Input("logits-colour", "value"))
keep_url({"unit": ("logits-unit", "value"), "k": ("logits-k", "value"), "colour": ("logits-colour", "value")})

"""Logit lens: what the model would say if each layer were its last.

The table was computed at capture where that was cheap; else it is a job when the page is first opened. A target token needs the
model once more, so following one is a job too; both results are kept.
"""

from __future__ import annotations

from typing import Any

import dash
import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.trace import Trace
from components.card import card, cards
from components.figures.lens import MODES, depth_curves, lens_table, row_label
from components.follow_token import follow_card, position_in
from components.graph import graph, graph_tools
from components.lens_values import LensValues, lens_missing, lens_values, opened_lens
from components.token_label import token_label, token_labels
from components.trace_view import trace_page
from components.url_state import as_choice, keep_url

dash.register_page(__name__, path="/lens", name="Logit lens", order=6, icon="layers", description="What each layer would predict")

REQUIRES = ("resid_post",)
WINDOW = 18  # positions shown at once: as many as can be read side by side
SHOWN_TOKENS = 5

MODE_TITLES = {"probability": "Probability", "entropy": "Entropy", "kl": "KL to the model", "rank": "Rank of the next token"}

ABOUT_TABLE = (
    "Each cell: the most probable next token if the residual stream of that layer went straight through the final norm and the unembedding, which were trained for "
    "the last layer only (logit lens, nostalgebraist 2020). Early rows are therefore a rough reading, not the model's opinion.",
    "The top row is the model's own output. KL is KL(model || layer) in nats; rank is that of the token that really follows, 1 for the best.",
)  # fmt: skip


def layout(trace: str | None = None, mode: str | None = None, target: str | None = None, **state: str):
    def build(opened: Trace) -> list[Any]:
        return _cards(opened, as_choice(mode, list(MODES), "probability"), (target or "")[:200])

    return trace_page(__name__, trace, REQUIRES, state, build, "The prediction, layer by layer.")


def _cards(trace: Trace, mode: str, target: str) -> list[Any]:
    lens = lens_values(trace)
    if lens is None:
        state = dcc.Store(id="lens-state", data={"mode": mode, "target": target})
        return [html.Div([lens_missing(trace), dcc.Store(id="lens-ready"), state], id="lens-body")]
    options: Any = [{"label": title, "value": name} for name, title in MODE_TITLES.items()]
    choose = dcc.Dropdown(options, mode, id="lens-mode", clearable=False, searchable=False, className="picker-metric")
    n_rows = len(lens.rows)
    wide = {"minWidth": 70 + 58 * min(WINDOW, trace.n_tokens)}
    table = html.Div(html.Div(graph("lens-table", height=110 + 30 * n_rows), style=wide), className="table-scroll")
    guesses = card(html.Span("", id="guesses-title"), html.Div(id="lens-guesses", className="table-scroll table-tall"), "The best tokens of each layer, with their probability.")
    depth = card("Towards the answer", graph("lens-depth", height=300, className="fill"), html.Span("", id="depth-subtitle"), graph_tools("lens-depth"),
                 list(ABOUT_TABLE), className="fill")  # fmt: skip
    top = card("Top token of each layer", table, html.Span("", id="lens-subtitle"), [choose, *graph_tools("lens-table", "logit-lens")], list(ABOUT_TABLE), className="wide")
    return [cards(top, guesses, depth, follow_card(target))]


@callback(Output("lens-body", "children"), Input("lens-ready", "data"), State("lens-state", "data"), State("page-state", "data"), prevent_initial_call=True)
def show_computed(job_id: str | None, state: dict[str, str], page: dict[str, Any]):
    """The cards, in place of the sentence that there was no lens."""
    return _cards(opened_lens(page["trace"])[0], state["mode"], state["target"]) if job_id else no_update


@callback(
    Output("lens-table", "figure"), Output("lens-subtitle", "children"),
    Input("lens-mode", "value"), Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_table(mode: str, position: int | None, theme: str, page: dict[str, Any]):
    trace, lens = opened_lens(page["trace"])
    at = position_in(trace, position)
    first = min(max(at - WINDOW // 2, 0), max(trace.n_tokens - WINDOW, 0))
    window = slice(first, min(first + WINDOW, trace.n_tokens))
    ids, logprobs = lens.result("lens_top_ids")[:, window, :SHOWN_TOKENS], lens.result("lens_top_logprobs")[:, window, :SHOWN_TOKENS]
    values = np.exp(logprobs[:, :, 0]) if mode == "probability" else lens.result({"entropy": "lens_entropy", "kl": "lens_kl", "rank": "lens_next_rank"}[mode])[:, window]
    texts = [[[token_label(lens.token_text(i)) for i in cell] for cell in row] for row in ids]
    labels = token_labels(trace.token_texts, trace.special, 10)
    following = [*labels[window.start + 1 : window.stop + 1], ""][: window.stop - first]
    figure = lens_table(values, texts, logprobs, lens.rows, labels[window], first, mode, at, theme, following)
    said = f"Positions {first} to {window.stop - 1} of {trace.n_tokens}; choose a token above to move. " if trace.n_tokens > WINDOW else ""
    written = "Written and coloured: the rank of the token that follows." if mode == "rank" else f"Written: the most probable next token. Colour: {MODES[mode]}."
    return figure, said + written


@callback(Output("position", "data", allow_duplicate=True), Input("lens-table", "clickData"), prevent_initial_call=True)
def choose_clicked(click: dict[str, Any] | None):
    return int(click["points"][0]["x"]) if click else no_update


@callback(
    Output("lens-guesses", "children"), Output("guesses-title", "children"), Output("lens-depth", "figure"), Output("depth-subtitle", "children"),
    Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_position(position: int | None, theme: str, page: dict[str, Any]):
    trace, lens = opened_lens(page["trace"])
    at = position_in(trace, position)
    label = token_label(trace.token_texts[at], at in trace.special, 16)
    curves = {"KL(model || layer), nats": lens.result("lens_kl")[:, at], "entropy, nats": lens.result("lens_entropy")[:, at]}
    said = f"At {label} (position {at}): how far each layer is from the model's own prediction, and how undecided it is."
    return _guesses(lens, at), f"Guesses after {label}", depth_curves(curves, lens.rows, theme), said


def _guesses(lens: LensValues, at: int) -> html.Table:
    """The best tokens of each row at one position, the model's own output first."""
    ids, logprobs = lens.result("lens_top_ids")[:, at, :SHOWN_TOKENS], lens.result("lens_top_logprobs")[:, at, :SHOWN_TOKENS]
    ranks, follows, rows = lens.result("lens_next_rank")[:, at], at + 1 < lens.trace.n_tokens, lens.rows
    header = [html.Th("Layer"), *(html.Th(f"{i + 1}.") for i in range(ids.shape[1])), html.Th("Rank of next", className="num") if follows else None]
    body = []
    for r in reversed(range(len(rows))):
        cells = [
            html.Td([html.Div(token_label(lens.token_text(i), max_length=14), className="chip-token"), html.Div(f"{np.exp(lp):.3f}", className="muted small")])
            for i, lp in zip(ids[r], logprobs[r], strict=True)
        ]
        body.append(html.Tr([html.Td(row_label(rows[r])), *cells, html.Td(f"{ranks[r] + 1:,}" if ranks[r] >= 0 else "–", className="num") if follows else None]))
    return html.Table([html.Thead(html.Tr(header)), html.Tbody(body)], className="ls-table")


keep_url({"mode": ("lens-mode", "value"), "target": ("target-text", "value")})

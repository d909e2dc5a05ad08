"""Lens: what the model would say if each layer were its last, or if one component wrote alone.

The table of resid_post was computed at capture where that was cheap; any other lens is a job when it is first opened. A target token
needs the model once more, so following one is a job too; all results are kept.
"""

from __future__ import annotations

from typing import Any

import dash
import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.reports.lens_results import OUTPUTS, LensChoice
from backend.trace import Trace
from components.card import card, cards
from components.figures.lens import MODES, depth_curves, lens_table
from components.follow_token import follow_card, position_in, target_values
from components.graph import graph, graph_tools
from components.lens_controls import choice_in, lens_picker
from components.lens_guesses import guesses_table
from components.lens_values import LensValues, lens_missing, lens_values, opened_lens
from components.services import services
from components.token_label import predicted_label, token_label, token_labels
from components.trace_view import trace_page
from components.tuned_lens_card import tuned_lens_card
from components.url_state import as_choice, keep_url

dash.register_page(__name__, path="/lens", name="Logit lens", order=6, icon="layers", description="What each layer would predict")

REQUIRES = ("resid_post",)
WINDOW = 18  # positions shown at once: as many as can be read side by side
SHOWN_TOKENS = 5

ABOUT_TABLE = (
    "Each cell: the most probable next token if the stream at that row went straight through the final norm and the unembedding, which were trained for "
    "the last layer only (logit lens, nostalgebraist 2020). Early rows are therefore a rough reading, not the model's opinion.",
    "attn_out, mlp_out and a head's result go through the final norm alone, as if nothing else were in the stream, with a norm of their own: what that component writes, not "
    "what it adds to the logits. A head's result is z W_O, before a bias of W_O and before what follows W_O in some architectures.",
    "A tuned lens puts a trained affine translator, h + A h + b, before the final norm of each row (Belrose et al. 2023): closer to what the layer knows of the answer.",
    "The top row is the model's own output. KL is KL(model || row) in nats. Rank and probability of the token are those of the token that really follows, or of the one "
    "followed below; rank 1 is the best. The dotted line is where generated tokens begin. Cells without colour are NaN.",
)  # fmt: skip


def layout(trace: str | None = None, mode: str | None = None, target: str | None = None, site: str | None = None, layer: str | None = None, lens: str | None = None, **state: str):
    def chosen(opened: Trace) -> LensChoice:
        return choice_in(opened, site, layer, lens)

    def build(opened: Trace) -> list[Any]:
        text = (target or "")[:200]
        return [dcc.Store(id="lens-target", data=text), html.Div(_body(opened, chosen(opened), text), id="lens-body"), cards(tuned_lens_card(opened))]

    def controls(opened: Trace) -> Any:
        return lens_picker(opened, chosen(opened), as_choice(mode, list(MODES), "probability"))

    return trace_page(__name__, trace, REQUIRES, state, build, "The prediction, layer by layer.", controls)


def _body(trace: Trace, choice: LensChoice, target: str) -> list[Any]:
    """The cards of the chosen lens, or the job that makes it."""
    store, lens = dcc.Store(id="lens-choice", data=choice.to_json()), lens_values(trace, choice)
    if lens is None:
        return [store, dcc.Store(id="lens-ready"), lens_missing(trace, choice)]
    n_rows = len(lens.rows)
    wide = {"minWidth": 70 + 58 * min(WINDOW, trace.n_tokens)}
    table = html.Div(html.Div(graph("lens-table", height=110 + 30 * n_rows), style=wide), className="table-scroll")
    guesses = card(html.Span("", id="guesses-title"), html.Div(id="lens-guesses", className="table-scroll table-tall"),
                   "The best tokens of each row, with their probability; last, the rank of the token that follows.",
                   about=list(ABOUT_TABLE))  # fmt: skip
    depth = card("Towards the answer", graph("lens-depth", height=300, className="fill"), html.Span("", id="depth-subtitle"), graph_tools("lens-depth"),
                 list(ABOUT_TABLE), className="fill")  # fmt: skip
    of = {"resid_post": "each layer", "result": f"each head of layer {choice.layer}"}.get(choice.site, f"{choice.site} at each layer")
    top = card(f"Top token of {of}", table, html.Span("", id="lens-subtitle"), graph_tools("lens-table", "lens"), list(ABOUT_TABLE), className="wide")
    return [store, cards(top, guesses, depth, follow_card(target))]


@callback(
    Output("lens-body", "children"),
    Input("lens-ready", "data", allow_optional=True), Input("lens-site", "value"), Input("lens-layer", "value"), Input("lens-kind", "value"),
    State("lens-choice", "data"), State("target-text", "value", allow_optional=True), State("lens-target", "data"), State("page-state", "data"), prevent_initial_call=True,
)  # fmt: skip
def show_lens(job_id: str | None, site: str, layer: int | None, kind: str, shown: dict[str, Any], text: str | None, target: str, page: dict[str, Any]):
    """Another lens, or the one that a job has just made in place of the sentence that there was none."""
    trace = services().library.open(page["trace"])
    choice = choice_in(trace, site, layer, kind)
    if choice.to_json() == shown and not (dash.ctx.triggered_id == "lens-ready" and job_id):
        return no_update
    return _body(trace, choice, target if text is None else text)


@callback(
    Output("lens-table", "figure"), Output("lens-subtitle", "children"),
    Input("lens-mode", "value"), Input("position", "data"), Input("target-token", "data"), Input("theme", "data"), State("lens-choice", "data"), State("page-state", "data"),
)  # fmt: skip
def show_table(mode: str, position: int | None, token: dict[str, Any] | None, theme: str, chosen: dict[str, Any], page: dict[str, Any]):
    trace, lens = opened_lens(page["trace"], chosen)
    at = position_in(trace, position)
    first = min(max(at - WINDOW // 2, 0), max(trace.n_tokens - WINDOW, 0))
    window = slice(first, min(first + WINDOW, trace.n_tokens))
    ids, logprobs = lens.result("lens_top_ids")[:, window, :SHOWN_TOKENS], lens.result("lens_top_logprobs")[:, window, :SHOWN_TOKENS]
    values, followed = _values(lens, mode, token)
    texts = [[[predicted_label(i, lens.token_text(i), trace.info) for i in cell] for cell in row] for row in ids]
    labels = token_labels(trace.token_texts, trace.special, 10)
    following = [*labels[window.start + 1 : window.stop + 1], ""][: window.stop - first]
    figure = lens_table(values[:, window], texts, logprobs, lens.rows, labels[window], first, mode, at, theme, following, followed, trace.n_prompt)
    said = f"Positions {first} to {window.stop - 1} of {trace.n_tokens}; choose a token above to move. " if trace.n_tokens > WINDOW else ""
    alone = "Each component's output alone, through the final norm. " if lens.choice.site in OUTPUTS else ""
    colour = MODES[mode].replace("the token that follows", followed) if followed else MODES[mode]
    written = f"Written and coloured: the {colour}." if mode == "rank" else f"Written: the most probable next token. Colour: {colour}."
    return figure, said + alone + written


def _values(lens: LensValues, mode: str, token: dict[str, Any] | None) -> tuple[np.ndarray, str]:
    """(row, pos) of what the cells are coloured by, and the label of the token that it is of, where one is followed."""
    if mode in ("entropy", "kl"):
        return lens.result(f"lens_{mode}"), ""
    if mode == "probability":
        return np.exp(lens.result("lens_top_logprobs")[:, :, 0]), ""
    target = target_values(lens.trace.id, token, lens.choice) if token else None
    if token is not None and target is not None:
        return (target[1] if mode == "rank" else np.exp(target[0])), token_label(token["token"], max_length=16)
    return (lens.result("lens_next_rank") if mode == "rank" else np.exp(lens.result("lens_next_logprob"))), ""


@callback(Output("position", "data", allow_duplicate=True), Input("lens-table", "clickData"), prevent_initial_call=True)
def choose_clicked(click: dict[str, Any] | None):
    return int(click["points"][0]["x"]) if click else no_update


@callback(
    Output("lens-guesses", "children"), Output("guesses-title", "children"), Output("lens-depth", "figure"), Output("depth-subtitle", "children"),
    Input("position", "data"), Input("theme", "data"), State("lens-choice", "data"), State("page-state", "data"),
)  # fmt: skip
def show_position(position: int | None, theme: str, chosen: dict[str, Any], page: dict[str, Any]):
    trace, lens = opened_lens(page["trace"], chosen)
    at = position_in(trace, position)
    label = token_label(trace.token_texts[at], at in trace.special, 16)
    curves = {"KL(model || row), nats": lens.result("lens_kl")[:, at], "entropy, nats": lens.result("lens_entropy")[:, at]}
    said = f"At {label} (position {at}): how far each row is from the model's own prediction, and how undecided it is."
    return guesses_table(lens, at, SHOWN_TOKENS), f"Guesses after {label}", depth_curves(curves, lens.rows, theme), said


keep_url({"site": ("lens-site", "value"), "layer": ("lens-layer", "value"), "lens": ("lens-kind", "value"), "mode": ("lens-mode", "value")})
keep_url({"target": ("target-text", "value")})

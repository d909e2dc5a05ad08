"""Logit lens: what the model would say if each layer were its last.

The table was computed at capture. A target token needs the model once more, so following one is a job; its result is kept.
"""

from __future__ import annotations

from typing import Any

import dash
import numpy as np
from dash import Input, Output, State, callback, ctx, dcc, html, no_update

from backend.trace import Trace
from components.card import card, cards
from components.figures.lens import MODES, depth_curves, lens_table, row_label, target_curves
from components.figures.theme import no_figure
from components.graph import graph, graph_tools
from components.services import services
from components.states import error
from components.token_label import token_label, token_labels
from components.trace_view import trace_page
from components.url_state import as_choice, keep_url

dash.register_page(__name__, path="/lens", name="Logit lens", order=5)

REQUIRES = ("lens_top_ids",)
WINDOW = 20  # positions shown at once: as many as can be read side by side
SHOWN_TOKENS = 5

MODE_TITLES = {"probability": "Probability", "entropy": "Entropy", "kl": "KL to the model", "rank": "Rank of the next token"}

ABOUT_TABLE = (
    "Each cell: the most probable next token if the residual stream of that layer went straight through the final norm and the unembedding, which were trained for "
    "the last layer only (logit lens, nostalgebraist 2020). Early rows are therefore a rough reading, not the model's opinion.",
    "The top row is the model's own output. KL is KL(model || layer) in nats; rank is that of the token that really follows, 1 for the best.",
)  # fmt: skip
ABOUT_TARGET = (
    "The probability and rank that each layer's residual stream gives to one token, at the chosen position. Write the token as it stands in the text, with its "
    "leading space; of a longer text the first token is taken. Following a new token runs the final norm and the unembedding once more, as a job.",
)  # fmt: skip


def layout(trace: str | None = None, mode: str | None = None, target: str | None = None, **state: str):
    def build(opened: Trace) -> list[Any]:
        return _cards(opened, as_choice(mode, list(MODES), "probability"), (target or "")[:200])

    return trace_page(__name__, trace, REQUIRES, state, build, "The prediction, layer by layer.")


def _cards(trace: Trace, mode: str, target: str) -> list[Any]:
    options: Any = [{"label": title, "value": name} for name, title in MODE_TITLES.items()]
    choose = dcc.Dropdown(options, mode, id="lens-mode", clearable=False, searchable=False, className="picker-metric")
    n_rows = len(trace.result_attrs("lens_top_ids")["rows"])
    wide = {"minWidth": 70 + 50 * min(WINDOW, trace.n_tokens)}
    table = html.Div(html.Div(graph("lens-table", height=110 + 30 * n_rows), style=wide), className="table-scroll")
    guesses = card(html.Span("", id="guesses-title"), html.Div(id="lens-guesses", className="table-scroll table-tall"), "The best tokens of each layer, with their probability.")
    depth = card("Towards the answer", graph("lens-depth", height=300, className="fill"), html.Span("", id="depth-subtitle"), graph_tools("lens-depth"),
                 list(ABOUT_TABLE), className="fill")  # fmt: skip
    top = card("Top token of each layer", table, html.Span("", id="lens-subtitle"), [choose, *graph_tools("lens-table", "logit-lens")], list(ABOUT_TABLE), className="wide")
    return [cards(top, guesses, depth, _target_card(target))]


def _target_card(target: str) -> html.Section:
    form = html.Div(
        [
            dcc.Input(id="target-text", value=target, placeholder="token, with its leading space", debounce=True, maxLength=200, className="text-input"),
            html.Button("Follow", id="target-go", className="btn btn-primary"),
        ],
        className="target-form",
    )
    stores = [dcc.Store(id="target-token"), dcc.Store(id="target-job"), dcc.Interval(id="target-poll", interval=500, disabled=True)]
    body = [*stores, form, html.Div(id="target-state", className="target-state", role="status"), graph("target-curves", height=230)]
    return card("Follow a token", body, html.Span("", id="target-subtitle"), graph_tools("target-curves", "target"), list(ABOUT_TARGET), className="wide")


@callback(
    Output("lens-table", "figure"), Output("lens-subtitle", "children"),
    Input("lens-mode", "value"), Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_table(mode: str, position: int | None, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    at = _inside(position, trace)
    first = min(max(at - WINDOW // 2, 0), max(trace.n_tokens - WINDOW, 0))
    window = slice(first, min(first + WINDOW, trace.n_tokens))
    ids, logprobs = trace.result("lens_top_ids")[:, window, :SHOWN_TOKENS], trace.result("lens_top_logprobs")[:, window, :SHOWN_TOKENS]
    values = np.exp(logprobs[:, :, 0]) if mode == "probability" else trace.result({"entropy": "lens_entropy", "kl": "lens_kl", "rank": "lens_next_rank"}[mode])[:, window]
    texts = [[[token_label(trace.token_text(i)) for i in cell] for cell in row] for row in ids]
    labels = token_labels(trace.token_texts, trace.special, 10)
    following = [*labels[window.start + 1 : window.stop + 1], ""][: window.stop - first]
    figure = lens_table(values, texts, logprobs, trace.result_attrs("lens_top_ids")["rows"], labels[window], first, mode, at, theme, following)
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
    trace = services().library.open(page["trace"])
    at = _inside(position, trace)
    rows = trace.result_attrs("lens_top_ids")["rows"]
    label = token_label(trace.token_texts[at], at in trace.special, 16)
    curves = {"KL(model || layer), nats": trace.result("lens_kl")[:, at], "entropy, nats": trace.result("lens_entropy")[:, at]}
    said = f"At {label} (position {at}): how far each layer is from the model's own prediction, and how undecided it is."
    return _guesses(trace, rows, at), f"Guesses after {label}", depth_curves(curves, rows, theme), said


def _guesses(trace: Trace, rows: list[str], at: int) -> html.Table:
    """The best tokens of each row at one position, the model's own output first."""
    ids, logprobs = trace.result("lens_top_ids")[:, at, :SHOWN_TOKENS], trace.result("lens_top_logprobs")[:, at, :SHOWN_TOKENS]
    ranks, follows = trace.result("lens_next_rank")[:, at], at + 1 < trace.n_tokens
    header = [html.Th("Layer"), *(html.Th(f"{i + 1}.") for i in range(ids.shape[1])), html.Th("Rank of next", className="num") if follows else None]
    body = []
    for r in reversed(range(len(rows))):
        cells = [
            html.Td([html.Div(token_label(trace.token_text(i), max_length=14), className="chip-token"), html.Div(f"{np.exp(lp):.3f}", className="muted small")])
            for i, lp in zip(ids[r], logprobs[r], strict=True)
        ]
        body.append(html.Tr([html.Td(row_label(rows[r])), *cells, html.Td(f"{ranks[r] + 1:,}", className="num") if follows else None]))
    return html.Table([html.Thead(html.Tr(header)), html.Tbody(body)], className="ls-table")


@callback(
    Output("target-token", "data"), Output("target-job", "data"), Output("target-poll", "disabled"), Output("target-state", "children"), Output("target-go", "disabled"),
    Input("target-go", "n_clicks"), Input("target-text", "n_submit"), Input("target-poll", "n_intervals"),
    State("target-text", "value"), State("target-job", "data"), State("page-state", "data"),
)  # fmt: skip
def follow_target(clicks: int | None, submitted: int | None, polls: int | None, text: str | None, job: dict[str, str] | None, page: dict[str, Any]):
    """Submit the job, watch it, and hand its token to the curves. A target that was followed before is there at once."""
    if ctx.triggered_id == "target-poll" and job:
        return _watch(page["trace"], job)
    if not text:
        return None, None, True, "", False
    known = services().derived.get_json(("lens_target_token", page["trace"], text))
    if known is not None:
        return known, None, True, "", False
    if ctx.triggered_id is None:
        return None, None, True, "Not followed yet in this trace: press Follow.", False
    submitted_job = services().jobs.submit("lens_target", {"trace_id": page["trace"], "target": text}, f"Follow {token_label(text, max_length=24)}")
    return None, {"id": submitted_job.id, "text": text}, False, "Waiting for the model.", True


def _watch(trace_id: str, job: dict[str, str]) -> tuple[Any, ...]:
    record = services().jobs.get(job["id"])
    if record.state in ("queued", "running"):
        return no_update, no_update, False, f"{record.stage or 'waiting'}: {record.done} of {record.total}", True
    if record.state != "done":
        return None, None, True, error(record.error or f"The job was {record.state.replace('_', ' ')}."), False
    services().derived.put_json(("lens_target_token", trace_id, job["text"]), record.result)
    return record.result, None, True, "", False


@callback(
    Output("target-curves", "figure"), Output("target-subtitle", "children"),
    Input("target-token", "data"), Input("position", "data"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_target(token: dict[str, Any] | None, position: int | None, theme: str, page: dict[str, Any]):
    """Curves of the target, or of the token that really follows (known from the capture) while there is none."""
    trace = services().library.open(page["trace"])
    at = _inside(position, trace)
    rows = trace.result_attrs("lens_top_ids")["rows"]
    values = services().derived.get_array(("lens_target", trace.id, token["token_id"])) if token else None
    here = f"at {token_label(trace.token_texts[at], at in trace.special, 12)} (position {at})"
    if token and values is not None:
        label = token_label(token["token"], max_length=20)
        figure = target_curves(values[0, :, at], values[1, :, at].astype(np.int64), rows[: values.shape[1]], label, theme)
        n_tokens = token.get("n_tokens_of_target", 1)
        more = f" The text has {n_tokens} tokens; this is the first." if n_tokens > 1 else ""
        return figure, f"Probability and rank of {label} {here}.{more}"
    if at + 1 == trace.n_tokens:
        return no_figure(theme, "Nothing follows the last token: write a token to follow."), f"Probability and rank of a token {here}."
    label = token_label(trace.token_texts[at + 1], at + 1 in trace.special, 20)
    figure = target_curves(trace.result("lens_next_logprob")[:, at], trace.result("lens_next_rank")[:, at], rows, label, theme)
    return figure, f"Probability and rank of {label}, which follows {here}. Write another token to follow that one."


def _inside(position: int | None, trace: Trace) -> int:
    return trace.n_prompt - 1 if position is None else min(max(position, 0), trace.n_tokens - 1)


keep_url({"mode": ("lens-mode", "value"), "target": ("target-text", "value")})

"""A finished generation, step by step: a slider over the written tokens; at each, where a head looked, how large the stream was, what could have come.

Everything is read from the trace. The chosen step lies in the slider `gen-step`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import ClientsideFunction, Input, Output, State, callback, clientside_callback, dcc, html

from backend.analysis.activations import bucket_edges
from backend.trace import Trace
from components.card import card, cards
from components.figures.generation import attention_row, depth_norms
from components.figures.theme import no_figure
from components.graph import graph, graph_tools
from components.services import services
from components.site_summary import site_summary
from components.states import empty, missing
from components.token_label import token_label, token_labels
from components.trace_view import integrity_badge
from components.url_state import keep_url

_MOST_KEYS = 256
_NORM_SITES = ("resid_post", "attn_out", "mlp_out")
_PAGES = {"Overview": "/trace", "Attention": "/attention", "Activations": "/activations", "Logit lens": "/lens"}

ABOUT_STEPS = "Each step wrote one token. Its values are those of the position before that token, read from the trace, where prompt and answer were run together once."
ABOUT_ROW = (
    "The attention probabilities of one head at the position that this step's token was chosen at: one bar for each token that could be looked at. They sum to 1.",
    f"Read from the trace, where prompt and answer were run together once. Beyond {_MOST_KEYS} tokens a bar is the largest of those it stands for.",
)
ABOUT_NEXT = "The most probable next tokens at the position that this step's token was chosen at: softmax of the model's logits, before temperature and cuts."
ABOUT_DEPTH = "The Euclidean length of each site's vector at this step's position, layer by layer: the residual stream, and what attention and the MLP add to it."


def result(trace: Trace, step: int, layer: int, head: int) -> list[Any]:
    """The strip with the slider and the cards of one step; `step` counts from 1."""
    n = trace.n_tokens - trace.n_prompt
    state = dcc.Store(id="page-state", data={"trace": trace.id, "position": trace.n_prompt - 1 + max(step - 1, 0)})
    if not n:
        return [state, card("Nothing was written", empty("No token was kept", "The generation was stopped before its first token; the trace holds the prompt.", _links(trace)),
                            about=ABOUT_STEPS)]  # fmt: skip
    slider = dcc.Slider(1, n, 1, value=step, id="gen-step", marks=None, tooltip={"placement": "bottom"}, updatemode="drag", allow_direct_input=False)
    said = html.Div("", id="gen-step-said", className="step-said", role="status")
    facts = html.Span(f"{trace.n_prompt} prompt tokens and {n} new ones")
    strip = html.Div([said, slider, html.Div([facts, integrity_badge(trace), _links(trace)], className="step-links")], className="step-strip")
    steps = card("Step by step", strip, "Drag, or click a token or use the arrow keys on the text above.", about=ABOUT_STEPS, className="wide")
    return [state, cards(steps, *_step_cards(trace, layer, head))]


def _links(trace: Trace) -> html.Div:
    links = [dcc.Link(name, href=f"{path}?trace={trace.id}", className="btn btn-outline-secondary") for name, path in _PAGES.items()]
    return html.Div(links, className="controls")


def _head_picker(trace: Trace, layer: int, head: int) -> html.Div:
    """Ids of its own: callbacks of the Attention page listen to those of components.heads."""
    names = {"Layer": ("gen-layer", trace.layers("attn_pattern"), layer), "Head": ("gen-head", list(range(trace.info.n_heads)), head)}
    pickers = []
    for label, (name, values, chosen) in names.items():
        options: Any = [{"label": str(v), "value": v} for v in values]
        choose = dcc.Dropdown(options, chosen, id=name, clearable=False, searchable=len(values) > 12, className="picker-narrow")
        pickers.append(html.Label([html.Span(label), choose]))
    return html.Div(pickers, className="controls")


def _step_cards(trace: Trace, layer: int, head: int) -> list[Any]:
    if trace.has("attn_pattern"):
        body, tools = graph("gen-attention", height=250), [_head_picker(trace, layer, head), *graph_tools("gen-attention", "attention-row")]
        row = card(html.Span("", id="gen-attention-title"), body, "Blue: the prompt. Orange: what was written before.", tools, list(ABOUT_ROW), className="wide")
    else:
        row = card("Where a head looks", missing("attn_pattern", trace.id), about=list(ABOUT_ROW), className="wide")
    table = html.Div(id="gen-next", className="table-scroll table-tall")
    norms = graph("gen-depth", height=300, className="fill")
    return [
        row,
        card("Most probable tokens", table, "The one that was written is marked.", about=ABOUT_NEXT),
        card("Norms at this step", norms, "At the position that the token was chosen at.", graph_tools("gen-depth", "step-norms"), ABOUT_DEPTH, className="fill"),
    ]


clientside_callback(ClientsideFunction("layerscope", "chooseStep"), Output("gen-at", "data"), Input("gen-step", "value"))


def _opened(page: dict[str, Any], step: int | None) -> tuple[Trace, int]:
    """The trace, and the position that the step's token was chosen at."""
    trace = services().library.open(page["trace"])
    return trace, trace.n_prompt - 2 + min(max(step or 1, 1), trace.n_tokens - trace.n_prompt)


@callback(
    Output("gen-step-said", "children"), Output("gen-next", "children"), Output("gen-depth", "figure"),
    Input("gen-step", "value"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_step(step: int | None, theme: str, page: dict[str, Any]):
    trace, at = _opened(page, step)
    written = token_label(trace.token_texts[at + 1], at + 1 in trace.special, 24)
    probability = float(np.exp(trace.next_logprobs[at]))
    how = f"probability {probability:.3g}, rank {trace.next_ranks[at] + 1:,}, entropy {trace.entropy[at]:.2f} nats"
    said = f"Step {at + 2 - trace.n_prompt} writes {written} at position {at + 1}: {how}"
    sites = [site for site in _NORM_SITES if trace.has(site)]
    layers = trace.layers(sites[0]) if sites else []
    norms = {site: site_summary(trace, site)[0][:, at] for site in sites if trace.layers(site) == layers}
    figure = depth_norms(norms, layers, theme) if norms else no_figure(theme, "Neither resid_post nor attn_out nor mlp_out was captured.")
    return said, _next_table(trace, at), figure


@callback(
    Output("gen-attention", "figure"), Output("gen-attention-title", "children"),
    Input("gen-step", "value"), Input("gen-layer", "value"), Input("gen-head", "value"), Input("theme", "data"), State("page-state", "data"),
)  # fmt: skip
def show_attention(step: int | None, layer: int, head: int, theme: str, page: dict[str, Any]):
    trace, at = _opened(page, step)
    title = f"Where head {layer}.{head} looks from {token_label(trace.token_texts[at], at in trace.special, 20)} (position {at})"
    heads, rows = trace.kept("attn_pattern", layer)
    if head not in heads or not rows[0] <= at < rows[1]:
        return no_figure(theme, f"Row {at} of head {layer}.{head} was not captured."), title
    row = trace.head("attn_pattern", layer, head, slice(at, at + 1), slice(0, at + 1))[0]
    edges = bucket_edges(len(row), min(len(row), _MOST_KEYS))
    return attention_row(np.maximum.reduceat(row, edges[:-1]), edges, token_labels(trace.token_texts, trace.special, 16), trace.n_prompt, theme), title


def _next_table(trace: Trace, at: int) -> html.Table:
    head = html.Thead(html.Tr([html.Th("", className="num"), html.Th("Token"), html.Th("Id", className="num"), html.Th("Probability"), html.Th("", className="num")]))
    follows, rows = trace.token_ids[at + 1], []
    for rank, (token_id, logprob) in enumerate(zip(trace.top_ids[at], trace.top_logprobs[at], strict=True)):
        probability = float(np.exp(logprob))
        token = html.Td(html.Span(token_label(trace.token_text(token_id), max_length=24), className="chip-token"), className="nowrap")
        bar = html.Td(html.Span(className="bar", style={"width": f"{100 * probability:.1f}%"}), className="bar-cell")
        cells = [html.Td(rank + 1, className="num muted"), token, html.Td(int(token_id), className="num muted"), bar, html.Td(f"{probability:.4f}", className="num")]
        rows.append(html.Tr(cells, className="chosen" if token_id == follows else ""))
    return html.Table([head, html.Tbody(rows)], className="ls-table compact")


keep_url({"step": ("gen-step", "value"), "layer": ("gen-layer", "value"), "head": ("gen-head", "value")})

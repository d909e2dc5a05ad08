"""Trace: the overview of one run. What each position predicted, how sure it was, what was checked and how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import dash
import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.trace import Trace
from components.card import card
from components.controls import facts
from components.drawn import still
from components.position_table import block_of, block_words, position_table
from components.services import services
from components.token_label import predicted_label, token_label
from components.trace_view import integrity_table, trace_page
from components.url_state import as_int

dash.register_page(__name__, path="/trace", name="Overview", order=2, icon="scan-text", description="Tokens, predictions, integrity, metadata")

REQUIRES: tuple[str, ...] = ()

ABOUT_POSITIONS = (
    "One row a token. Log-prob, in nats, is what the model gave to this token given those before it; rank 1 means that it was the model's "
    "first choice. Nothing predicts the first token.",
    "Entropy, in nats, is that of the prediction made at this position for the token after it: 0 is certain, ln(vocabulary) knows nothing.",
)
ABOUT_INTEGRITY = (
    "Identities that any faithful capture obeys, measured on this run's own values: the largest relative error found, and the tolerance for this precision and quantization.",
    "Quantized kernels round inside a matrix product, so their tolerances are wider; each is stated.",
)

ABOUT_TOP = "The most probable next tokens at the chosen position: softmax of the logits that the engine computed, over the whole vocabulary; as many as the trace stores."
ABOUT_MADE = "Model, engine and settings as they were written into the trace file, with the times that each stage took."


def layout(trace: str | None = None, **state: str) -> html.Div:
    def build(opened: Trace) -> list[Any]:
        return _cards(opened, as_int(state.get("pos"), opened.n_prompt - 1, 0, opened.n_tokens - 1))

    return trace_page(__name__, trace, REQUIRES, state, build, "What each position predicted.")


def _cards(trace: Trace, at: int) -> list[Any]:
    table = html.Div(position_table(trace, at), id="positions", className="table-scroll table-fill")
    words = html.Span(block_words(trace, at), id="positions-words")
    positions = card("Positions", [table, dcc.Store(id="positions-start", data=block_of(at))], words, about=ABOUT_POSITIONS, className="tall")
    chosen = card(html.Span("", id="top-title"), html.Div(id="top-list"), html.Span("", id="top-subtitle"), about=ABOUT_TOP)
    integrity = card("Integrity", html.Div(integrity_table(trace), className="table-scroll"), "What was checked, and how closely it holds.", about=ABOUT_INTEGRITY)
    made = card("How it was made", _metadata(trace), "Everything needed to run it again.", about=ABOUT_MADE)
    return [html.Div([positions, chosen, made, integrity], className="cards cards-wide-left")]


@callback(
    Output("positions", "children"), Output("positions-words", "children"), Output("positions-start", "data"),
    Input("position", "data"), State("positions-start", "data"), State("page-state", "data"),
    prevent_initial_call=True,
)  # fmt: skip
def turn_to_block(position: int | None, start: int, page: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Another part of a long prompt, when the chosen position lies outside the one that is shown."""
    if position is None or block_of(position) == start:
        return no_update, no_update, no_update
    trace = services().library.open(page["trace"])
    at = min(max(position, 0), trace.n_tokens - 1)
    return position_table(trace, at), block_words(trace, at), block_of(at)


@callback(
    Output("top-list", "children"), Output("top-title", "children"), Output("top-subtitle", "children"),
    Input("position", "data"), State("page-state", "data"),
)  # fmt: skip
def show_top(position: int | None, page: Mapping[str, Any]) -> tuple[Any, str, str]:
    """Every stored next token of the chosen position, with its probability as a bar."""
    trace = services().library.open(page["trace"])
    at = min(max(position if position is not None else page["position"], 0), trace.n_tokens - 1)
    follows = trace.token_ids[at + 1] if at + 1 < trace.n_tokens else None
    rows = [_top_row(trace, rank, int(i), float(np.exp(lp)), int(i) == follows) for rank, (i, lp) in enumerate(zip(trace.top_ids[at], trace.top_logprobs[at], strict=True))]
    head = html.Thead(html.Tr([html.Th("", className="num"), html.Th("Token"), html.Th("Id", className="num"), html.Th("Probability"), html.Th("", className="num")]))
    label = token_label(trace.token_texts[at], at in trace.special, 24)
    rest = 1.0 - float(np.exp(trace.top_logprobs[at]).sum())
    what = f"Position {at}. " + (f"Then comes {token_label(trace.token_texts[at + 1], at + 1 in trace.special, 24)} (marked). " if follows is not None else "")
    table = still(html.Table([head, html.Tbody(rows)], className="ls-table compact"), "table-scroll table-tall")
    return table, f"Next token after {label}", f"{what}All other tokens together: {max(rest, 0.0):.3f}."


def _top_row(trace: Trace, rank: int, token_id: int, prob: float, follows: bool) -> html.Tr:
    bar = html.Span(className="bar", style={"width": f"{100 * prob:.1f}%"})
    token = html.Td(html.Span(predicted_label(token_id, trace.token_text(token_id), trace.info, 24), className="chip-token"), className="nowrap")
    cells = [html.Td(rank + 1, className="num muted"), token, html.Td(token_id, className="num muted"), html.Td(bar, className="bar-cell"), html.Td(f"{prob:.4f}", className="num")]
    return html.Tr(cells, className="chosen" if follows else "")


def _metadata(trace: Trace) -> html.Div:
    info, meta = trace.info, trace.metadata
    timings, capture = meta.get("timings") or {}, meta.get("capture") or {}
    heads = f"{info.n_heads} heads, {info.n_kv_heads} key/value heads" if info.n_kv_heads != info.n_heads else f"{info.n_heads} heads"
    experts = f", {info.n_experts} experts of which {info.n_experts_used} per token" if info.is_moe else ""
    shown = {
        "Model": f"{info.name}: {info.architecture}, {info.n_params / 1e6:,.1f} M parameters, {info.quantization}",
        "Shape": f"{info.n_layers} layers, {heads}, d_model {info.d_model:,}, vocabulary {info.d_vocab:,}{experts}",
        "Engine": trace.engine_version or trace.engine,
        "Note": " ".join(meta["notes"]) if meta.get("notes") else None,
        "Prompt": html.Span(trace.prompt, className="mono wrap"),
        "Answer": html.Span(trace.response, className="mono wrap") if trace.response else None,
        "Generation": _pairs(meta.get("generation")),
        "Interventions": "none" if not meta.get("interventions") else "; ".join(_pairs(edit) for edit in meta["interventions"]),
        "Sites": html.Span(", ".join(trace.stored), className="mono"),
        "Layers": "all" if capture.get("layers") is None else ", ".join(map(str, capture["layers"])),
        "Stored as": capture.get("precision"),
        "Timings": ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {seconds:.2f} s" for name, seconds in timings.items()),
        "Category": trace.category,
        "Tags": ", ".join(trace.tags),
        "Trace": html.Span(trace.id, className="mono"),
        "Command": html.Span(shlex.join(meta["command"]), className="mono wrap") if meta.get("command") else None,
    }
    return html.Div(facts(shown))


def _pairs(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in (values or {}).items() if value is not None)

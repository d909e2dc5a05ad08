"""The card of experts over all traces of a model: which categories of prompts they serve, and their use as time goes on."""

from __future__ import annotations

import math
from typing import Any

from dash import Input, Output, State, callback, dcc, html, no_update

from backend.analysis.moe_compare import within_between
from backend.reports.expert_usage import Usage
from backend.trace import Trace
from components.card import card
from components.figures.moe_alike import alike_heatmap, usage_heatmap
from components.graph import graph, graph_tools
from components.job_follow import follow_job
from components.services import services
from components.token_label import token_label
from components.trace_view import one_line, short_date

ALIKE = {"cosine": "cosine", "pearson": "Pearson correlation", "jensen_shannon": "Jensen-Shannon divergence, nats"}
VIEWS = {"category": "By category", "token": "By token", "time": "Over time", **{name: f"Categories: {words.split(',')[0]}" for name, words in ALIKE.items()}}
MOST_TRACES = 2000  # that are read, the newest
ROWS = 128  # traces that the picture over time shows, the newest
ABOUT = (
    "How often each expert of the chosen layer was chosen, as a share of all choices, over every trace of this model that holds its chosen experts: together for each category "
    "(domain specialisation, Muennighoff et al. 2024, OLMoE), for the most frequent tokens of all traces (vocabulary specialisation), or trace by trace, oldest first. Or "
    "categories against each other: cosine, Pearson correlation and Jensen-Shannon divergence of their loads in this layer; the hover gives the mean over all layers too.",
    "The sentence compares traces with each other: the mean Jensen-Shannon divergence (nats, at most ln 2) of the loads of the layer, over pairs of one category and over pairs of "
    "different ones. Where the second is larger, categories are routed apart.",
)  # fmt: skip


def usage_card(trace: Trace, view: str) -> html.Section:
    """The card; its callbacks need `moe-layer`, `theme`, `page-state` and `jobs-now`."""
    options: Any = [{"value": name, "label": words} for name, words in VIEWS.items()]
    pick = dcc.Dropdown(options, view, id="moe-usage-view", clearable=False, searchable=False, className="picker-metric")
    known = usage(trace) is not None
    button = html.Button("Read the traces", id="moe-usage-read", className="btn btn-primary", n_clicks=0)
    offer = html.Div([button, html.Span(f"{len(read_traces(trace)):,} traces of {trace.info.name} hold their chosen experts.")], id="moe-usage-offer", className="neuron-foot",
                     hidden=known)  # fmt: skip
    shown = html.Div(id="moe-usage-box", hidden=True)  # no graph in it yet: one that nobody sees is drawn all the same
    stores = [dcc.Store(id="moe-usage-job"), dcc.Store(id="moe-usage-ready")]
    return card("Over all traces", [*stores, offer, html.Div(id="moe-usage-progress", role="status"), shown], html.Span("", id="moe-usage-said"),
                [pick, *graph_tools("moe-usage", "expert-usage")], list(ABOUT), className="wide")  # fmt: skip


def read_traces(trace: Trace) -> list[str]:
    """Ids of the traces of the same model that hold expert_indices, newest first."""
    found = services().library.traces(model=trace.info.name, limit=MOST_TRACES)
    return [each.id for each in found if "expert_indices" in each.sites]


def usage(trace: Trace) -> Usage | None:
    """The use of experts over those traces; None while nobody has read them as they are now."""
    return Usage.load(services().derived, Usage.key(trace.info.name, read_traces(trace)))


@callback(Output("moe-usage-job", "data"), Input("moe-usage-read", "n_clicks"), State("page-state", "data"), prevent_initial_call=True)
def submit(clicks: int | None, page: dict[str, Any]):
    if not clicks:
        return no_update
    trace = services().library.open(page["trace"])
    ids = read_traces(trace)[::-1]  # oldest first: traces of one moment stay in the order they were made in
    return services().jobs.submit("expert_usage", {"model": trace.info.name, "traces": ids}, f"Experts over {len(ids):,} traces").id


@callback(Output("moe-usage-progress", "children"), Output("moe-usage-ready", "data"), Input("moe-usage-job", "data"), Input("jobs-now", "data"),
          State("moe-usage-ready", "data"), prevent_initial_call=True)  # fmt: skip
def follow(job_id: str | None, _: Any, ready: str | None):
    return follow_job(job_id, ready)


@callback(
    Output("moe-usage-box", "children"), Output("moe-usage-said", "children"), Output("moe-usage-offer", "hidden"), Output("moe-usage-box", "hidden"),
    Input("moe-begun", "data"), Input("moe-layer", "value"), Input("moe-usage-view", "value"), Input("moe-usage-ready", "data"), Input("theme", "data"),
    State("page-state", "data"), prevent_initial_call=True,
)  # fmt: skip
def show(_: Any, layer: int, view: str, __: Any, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    found = usage(trace)
    if found is None:
        return None, "Not read yet.", False, True
    if view in ALIKE:
        return graph("moe-usage", 320, _alike(found, layer, view, theme)), _words(found, layer), True, False
    if view == "token":
        counts = found.token_counts[:, layer]
        names = [f"{token_label(text, max_length=16)} · {n:,}" for text, n in found.tokens]
    elif view == "time":
        counts = found.counts[-ROWS:, layer]
        names = [f"{short_date(date)} · {one_line(prompt, 20)}" for date, prompt in zip(found.created_at[-ROWS:], found.prompts[-ROWS:], strict=True)]
        names = [f"{i + 1}. {name}" for i, name in enumerate(names, max(0, len(found.trace_ids) - ROWS))]
    else:
        categories, counts = found.by_category(layer)
        names = [one_line(each, 28) or "no category" for each in categories]
    return graph("moe-usage", max(320, 110 + 15 * min(len(names), 48)), usage_heatmap(counts, names, theme)), _words(found, layer), True, False


def _alike(found: Usage, layer: int, measure: str, theme: str) -> Any:
    names, here = found.alike(layer)
    words = [one_line(each, 24) or "no category" for each in names]
    return alike_heatmap(here[measure], found.alike(None)[1][measure], words, ALIKE[measure], theme)


def _words(found: Usage, layer: int) -> str:
    words = f"Layer {layer}, {sum(found.n_tokens):,} tokens of {len(found.trace_ids):,} traces."
    within, between = within_between(list(found.counts[-ROWS:, layer]), found.categories[-ROWS:])
    if math.isnan(within) or math.isnan(between):
        return words + " Give traces categories, two at least, to compare within and between them."
    return words + f" Jensen-Shannon divergence {within:.3f} within categories, {between:.3f} between them."

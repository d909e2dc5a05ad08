"""The card that takes every expert out in turn: a job runs the model once for each, and a heatmap ranks them by what they did."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.trace import Trace
from components.card import card
from components.drawn import still
from components.figures.moe import effect_heatmap
from components.graph import graph, graph_tools
from components.job_follow import follow_job
from components.over_batch import groups_of, trace_ids
from components.services import services
from components.url_state import as_choice

# measure -> words of the menu, unit beside the scale; the order is that of the array
MEASURES = {
    "nll": ("Loss", "change of the loss, nats per token"),
    "kl": ("KL", "KL(clean ‖ without), nats"),
    "changed": ("Other top token", "share of positions with another top token"),
}
RANKED = 12
PROMPTS = 20  # of a group: the newest that a sweep runs over
THIS = "this"
ABOUT = (
    "The prompt is run again once for each expert of each layer, with that expert taken out of the router's choice: the tokens that had chosen it get their next best. Nothing "
    "else is changed, and tokens that had not chosen it keep their MLP output in that layer (except where whole groups of experts are chosen, as in DeepSeek V3).",
    "Loss: mean of −ln p of the token that follows, without the expert less with it; exp of it is the factor on perplexity. KL: mean over positions of KL(clean ‖ without), nats. "
    f"One prompt is a small sample: an expert that does nothing here may serve other text. A batch or category of three traces or more can be swept instead, its newest {PROMPTS} "
    "at most; every token counts alike.",
)  # fmt: skip


def ablation_card(trace: Trace, measure: str, over: str | None) -> html.Section:
    """The card; its callbacks need `theme`, `page-state` and `jobs-now`. over: the group that the page's address asks for."""
    groups = {THIS: "this prompt", **groups_of(trace)}
    chosen = as_choice(over, list(groups), THIS)
    done = services().derived.get_array(("expert_sweep", sweep_key(trace, chosen))) is not None
    options: Any = [{"value": name, "label": words} for name, (words, _) in MEASURES.items()]
    pick = dcc.Dropdown(options, measure, id="moe-effect-measure", clearable=False, searchable=False, className="picker-metric")
    prompts: Any = [{"value": name, "label": words} for name, words in groups.items()]
    where = dcc.Dropdown(prompts, chosen, id="moe-effect-over", clearable=False, searchable=False, className="picker-traces")
    over_form = html.Div(html.Label([html.Span("Over"), where]), className="controls moe-form", hidden=len(groups) == 1)
    button = html.Button("", id="moe-sweep", className="btn btn-primary", n_clicks=0)
    offer = html.Div([button, html.Span("", id="moe-sweep-words")], id="moe-sweep-offer", className="neuron-foot", hidden=done)
    shown = html.Div(id="moe-effect-box", hidden=True)  # no graph in it yet: one that nobody sees is drawn all the same
    stores = [dcc.Store(id="moe-sweep-job"), dcc.Store(id="moe-sweep-ready")]
    return card("Without one expert", [*stores, over_form, offer, html.Div(id="moe-sweep-progress", role="status"), shown], html.Span("", id="moe-effect-said"),
                [pick, *graph_tools("moe-effect", "expert-ablation")], list(ABOUT), className="wide")  # fmt: skip


def swept(trace: Trace, over: str) -> list[str]:
    """Ids of the traces that a sweep runs over: this one, or the newest of its batch or category."""
    return [trace.id] if over == THIS else trace_ids(trace, over)[-PROMPTS:]


def sweep_key(trace: Trace, over: str) -> str:
    """Where a sweep lies in the cache; that of a group changes with its traces."""
    return trace.id if over == THIS else f"{over}:{hashlib.sha256(' '.join(swept(trace, over)).encode()).hexdigest()[:16]}"


@callback(Output("moe-sweep-job", "data"), Input("moe-sweep", "n_clicks"), State("moe-effect-over", "value"), State("page-state", "data"), prevent_initial_call=True)
def submit(clicks: int | None, over: str, page: dict[str, Any]):
    if not clicks:
        return no_update
    trace = services().library.open(page["trace"])
    params = {"trace_ids": swept(trace, over), "key": sweep_key(trace, over)}
    return services().jobs.submit("expert_sweep", params, f"Ablate every expert of {trace.info.name}").id


@callback(Output("moe-sweep-progress", "children"), Output("moe-sweep-ready", "data"), Input("moe-sweep-job", "data"), Input("jobs-now", "data"),
          State("moe-sweep-ready", "data"), prevent_initial_call=True)  # fmt: skip
def follow(job_id: str | None, _: Any, ready: str | None):
    return follow_job(job_id, ready)


@callback(
    Output("moe-effect-box", "children"), Output("moe-effect-said", "children"), Output("moe-sweep-offer", "hidden"),
    Output("moe-effect-box", "hidden"), Output("moe-sweep", "children"), Output("moe-sweep-words", "children"),
    Input("moe-begun", "data"), Input("moe-effect-measure", "value"), Input("moe-effect-over", "value"), Input("moe-sweep-ready", "data"), Input("theme", "data"),
    State("page-state", "data"), prevent_initial_call=True,
)  # fmt: skip
def show(_: Any, measure: str, over: str, __: Any, theme: str, page: dict[str, Any]):
    trace, derived = services().library.open(page["trace"]), services().derived
    key = sweep_key(trace, over)
    found, layers = derived.get_array(("expert_sweep", key)), derived.get_json(("expert_sweep_layers", key))
    if found is None or layers is None:
        return None, "Not measured yet.", False, True, *_offer(trace, over)
    values = found[list(MEASURES).index(measure)]
    figure = effect_heatmap(values, layers, MEASURES[measure][1], theme)
    row, expert = np.unravel_index(int(np.nanargmax(np.abs(values))), values.shape)
    said = f"Taking out expert {expert} of layer {layers[row]} does most: {values[row, expert]:.4g} ({MEASURES[measure][1]})."
    picture = graph("moe-effect", 100 + min(24 * len(layers), 480), figure)
    return [picture, html.Div(_ranked(trace if over == THIS else None, found, layers, values), id="moe-ranked", className="table-scroll")], said, True, False, no_update, no_update


def _offer(trace: Trace, over: str) -> tuple[str, str]:
    """Words of the button and beside it."""
    n = len(trace.stored["expert_indices"]) * trace.info.n_experts
    if over == THIS:
        return f"Run {n:,} ablations", f"One run of {trace.n_tokens:,} tokens for each expert of each layer. The result is kept."
    prompts = len(swept(trace, over))
    return f"Run {n * prompts:,} ablations", f"One run of each of {prompts} prompts for each expert of each layer. The result is kept."


def _ranked(trace: Trace | None, found: Any, layers: list[int], values: Any) -> html.Div:
    """The largest effects; of a single trace also how many tokens were routed to the expert."""
    titles = ("Expert", *(("Tokens routed to it",) if trace else ()), "Loss, nats", "Perplexity ×", "KL, nats", "Other top token")
    order = np.argsort(-np.abs(values), axis=None, kind="stable")[:RANKED]
    rows = []
    for row, expert in zip(*np.unravel_index(order, values.shape), strict=True):
        nll, kl, changed = (float(part[row, expert]) for part in found)
        routed = [f"{int((trace['expert_indices', layers[row]] == expert).any(axis=1).sum()):,} of {trace.n_tokens:,}"] if trace else []
        cells = (*routed, f"{nll:+.4f}", f"{np.exp(nll):.3f}", f"{kl:.4f}", f"{changed:.1%}")
        rows.append(html.Tr([html.Td(f"{layers[row]}.{expert}"), *(html.Td(cell, className="num") for cell in cells)]))
    head = html.Tr([html.Th(title, className="num" if i else "") for i, title in enumerate(titles)])
    return still(html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact"))

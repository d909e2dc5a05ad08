"""The card of super experts: the largest output of every expert, and which of them meet the paper's criterion."""

from __future__ import annotations

from typing import Any

from dash import Input, Output, State, callback, html

from backend.analysis.super_experts import LISTED, PERCENTILE, SHARE_OF_LARGEST, SuperExpert, published
from backend.estimate import in_bytes
from backend.reports.super_experts import SITES, SuperExperts, outputs_layers, super_experts
from backend.trace import Trace
from components.card import card
from components.drawn import still
from components.figures.super_experts import largest_heatmap, plain
from components.graph import graph, graph_tools
from components.services import services
from components.states import missing
from components.token_label import token_label

ABOUT = (
    "The largest |value| that each expert put out over all tokens of this trace, before the router's weight (expert_out divided by expert_weights). "
    f"Super experts (Su et al. 2025, arXiv 2507.23279) are those above the {PERCENTILE:g}th percentile of all experts and above {SHARE_OF_LARGEST:g} of the largest, "
    "in layers that form massive activations. An expert that no token chose put out nothing and counts as 0.",
    "The paper reads those layers off a plot. Here a layer forms a massive activation where, at some token and dimension, |x| after the block is above 100 and above 1,000 times "
    "the median (Sun et al. 2024, arXiv 2402.17762), and larger by more than 100 than before it. Small models often have none: then no expert is super.",
    "Published: Qwen3-30B-A3B L1E68, L2E92, L3E82; Mixtral-8x7B L1E3; DeepSeek-V2-Lite L3E54, L4E38 (L2E54, L3E38 in the preprint, whose layers count otherwise). Layers count "
    f"from 0 through the whole model. The table lists the {LISTED} largest, and the published ones of a model of that name.",
)  # fmt: skip


def super_experts_card(trace: Trace) -> html.Section:
    """The card; its callback needs `theme` and `page-state`."""
    title = "Super experts"
    layers = outputs_layers(trace)
    if not layers:
        lacking = next((site for site in SITES if site not in trace.stored), "expert_out")
        return card(title, [html.P(_cost(trace), className="muted small"), missing(lacking, trace.id)], about=list(ABOUT), className="wide")
    body = [graph("moe-super", height=100 + min(24 * len(layers), 480)), html.Div(id="moe-super-table", className="table-scroll")]
    return card(title, body, html.Span("", id="moe-super-said"), graph_tools("moe-super", "super-experts"), list(ABOUT), className="wide")


def _cost(trace: Trace) -> str:
    n_layers = len(trace.stored.get("expert_indices", []))
    n_bytes = 2 * trace.n_tokens * trace.info.n_experts_used * trace.info.d_model * n_layers
    return f"The experts' outputs of these {trace.n_tokens:,} tokens take about {in_bytes(n_bytes)} more in half precision."


@callback(
    Output("moe-super", "figure"), Output("moe-super-table", "children"), Output("moe-super-said", "children"),
    Input("moe-begun", "data"), Input("theme", "data"), State("page-state", "data"), prevent_initial_call=True,
)  # fmt: skip
def show(_: Any, theme: str, page: dict[str, Any]):
    trace = services().library.open(page["trace"])
    found = known(trace)
    marked = [(each.layer, each.expert) for each in found.verdict.supers]
    return largest_heatmap(found.sizes, found.layers, marked, theme), _table(trace, found), _words(found)


def known(trace: Trace) -> SuperExperts:
    """What there is to say of a trace, computed once."""
    key = ("super_experts", trace.id)
    data = services().derived.get_json(key)
    if data is None:
        data = super_experts(trace).to_json()
        services().derived.put_json(key, data)
    return SuperExperts.from_json(data)


def _words(found: SuperExperts) -> str:
    verdict = found.verdict
    limits = f"above the {PERCENTILE:g}th percentile ({plain(verdict.percentile)}) and above {SHARE_OF_LARGEST:g} of the largest ({plain(verdict.largest)})"
    if verdict.supers:
        said = f"{len(verdict.supers)} super experts, framed: " if len(verdict.supers) > 1 else "1 super expert, framed: "
        said += f"{limits}, in a layer that forms massive activations ({', '.join(f'L{layer}' for layer in found.forming)})."
    elif found.forming:
        said = f"No super expert: none is {limits} in a layer that forms massive activations ({', '.join(f'L{layer}' for layer in found.forming)})."
    elif len(found.unknown) == len(found.layers):
        return f"The residual stream was not captured, so it cannot be told which layers form massive activations. By size alone, {_experts(len(verdict.by_size))}."
    else:
        said = f"No layer forms massive activations in this trace, so no expert is super. By size alone, {_experts(len(verdict.by_size))}."
    return said + (f" Of {len(found.unknown)} layers the residual stream was not captured." if found.unknown else "")


def _experts(n: int) -> str:
    return "1 would be" if n == 1 else f"{n} would be"


def _table(trace: Trace, found: SuperExperts) -> html.Div:
    supers, named = {(each.layer, each.expert) for each in found.verdict.supers}, published(trace.info.name)
    names = ("Expert", "Largest |output|", "with its weight", "of the largest", "Token", "Dimension", "Super", "Published")[: 8 if named else 7]
    head = html.Tr([html.Th(name, className="num" if name in names[1:4] or name == "Dimension" else "") for name in names])
    rows = [_row(trace, each, (each.layer, each.expert) in supers, (each.layer, each.expert) in named if named else None) for each in found.verdict.ranked]
    seen = {(each.layer, each.expert) for each in found.verdict.ranked}
    for layer, expert in named:
        if layer in found.layers and expert < found.sizes.shape[1] and (layer, expert) not in seen:
            size = float(found.sizes[found.layers.index(layer), expert])
            cells = [html.Td(plain(size), className="num"), html.Td("–", className="num"), html.Td(f"{size / (found.verdict.largest or 1):.2%}", className="num")]
            rows.append(html.Tr([html.Td(f"L{layer}E{expert}"), *cells, html.Td("–"), html.Td("–", className="num"), html.Td("no"), html.Td("yes")]))
    return still(html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact"))


def _row(trace: Trace, each: SuperExpert, is_super: bool, is_published: bool | None) -> html.Tr:
    label = token_label(trace.token_texts[each.position], each.position in trace.special, 12)
    token = html.Td([html.Span(label, className="chip-token"), html.Span(f" {each.position}", className="muted small")])
    numbers = [html.Td(words, className="num") for words in (plain(each.size), plain(each.added), f"{each.share:.2%}")]
    ends = [html.Td(each.dimension, className="num"), html.Td("yes" if is_super else "no")]
    ends += [] if is_published is None else [html.Td("yes" if is_published else "–")]
    return html.Tr([html.Td(f"L{each.layer}E{each.expert}"), *numbers, token, *ends])

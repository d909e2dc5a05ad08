"""What each page of a trace shows of its group (components/over_batch.py): head scores, norms through depth, predictions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.aggregates import NORM_SITES, Row
from backend.analysis.aggregate import Moments
from backend.analysis.attention import METRICS
from backend.trace import Trace
from components.batch_results import perplexity
from components.drawn import still
from components.figures.aggregate import Group, depth_bands, head_aggregate, with_trace
from components.figures.theme import no_figure
from components.graph import graph, graph_tools
from components.head_table import METRIC_TEXTS
from components.over_batch import over_batch_card, show_picker, trace_and_group
from components.services import services
from components.url_state import as_choice, keep_url

PREDICTIONS = {"logprob": "Log-prob, nats", "entropy": "Entropy, nats", "top1": "Most probable token right"}
SPREAD = "standard deviation of the group"

ABOUT_HEADS = (
    "The score of each head over this trace, its mean over the traces of the group (each counts once; prompts where a score does not exist are left out of it), or the first "
    "minus the second: red where this prompt has more, blue where it has less. The definitions of the scores are under Head metrics.",
    "The hover gives the group's standard deviation (divisor n - 1, Welford 1962) and its number of prompts: a difference well inside it is ordinary.",
)
ABOUT_NORMS = (
    "The mean over positions from 1 (the first often carries a massive norm) of the vector's Euclidean length at each layer: of this trace, and the mean over the traces of the "
    "group with one standard deviation (divisor n - 1, Welford 1962) as a band.",
)
ABOUT_PREDICTIONS = (
    "Means over the prompt's own tokens, generated ones left out: log-probability, entropy of the predictions, and how often the most probable token was the real one; of the "
    "group the mean ± standard deviation (divisor n - 1) over its traces. Perplexity is exp of minus the mean log-prob.",
    "Deviations: how many standard deviations of the group this trace lies from its mean.",
)


def head_scores_card(trace: Trace, asked: dict[str, str]) -> html.Section | None:
    """For the Attention page."""
    metrics: Any = [{"label": METRIC_TEXTS[name][0], "value": name} for name in METRICS]
    metric = dcc.Dropdown(metrics, as_choice(asked.get("overmetric"), list(METRICS), "previous"), id="over-metric", clearable=False, searchable=False, className="picker-metric")
    pickers = [html.Label([html.Span("Score"), metric]), show_picker(asked)]
    body = graph("over-heads", height=130 + 22 * min(trace.info.n_layers, 24))
    return over_batch_card(trace, asked, pickers, body, graph_tools("over-heads", "batch-heads"), list(ABOUT_HEADS))


def norms_card(trace: Trace, asked: dict[str, str]) -> html.Section | None:
    """For the Activations page."""
    site = dcc.Dropdown(list(NORM_SITES), as_choice(asked.get("oversite"), NORM_SITES, "resid_post"), id="over-site", clearable=False, searchable=False, className="picker-metric")
    return over_batch_card(trace, asked, [html.Label([html.Span("Norm of"), site])], graph("over-norms", height=280), graph_tools("over-norms", "batch-norms"), list(ABOUT_NORMS))


def predictions_card(trace: Trace, asked: dict[str, str]) -> html.Section | None:
    """For the Logits page."""
    return over_batch_card(trace, asked, [], html.Div(id="over-predictions", className="table-scroll"), [], list(ABOUT_PREDICTIONS))


def _values(page: dict[str, Any], ready: dict[str, Any]) -> tuple[Trace, Row, dict[str, Moments]]:
    trace = services().library.open(page["trace"])
    return trace, *trace_and_group(trace, ready["group"], ready["n"])


@callback(Output("over-heads", "figure"), Input("over-ready", "data"), Input("over-metric", "value"), Input("over-show", "value"), Input("theme", "data"),
          State("page-state", "data"))  # fmt: skip
def show_heads(ready: dict[str, Any] | None, metric: str, show: str, theme: str, page: dict[str, Any]):
    if not ready:
        return no_update
    _, row, moments = _values(page, ready)
    name = f"head_{metric}"
    if name not in row or name not in moments:
        return no_figure(theme, "No trace of the group holds attn_pattern.")
    title, limit, _words = METRIC_TEXTS[metric]
    group = moments[name]
    if show == "difference":
        return head_aggregate(Group("this trace − mean", row[name] - group.mean, group.std, group.count), title, signed=True, theme=theme, spread_is=SPREAD)
    shown, words = (row[name], "this trace") if show == "this" else (group.mean, "mean of the group")
    return head_aggregate(Group(words, shown, group.std, group.count), title, limit, theme=theme, spread_is=SPREAD)


@callback(Output("over-norms", "figure"), Input("over-ready", "data"), Input("over-site", "value"), Input("theme", "data"), State("page-state", "data"))
def show_norms(ready: dict[str, Any] | None, site: str, theme: str, page: dict[str, Any]):
    if not ready:
        return no_update
    _, row, moments = _values(page, ready)
    name = f"norm_{site}"
    if name not in row or name not in moments:
        return no_figure(theme, f"This trace or its group holds no {site}.")
    group = moments[name]
    figure = depth_bands([Group(f"mean of {ready['n']:,} traces", group.mean, group.std, group.count)], f"L2 norm of {site}", theme)
    return with_trace(figure, row[name], "this trace", theme)


@callback(Output("over-predictions", "children"), Input("over-ready", "data"), State("page-state", "data"))
def show_predictions(ready: dict[str, Any] | None, page: dict[str, Any]):
    if not ready:
        return no_update
    _, row, moments = _values(page, ready)
    return predictions_table(row, moments)


def predictions_table(row: Row, moments: dict[str, Moments]) -> html.Div:
    """Log-prob, perplexity, entropy and top-1 share of the trace, of its group, and how far apart they are in the group's standard deviations."""
    head = html.Tr([html.Th(""), *(html.Th(name, className="num") for name in ("This trace", "Group", "Deviations"))])
    rows = []
    for name, title in PREDICTIONS.items():
        mine, mean, std = float(row[name]), float(moments[name].mean), float(moments[name].std)
        away = (mine - mean) / std if std > 0 else float("nan")
        rows.append(_line(title, [_number(mine), f"{_number(mean)} ± {_number(std)}", "–" if math.isnan(away) else f"{away:+.2f}"]))
        if name == "logprob":
            rows.append(_line("Perplexity", [perplexity(mine), perplexity(mean), ""]))
    rows.append(_line("Prompts", ["1", f"{int(np.max(moments['logprob'].count)):,}", ""]))
    return still(html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact"))


def _line(title: str, cells: list[str]) -> html.Tr:
    return html.Tr([html.Td(title), *(html.Td(cell, className="num") for cell in cells)])


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


keep_url({"overmetric": ("over-metric", "value"), "overshow": ("over-show", "value")})
keep_url({"oversite": ("over-site", "value")})

"""Aggregates over a batch or a category: two groups A and B of traces of one model, their means and spreads, and their difference.

Each trace counts once. The statistics of a trace lie in the derived cache since its batch ran; for traces from elsewhere a job makes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dash import Input, Output, State, callback, dcc, html, no_update

from backend.aggregates import NORM_SITES, Aggregates
from backend.analysis.aggregate import Moments, difference
from backend.batches import Batch
from backend.errors import LayerscopeError
from components.batch_results import perplexity
from components.card import card, cards
from components.controls import field
from components.figures.aggregate import Group, depth_bands, head_aggregate
from components.figures.theme import no_figure
from components.graph import graph, graph_tools
from components.head_table import METRIC_TEXTS
from components.jobs_tray import job_or_none, job_panel
from components.services import services
from components.states import error
from components.url_state import keep_url

SCOPES = {"batch": "this batch", "model": "all traces of this model"}
SHOWN = {"a": "A", "b": "B", "difference": "A − B"}
DEPTHS = {**{f"norm_{site}": f"Norm of {site}" for site in NORM_SITES}, "lens_kl": "KL of the logit lens"}
_PREDICTIONS = {"logprob": "Log-prob, nats", "entropy": "Entropy, nats", "top1": "Most probable token right"}
_MOST_TRACES = 2000

ABOUT_GROUPS = "Two groups of traces of this model, of one category each or all together; every trace counts once. A trace's statistics are computed once and kept."
ABOUT_HEADS = [
    html.P("The mean over prompts of each head's score, as the captures computed them; every prompt counts once, and prompts where a score does not exist are left out of it."),
    html.P("A − B: blue where B is larger, red where A is. The hover gives the standard error sqrt(s²_A/n_A + s²_B/n_B) (Welch 1947): a difference of less than "
           "two of them may be chance. It takes the groups for independent: where one holds the other, as all prompts hold a category, it is rough."),
    *(html.P([html.B(title), f": {text}."]) for title, _, text in METRIC_TEXTS.values()),
]
ABOUT_DEPTH = (
    "Norm: the mean over a prompt's positions from 1 (the first often carries a massive norm) of the Euclidean length, then mean and standard deviation over prompts. "
    "KL: KL(model || layer) of the logit lens in nats, over the same positions, of the traces whose capture computed the lens.",
)
ABOUT_PREDICTIONS = (
    "Means over a prompt's own tokens (not generated ones), then mean ± standard deviation over prompts. Perplexity is exp of minus the mean log-prob. "
    "The difference is given with its standard error.",
)


def aggregate_cards(batch: Batch, asked: dict[str, str | None]) -> html.Div:
    """The pickers and the three views; `asked`: what the address says."""
    scope = asked.get("scope") if asked.get("scope") in SCOPES else "batch"
    names = _categories(batch, scope or "batch")
    a, b = (value if value in names else None for value in (asked.get("a"), asked.get("b")))

    def pick(id: str, options: Any, value: Any, clearable: bool = False, placeholder: str = "") -> dcc.Dropdown:
        choices = [{"label": label, "value": name} for name, label in options.items()] if isinstance(options, dict) else options
        return dcc.Dropdown(choices, value, id=id, clearable=clearable, searchable=False, placeholder=placeholder)

    metrics = {name: title for name, (title, _, _) in METRIC_TEXTS.items()}
    pickers = html.Div(
        [
            field("Of", pick("agg-scope", SCOPES, scope), id="agg-scope"),
            field("A", pick("agg-a", names, a, True, "all prompts"), id="agg-a"),
            field("B", pick("agg-b", names, b, True, "none"), id="agg-b"),
            field("Show", pick("agg-show", SHOWN, asked.get("show") if asked.get("show") in SHOWN else "difference"), id="agg-show"),
        ],
        className="fields fields-four",
    )
    which, where = asked.get("metric"), asked.get("depth")
    metric = dcc.Dropdown(metrics, which if which in metrics else "previous", id="agg-metric", clearable=False, searchable=False, className="picker-metric")
    depth = dcc.Dropdown(DEPTHS, where if where in DEPTHS else "norm_resid_post", id="agg-depth", clearable=False, searchable=False, className="picker-site")
    choose = card("Groups", [pickers, html.Div(id="agg-state"), dcc.Store(id="agg-groups"), dcc.Store(id="agg-job")], "A category, or everything; a second one to compare with.",
                  about=ABOUT_GROUPS, className="wide")  # fmt: skip
    heads = card(html.Span("", id="agg-heads-title"), graph("agg-heads", height=330, className="fill"), html.Span("", id="agg-heads-words"),
                 [metric, *graph_tools("agg-heads", "aggregate-heads")], ABOUT_HEADS, className="fill")  # fmt: skip
    lines = card("Through depth", graph("agg-lines", height=330), "Mean over prompts; the band is one standard deviation.",
                 [depth, *graph_tools("agg-lines", "aggregate-depth")], list(ABOUT_DEPTH))  # fmt: skip
    table = card("Predictions", html.Div(id="agg-predictions", className="table-scroll"), "How well the model predicts the prompts' own tokens.", about=list(ABOUT_PREDICTIONS),
                 className="wide")  # fmt: skip
    return cards(choose, heads, lines, table)


def _categories(batch: Batch, scope: str) -> list[str]:
    return list(services().batches.categories(batch.id)) if scope == "batch" else services().library.categories()


def _trace_ids(batch: Batch, scope: str, category: str | None) -> list[str]:
    """Oldest first, so that a group that grows keeps its beginning."""
    if scope == "batch":
        present = {trace.id for trace in services().library.traces(search=batch.tag, limit=_MOST_TRACES)}  # a trace may have been deleted since
        return [trace_id for trace_id in services().batches.trace_ids(batch.id, category or "") if trace_id in present]
    return [trace.id for trace in services().library.traces(model=batch.model, category=category or "", limit=_MOST_TRACES)][::-1]


@callback(Output("agg-a", "options"), Output("agg-b", "options"), Output("agg-a", "value"), Output("agg-b", "value"),
          Input("agg-scope", "value"), Input("batch-stand", "data"), State("agg-a", "value"), State("agg-b", "value"), State("batch-id", "data"))  # fmt: skip
def offer_categories(scope: str, _: Any, a: str | None, b: str | None, batch_id: str):
    names = _categories(services().batches.get(batch_id), scope)
    # A choice that stays is not sent back: the answer may come after the next choice was made.
    return names, names, *(no_update if value is None or value in names else None for value in (a, b))


@callback(
    Output("agg-groups", "data"), Output("agg-state", "children"),
    Input("agg-scope", "value"), Input("agg-a", "value"), Input("agg-b", "value"), Input("batch-stand", "data"), Input("agg-job", "data"), Input("jobs-now", "data"),
    State("agg-groups", "data"), State("batch-id", "data"),
)  # fmt: skip
def find_groups(scope: str, a: str | None, b: str | None, _: Any, job_id: str | None, __: Any, before: Any, batch_id: str):
    """Which traces the groups hold, and whether their statistics are there; else the job that makes them."""
    batch, aggregates = services().batches.get(batch_id), Aggregates(services().derived)
    groups = {key: _trace_ids(batch, scope, name) for key, name in (("a", a), ("b", b)) if key == "a" or name}
    missing = aggregates.missing(dict.fromkeys(trace_id for ids in groups.values() for trace_id in ids))
    job = job_or_none(job_id)
    if missing:
        if job is not None and job.is_active:
            return no_update, job_panel(job)
        failed = error(job.error) if job is not None and job.error else None
        button = html.Button(f"Compute the statistics of {len(missing):,} traces", id="agg-compute", className="btn btn-primary", type="button")
        return {"missing": len(missing)}, html.Div([failed, button], className="agg-missing")
    sizes = {key: len(ids) for key, ids in groups.items()}
    data = {"scope": scope, "a": a, "b": b, "n": sizes}
    if data == before:
        return no_update, no_update
    names = {"a": a or "all prompts", "b": b}
    said = "; ".join(f"{SHOWN[key]}: {names[key]}, {n:,} traces" for key, n in sizes.items())
    limit = f" The newest {_MOST_TRACES:,} are taken." if max(sizes.values()) == _MOST_TRACES else ""
    return data, html.Div(f"{said}.{limit}", className="muted small agg-words")


@callback(Output("agg-job", "data"), Input("agg-compute", "n_clicks"), State("agg-scope", "value"), State("agg-a", "value"), State("agg-b", "value"), State("batch-id", "data"),
          prevent_initial_call=True)  # fmt: skip
def compute(clicks: int | None, scope: str, a: str | None, b: str | None, batch_id: str):
    if not clicks:
        return no_update
    batch = services().batches.get(batch_id)
    wanted = dict.fromkeys([*_trace_ids(batch, scope, a), *(_trace_ids(batch, scope, b) if b else ())])
    missing = Aggregates(services().derived).missing(wanted)
    return services().jobs.submit("aggregate", {"trace_ids": missing}, f"Statistics of {len(missing):,} traces").id


def _moments(batch_id: str, groups: dict[str, Any]) -> dict[str, dict[str, Moments]]:
    batch, aggregates = services().batches.get(batch_id), Aggregates(services().derived)
    scope: str = groups["scope"]
    of = f"{scope}:{batch.id if scope == 'batch' else batch.model}"
    return {key: aggregates.over(_trace_ids(batch, scope, groups[key]), f"{of}:{groups[key] or ''}") for key in groups["n"]}


@callback(
    Output("agg-heads", "figure"), Output("agg-heads-title", "children"), Output("agg-heads-words", "children"), Output("agg-lines", "figure"),
    Output("agg-predictions", "children"),
    Input("agg-groups", "data"), Input("agg-metric", "value"), Input("agg-depth", "value"), Input("agg-show", "value"), Input("theme", "data"), State("batch-id", "data"),
)  # fmt: skip
def show(groups: dict[str, Any] | None, metric: str, depth: str, show: str, theme: str, batch_id: str):
    title = METRIC_TEXTS[metric][0]
    if not groups or "n" not in groups or not all(groups["n"].values()):
        nothing = no_figure(theme, "No trace with statistics yet.")
        return nothing, f"{title} of every head", "", nothing, None
    try:
        found = _moments(batch_id, groups)
    except LayerscopeError as problem:
        nothing = no_figure(theme, "These traces cannot be aggregated.")
        return nothing, f"{title} of every head", "", nothing, error(str(problem))
    names = {"a": groups["a"] or "all prompts", "b": groups["b"] or ""}
    heads, words = _heads(found, names, metric, show if "b" in found else "a", theme)
    lines = [_group(names[key], moments[depth]) for key, moments in found.items() if depth in moments]
    unit = "KL(model || layer), nats" if depth == "lens_kl" else "L2 norm"
    drawn = depth_bands(lines, unit, theme) if lines else no_figure(theme, f"No trace of these holds what {DEPTHS[depth]} needs.")
    return heads, f"{title} of every head", words, drawn, _prediction_table(found, names)


def _group(name: str, moments: Moments) -> Group:
    return Group(name, moments.mean, moments.std, moments.count)


def _heads(found: dict[str, dict[str, Moments]], names: dict[str, str], metric: str, show: str, theme: str) -> tuple[Any, str]:
    title, limit, _ = METRIC_TEXTS[metric]
    have = {key: moments[f"head_{metric}"] for key, moments in found.items() if f"head_{metric}" in moments}
    wanted = ("a", "b") if show == "difference" else (show,)
    if not all(key in have for key in wanted):
        return no_figure(theme, "No trace of these holds attn_pattern."), ""
    if show != "difference":
        return head_aggregate(_group(names[show], have[show]), title, limit, theme=theme), f"Mean over the prompts of {SHOWN[show]}: {names[show]}."
    gap, spread = difference(have["a"], have["b"])
    group = Group(f"{names['a']} − {names['b']}", gap, spread, have["a"].count + have["b"].count)
    return head_aggregate(group, title, signed=True, theme=theme), f"Mean of {names['a']} minus mean of {names['b']}."


def _prediction_table(found: dict[str, dict[str, Moments]], names: dict[str, str]) -> html.Table:
    """Groups side by side: mean ± standard deviation; of two also the difference ± its standard error."""
    both = len(found) == 2
    columns = [f"{SHOWN[key]}: {names[key]}" for key in found] + (["A − B"] if both else [])
    head = html.Tr([html.Th(""), *(html.Th(name, className="num") for name in columns)])
    rows = []
    for name, title in _PREDICTIONS.items():
        cells = [_with_spread(float(moments[name].mean), float(moments[name].std)) for moments in found.values()]
        if both:
            gap, spread = difference(found["a"][name], found["b"][name])
            cells.append(_with_spread(float(gap), float(spread), sign="+"))
        rows.append(_line(title, cells))
        if name == "logprob":
            rows.append(_line("Perplexity", [perplexity(float(moments[name].mean)) for moments in found.values()] + [""] * both))
    rows.append(_line("Prompts", [f"{int(moments['logprob'].count):,}" for moments in found.values()] + [""] * both))
    return html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact")


def _line(title: str, cells: Sequence[str]) -> html.Tr:
    return html.Tr([html.Td(title), *(html.Td(cell, className="num") for cell in cells)])


def _with_spread(mean: float, spread: float, sign: str = "") -> str:
    if math.isnan(mean):
        return "–"
    return f"{mean:{sign}.3f}" if math.isnan(spread) else f"{mean:{sign}.3f} ± {spread:.3f}"


keep_url({"scope": ("agg-scope", "value"), "a": ("agg-a", "value"), "b": ("agg-b", "value"), "show": ("agg-show", "value"), "metric": ("agg-metric", "value"),
          "depth": ("agg-depth", "value")})  # fmt: skip

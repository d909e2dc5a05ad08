"""The pattern card of the Attention page: the map that is chosen, its view and range, and a pinned head beside it in the same colours.

Its callbacks need the stores `chosen-head`, `position`, `theme`, `page-state` and `jobs-now`. A range that is zoomed to lies in the store
`pattern-window` (assets/attention.js) and is read again at full resolution. `pattern-shown` holds the head that is drawn: other cards wait for it.
"""

from __future__ import annotations

import time
from typing import Any

from dash import ClientsideFunction, Input, Output, State, callback, clientside_callback, ctx, dcc, html, no_update, set_props

from backend.errors import LayerscopeError
from backend.trace import Trace
from components import states
from components.attention_source import (
    OF_TITLES,
    UNITS,
    VIEW_TITLES,
    NotComputed,
    Shown,
    colour_limit,
    missing_site,
    short_labels,
    shown_map,
    shown_tile,
    submit_summary,
)
from components.card import card
from components.figures.attention import LARGEST, attention_pattern
from components.figures.theme import no_figure
from components.graph import GRAPH_CONFIG, graph, graph_tools
from components.job_follow import follow_job
from components.jobs_tray import job_or_none
from components.services import services

ABOUT = (
    "Row: the token that looks (query). Column: the token it looks at (key). Each row sums to 1. The triangle above the diagonal is empty because a model that "
    "writes from left to right cannot look ahead. Click a row to choose its token; drag to zoom, double-click to see the whole prompt.",
    f"Attention is the softmax of the scaled, masked scores as the engine computed them. Beyond {LARGEST} tokens each cell shows the largest value "
    "of the cells it stands for, so no strong link is lost; the hover names the range, and zooming in reads it again cell by cell.",
    "Hide first token: the first token takes what a head has no use for (the attention sink of Xiao et al. 2023); its column is left out and the rest of each "
    "row divided by its sum.",
    "Value-weighted: attention times ||v W_O||, the length of what the head writes when it looks there (Kobayashi et al. 2020); a token whose value is short "
    "counts little however much it is looked at. v with its bias, W_O from the model's file; a norm after W_O is not applied.",
    "Rollout: 0.5 A + 0.5 I, rows made to sum to 1, multiplied through the layers up to this one, A the mean of a layer's heads (Abnar & Zuidema 2020). "
    "It follows attention alone: what heads and MLPs write with it is not in it.",
)  # fmt: skip


def pattern_card(of: str, view: str, hide_first: bool, scale: str, window: list[int] | None, pinned: dict[str, int] | None) -> html.Section:
    """The card; its arguments are the state to begin with."""
    scales: Any = [{"label": "Linear", "value": "linear"}, {"label": "Square root", "value": "sqrt"}]
    controls = html.Div(
        [
            _dropdown("pattern-of", OF_TITLES, of),
            _dropdown("pattern-view", VIEW_TITLES, view),
            dcc.Dropdown(scales, scale, id="pattern-scale", clearable=False, searchable=False, className="picker-metric"),
            dcc.Checklist([{"label": "Hide first token", "value": "hidden"}], ["hidden"] if hide_first else [], id="pattern-first", className="check"),
            html.Button("Whole prompt", id="pattern-reset", className="btn btn-outline-secondary", hidden=window is None),
        ],
        className="controls pattern-controls",
    )
    tools = [html.Button("Pin", id="pin-head", className="tool", title="Keep this head beside the next ones"), *graph_tools("pattern", "attention-pattern")]
    unpin = html.Button("Unpin", id="unpin-head", className="tool")
    pinned_head = html.Div([html.H3("", id="pinned-title"), html.Div([unpin, *graph_tools("pinned", "attention-pinned")[:4]], className="card-tools")], className="pane-head")
    current_head = html.Div(html.H3("Current"), className="pane-head pane-current")
    current = html.Div([current_head, html.Div(id="pattern-state"), html.Div(id="maps-progress", className="home-progress"), _graph("pattern")], className="pattern-pane")
    beside = html.Div([pinned_head, _graph("pinned")], id="pinned-pane", className="pattern-pane", hidden=True)
    panes = html.Div([current, beside], className="pattern-panes")
    stores = [dcc.Store(id="pattern-window", data=window), dcc.Store(id="pinned-head", data=pinned)]
    stores += [dcc.Store(id=name) for name in ("maps-wanted", "maps-job", "maps-ready", "pattern-tip", "pattern-shown", "pinned-request")]
    return card(html.Span("", id="pattern-title"), [*stores, controls, panes], html.Span("", id="pattern-subtitle"), tools, list(ABOUT), className="fill pattern-card")


def _dropdown(id: str, titles: dict[str, str], value: str) -> dcc.Dropdown:
    options: Any = [{"label": title, "value": name} for name, title in titles.items()]
    return dcc.Dropdown(options, value, id=id, clearable=False, searchable=False, className="picker-view")


def _graph(id: str) -> dcc.Graph:
    made: Any = graph(id, height=540)
    made.config = {**GRAPH_CONFIG, "doubleClick": "autosize"}  # which the browser tells apart from a range
    made.clear_on_unhover = True
    return made


_STATE = (
    Input("chosen-head", "data"), Input("pattern-of", "value"), Input("pattern-view", "value"), Input("pattern-first", "value"), Input("pattern-scale", "value"),
    Input("pattern-window", "data"), Input("pinned-head", "data"), Input("position", "data"), Input("theme", "data"), Input("maps-ready", "data"), State("page-state", "data"),
)  # fmt: skip


@callback(
    Output("pattern", "figure"), Output("pattern-title", "children"), Output("pattern-subtitle", "children"), Output("pattern-state", "children"),
    Output("pattern-shown", "data"), *_STATE, State("pattern-title", "children"),
)  # fmt: skip
def show_pattern(chosen: dict[str, int], of: str, view: str, first: list[str], scale: str, window: list[int] | None, pinned: dict[str, int] | None, position: int | None,
                 theme: str, _: Any, page: dict[str, Any], drawn: str):  # fmt: skip
    trace = services().library.open(page["trace"])
    shown = shown_map(of, chosen["layer"], chosen["head"], view, bool(first))
    title = _title(shown)
    if title == drawn and _alone("pinned-head") and shown.view == "pattern":
        return no_update, no_update, no_update, no_update, no_update  # the colours of probabilities do not depend on what is beside them
    lacking = missing_site(trace, shown)
    if lacking:
        return no_figure(theme, f"This trace holds no {lacking} of layer {shown.layer}."), title, "", states.missing(lacking, trace.id), chosen
    try:
        figure, said = _picture(trace, shown, _compared(shown, pinned), scale, window, position, theme)
    except NotComputed as problem:
        want_summary()
        return no_figure(theme, "Not computed yet."), title, str(problem), "", chosen
    except LayerscopeError as problem:
        return no_figure(theme, str(problem)), title, "", "", chosen
    return figure, title, said, "", chosen


# The server is asked for the pinned head only where there is one, and not again for probabilities beside another head.
clientside_callback(ClientsideFunction("layerscope", "askPinned"), Output("pinned-request", "data"), *_STATE[:-1])


@callback(
    Output("pinned", "figure"), Output("pinned-title", "children"), Output("pinned-pane", "hidden"), Output("attention-cards", "className"),
    Input("pinned-request", "data"), *(State(each.component_id, each.component_property) for each in _STATE),
    prevent_initial_call=True,
)  # fmt: skip
def show_pinned(asked: float | None, chosen: dict[str, int], of: str, view: str, first: list[str], scale: str, window: list[int] | None, pinned: dict[str, int] | None,
                position: int | None, theme: str, _: Any, page: dict[str, Any]):  # fmt: skip
    if not pinned:
        return no_update, "", True, "cards attention-cards"
    trace = services().library.open(page["trace"])
    shown = shown_map("head", pinned["layer"], pinned["head"], view if of == "head" else "pattern", bool(first))
    current = shown_map(of, chosen["layer"], chosen["head"], view, bool(first))
    try:
        figure, _ = _picture(trace, shown, [shown, current] if of == "head" else [shown], scale, window, position, theme)
    except LayerscopeError as problem:
        figure = no_figure(theme, str(problem))
    return figure, f"Pinned: {pinned['layer']}.{pinned['head']}", False, "cards attention-cards pinned"


def _alone(store: str) -> bool:
    """Whether this callback runs because of that store and nothing else. When a page opens others come with it."""
    return set(ctx.triggered_prop_ids) == {f"{store}.data"}


def _compared(shown: Shown, pinned: dict[str, int] | None) -> list[Shown]:
    """The maps that share their colours."""
    if not pinned or shown.of != "head":
        return [shown]
    return [shown, shown_map("head", pinned["layer"], pinned["head"], shown.view, shown.hide_first)]


def _picture(trace: Trace, shown: Shown, compared: list[Shown], scale: str, window: list[int] | None, position: int | None, theme: str) -> tuple[Any, str]:
    """The figure, and what is said of it."""
    found = shown_tile(trace, shown, window)
    labels = short_labels(trace)
    figure = attention_pattern(found.values, labels, theme, scale == "sqrt", position, (found.rows, found.columns), UNITS[shown.view], colour_limit(trace, compared),
                               signed=shown.view == "scores")  # fmt: skip
    figure.layout.meta["n"] = trace.n_tokens
    return figure, " ".join(["Rows look at columns.", *_remarks(trace, shown, window), *_precision(found, shown)])


def _remarks(trace: Trace, shown: Shown, window: list[int] | None) -> list[str]:
    """What a reader has to know of the map besides its title."""
    info, said = trace.info, []
    if shown.of == "head":
        heads_each = info.n_heads // info.n_kv_heads
        if heads_each > 1:
            said.append(f"KV head {shown.head // heads_each} of {info.n_kv_heads}.")
        rows = trace.kept(shown.site, shown.layer)[1]
        if rows != (0, trace.n_tokens):
            said.append(f"Captured: rows {rows[0]} to {rows[1] - 1}.")
    elif shown.of == "mean":
        n = len(trace.kept("attn_pattern", shown.layer)[0])
        said.append(f"Mean of {n} heads." if n == info.n_heads else f"Mean of the {n} of {info.n_heads} heads that were captured.")
    if window:
        said.append(f"Rows {window[0]:,} to {window[1] - 1:,}, columns {window[2]:,} to {window[3] - 1:,} of {trace.n_tokens:,}.")
    return said


def _precision(found: Any, shown: Shown) -> list[str]:
    said = []
    if not found.is_exact:
        step = round(float(found.rows[-1] - found.rows[0]) / (len(found.rows) - 1), 1)
        said.append(f"A cell is the largest of about {step:g} × {step:g}{'; zoom in to see each' if shown.of in ('head', 'mean') else ''}.")
    if found.n_broken:
        said.append(f"{found.n_broken:,} values are NaN or infinite and blank here.")
    return said


def _title(shown: Shown) -> str:
    return {"head": f"Pattern of {shown.layer}.{shown.head}", "mean": f"Mean pattern of layer {shown.layer}", "all": "Mean pattern of all layers",
            "rollout": f"Rollout to layer {shown.layer}"}[shown.of] if shown.view == "pattern" else f"{VIEW_TITLES[shown.view]} of {shown.layer}.{shown.head}"  # fmt: skip


# -- what is made from every head ---------------------------------------------------------------------------------------------------


def want_summary() -> None:
    """Ask, from a callback, for what is made from every head; `maps-ready` changes when it is there."""
    set_props("maps-wanted", {"data": time.time()})


@callback(Output("maps-job", "data"), Input("maps-wanted", "data"), State("page-state", "data"), State("maps-job", "data"), prevent_initial_call=True)
def start(wanted: float | None, page: dict[str, Any], job_id: str | None):
    """One job a trace, however many cards ask for it."""
    running = job_or_none(job_id)
    if not wanted or (running is not None and running.is_active):
        return no_update
    return submit_summary(services().library.open(page["trace"])).id


@callback(
    Output("maps-progress", "children"), Output("maps-ready", "data"), Input("maps-job", "data"), Input("jobs-now", "data"), State("maps-ready", "data"),
    prevent_initial_call=True,
)  # fmt: skip
def follow(job_id: str | None, _: Any, ready: str | None):
    """The job's progress; when it is done the cards that waited are drawn; when it failed, why."""
    return follow_job(job_id, ready)


# -- in the browser -----------------------------------------------------------------------------------------------------------------


@callback(Output("position", "data", allow_duplicate=True), Input("pattern", "clickData"), prevent_initial_call=True)
def choose_row(click: dict[str, Any] | None):
    return int(click["points"][0]["y"]) if click else no_update


clientside_callback(
    ClientsideFunction("layerscope", "zoomPattern"), Output("pattern-window", "data"), Input("pattern", "relayoutData"), Input("pattern-reset", "n_clicks"),
    State("pattern-window", "data"), prevent_initial_call=True,
)  # fmt: skip
clientside_callback("function(window) { return !window; }", Output("pattern-reset", "hidden"), Input("pattern-window", "data"))
clientside_callback(
    ClientsideFunction("layerscope", "pinHead"), Output("pinned-head", "data"), Input("pin-head", "n_clicks"), Input("unpin-head", "n_clicks"), State("chosen-head", "data"),
    prevent_initial_call=True,
)  # fmt: skip
clientside_callback(
    ClientsideFunction("layerscope", "patternTip"), Output("pattern-tip", "data"), Input("pattern", "hoverData"), Input("pinned", "hoverData"), prevent_initial_call=True
)
clientside_callback(
    "function(of) { return of !== 'head'; }", Output("pattern-view", "disabled"), Input("pattern-of", "value")
)  # only single heads have values and scores of their own

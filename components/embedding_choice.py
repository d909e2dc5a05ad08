"""Choosing and finding on the Embeddings page: a click, a neighbour's name, a search or a token of the strip lead to one row of the vectors (store `emb-row`)."""

from __future__ import annotations

from typing import Any

from dash import Input, Output, State, callback, ctx, html, no_update

from components.embedding_neighbours import shown_view
from components.embedding_source import View

MAX_FOUND = 200


def drawn_view(page: dict[str, Any], spec: dict[str, Any] | None, webgl: bool | None, found: dict[str, Any] | None, row: int | None) -> tuple[View, Any] | None:
    """The view and the numbers of its points that are drawn; None while there is no projection."""
    if webgl is None:
        return None
    shown = shown_view(page, spec)
    if shown is None:
        return None
    include = tuple((found or {}).get("rows", ())) + (() if row is None else (row,))
    return shown, shown.shown(webgl, include)


@callback(
    Output("emb-row", "data"), Output("emb-position", "data"),
    Input("emb-clicked", "data"), Input("emb-choose", "data"), Input("emb-found", "data"), Input("position", "data"), Input("emb-ready", "data"), State("emb-row", "data"),
    State("emb-page", "data"), State("emb-points", "data"), State("emb-webgl", "data"),
)  # fmt: skip
def choose(clicked: dict[str, Any] | None, named: dict[str, Any] | None, found: dict[str, Any] | None, position: int | None, spec: dict[str, Any] | None, row: int | None,
           page: dict[str, Any], drawn_points: dict[str, Any] | None, webgl: bool | None):  # fmt: skip
    """A click, a neighbour's name, a search or a token of the strip chooses a vector; a state of the open trace chooses its position too."""
    drawn = drawn_view(page, spec, webgl, found, row)
    if drawn is None:
        return no_update, no_update
    shown, numbers = drawn
    triggered = ctx.triggered_id
    if triggered == "emb-clicked" and clicked and drawn_points and clicked["key"] == drawn_points["key"] and 0 <= clicked["i"] < len(numbers):
        chosen: int | None = int(shown.projection.rows[numbers[clicked["i"]]])
    elif triggered == "emb-choose" and named:
        chosen = int(named["value"])
    elif triggered == "emb-found":
        chosen = found["rows"][0] if found and found["typed"] and found["rows"] else row
    else:
        chosen = _kept(shown, row, position if page["trace"] else None, triggered)
    if chosen is not None and not 0 <= chosen < shown.vectors.shape[0]:
        chosen = None
    of_trace = chosen is not None and shown.states is not None and page["trace"] and int(shown.states.trace[chosen]) == 0
    at = int(shown.states.position[chosen]) if of_trace and shown.states is not None and chosen is not None else None
    return (no_update if chosen == row else chosen), (no_update if at is None or at == position else at)


@callback(Output("position", "data", allow_duplicate=True), Input("emb-position", "data"), prevent_initial_call=True)
def follow(position: int | None):
    """The token strip follows. On its own, since the strip is on other pages too, where the rest of `choose` does not exist."""
    return no_update if position is None else position


def _kept(shown: View, row: int | None, position: int | None, triggered: Any) -> int | None:
    """The chosen row after the position or the projection changed: the same layer of the strip's position; a row of the address where nothing was chosen yet."""
    states = shown.states
    if states is None or position is None:
        return row
    if row is not None and row < shown.vectors.shape[0] and int(states.trace[row]) == 0:
        layer = int(states.layer[row])
        if triggered != "position" and int(states.position[row]) == position:
            return row
    else:
        layer = states.layers[-1]
    return states.row_at(0, layer, position)


@callback(
    Output("emb-found", "data"), Output("emb-found-said", "children"),
    Input("emb-search", "value"), Input("emb-ready", "data"), State("emb-page", "data"),
)  # fmt: skip
def search(text: str | None, spec: dict[str, Any] | None, page: dict[str, Any]):
    """Rows of the tokens that were meant, and a word about how many of them there are."""
    shown = shown_view(page, spec)
    if shown is None or not (text or "").strip():
        return None, ""
    rows = _matches(shown, str(text))
    present = set(shown.projection.rows.tolist()) if len(rows) and len(shown.projection.rows) < shown.vectors.shape[0] else None
    absent = [] if present is None else [row for row in rows if row not in present and shown.projection.norms[row] == shown.projection.norms[row]]
    more = f"at least {MAX_FOUND}" if len(rows) == MAX_FOUND else f"{len(rows):,}"
    words: list[Any] = [f"{more} found" if rows else "No token holds this text."]
    words += [html.Span(", ".join(shown.label(row) for row in rows[:8]) + (", …" if len(rows) > 8 else ""), className="chip-token found-tokens")] if rows else []
    if absent:
        words.append(html.Button(f"{len(absent)} are not in the sample: project again with them", id="emb-again", className="btn btn-outline-secondary", n_clicks=0))
    return {"rows": rows, "text": f"{text}|{shown.key}|{shown.dims}", "absent": absent, "typed": ctx.triggered_id == "emb-search"}, words


def _matches(shown: View, text: str) -> list[int]:
    words = shown.vocabulary
    if shown.states is None:
        return words.find(text, MAX_FOUND) if words is not None else []
    wanted, found = text.casefold().strip(), shown.states
    hits = [{at for at, token in enumerate(trace.token_texts) if wanted in token.casefold()} for trace in found.traces]
    rows = [i for i in range(len(found.position)) if int(found.position[i]) in hits[int(found.trace[i])]]
    return sorted(rows, key=lambda i: -int(found.layer[i]))[:MAX_FOUND]


@callback(Output("emb-include", "data"), Input("emb-again", "n_clicks"), State("emb-found", "data"), prevent_initial_call=True)
def include_found(clicks: int, found: dict[str, Any] | None):
    return found["absent"] if clicks and found else no_update

"""Nearest vectors by cosine of the chosen point: the card, its tables, and the job where the matrices are too large to read while one waits."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update

from backend.errors import LayerscopeError
from backend.reports.embedding_neighbours import n_values, neighbours, neighbours_key
from backend.reports.projection import ProjectionSpec
from components.card import card
from components.controls import set_button
from components.embedding_source import View, place, view, vocabulary, vocabulary_matrices
from components.jobs_tray import job_or_none, job_panel
from components.services import services
from components.states import empty, error

N = 20  # neighbours of a table
_AT_ONCE = 1 << 25  # numbers that the server reads for one click: a third of a second
ABOUT = (
    "The vectors whose direction is nearest to the chosen one's: cosine similarity, x·y / (|x| |y|), over all dimensions, not over those of the picture. "
    "Among the vectors that are projected, and among the rows of W_E and W_U where those are as wide.",
    "Rows of W_U are compared as they are, without the final norm's gain: the logit lens is the reading through the norm. In the residual stream a few "
    "outlier dimensions can make all cosines large (Timkey and van Schijndel 2021); compare them with each other, not with 1.",
)  # fmt: skip
TITLES = {"W_E": "In the input embeddings W_E", "W_U": "In the output embeddings W_U"}


def neighbours_card() -> html.Section:
    """The card. Its callbacks need the stores `emb-page`, `emb-ready` (a ProjectionSpec as JSON) and `emb-row` (the chosen row)."""
    stores = [dcc.Store(id="emb-near-job"), dcc.Store(id="emb-near-done"), dcc.Store(id="emb-choose")]
    body = html.Div(_nothing(), id="emb-near", className="near")
    progress = html.Div(id="emb-near-progress", className="home-progress")
    return card(html.Span("Nearest by cosine", id="emb-near-title"), [*stores, body, progress], html.Span("", id="emb-near-subtitle"), [], list(ABOUT))


def _nothing(found: View | None = None) -> Any:
    """Before a point is chosen: the longest and the shortest vectors, which are worth a look."""
    if found is None:
        return empty("No point chosen", "Click a point, or search for a token: its nearest vectors are listed here.", None, "circle-dashed")
    norms = found.projection.norms
    order = np.argsort(norms, kind="stable")  # NaN last
    order = order[: int(np.isfinite(norms).sum())]
    parts = [html.P("Click a point, or one of these, to see its nearest vectors.", className="muted small")]
    for title, rows in (("Longest", order[::-1][:N]), ("Shortest", order[:N])):
        head = html.Tr([html.Th(title, colSpan=2), html.Th("Length", className="num")])
        body = [html.Tr([html.Td(_name(found.label(int(row)), int(row))), html.Td(found.short_place(int(row)), className="muted small nowrap"),
                         html.Td(f"{norms[row]:.4g}", className="num")]) for row in rows]  # fmt: skip
        parts.append(html.Div(html.Table([html.Thead(head), html.Tbody(body)], className="ls-table compact near-table")))
    return parts


def shown_view(page: dict[str, Any], spec: dict[str, Any] | None) -> View | None:
    """The view of a page whose projection is ready, or None."""
    return view(place(page["model"], tuple(page["traces"])), ProjectionSpec.from_json(spec)) if spec else None


@callback(
    Output("emb-near", "children"), Output("emb-near-title", "children"), Output("emb-near-subtitle", "children"), Output("emb-near-job", "data"),
    Input("emb-row", "data"), Input("emb-ready", "data"), Input("emb-near-done", "data"), State("emb-page", "data"),
)  # fmt: skip
def show_neighbours(row: int | None, spec: dict[str, Any] | None, _: str | None, page: dict[str, Any]):
    """The tables of the chosen point: read at once where that is quick, else from the cache or by a job."""
    found = shown_view(page, spec)
    if found is None or row is None or not 0 <= row < found.vectors.shape[0]:
        return _nothing(found), "Nearest by cosine", "", None
    title, place_words = f"Nearest to {found.label(row)}", found.where(row)
    try:
        answer, job = _answer(found, row)
    except LayerscopeError as problem:
        return error(str(problem)), title, place_words, None
    if answer is None:
        return html.P("All rows are compared.", className="muted"), title, place_words, job
    norm = answer["norm"]
    if "here" not in answer:
        words = "This vector holds NaN or infinite values" if norm is None else "This vector is 0"
        return html.P(f"{words}; it has no direction and no neighbours.", className="muted"), title, place_words, None
    return _tables(found, row, answer), title, f"{place_words}; length {norm:.4g}", None


def _answer(found: View, row: int) -> tuple[dict[str, Any] | None, str | None]:
    """(the neighbours, None), or (None, the job that looks for them)."""
    known = services().derived.get_json(neighbours_key(found.key, row, N))
    if known is not None and (not known.get("note") or not found.place.identity):
        return known, None
    words = vocabulary(found.place)
    among = vocabulary_matrices(found.place) if words is not None else {}
    fetch = bool(found.place.identity) and words is None  # token texts come from the worker
    if not fetch and n_values(found.vectors, among) <= _AT_ONCE:
        return neighbours(found.vectors, row, among, N), None
    job = services().jobs.submit("neighbours", {"spec": found.spec.to_json(), "row": row, "k": N}, f"Neighbours of {found.label(row)}")
    return None, job.id


@callback(
    Output("emb-near-progress", "children"), Output("emb-near-done", "data"),
    Input("emb-near-job", "data"), Input("jobs-now", "data"), prevent_initial_call=True,
)  # fmt: skip
def follow_neighbours(job_id: str | None, _: Any):
    """That it is done is said until `show_neighbours` has taken the job away, as in embedding_projection.follow."""
    job = job_or_none(job_id)
    if job is None:
        return "", no_update
    if job.state == "done":
        return "", job.id
    return job_panel(job) if job.is_active else error(job.error or f"The job was {job.state.replace('_', ' ')}."), no_update


def _tables(found: View, row: int, answer: dict[str, Any]) -> list[Any]:
    own = found.spec.choice.what
    here = TITLES.get(own, f"Among the {found.vectors.shape[0]:,} states of {own}")
    if found.states is None and getattr(found.vectors, "tied", False):
        here = "In W_E, which is W_U too (tied)"
    sections = [_section(here, [(found.label(int(i)), found.short_place(int(i)), cosine, int(i)) for i, cosine in answer["here"]])]
    for name in ("W_E", "W_U"):
        if name in answer:
            tied = " (tied: W_U too)" if name == "W_E" and "W_U" not in vocabulary_matrices(found.place) else ""
            rows = [(found.token(int(i)), f"id {int(i):,}", cosine, None) for i, cosine in answer[name]]
            sections.append(_section(TITLES[name] + tied, rows))
    if found.states is not None and "W_E" not in answer:
        info = found.place.info
        why = found.place.why_no_model or answer.get("note") or f"{own} has {found.vectors.shape[1]:,} columns and the embeddings have {info.d_model if info else 0:,}."
        sections.append(html.P(f"No tokens of the vocabulary: {why}", className="muted small"))
    return sections


def _section(title: str, rows: list[tuple[str, str, float, int | None]]) -> html.Div:
    head = html.Tr([html.Th(title, colSpan=2), html.Th("Cosine", className="num")])
    body = [
        html.Tr([html.Td(_name(label, row)), html.Td(where, className="muted small nowrap"), html.Td(_bar(cosine), className="num nowrap")])
        for label, where, cosine, row in rows
    ]
    return html.Div(html.Table([html.Thead(head), html.Tbody(body)], className="ls-table compact near-table"))


def _name(label: str, row: int | None) -> Any:
    """A neighbour that is a point of the picture is a button that chooses it."""
    return html.Span(label, className="chip-token") if row is None else set_button(label, "emb-choose", str(row), "th-button chip-token", title=label)


def _bar(cosine: float) -> list[Any]:
    return [html.Span(className="bar", style={"width": f"{max(cosine, 0) * 52:.0f}px"}), html.Span(f"{cosine:.3f}", className="near-number")]

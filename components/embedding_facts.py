"""Facts of the vectors on the Embeddings page: how long they are, and how the variance is shared among their principal components."""

from __future__ import annotations

from typing import Any

from dash import Input, Output, State, callback, html

from backend.analysis.embeddings import N_COMPONENTS
from components.card import card, cards
from components.embedding_neighbours import shown_view
from components.embedding_source import View
from components.figures.embeddings import explained_variance, norm_histogram
from components.figures.theme import no_figure
from components.graph import graph, graph_tools

ABOUT_NORMS = ("The Euclidean length of every vector, those that a sample leaves out as well. Tokens that training hardly touched keep a length of their own: look at both ends.",)
ABOUT_VARIANCE = (f"The first {N_COMPONENTS} principal components of the vectors that were projected; UMAP and t-SNE see these and nothing else. Few "
                  "components that hold most of the variance: a narrow cone, or outlier dimensions.",)  # fmt: skip


def fact_cards() -> html.Div:
    """Both cards, empty."""
    return cards(
        card("Lengths", graph("emb-norms", height=280, className="fill"), html.Span("", id="emb-norms-said"), graph_tools("emb-norms", "embedding-lengths"), list(ABOUT_NORMS),
             className="fill"),
        card("Variance of the principal components", graph("emb-variance", height=280, className="fill"), html.Span("", id="emb-variance-said"),
             graph_tools("emb-variance", "explained-variance"), list(ABOUT_VARIANCE), className="fill"),
    )  # fmt: skip


@callback(
    Output("emb-norms", "figure"), Output("emb-norms-said", "children"), Output("emb-variance", "figure"), Output("emb-variance-said", "children"),
    Input("emb-ready", "data"), Input("theme", "data"), State("emb-page", "data"),
)  # fmt: skip
def show_facts(spec: dict[str, Any] | None, theme: str, page: dict[str, Any]):
    shown = shown_view(page, spec)
    if shown is None:
        waiting = no_figure(theme, "Shown once the vectors are projected.")
        return waiting, "", waiting, ""
    norms, ratio = shown.projection.norms, shown.projection.ratio
    finite = norms[norms == norms]
    ends = [int(i) for i in (norms == finite.min()).nonzero()[0][:1]] + [int(i) for i in (norms == finite.max()).nonzero()[0][:1]]
    said = f"From {finite.min():.4g} ({shown.label(ends[0])}, {shown.where(ends[0])}) to {finite.max():.4g} ({shown.label(ends[-1])}, {shown.where(ends[-1])})."
    told = f"The first two hold {100 * ratio[:2].sum():.1f} %, the first {len(ratio)} together {100 * ratio.sum():.1f} %." if len(ratio) > 1 else ""
    return norm_histogram(norms, _Names(shown), theme), said, explained_variance(ratio, theme), told


class _Names:
    """What vectors are called, made when a hover needs it: of a vocabulary only a few are."""

    def __init__(self, shown: View) -> None:
        self._shown = shown

    def __getitem__(self, row: int) -> str:
        return self._shown.label(int(row)) if self._shown.states is None else f"{self._shown.label(int(row))} ({self._shown.where(int(row))})"

    def __len__(self) -> int:
        return self._shown.vectors.shape[0]

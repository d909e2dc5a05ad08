"""The table of every head's scores: one column a metric, sorted by one of them, the chosen head marked.

Column titles are buttons with ids {"type": "sort-heads", "metric": name}; a row opens its head through the data attributes that
assets/heads.js listens to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import html
from numpy.typing import NDArray

from backend.analysis.attention import METRICS
from backend.trace import Trace

# metric -> column title, top of its colour scale (None: the largest value), how it is defined
METRIC_TEXTS: dict[str, tuple[str, float | None, str]] = {
    "induction": ("Induction", 1.0, "mean attention to the token after an earlier copy of the current one (Olsson et al. 2022)"),
    "previous": ("Previous token", 1.0, "mean attention to the token just before"),
    "duplicate": ("Duplicate token", 1.0, "mean attention to earlier copies of the current token"),
    "sink": ("First token", 1.0, "mean attention to position 0, the attention sink (Xiao et al. 2023)"),
    "entropy": ("Entropy, nats", None, "mean of -sum A ln A over query rows: 0 looks at one token"),
    "entropy_norm": ("Entropy, share", 1.0, "entropy divided by the most a row can have, ln(i + 1)"),
    "distance": ("Distance, tokens", None, "mean number of tokens looked back"),
}


def head_table(trace: Trace, metric: str, chosen: tuple[int, int], most: int = 256) -> html.Table:
    """Heads by `metric`, largest first (smallest first for entropy: a sharp head is the interesting one), at most `most` of them."""
    columns = {name: trace.result(f"attn_{name}") for name in METRICS}
    layers = trace.result_attrs(f"attn_{metric}")["layers"]
    sort = columns[metric].ravel() if metric.startswith("entropy") else -columns[metric].ravel()
    order = np.argsort(sort, kind="stable")
    order = order[np.isfinite(columns["entropy"].ravel()[order])][:most]  # a head whose map was not captured has no scores
    share = trace.info.n_heads // trace.info.n_kv_heads
    header = [html.Th("Head"), html.Th("KV head", className="num"), *(_column_head(name, name == metric) for name in METRIC_TEXTS)]
    rows = [_table_row(columns, layers, int(i), share, chosen) for i in order]
    return html.Table([html.Thead(html.Tr(header)), html.Tbody(rows)], className="ls-table")


def _column_head(name: str, sorted_by: bool) -> html.Th:
    arrow = (" ↑" if name.startswith("entropy") else " ↓") if sorted_by else ""
    button = html.Button(METRIC_TEXTS[name][0] + arrow, id={"type": "sort-heads", "metric": name}, className="th-button")
    sort: Any = {"aria-sort": "none" if not sorted_by else "ascending" if arrow == " ↑" else "descending"}
    return html.Th(button, className="num", **sort)


def _table_row(columns: dict[str, NDArray[np.float32]], layers: list[int], index: int, share: int, chosen: tuple[int, int]) -> html.Tr:
    row, head = divmod(index, columns["sink"].shape[1])
    values = [html.Td(_shown(float(columns[name][row, head])), className="num") for name in METRIC_TEXTS]
    here: Any = {"data-layer": layers[row], "data-head": head}
    return html.Tr([html.Td(f"{layers[row]}.{head}"), html.Td(str(head // share), className="num"), *values],
                   className="chosen" if (layers[row], head) == chosen else "", **here)  # fmt: skip


def _shown(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"

"""The table of every head's scores: one column a metric, sorted by one of them, the chosen head marked.

It is drawn by the browser (components.drawn). Column titles are buttons with a data-sort attribute, a row opens its head through its data
attributes; assets/heads.js listens to both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from dash import html
from numpy.typing import NDArray

# metric -> column title, top of its colour scale (None: the largest value), how it is defined
METRIC_TEXTS: dict[str, tuple[str, float | None, str]] = {
    "induction": ("Induction", 1.0, "mean attention to the token after an earlier copy of the current one (Olsson et al. 2022)"),
    "previous": ("Previous token", 1.0, "mean attention to the token just before"),
    "duplicate": ("Duplicate token", 1.0, "mean attention to earlier copies of the current token"),
    "sink": ("First token", 1.0, "mean attention to position 0, the attention sink (Xiao et al. 2023)"),
    "entropy": ("Entropy, nats", None, "mean of -sum A ln A over query rows: 0 looks at one token"),
    "entropy_norm": ("Entropy, share", 1.0, "entropy divided by the most a row can have, ln(i + 1)"),
    "distance": ("Distance, tokens", None, "mean number of tokens looked back"),
    "below": ("Share below", 1.0, "sparsity: share of the cells on and under the diagonal whose attention is below the threshold that is chosen"),
    "mean": ("Mean attention", None, "mean of the cells on and under the diagonal; where rows sum to 1 it is 2 / (n + 1) of every head, less where a learned sink takes a part"),
}
COUNTED = ("below", "mean")  # counted from the stored patterns, the others while capturing


def head_table(columns: Mapping[str, NDArray[np.float32]], layers: Sequence[int], metric: str, chosen: tuple[int, int], heads_each: int, threshold: float = 0.01,
               most: int = 256) -> html.Table:  # fmt: skip
    """Heads by `metric`, largest first (smallest first for entropy: a sharp head is the interesting one), at most `most` of them.

    columns: (layer, head) of the scores there are, those of METRIC_TEXTS; heads_each: heads that share a key/value head; threshold: that of "below".
    """
    sort = columns[metric].ravel() if metric.startswith("entropy") else -columns[metric].ravel()
    order = np.argsort(sort, kind="stable")
    order = order[np.isfinite(columns["entropy"].ravel()[order])][:most]  # a head whose map was not captured has no scores
    shown = [name for name in METRIC_TEXTS if name in columns]
    header = [html.Th("Head"), html.Th("KV head", className="num"), *(_column_head(name, name == metric, threshold) for name in shown)]
    rows = [_table_row(columns, shown, layers, int(i), heads_each, chosen) for i in order]
    return html.Table([html.Thead(html.Tr(header)), html.Tbody(rows)], className="ls-table")


def _column_head(name: str, sorted_by: bool, threshold: float) -> html.Th:
    arrow = (" ↑" if name.startswith("entropy") else " ↓") if sorted_by else ""
    title = METRIC_TEXTS[name][0] + (f" {threshold:g}" if name == "below" else "")
    by: Any = {"data-sort": name}
    button = html.Button(title + arrow, className="th-button", **by)
    sort: Any = {"aria-sort": "none" if not sorted_by else "ascending" if arrow == " ↑" else "descending"}
    return html.Th(button, className="num", **sort)


def _table_row(columns: Mapping[str, NDArray[np.float32]], shown: Sequence[str], layers: Sequence[int], index: int, share: int, chosen: tuple[int, int]) -> html.Tr:
    row, head = divmod(index, columns["sink"].shape[1])
    values = [html.Td(_shown(float(columns[name][row, head]), 4 if name == "mean" else 2), className="num") for name in shown]
    here: Any = {"data-layer": layers[row], "data-head": head}
    return html.Tr([html.Td(f"{layers[row]}.{head}"), html.Td(str(head // share), className="num"), *values], tabIndex=0,
                   className="chosen" if (layers[row], head) == chosen else "", **here)  # fmt: skip


def _shown(value: float, digits: int) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"

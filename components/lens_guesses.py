"""The best tokens of each row of a lens at one position, as a table."""

from __future__ import annotations

import numpy as np
from dash import html

from components.drawn import still
from components.figures.lens import row_label
from components.lens_values import LensValues
from components.token_label import predicted_label


def guesses_table(lens: LensValues, at: int, shown: int) -> html.Div:
    """`shown` tokens of each row at position `at` with their probability, the model's own output first."""
    ids, logprobs = lens.result("lens_top_ids")[:, at, :shown], lens.result("lens_top_logprobs")[:, at, :shown]
    ranks, follows, rows = lens.result("lens_next_rank")[:, at], at + 1 < lens.trace.n_tokens, lens.rows
    header = [html.Th("Layer"), *(html.Th(f"{i + 1}.") for i in range(ids.shape[1])), html.Th("Rank", className="num", title="of the token that follows") if follows else None]
    body = []
    for r in reversed(range(len(rows))):
        cells = [
            html.Td([html.Div(predicted_label(i, lens.token_text(i), lens.trace.info, 14), className="chip-token"), html.Div(f"{np.exp(lp):.3f}", className="muted small")])
            for i, lp in zip(ids[r], logprobs[r], strict=True)
        ]
        body.append(html.Tr([html.Td(row_label(rows[r])), *cells, html.Td(f"{ranks[r] + 1:,}" if ranks[r] >= 0 else "–", className="num") if follows else None]))
    return still(html.Table([html.Thead(html.Tr(header)), html.Tbody(body)], className="ls-table"))

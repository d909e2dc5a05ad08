"""The tables and facts of the Quantization page: every tensor's error, the predictions that changed, the figures in short."""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import html

from backend.estimate import in_bytes
from backend.reports.quantization_report import QuantizationReport, percent
from components.controls import facts
from components.token_label import token_label

_MOST_ROWS, _MOST_PREDICTIONS = 1000, 300
_COLUMNS = {"relative_rmse": "Off", "sqnr_db": "SQNR, dB", "rmse": "RMSE", "max_error": "Max error", "cosine": "1 − cosine"}


def summary_facts(report: QuantizationReport) -> html.Dl | html.Div:
    """What was compared, and what came out, in numbers."""
    model, reference, found = report.model, report.reference, report.predictions
    smaller = reference["n_bytes"] / model["n_bytes"] if model["n_bytes"] else float("nan")
    return facts({
        "Model": f"{model['name']}: {model['quantization']}, {model['bits']:.2f} bits a weight, {in_bytes(model['n_bytes'])}",
        "Reference": f"{reference['name']}: {reference['quantization']}, {reference['bits']:.2f} bits a weight, {in_bytes(reference['n_bytes'])} ({smaller:.1f} times as large)",
        "Weights": f"{percent(report.total['relative_rmse'])} off, SQNR {report.total['sqnr_db']:.1f} dB, over {len(report.weights)} tensors" if report.weights else None,
        "KL": f"{found['kl_mean']:.3g} nats on average, median {found['kl_median']:.2g}, largest {found['kl_max']:.3g}, over {found['n_positions']:,} positions",
        "Next token": f"the same best token at {percent(found['top1_agreement'])} of the positions",
        "Log-probability": f"{found['next_logprob_change']:+.4f} nats for the token that really follows" if np.isfinite(found["next_logprob_change"]) else None,
    })  # fmt: skip


def tensor_table(report: QuantizationReport, metric: str) -> html.Table:
    """Every tensor, the worst by `metric` first."""
    ordered = sorted(report.weights, key=lambda row: _badness(row, metric))[:_MOST_ROWS]
    head = [html.Th("Tensor"), html.Th("Stored as"), html.Th("Reference"), html.Th("Bits", className="num")]
    head += [html.Th(title + (" ↓" if name == metric else ""), className="num") for name, title in _COLUMNS.items()]
    rows = [
        html.Tr([
            html.Td(row["name"], className="mono nowrap"), html.Td(row["dtype"]), html.Td(row["reference_dtype"]), html.Td(f"{row['bits']:.2f}", className="num"),
            *(html.Td(_cell(name, row[name]), className="num") for name in _COLUMNS),
        ])
        for row in ordered
    ]  # fmt: skip
    return html.Table([html.Thead(html.Tr(head)), html.Tbody(rows)], className="ls-table compact")


def prediction_table(report: QuantizationReport, prompt: int) -> html.Table:
    """The positions of a prompt, those first whose best next token changed (they are marked), then by KL: what the two predict, what it cost."""
    result = report.prompts[prompt]
    shift, changed = result.shift, result.changed
    head = [html.Th("Position", className="num"), html.Th("After"), html.Th("Reference"), html.Th("Quantized"), html.Th("KL, nats", className="num"),
            html.Th("Next token", className="num", title="Change of the log-probability of the token that really follows, in nats")]  # fmt: skip
    rows = []
    for at in np.lexsort((-np.asarray(shift["kl"]), ~changed))[:_MOST_PREDICTIONS]:
        change = float(shift["next_logprob_change"][at])
        rows.append(html.Tr([
            html.Td(str(at), className="num"), html.Td(token_label(result.tokens[at], at in result.special, 20), className="chip-token"),
            _prediction(report, shift["reference_top"][at], shift["reference_prob"][at]), _prediction(report, shift["top"][at], shift["prob"][at]),
            html.Td(f"{float(shift['kl'][at]):.2g}", className="num"), html.Td(f"{change:+.3f}" if np.isfinite(change) else "–", className="num"),
        ], className="chosen" if changed[at] else ""))  # fmt: skip
    return html.Table([html.Thead(html.Tr(head)), html.Tbody(rows)], className="ls-table compact")


def _prediction(report: QuantizationReport, token: Any, probability: Any) -> html.Td:
    label = token_label(report.texts.get(int(token), ""), max_length=20)
    return html.Td([html.Span(label, className="chip-token"), html.Span(f" {float(probability):.2f}", className="muted small")])


def _badness(row: dict[str, Any], metric: str) -> float:
    """Ascending order of this is worst first; tensors whose error is not a number come before all."""
    value = float(row[metric])
    if np.isnan(value):
        return -np.inf
    return value if metric in ("sqnr_db", "cosine") else -value


def _cell(name: str, value: float) -> str:
    if name == "relative_rmse":
        return percent(value)
    if name == "cosine":
        return f"{max(1 - value, 0.0):.2e}"
    return f"{value:.2f}" if name == "sqnr_db" and np.isfinite(value) else "exact" if value == np.inf else f"{value:.3g}"

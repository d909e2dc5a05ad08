"""The cards of a quantization report: the path from weights to predictions, errors by layer and token, the predictions, every tensor.

Their callbacks need the stores `quant-key` (which report), `quant-chosen` (what the address asked for) and `theme`.
"""

from __future__ import annotations

from typing import Any

import dash
import numpy as np
from dash import Input, Output, State, callback, dcc, html, no_update
from dash.exceptions import PreventUpdate

from backend.reports.quantization_report import QuantizationReport, percent
from components.card import card, cards
from components.figures.quantization import ACTIVATION_METRICS, WEIGHT_METRICS, depth_map, error_path, kl_bars, position_map, written
from components.figures.theme import escape, number
from components.graph import graph, graph_tools
from components.quantization_form import report_of
from components.quantization_tables import prediction_table, summary_facts, tensor_table
from components.states import empty
from components.token_label import token_label, token_labels
from components.trace_view import one_line
from components.url_state import keep_url

ABOUT_PATH = (
    "Top: how far each matrix is from the reference, the root of the summed squared differences over that of the reference's squares. Below, in the same slot of the same "
    "layer: how far the activation is that this matrix makes, relative L2 error |x' − x| / |x|, the mean over all positions. Right: KL(reference || quantized) of the "
    "prediction at each position, in nats.",
    "Read it downwards and to the right: a bar shows what was put in, the point below it what comes out of that step, the thick line what stays in the residual stream.",
)
ABOUT_WEIGHTS = (
    "p is the reference's tensor, q the quantized one, d = q − p. RMSE: sqrt(mean d²). Relative RMSE: sqrt(Σd² / Σp²). SQNR: 10 log10(Σp² / Σd²) in dB; a bit more is about "
    "6 dB (Widrow and Kollar 2008). Cosine: the angle between the two as vectors. Weights are compared by what they mean: rows that the converter to GGUF reordered and "
    "norms that it offset are put back first.",
)
ABOUT_ACTIVATIONS = (
    "Both models run over the same tokens with a float32 key/value cache. Relative L2: |x' − x| / |x| of each position's vector. Cosine: the angle between the two. Both are "
    "means over all positions. Linear CKA (Kornblith et al. 2019) compares how the positions lie to each other: it sees no rotation and no scale; several prompts are joined "
    "as in minibatch CKA (Nguyen et al. 2021).",
    "Masked attention scores count as 0 in both. Chosen experts are compared as rows of zeros and ones: their cosine is the share of experts that both chose.",
)
ABOUT_PREDICTIONS = (
    "KL(p || q) = Σ p ln(p / q) over the vocabulary, in nats, p the reference's distribution of the next token and q the quantized model's: the measure of llama.cpp's "
    "llama-perplexity --kl-divergence. Orange or red: the most probable token is another one.",
)


@callback(Output("quant-body", "children"), Input("quant-key", "data"), State("quant-chosen", "data"))
def show_report(key: str | None, chosen: dict[str, Any]):
    report = report_of(key)
    if report is None:
        words = "Choose a quantized model and the same model unquantized, then press Compare: it takes about as long as running the prompt through both."
        return empty("Nothing compared yet", words, symbol="scale")
    return report_cards(report, chosen)


def report_cards(report: QuantizationReport, chosen: dict[str, Any]) -> list[Any]:
    """All cards of a report; chosen: metrics, site and prompt (`wmetric`, `ametric`, `site`, `at`) to begin with."""
    site = chosen["site"] if chosen["site"] in report.sites else "resid_post" if "resid_post" in report.sites else report.sites[0]
    prompts: Any = [{"label": f"{i + 1}: {one_line(prompt.text, 50)}", "value": i} for i, prompt in enumerate(report.prompts)]
    at = min(chosen["at"], len(prompts) - 1)
    pick_weight = dcc.Dropdown(_options(WEIGHT_METRICS), chosen["wmetric"], id="quant-wmetric", clearable=False, searchable=False, className="picker-metric")
    pick_activation = dcc.Dropdown(_options(ACTIVATION_METRICS), chosen["ametric"], id="quant-ametric", clearable=False, searchable=False, className="picker-metric")
    pick_site = dcc.Dropdown(report.sites, site, id="quant-site", clearable=False, className="picker-metric")
    pick_prompt = html.Div(dcc.Dropdown(prompts, at, id="quant-at", clearable=False, className="picker-prompt"), hidden=len(prompts) == 1)
    n_components = len({row["component"] for row in report.weights if row["layer"] is not None})
    n_sites = len(report.sites)
    wide = {"minWidth": 760}  # each slot needs room; a narrower card scrolls sideways
    tall = 110 + 19 * max(n_components, n_sites, 8)
    return [
        html.Div([html.P(report.sentence(), id="quant-sentence", className="quant-sentence"), html.Div(summary_facts(report), className="two-columns")], className="ls-card"),
        card("From weights to predictions", html.Div(html.Div(graph("quant-path", height=530), style=wide), className="table-scroll"),
             "One column a layer. Above: the error of each matrix. Below, in the same slot: the error of what it computes. Right: the predictions. "
             "Click a point to see its site token by token.",
             graph_tools("quant-path", "quantization"), list(ABOUT_PATH)),
        cards(
            card("Weight error", graph("quant-weights", height=tall, className="fill"), "Component by layer.", [pick_weight, *graph_tools("quant-weights")],
                 list(ABOUT_WEIGHTS), className="fill"),
            card("Activation divergence", graph("quant-activations", height=tall, className="fill"), "Site by layer; click one.",
                 [pick_activation, *graph_tools("quant-activations")], list(ABOUT_ACTIVATIONS), className="fill"),
            card(html.Span("", id="quant-positions-title"), graph("quant-positions", height=130 + min(26 * max(report.n_layers, 4), 480)), "A row a layer, a column a token.",
                 [pick_site, pick_prompt, *graph_tools("quant-positions")], list(ABOUT_ACTIVATIONS), className="wide"),
            card("KL of each prediction", graph("quant-kl", height=320, className="fill"), html.Span("", id="quant-kl-subtitle"), graph_tools("quant-kl"),
                 list(ABOUT_PREDICTIONS), className="fill"),
            card("What the two predict", html.Div(id="quant-changed", className="table-scroll table-tall"),
                 "The most probable next token and its probability. Marked and first: where it changed. Last column: the log-probability of the real next token, in nats.",
                 about=list(ABOUT_PREDICTIONS)),
            card("Every tensor", html.Div(id="quant-tensors", className="table-scroll table-tall"), "Worst first, by the metric chosen above.", about=list(ABOUT_WEIGHTS),
                 className="wide"),
        ),
    ]  # fmt: skip


def _options(metrics: Any) -> Any:
    return [{"label": title[0].upper() + title[1:], "value": name} for name, (title, _) in metrics.items()]


def _report(key: str | None) -> QuantizationReport:
    """The report whose cards are shown. The cache may have dropped it since: then the page, loaded again, says so."""
    report = report_of(key)
    if report is None:
        raise PreventUpdate
    return report


@callback(Output("quant-path", "figure"), Input("theme", "data"), State("quant-key", "data"))
def show_path(theme: str, key: str | None):
    report = _report(key)
    predictions = {"kl": np.concatenate([prompt.shift["kl"] for prompt in report.prompts]), "changed": np.concatenate([prompt.changed for prompt in report.prompts])}
    tokens = [label for prompt in report.prompts for label in token_labels(prompt.tokens, set(prompt.special), 16)]
    agreement = percent(report.predictions["top1_agreement"])
    return error_path(report.weights, report.places, report.relative_l2, report.n_layers, predictions, tokens, theme, agreement)


@callback(Output("quant-weights", "figure"), Output("quant-tensors", "children"), Input("quant-wmetric", "value"), Input("theme", "data"), State("quant-key", "data"))
def show_weights(metric: str, theme: str, key: str | None):
    report = _report(key)
    rows = [row for row in report.weights if row["layer"] is not None]
    components = list(dict.fromkeys(row["component"] for row in rows))
    values, hovers = np.full((len(components), report.n_layers), np.nan), np.full((len(components), report.n_layers), "", object)
    for row in rows:
        at = components.index(row["component"]), row["layer"]
        values[at] = row[metric]
        hovers[at] = f"{escape(row['name'])}<br>{row['dtype']}, {row['bits']:.2f} bits a weight<br>{written(row[metric], metric, WEIGHT_METRICS)}"
    figure = depth_map(values, components, [f"L{layer}" for layer in range(report.n_layers)], metric, WEIGHT_METRICS, hovers, theme)
    return figure, tensor_table(report, metric)


@callback(Output("quant-activations", "figure"), Input("quant-ametric", "value"), Input("quant-site", "value"), Input("theme", "data"), State("quant-key", "data"))
def show_activations(metric: str, site: str, theme: str, key: str | None):
    report = _report(key)
    columns = ["in", *(f"L{layer}" for layer in range(report.n_layers)), "out"]
    values, hovers = np.full((len(report.sites), len(columns)), np.nan), np.full((len(report.sites), len(columns)), "", object)
    for (name, layer), value in zip(report.places, getattr(report, metric), strict=True):
        at = report.sites.index(name), layer + 1 if layer is not None else 0 if name == "embed" else len(columns) - 1
        values[at] = value
        hovers[at] = f"{name}{'' if layer is None else f' at layer {layer}'}<br>{written(value, metric, ACTIVATION_METRICS)}"
    return depth_map(values, report.sites, columns, metric, ACTIVATION_METRICS, hovers, theme, site)


@callback(Output("quant-positions", "figure"), Output("quant-positions-title", "children"), Input("quant-site", "value"), Input("quant-at", "value"),
          Input("quant-ametric", "value"), Input("theme", "data"), State("quant-key", "data"))  # fmt: skip
def show_positions(site: str, at: int, metric: str, theme: str, key: str | None):
    report = _report(key)
    prompt = report.prompts[at]
    kept = metric if metric in ("relative_l2", "cosine") else "relative_l2"  # CKA is one number for all positions
    layers = [layer for name, layer in report.places if name == site]
    rows = [site if layer is None else f"L{layer}" for layer in layers]
    labels = token_labels(prompt.tokens, set(prompt.special), 12)
    return position_map(report.at_position(at, kept, site), rows, labels, kept, site, theme), f"Divergence of {site}, token by token"


@callback(Output("quant-kl", "figure"), Output("quant-kl-subtitle", "children"), Output("quant-changed", "children"), Input("quant-at", "value"), Input("theme", "data"),
          State("quant-key", "data"))  # fmt: skip
def show_predictions(at: int, theme: str, key: str | None):
    report = _report(key)
    prompt = report.prompts[at]
    shift, labels = prompt.shift, token_labels(prompt.tokens, set(prompt.special), 12)
    hovers = []
    for i, label in enumerate(labels):
        best = [_best(report, shift[name][i], shift[p][i]) for name, p in (("reference_top", "reference_prob"), ("top", "prob"))]
        hovers.append(f"after {escape(label)} (position {i})<br>KL {number(float(shift['kl'][i]))} nats<br>reference {best[0]}<br>quantized {best[1]}")
    said = f"{int(prompt.changed.sum())} of {len(labels)} best tokens changed; mean KL {number(float(np.mean(shift['kl'])))} nats. At each token: the prediction of the next."
    return kl_bars(shift["kl"], prompt.changed, labels, hovers, theme), said, prediction_table(report, at)


def _best(report: QuantizationReport, token: Any, probability: Any) -> str:
    return f"{escape(token_label(report.texts.get(int(token), ''), max_length=20))} {float(probability):.3f}"


@callback(Output("quant-site", "value"), Input("quant-activations", "clickData"), Input("quant-path", "clickData"), State("quant-key", "data"), prevent_initial_call=True)
def open_clicked(cell: dict[str, Any] | None, point: dict[str, Any] | None, key: str | None):
    """The site whose cell or point was clicked: a map says its row, a point of the path begins its hover with the name."""
    sites, on_map = _report(key).sites, dash.ctx.triggered_id == "quant-activations"
    clicked = (cell if on_map else point) or {"points": [{}]}
    first = clicked["points"][0]
    if on_map:
        return sites[int(first["y"])] if "y" in first else no_update
    name = str(first.get("customdata", "")).split("<br>")[0].split(" ")[0]
    return name if name in sites else no_update


keep_url({"wmetric": ("quant-wmetric", "value"), "ametric": ("quant-ametric", "value"), "site": ("quant-site", "value"), "at": ("quant-at", "value")})

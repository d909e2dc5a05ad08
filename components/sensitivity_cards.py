"""The cards of a sensitivity run, as far as the run has what they show; callbacks in components/sensitivity_views.py fill them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from dash import Input, Output, State, callback, dcc, html

from backend.errors import LayerscopeError
from backend.reports.sensitivity_run import SensitivityRun
from backend.sensitivity_spec import METRICS
from components.card import card, cards, full_screen_button
from components.controls import facts
from components.graph import graph, graph_tools
from components.sensitivity_comparison import comparison_card
from components.sensitivity_request import TEXTS
from components.sensitivity_tables import MOST_ROWS, STATUSES, brackets, effect_table, overlap_table, published_table, super_table, top_grid
from components.sensitivity_values import DONE, GROUPS, STATISTICS, components_of, layers_of, not_measured, number, opened, sentence
from components.services import services
from components.states import empty, error
from components.trace_view import short_date
from components.url_state import as_choice, keep_url

ABOUT_RUN = (
    "What was run, as manifest.json has it, and the command that repeats it. Perplexity is exp of the mean loss in nats per token; intervals are 95 %, by bootstrap over windows, "
    "paired with the baseline for ratios.",
)
ABOUT_DISTRIBUTION = (
    "Scores above 0 on a log axis, all of them above, below as shares of each row's. The mark is the least score among the top weights. Tensors have bins of their own; they are "
    "brought to common ones by spreading each bin's count evenly over it.",
)
ABOUT_MAP = "A statistic of every tensor's scores. Colours of scores are on a log scale; the hover has the number itself. Click a cell to see its top weights in the table."
ABOUT_TOP = (
    "The top weights of the run, the best of every scope first. A row leads to the weight in its matrix on the Weights page. Row and column are those of the canonical matrix "
    "(outputs by inputs); there the stored tensor is shown, whose rows may be ordered otherwise.",
)
ABOUT_EFFECTS = (
    "The chosen weights are changed in memory, perplexity is measured over the text, and they are put back. Controls have the same count in the same tensors: drawn at random "
    "with a seed, or those with the least scores. A point right of 1 is a worse model.",
    "In a quantized block a weight may not take every value, and its neighbours may move with it: Not exact and Others in the table count these.",
)  # fmt: skip
ABOUT_STABILITY = (
    "Jaccard overlap |A ∩ B| / |A ∪ B| of the k best weights of two rankings (Jaccard 1901), and Spearman's rank correlation over the union of the weights that both kept: with "
    "another seed, another half of the text, another metric.",
)
ABOUT_PRUNING = (
    "The weights with the least scores are set to 0 in memory, row by row or tensor by tensor as the run says, and perplexity is measured. Band: 95 % by bootstrap over windows.",
    "Divergence: relative L2, |x' − x| / |x|, of the residual stream after each layer, before and after pruning.",
)
ABOUT_FLOW = "The L2 norm of dL/dW of every matrix, L the mean loss over the text in nats per token. Hugging Face models only: llama.cpp computes no gradients."
ABOUT_SUPER = (
    "Yu et al. 2024 (arXiv 2411.07191): single weights of W_out through which one huge activation enters the residual stream. Searched are the columns and rows of W_out whose "
    "input and output spike; one arg-max is not enough, so several are kept for each layer, with how long the spike stays in the stream.",
    *(f"{name.capitalize()}: {meaning}" for name, (_, meaning) in STATUSES.items()),
)  # fmt: skip


@callback(Output("sens-body", "children"), Input("sens-run", "data"), State("sens-asked", "data"), prevent_initial_call=True)
def show_run(run_id: str | None, asked: dict[str, Any]):
    """Another run. The first is in the page's layout: Dash calls nothing at the start that depends only on outputs of callbacks that wait for a click."""
    return run_body(run_id, asked)


def run_body(run_id: str | None, asked: Mapping[str, Any]) -> Any:
    """The cards of a run, or the sentence that says why there are none."""
    if not run_id:
        return empty("No run chosen", "Choose a run above, or start a new one: what it found is shown here.", symbol="crosshair")
    try:
        return run_cards(opened(run_id), run_id, asked)
    except LayerscopeError as problem:
        return error(str(problem))


def run_cards(run: SensitivityRun, run_id: str, asked: Mapping[str, Any]) -> list[Any]:
    """All cards of a run. asked: `group` and `stat` of the address, `with` (ids of runs to compare with)."""
    parts = [card_of for name, card_of in _PARTS if run.stats.get(name)]
    alone = len(parts) % 2  # the last of an odd number of half-wide cards takes the whole width
    halves = [card_of(run, "fill wide" if alone and card_of is parts[-1] else "fill") for card_of in parts]
    supers = [_super_card(run)] if run.stats.get("super_weights") else []
    return [_summary(run), cards(_distribution_card(run, asked), _map_card(run, asked), _top_card(run), *halves, *supers, comparison_card(run_id, asked))]


def _summary(run: SensitivityRun) -> html.Section:
    manifest, spec, model, text = run.manifest, run.manifest["spec"], run.manifest["model"], run.manifest["text"]
    seconds = manifest.get("seconds")
    told = {
        "Model": f"{model['name']}: {model['architecture']}, {model['quantization']}, {model['n_layers']} layers, {model['n_params']:,} weights",
        "Metric": f"{run.stats['metric']}: {METRICS.get(run.stats['metric'], 'unknown to this version')}",
        "Ranked": f"top {spec['topk']:,} {'of the whole model' if run.stats['mode'] == 'global' else 'of every layer'}",
        "Text": f"{text['name']}, {text['n_windows']:,} windows of {text['window']:,} tokens",
        "Engine": f"{model['engine']} {model.get('engine_version') or ''}".strip(),
        "Made": f"{short_date(manifest['created'])}, Layerscope {manifest.get('layerscope') or 'of unknown version'}",
        "Took": ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items() if isinstance(value, int | float)) if isinstance(seconds, dict) else None,
        "Not measured": ", ".join(not_measured(run)) or None,
    }
    words = [part for option in re.split(r" (?=--)", command_line(run)) for part in (html.Span(option, className="sens-option"), " ")]  # a line breaks between options
    command = html.Div([html.Code(words, id="sens-command", className="sens-command"), html.Button("Copy", className="tool", type="button", title="Copy the command",
                        **{"data-copy-from": "sens-command"})], className="sens-repeat")  # fmt: skip
    notes = html.Ul([html.Li(note) for note in manifest["notes"]], className="sens-notes") if manifest["notes"] else None
    body = [html.P(sentence(run), id="sens-sentence", className="sens-sentence"), html.Div(facts(told), className="two-columns"), notes, command]
    return card(f"{model['name']} by {run.stats['metric']}", body, "What was run, and how to run it again.", about=list(ABOUT_RUN))


def command_line(run: SensitivityRun) -> str:
    """The command that repeats the run: the one that made it, or for a run of the page the one that does the same."""
    if run.manifest["command"]:
        return shlex.join(run.manifest["command"])
    spec, words = dict(run.manifest["spec"]), ["python", "-m", "backend", "sensitivity"]
    spec["controls"] = spec.get("controls") or ["none"]
    if spec.get("text"):  # the page names a file of its folder of texts
        spec["text"] = str(services().settings.data_dir / TEXTS / str(spec["text"]))
    for name, value in spec.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value not in (None, False, "", []) and not isinstance(value, dict):
            words += [option, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join([*words, "--out-dir", f"sensitivity-{run.id[:8]}"])


def _choose(id: str, options: Mapping[str, Any], value: str) -> dcc.Dropdown:
    offered: Any = [{"label": words if isinstance(words, str) else words[0], "value": name} for name, words in options.items()]
    return dcc.Dropdown(offered, value, id=id, clearable=False, searchable=False, className="picker-metric")


def _pickers(label: str, pick: dcc.Dropdown) -> html.Div:
    return html.Div(html.Label([html.Span(label), pick]), className="controls")


def _height(n_rows: int) -> int:
    return 240 + min(22 * max(n_rows, 6), 400)


def _distribution_card(run: SensitivityRun, asked: Mapping[str, Any]) -> html.Section:
    pick = _choose("sens-group", GROUPS, as_choice(asked.get("group"), list(GROUPS), "component"))
    height = _height(max(len(layers_of(run)), len(components_of(run)))) + 60
    body = [_pickers("Rows", pick), graph("sens-scores", height, className="fill")]
    return card("Distribution of the scores", body, "Every score above 0. Marked: where the top weights begin.", graph_tools("sens-scores", "score-distribution"),
                list(ABOUT_DISTRIBUTION), className="fill")  # fmt: skip


def _map_card(run: SensitivityRun, asked: Mapping[str, Any]) -> html.Section:
    pick = _choose("sens-stat", STATISTICS, as_choice(asked.get("stat"), list(STATISTICS), "p99"))
    body = [_pickers("Statistic", pick), graph("sens-map", _height(len(layers_of(run))), className="fill")]
    return card("Layers and components", body, "Layers down, components across. Click a cell to see its top weights.", graph_tools("sens-map", "scores-by-layer"),
                ABOUT_MAP, className="fill")  # fmt: skip


def _top_card(run: SensitivityRun) -> html.Section:
    shown = f"The best {MOST_ROWS:,} of {len(run.top):,}; the file has all. " if len(run.top) > MOST_ROWS else f"{len(run.top):,} weights. "
    search = dcc.Input(id="sens-search", placeholder="search tensors", debounce=0.2, className="text-input grid-search", maxLength=100)
    save = html.Button("CSV", id="sens-save", className="tool", title="Save all top weights as CSV")
    body = [dcc.Download(id="sens-file"), top_grid(run)]
    return card("Top weights", body, f"{shown}Click a row to see the weight in its matrix.", [search, save, full_screen_button()], list(ABOUT_TOP), className="wide")


def _effects_card(run: SensitivityRun, place: str) -> html.Section:
    found = run.stats["perturbation"]
    what = f"{DONE.get(found['op'], found['op'])} the chosen weights"
    what += f", scale {found['scale']:g}" if found["op"] in ("scale", "gaussian") and found["scale"] is not None else ""
    what += f", bit {found['bit']}" if found["bit"] is not None else ""
    what += f". Baseline {number(found['baseline']['perplexity'])} {brackets(found['baseline']['ci'])}".rstrip()
    body = [graph("sens-effects", 130 + 34 * min(len(found["runs"]), 12)), html.Div(effect_table(found), className="sens-tight")]
    return card("Effect on perplexity", body, f"{what}. Bars: 95 % intervals.", graph_tools("sens-effects", "perturbation-effects"),
                list(ABOUT_EFFECTS), className=place)  # fmt: skip


def _stability_card(run: SensitivityRun, place: str) -> html.Section:
    body = [graph("sens-stability", 300, className="fill"), html.Div(overlap_table(run.stats["stability"]), className="sens-table sens-tight")]
    return card("Stability of the ranking", body, "How much of the top k stays when something else is changed.", graph_tools("sens-stability", "stability"), list(ABOUT_STABILITY),
                className=place)  # fmt: skip


def _pruning_card(run: SensitivityRun, place: str) -> html.Section:
    found = run.stats["pruning"]
    return card("Pruning", graph("sens-pruning", 360, className="fill"), f"The least by {found['metric']} within each {found['within']} set to 0.",
                graph_tools("sens-pruning", "pruning"), list(ABOUT_PRUNING), className=place)  # fmt: skip


def _divergence_card(run: SensitivityRun, place: str) -> html.Section:
    rows = len(run.stats["pruning"]["rows"][0]["divergence"]) if run.stats["pruning"]["rows"] else 0
    return card("What pruning does to each layer", graph("sens-divergence", 130 + min(24 * max(rows, 8), 480), className="fill"), "The residual stream after each layer.",
                graph_tools("sens-divergence", "pruning-divergence"), list(ABOUT_PRUNING), className=place)  # fmt: skip


def _flow_card(run: SensitivityRun, place: str) -> html.Section:
    found = run.stats["gradient_flow"]
    return card("Gradient flow", graph("sens-flow", 150 + min(26 * max(len(found["layers"]), 8), 480), className="fill"), f"Over {found.get('n_windows') or 'all'} windows.",
                graph_tools("sens-flow", "gradient-flow"), ABOUT_FLOW, className=place)  # fmt: skip


def _super_card(run: SensitivityRun) -> html.Section:
    found = run.stats["super_weights"]
    random = found.get("random")
    said = f"Spikes above {found['threshold']:g}. " if found["threshold"] is not None else ""
    said += f"The worst of {random['n']:,} random weights of the same matrix: × {random['worst_ratio']:.4g}." if random and random["worst_ratio"] is not None else ""
    tables = [super_table(run) if found["candidates"] else html.P("No candidate: no activation of W_out spikes.", className="muted")]
    tables += [published_table(run)] if found["published"] else [html.P("No publication that is known here names a super weight of this model.", className="muted small")]
    save = html.Button("CSV", id="sens-super-save", className="tool", title="Save the candidates as CSV")
    return card("Super weights", [dcc.Download(id="sens-super-file"), *tables], said, [save, full_screen_button()], list(ABOUT_SUPER), className="wide")


_PARTS = (("perturbation", _effects_card), ("stability", _stability_card), ("pruning", _pruning_card), ("pruning", _divergence_card), ("gradient_flow", _flow_card))

keep_url({"group": ("sens-group", "value"), "stat": ("sens-stat", "value"), "with": ("sens-with", "value")})

"""A sensitivity run in words and rows: what a report prints. Every number comes from the run's own files; all text is plain, and escaped by who prints it."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from backend.reports.plot_style import printable
from backend.reports.sensitivity_effects import SELECTIONS, number, operation
from backend.reports.sensitivity_panels import SCORES
from backend.reports.sensitivity_run import SensitivityRun

Rows = list[list[str]]
TOP_ROWS, PAIR_ROWS = 20, 40
NONE = "\u2013"


def summary(run: SensitivityRun) -> str:
    """What the run found, with its numbers."""
    stats, model = run.stats, run.manifest["model"]
    n, tensors = sum(row["n"] for row in stats["tensors"]), len(stats["tensors"])
    scope = "over the whole model" if stats["mode"] == "global" else "layer by layer"
    said = [f"Of {n:,} weights in {tensors:,} matrices of {model['name']}, ranked by {stats['metric']} {scope}, the {len(run.top):,} with the largest scores were kept."]
    said += [sentence for make in (_concentration, _perturbation, _stability, _pruning, _super) if (sentence := make(run))]
    return " ".join(said)


def _concentration(run: SensitivityRun) -> str:
    rows = run.stats["tensors"]
    component_of = {row["name"]: row["component"] for row in rows}
    chosen = Counter(component_of[row["name"]] for row in run.top)
    if not chosen:
        return ""
    name, count = chosen.most_common(1)[0]
    share = sum(row["n"] for row in rows if row["component"] == name) / sum(row["n"] for row in rows)
    return f"{name} holds {percent(count / len(run.top))} of them and {percent(share)} of the weights."


def _perturbation(run: SensitivityRun) -> str:
    part = run.stats.get("perturbation")
    if not part:
        return ""
    said = []
    for selection in dict.fromkeys(row["selection"] for row in part["runs"]):
        rows = [row for row in part["runs"] if row["selection"] == selection and row["ratio"] is not None]
        if not rows:
            continue
        ratios, name = [row["ratio"] for row in rows], SELECTIONS.get(selection, (selection,))[0]
        times = f"{number(ratios[0])}{interval(rows[0]['ci'], ' (95 % CI ', ')')}" if len(rows) == 1 else f"{number(min(ratios))} to {number(max(ratios))} ({len(rows)} seeds)"
        said.append(f"{name} by {times}")
    n = run.manifest["text"]["n_windows"]
    if not said:
        return "The perturbation gave no finite perplexity."
    return f"Perturbed ({operation(part)}), they multiply perplexity: {'; '.join(said)}. The baseline is {number(part['baseline']['perplexity'])} over {n:,} windows."


def _stability(run: SensitivityRun) -> str:
    part, said = run.stats.get("stability"), []
    for kind, what in (("seed", "seeds"), ("sample", "samples")):
        overlaps = [pair["jaccard"][max(pair["jaccard"], key=int)] for pair in (part or {"pairs": []})["pairs"] if pair["kind"] == kind and pair["jaccard"]]
        known = [each for each in overlaps if each is not None]
        if known:
            span = f"{min(known):.2f}" if len(known) == 1 else f"{min(known):.2f} to {max(known):.2f}"
            said.append(f"of other {what} {span} ({len(known)} pair{'s' if len(known) > 1 else ''})")
    return f"Jaccard overlap of the top k at the largest k with rankings {', '.join(said)}." if said else ""


def _pruning(run: SensitivityRun) -> str:
    rows = [row for row in (run.stats.get("pruning") or {"rows": []})["rows"] if row["ratio"] is not None and row["sparsity"] is not None]
    if not rows:
        return ""
    last = max(rows, key=lambda row: row["sparsity"])
    return f"Pruned to {percent(last['sparsity'])} zeros, perplexity is {number(last['ratio'])} times the baseline's{interval(last['ci'], ' (95 % CI ', ')')}."


def _super(run: SensitivityRun) -> str:
    part = run.stats.get("super_weights")
    if not part:
        return ""
    confirmed = [each for each in part["candidates"] if each["status"] == "confirmed"]
    if not confirmed:
        return f"Of {len(part['candidates'])} candidates for super weights, none was confirmed by ablation."
    worst = max(confirmed, key=lambda each: each["ratio"] or 0.0)
    random = (part.get("random") or {}).get("worst_ratio")
    beside = f"; the worst of {part['random']['n']:,} random weights by {number(random)}" if random else ""
    return (f"{len(confirmed)} super weight{'s were' if len(confirmed) > 1 else ' was'} confirmed by ablation: {worst['name']} [{worst['row']}, {worst['column']}] set to 0 "
            f"multiplies perplexity by {number(worst['ratio'])}{beside}.")  # fmt: skip


CAPTIONS = {
    "sensitivity_distribution": "Scores above 0 by component (left), and the share of each layer's weights above a score (right). The lowest in a thousand is cut off.",
    "layer_comparison": "Mean and largest score of every layer, mean by component, and the number of top weights by layer and component.",
    "sensitivity_heatmap": "Mean score and number of top weights of every matrix. Hatched: there is no such matrix, or it has no score above 0.",
    "perturbation_effects": "Perplexity after the perturbation over the baseline's, on the same tokens. Bars: 95 % intervals, bootstrap over windows. Dashed: the baseline.",
    "stability_analysis": "Overlap of top-k sets of two rankings, one line a pair (left), and Spearman's correlation over the weights that either kept (right).",
    "pruning": "Perplexity over the baseline's (left; bars: 95 % intervals, bootstrap over windows), and relative L2 distance of each layer's output from before (right).",
    "gradient_flow": "Frobenius norm of the loss's gradient for every matrix, by layer.",
    "super_weights": "Spikes of the candidates (left), and perplexity with one weight set to 0 over the baseline's (right; bars: 95 % intervals; dashed: the baseline).",
}


def caption(run: SensitivityRun, name: str) -> str:
    text = run.manifest["text"]
    n = {"sensitivity_distribution": f"n = {sum(row['n'] for row in run.stats['tensors']):,} weights", "layer_comparison": f"n = {len(run.stats['tensors']):,} matrices",
         "sensitivity_heatmap": f"n = {len(run.stats['tensors']):,} matrices, {len(run.top):,} top weights",
         "stability_analysis": f"n = {len((run.stats.get('stability') or {'pairs': []})['pairs'])} pairs",
         "super_weights": f"n = {len((run.stats.get('super_weights') or {'candidates': []})['candidates'])} candidates"}  # fmt: skip
    windows = f"n = {text['n_windows']:,} windows, {text['n_tokens']:,} tokens"
    return f"{printable(run.label)}. {CAPTIONS[name]} {n.get(name, windows)}."


def facts(run: SensitivityRun) -> Rows:
    """What was run, as name and value."""
    manifest, model, text, spec = run.manifest, run.manifest["model"], run.manifest["text"], run.manifest["spec"]
    metric = run.stats["metric"]
    rows = [
        ["Model", f"{model['name']} ({model['architecture']}, {model['n_layers']} layers, {whole(model['n_params'])} parameters, {model.get('quantization') or 'unquantized'})"],
        ["Engine", f"{model['engine']}, {model.get('engine_version', '')}"],
        ["Identity", str(model.get("identity", ""))],
        ["Text", f"{text['name']}: {text['n_windows']:,} windows of at most {text['window']:,} tokens, {text['n_tokens']:,} tokens; SHA-256 {text['sha256'][:16]}\u2026"],
        ["Metric", f"{metric}{f': {SCORES[metric]}' if metric in SCORES else ''}; {run.stats['mode']}, k = {spec.get('topk')}"],
        ["Perturbation", f"{spec.get('perturb')} (scale {spec.get('perturb_scale')}); controls {', '.join(map(str, spec.get('controls') or ())) or 'none'}"],
        ["Seeds", ", ".join(map(str, spec.get("seeds") or ())) or "none"],
        ["Packages", ", ".join(f"{name} {version}" for name, version in (manifest.get("packages") or {}).items())],
        ["Seconds", ", ".join(f"{stage} {value:.1f}" for stage, value in (manifest.get("seconds") or {}).items() if isinstance(value, (int, float)))],
        ["Layerscope", f"{manifest.get('layerscope', '')}; run {run.id}, {manifest['created']}"],
    ]
    return [row for row in rows if row[1].strip(" ,")]


def command(run: SensitivityRun) -> str:
    """How to repeat the run: its command line, or what the page asked for."""
    return shlex.join(run.manifest["command"]) if run.manifest["command"] else json.dumps(run.manifest["spec"], ensure_ascii=False)


def top_rows(run: SensitivityRun) -> tuple[Rows, str]:
    """The table of the largest scores with its heading first, and what is to be said of it."""
    rows = sorted(run.top, key=lambda row: -(row["score"] if row["score"] is not None else -1.0))[:TOP_ROWS]
    experts = any(row["expert"] is not None for row in rows)
    head = ["#", "layer", "component", *(["expert"] if experts else []), "row", "column", "value", "score", "percentile", "rank in scope"]
    body = [[str(i), place(row["layer"]), row["component"], *([place(row["expert"])] if experts else []), place(row["row"]), place(row["column"]), value(row["value"]),
             value(row["score"]), f"{row['percentile']:.4f}" if row["percentile"] is not None else NONE, f"{row['rank']:,}"] for i, row in enumerate(rows, 1)]  # fmt: skip
    return [head, *body], f"The {len(rows)} largest scores of all {len(run.top):,} that were kept. Percentile: share of the scores of its scope below it, in percent."


def perturbation_rows(part: dict[str, Any]) -> Rows:
    base = part["baseline"]
    rows = [["weights", "seed", "n", "changed", "not repr.", "perplexity", "ratio", "95 % CI of the ratio"],
            ["baseline", NONE, "0", "0", "0", number(base["perplexity"]), "1", NONE]]  # fmt: skip
    for row in part["runs"]:
        rows.append([SELECTIONS.get(row["selection"], (row["selection"],))[0], place(row["seed"]), whole(row["n"]), whole(row["changed"]), whole(row["not_representable"]),
                     ratio(row["perplexity"]), ratio(row["ratio"]), interval(row["ci"]) or NONE])  # fmt: skip
    return rows


def stability_rows(part: dict[str, Any]) -> Rows:
    ks = sorted({int(k) for pair in part["pairs"] for k in pair["jaccard"]})
    ks = ks if len(ks) <= 6 else [ks[round(i * (len(ks) - 1) / 5)] for i in range(6)]
    rows = [["between", "a", "b", *(f"Jaccard, k={k:,}" for k in ks), "Spearman"]]
    for pair in part["pairs"][:PAIR_ROWS]:
        numbers = [*(pair["jaccard"].get(str(k)) for k in ks), pair["spearman"]]
        rows.append([pair["kind"], pair["a"], pair["b"], *(NONE if each is None else f"{each:.3f}" for each in numbers)])
    return rows


def pruning_rows(part: dict[str, Any]) -> Rows:
    rows = [["sparsity asked", "zeros reached", "perplexity", "ratio", "95 % CI of the ratio", "divergence, last layer", "largest divergence"]]
    for row in part["rows"]:
        known = [(each, layer) for layer, each in enumerate(row["divergence"]) if each is not None]
        last = value(row["divergence"][-1]) if row["divergence"] else NONE
        most = f"{value(max(known)[0])} (layer {max(known)[1]})" if known else NONE
        rows.append([percent(row["sparsity"]), percent(row["zeros"]), ratio(row["perplexity"]), ratio(row["ratio"]), interval(row["ci"]) or NONE, last, most])
    return rows


def super_rows(part: dict[str, Any]) -> Rows:
    rows = [["status", "layer", "matrix", "row", "column", "value", "rank of |w|", "spike in", "spike out", "persistence", "ratio", "95 % CI"]]
    for each in part["candidates"][:PAIR_ROWS]:
        matrix = each["name"].removeprefix(f"blocks.{each['layer']}.") + (f", expert {each['expert']}" if each["expert"] is not None else "")
        rows.append([each["status"], str(each["layer"]), matrix, str(each["row"]), str(each["column"]), value(each["value"]), whole(each["magnitude_rank"]),
                     value(each["input_spike"]), value(each["output_spike"]), percent(each["persistence"]), ratio(each["ratio"]), interval(each["ci"]) or NONE])  # fmt: skip
    return rows


# -- numbers -------------------------------------------------------------------------------------------------------------------


def interval(ci: Sequence[float | None] | None, before: str = "", after: str = "") -> str:
    return "" if not ci or None in ci else f"{before}{number(ci[0])} to {number(ci[1])}{after}"


def ratio(of: float | None) -> str:
    return NONE if of is None else number(of)


def value(of: float | None) -> str:
    return NONE if of is None else f"{of:.4g}"


def whole(of: int | None) -> str:
    return NONE if of is None else f"{of:,}"


def place(of: int | None) -> str:
    return NONE if of is None else str(of)


def percent(of: float | None) -> str:
    return NONE if of is None else f"{100 * of:.3g} %"


def p_value(of: float | None) -> str:
    return NONE if of is None else "< 1e-12" if of < 1e-12 else f"{of:.3g}"

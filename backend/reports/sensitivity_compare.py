"""Several sensitivity runs set side by side: what agrees, what differs, and how sure that is. docs/sensitivity_compare.md has the schema."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from backend.analysis.sensitivity_profiles import resampled
from backend.analysis.significance import CORRECTIONS, MONTE_CARLO, agreement, corrected, effect, kruskal, overlap, rank_p, shares
from backend.errors import LayerscopeError
from backend.reports.sensitivity_check import checked, ranked
from backend.reports.sensitivity_run import MANIFEST, SensitivityRun, open_run

SCHEMA = "layerscope.sensitivity-compare/1"
ALPHA = 0.05
MAX_RUNS = 50
_KS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000)
# What each family of tests asks, and the test. Corrections are made within a family, over all runs.
FAMILIES = {
    "top overlap": "more weights in both top-k sets (all k that both kept) than if both were drawn at random, scope by scope; exact, sum of hypergeometric counts, one-sided",
    "kept scores": "scores of the weights that both runs kept; Spearman",
    "profiles": "mean scores of layer x component; Spearman",
    "depth trend": "mean score of a layer against its place; Spearman",
    "components": "counts of top weights by component against the share of weights, scope by scope; chi-square, Monte Carlo",
    "each component": "the same for one component; binomial counts, Monte Carlo, two-sided",
    "top against controls": "log ratio of perplexity, top k minus control; z test on bootstrap intervals over the same windows, two-sided",
    "rank among controls": "top k hurts more than random draws do; exact Monte Carlo rank over seeds, one-sided",
    "top k between runs": "log ratio of perplexity of top k, one run minus another on the same text; z test on bootstrap intervals, two-sided",
    "metrics of a model": "|w| or relative depth of the kept weights across metrics; Kruskal-Wallis",
}


class _Tests:
    """All tests of a comparison, in the order in which they were made."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, family: str, runs: Sequence[int], what: str, n: int, statistic: tuple[str, float], size: tuple[str, float], p: float) -> int | None:
        """The place of the test; None if it could not be made."""
        if not math.isfinite(p):
            return None
        self.rows.append({"family": family, "runs": list(runs), "what": what, "n": n, "statistic_name": statistic[0], "statistic": _number(statistic[1]), "effect_name": size[0],
                          "effect": _number(size[1]), "p": p})  # fmt: skip
        return len(self.rows) - 1

    def corrected(self, method: str) -> list[dict[str, Any]]:
        for family in FAMILIES:
            mine = [row for row in self.rows if row["family"] == family]
            for row, p in zip(mine, corrected([row["p"] for row in mine], method), strict=True):
                row.update(p_adjusted=float(p), significant=bool(p < ALPHA))
        return self.rows


def compare_runs(runs: Sequence[SensitivityRun], correction: str = "holm") -> dict[str, Any]:
    """The comparison of at least two runs, as docs/sensitivity_compare.md has it.

    Raises LayerscopeError for fewer than two runs, more than MAX_RUNS, a run that is there twice, an unknown correction, and a damaged run.
    """
    if not 2 <= len(runs) <= MAX_RUNS:
        raise LayerscopeError(f"A comparison is of 2 to {MAX_RUNS} runs, and {'there is only one' if len(runs) == 1 else f'here are {len(runs)}'}.")
    if correction not in CORRECTIONS:
        raise LayerscopeError(f"The correction {correction!r} is not one of {', '.join(CORRECTIONS)}.")
    for run in runs:
        checked(run)
    if twice := next((run for i, run in enumerate(runs) if any(other.id == run.id for other in runs[:i])), None):
        raise LayerscopeError(f"The run {twice.id[:40]} ({twice.folder}) is there twice; a run agrees with itself.")
    tests, notes = _Tests(), list[str]()
    found = {
        "runs": [_about(i, run) for i, run in enumerate(runs)],
        "agreement": [_pair(i, j, runs[i], runs[j], tests, notes) for i, j in combinations(range(len(runs)), 2)],
        "layers": [_layers(i, run, tests) for i, run in enumerate(runs)],
        "components": [_components(i, run, tests) for i, run in enumerate(runs)],
        "controls": [row for i, run in enumerate(runs) for row in _controls(i, run, tests)],
        "between": [row for i, j in combinations(range(len(runs)), 2) if (row := _between(i, j, runs[i], runs[j], tests))],
        "metrics": _metrics(runs, tests, notes),
    }
    rows = tests.corrected(correction)
    counts = Counter(row["family"] for row in rows)
    return {
        "schema": SCHEMA, "alpha": ALPHA,
        "correction": {"method": CORRECTIONS[correction], "over": "each family of tests, all runs together",
                       "families": {name: {"n_tests": counts[name], "question": asks} for name, asks in FAMILIES.items() if counts[name]}},
        **found, "tests": rows, "notes": [*_LIMITS, *dict.fromkeys(notes)],
    }  # fmt: skip


_LIMITS = (
    "Tensors of a layer, and layers of a model, are not independent of each other: p-values of profiles and trends are smaller than they would be if that were modelled.",
    "Kept scores are a selection from above: their correlation is lower than that of all scores.",
    f"Monte Carlo tests draw {MONTE_CARLO:,} times with seed 0; their smallest p-value is {1 / (MONTE_CARLO + 1):g}.",
    "Intervals of perplexity ratios sample windows of one text; they say nothing of other texts.",
)


def _about(i: int, run: SensitivityRun) -> dict[str, Any]:
    model, text, stats = run.manifest["model"], run.manifest["text"], run.stats
    return {
        "run": i, "id": run.id, "label": run.label, "model": model["name"], "architecture": model["architecture"], "n_layers": model["n_layers"], "metric": stats["metric"],
        "mode": stats["mode"], "n_weights": sum(row["n"] for row in stats["tensors"]), "n_tensors": len(stats["tensors"]), "n_top": len(run.top), "text": text["sha256"],
        "n_windows": text["n_windows"],
    }  # fmt: skip


# -- two runs ------------------------------------------------------------------------------------------------------------------


def _pair(i: int, j: int, a: SensitivityRun, b: SensitivityRun, tests: _Tests, notes: list[str]) -> dict[str, Any]:
    one_model = a.manifest["model"]["name"] == b.manifest["model"]["name"]
    one_text = all(a.manifest["text"][key] == b.manifest["text"][key] for key in ("sha256", "n_windows", "window"))
    sizes, others = ({row["name"]: row["n"] for row in run.stats["tensors"]} for run in (a, b))
    shared = {name: n for name, n in sizes.items() if name in others}
    # not the architecture: engines name it differently (a mistral is a llama to llama.cpp), and a quantized variant is worth comparing
    same_depth = a.manifest["model"]["n_layers"] == b.manifest["model"]["n_layers"]
    alike = same_depth and bool(shared) and all(others[name] == n for name, n in shared.items())
    weights = None
    if not alike:
        notes.append(f"Weights of {a.label} and {b.label} are not compared one by one: the models differ in depth, or in the sizes of their tensors.")
    elif a.stats["mode"] != b.stats["mode"]:
        notes.append(f"Weights of {a.label} and {b.label} are not compared one by one: one is ranked {a.stats['mode']}, the other {b.stats['mode']}.")
    else:
        weights = _weights(i, j, a, b, shared, tests)
    return {"runs": [i, j], "one_model": one_model, "one_text": one_text, "weights": weights, "profile": _profiles(i, j, a, b, shared if alike else {}, tests)}


def _weights(i: int, j: int, a: SensitivityRun, b: SensitivityRun, shared: dict[str, int], tests: _Tests) -> dict[str, Any]:
    """Overlap of the top-k sets at several k, and the agreement of the scores of what both kept."""
    scope_of = _scope(a)
    population: Counter[str] = Counter()
    for row in a.stats["tensors"]:
        population[scope_of(row)] += shared.get(row["name"], 0)
    kept = [{(row["name"], row["expert"], row["row"], row["column"]): row for row in run.top if row["name"] in shared} for run in (a, b)]
    deepest = min((max((row["rank"] for row in each.values()), default=0) for each in kept), default=0)
    rows = []
    for k in [*(k for k in _KS if k < deepest), *([deepest] if deepest else [])]:
        sets = [{key for key, row in each.items() if row["rank"] <= k} for each in kept]
        drawn = [Counter(scope_of(each[key]) for key in chosen) for each, chosen in zip(kept, sets, strict=True)]
        scopes = [scope for scope, n in population.items() if n]
        of_a, of_b = ([each[scope] for scope in scopes] for each in drawn)
        found = overlap([population[scope] for scope in scopes], of_a, of_b, len(sets[0] & sets[1]))
        one = ("top overlap", (i, j), f"top {k:,} of each scope", found.n_a + found.n_b, ("weights in both", found.both), ("Jaccard", found.jaccard), found.p)
        test = tests.add(*one) if k == deepest else None  # the sets lie in each other: one test a pair
        rows.append({"k": k, "n_a": found.n_a, "n_b": found.n_b, "both": found.both, "expected": found.expected, "jaccard": _number(found.jaccard), "test": test})
    both = [key for key in kept[0] if key in kept[1]]
    scores = agreement(*(np.array([each[key]["score"] for key in both], dtype=float) for each in kept))
    test = tests.add("kept scores", (i, j), "scores of the weights in both", scores.n, ("rho", scores.rho), ("rho", scores.rho), scores.p)
    return {"n_tensors": len(shared), "n_weights": sum(shared.values()), "overlap": rows, "scores": _agreement(scores, test)}


def _profiles(i: int, j: int, a: SensitivityRun, b: SensitivityRun, shared: dict[str, int], tests: _Tests) -> dict[str, Any]:
    """Tensor by tensor where two runs have the same, and component by component at relative depths of the shallower model where not."""
    if shared:
        means = [{row["name"]: row["mean"] for row in run.stats["tensors"]} for run in (a, b)]
        found, over = agreement(*(np.array([each[name] for name in shared], dtype=float) for each in means)), "tensors"
    else:
        tables = [ranked(run) for run in (a, b)]
        common = [name for name in tables[0].components if name in tables[1].components]
        depths = min(len(each.layers) for each in tables)
        rows = [resampled(each.mean[[each.components.index(name) for name in common]], depths).reshape(-1) if common and depths else np.zeros(0) for each in tables]
        found, over = agreement(*rows), f"{len(common)} components at {depths} relative depths"
    test = tests.add("profiles", (i, j), f"mean scores over {over}", found.n, ("rho", found.rho), ("rho", found.rho), found.p)
    return {"over": over, **_agreement(found, test)}


def _agreement(found: Any, test: int | None) -> dict[str, Any]:
    return {"n": found.n, "spearman": _number(found.rho), "ci": _ends(found.ci), "kendall": _number(found.tau), "test": test}


def _between(i: int, j: int, a: SensitivityRun, b: SensitivityRun, tests: _Tests) -> dict[str, Any] | None:
    """Which run's top weights the model hangs on more: one model, one text, one perturbation of as many weights."""
    first, second = (run.stats.get("perturbation") for run in (a, b))
    if not first or not second or a.manifest["model"] != b.manifest["model"] or a.manifest["text"] != b.manifest["text"]:
        return None
    same = all(first.get(key) == second.get(key) for key in ("op", "scale", "bit"))
    groups = [_ratios(part, "top_k") for part in (first, second)]
    sizes = [{row["n"] for row in part["runs"] if row["selection"] == "top_k"} for part in (first, second)]
    if not same or not all(groups) or sizes[0] != sizes[1]:
        return None
    found = effect(*groups)
    n = a.manifest["text"]["n_windows"]
    test = tests.add("top k between runs", (i, j), "top k of one run against top k of the other", n, ("z", found.z), ("ratio of ratios", math.exp(found.difference)), found.p)
    return {"runs": [i, j], "n_windows": n, "ratio_of_ratios": math.exp(found.difference), "ci": _ends(tuple(map(math.exp, found.ci))), "z": _number(found.z), "test": test}


# -- one run -------------------------------------------------------------------------------------------------------------------


def _layers(i: int, run: SensitivityRun, tests: _Tests) -> dict[str, Any]:
    found = ranked(run)
    total, top = found.layer_total, found.top.sum(axis=0)
    trend = agreement(found.layers, found.layer_mean)
    test = tests.add("depth trend", (i,), "mean score of a layer against its place", trend.n, ("rho", trend.rho), ("rho", trend.rho), trend.p)
    return {
        "run": i, "layers": list(found.layers), "mean_score": [_number(each) for each in found.layer_mean],
        "share_of_score": [_number(each) for each in (total / total.sum() if total.sum() > 0 else np.full(len(total), np.nan))],
        "share_of_top": [_number(each) for each in (top / top.sum() if top.sum() else np.full(len(top), np.nan))], "trend": _agreement(trend, test),
    }  # fmt: skip


def _components(i: int, run: SensitivityRun, tests: _Tests) -> dict[str, Any]:
    rows, scope_of = run.stats["tensors"], _scope(run)
    names, scopes = list(dict.fromkeys(row["component"] for row in rows)), list(dict.fromkeys(map(scope_of, rows)))
    component_of = {row["name"]: row["component"] for row in rows}
    sizes = np.zeros((len(scopes), len(names)))
    for row in rows:
        sizes[scopes.index(scope_of(row)), names.index(row["component"])] += row["n"]
    taken, chosen = Counter(map(scope_of, run.top)), Counter(component_of[row["name"]] for row in run.top)
    observed = [chosen[name] for name in names]
    found = shares(observed, [taken[scope] for scope in scopes], sizes) if run.top else None
    test = tests.add("components", (i,), "all components", found.n, ("chi-square", found.statistic), ("Cohen's w", found.effect), found.p_all) if found and len(names) > 1 else None
    listed = []
    for at, name in enumerate(names):
        expected = float(found.expected[at]) if found else 0.0
        enrichment = observed[at] / expected if expected else math.nan
        one = None
        if found and test is not None:
            one = tests.add("each component", (i,), name, found.n, ("top weights", observed[at]), ("observed / expected", enrichment), float(found.p[at]))
        listed.append({"component": name, "n_weights": int(sizes[:, at].sum()), "share_of_weights": _number(sizes[:, at].sum() / sizes.sum()), "n_top": observed[at],
                       "share_of_top": observed[at] / len(run.top) if run.top else None, "expected": expected, "enrichment": _number(enrichment), "test": one})  # fmt: skip
    return {"run": i, "components": listed, "n_top": len(run.top), "test": test}


def _controls(i: int, run: SensitivityRun, tests: _Tests) -> list[dict[str, Any]]:
    part, found = run.stats.get("perturbation") or {"runs": []}, []
    top = _ratios(part, "top_k")
    for control in dict.fromkeys(row["selection"] for row in part["runs"] if row["selection"] != "top_k") if top else ():
        others, n = _ratios(part, control), run.manifest["text"]["n_windows"]
        if not others:
            continue
        each = effect(top, others)
        test = tests.add("top against controls", (i,), f"top k against {control}", n, ("z", each.z), ("ratio of ratios", math.exp(each.difference)), each.p)
        rank = None
        if control.startswith("random"):
            p = rank_p(float(np.exp(np.mean(np.log([row[0] for row in top])))), [row[0] for row in others])
            rank = tests.add("rank among controls", (i,), f"top k among {len(others)} draws", len(others) + 1, ("draws at least as bad", p * (len(others) + 1) - 1), ("p", p), p)
        found.append({"run": i, "control": control, "n_top": len(top), "n_control": len(others), "n_windows": n, "ratio_of_ratios": math.exp(each.difference),
                      "ci": _ends(tuple(map(math.exp, each.ci))), "z": _number(each.z), "test": test, "rank_test": rank})  # fmt: skip
    return found


def _ratios(part: dict[str, Any], selection: str) -> list[tuple[float, float, float]]:
    """(ratio, low, high) of the runs of a selection that have all three, above 0."""
    rows = [(row["ratio"], *(row["ci"] or (None, None))) for row in part["runs"] if row["selection"] == selection]
    return [row for row in rows if all(each is not None and each > 0 for each in row)]


def _metrics(runs: Sequence[SensitivityRun], tests: _Tests, notes: list[str]) -> list[dict[str, Any]]:
    """Whether the metrics of one model choose weights of another size, or at another depth."""
    models: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        models.setdefault(run.manifest["model"]["name"], []).append(i)
    found = []
    for name, places in models.items():
        metrics = list(dict.fromkeys(runs[i].stats["metric"] for i in places))
        if len(metrics) < 2:
            continue
        chosen = [next(i for i in places if runs[i].stats["metric"] == metric) for metric in metrics]
        for what, value in _MEASURES.items():
            if what == "relative depth" and any(runs[i].stats["mode"] != "global" for i in chosen):
                notes.append(f"Depths of the top weights of {name} are not compared: with the mode per_layer every layer has as many.")
                continue
            groups = [[value(row, runs[i]) for row in runs[i].top if row["value"] is not None and row["layer"] is not None] for i in chosen]
            statistic, p, epsilon, n = kruskal(groups)
            test = tests.add("metrics of a model", chosen, f"{what} of the kept weights", n, ("H", statistic), ("epsilon squared", epsilon), p)
            medians = [_number(float(np.median(each))) if each else None for each in groups]
            found.append({"model": name, "runs": chosen, "what": what, "medians": medians, "n": [len(each) for each in groups], "epsilon_squared": _number(epsilon), "test": test})
    if found:
        notes.append("A weight that several metrics keep is in each of their groups: Kruskal-Wallis takes groups as independent.")
    return found


_MEASURES: dict[str, Callable[[dict[str, Any], SensitivityRun], float]] = {
    "|w|": lambda row, _: abs(row["value"]),
    "relative depth": lambda row, run: (row["layer"] + 0.5) / max(run.manifest["model"]["n_layers"], 1),
}


def _scope(run: SensitivityRun) -> Callable[[dict[str, Any]], str]:
    return (lambda _: "global") if run.stats["mode"] == "global" else (lambda row: str(row["layer"]))


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _ends(ci: tuple[float, ...]) -> list[float] | None:
    return list(map(float, ci)) if all(map(math.isfinite, ci)) else None


# -- folders -------------------------------------------------------------------------------------------------------------------


def open_runs(folders: Sequence[Path]) -> list[SensitivityRun]:
    """The runs in the folders, each once: a folder that is no run stands for the runs right inside it.

    Raises LayerscopeError for a folder that is not there or holds none, and for a run that cannot be read.
    """
    found: dict[Path, SensitivityRun] = {}
    for folder in folders:
        if not folder.is_dir():
            raise LayerscopeError(f"There is no folder {folder}.")
        inside = [folder] if (folder / MANIFEST).is_file() else sorted(each.parent for each in folder.glob(f"*/{MANIFEST}"))
        if not inside:
            raise LayerscopeError(f"{folder} holds no sensitivity run, nor does a folder in it: there is no {MANIFEST}.")
        if len(found) + len(inside) > MAX_RUNS:
            raise LayerscopeError(f"{folder} brings the runs to {len(found) + len(inside)}, and {MAX_RUNS} is the limit.")
        found |= {each.resolve(): checked(open_run(each)) for each in inside}
    return list(found.values())

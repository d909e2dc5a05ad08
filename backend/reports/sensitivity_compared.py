"""The comparison of runs (backend.reports.sensitivity_compare) as tables of a report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from backend.reports.sensitivity_text import NONE, Rows, interval, p_value, percent, ratio, value

# heading, remark, rows (the heading row first), rows that are significant, columns of words
Compared = tuple[str, str, Rows, list[int], tuple[int, ...]]


def comparison_tables(compared: dict[str, Any]) -> Iterator[Compared]:
    """The tables that have rows."""
    for make in (_overlap, _profiles, _components, _controls, _between, _trends, _metrics):
        heading, remark, rows, tests, left = make(compared)
        if len(rows) > 1:
            yield heading, remark, rows, [i for i, at in enumerate(tests, 1) if at is not None and compared["tests"][at]["significant"]], left


def _name(runs: list[int]) -> str:
    return " and ".join(str(each + 1) for each in runs)


def _p(compared: dict[str, Any], at: int | None) -> list[str]:
    test = compared["tests"][at] if at is not None else None
    return [p_value(test["p"]), p_value(test["p_adjusted"])] if test else [NONE, NONE]


def _overlap(compared: dict[str, Any]) -> tuple[str, str, Rows, list[int | None], tuple[int, ...]]:
    rows, tests = [["runs", "k of each scope", "in both", "of", "by chance", "Jaccard", "p", "p*"]], []
    for pair in compared["agreement"]:
        for each in (pair["weights"] or {"overlap": []})["overlap"]:
            rows.append([_name(pair["runs"]), f"{each['k']:,}", f"{each['both']:,}", f"{each['n_a']:,} and {each['n_b']:,}", value(each["expected"]),
                         "\u2013" if each["jaccard"] is None else f"{each['jaccard']:.3f}", *_p(compared, each["test"])])  # fmt: skip
            tests.append(each["test"])
    return "Overlap of the top weights", "By chance: expected if both were drawn at random, scope by scope. One test a pair, at the largest k.", rows, tests, (0,)


def _profiles(compared: dict[str, Any]) -> tuple[str, str, Rows, list[int | None], tuple[int, ...]]:
    rows, tests = [["runs", "over", "n", "Spearman", "95 % CI", "Kendall", "p", "p*"]], []
    for pair in compared["agreement"]:
        for over, each in (("kept weights", (pair["weights"] or {}).get("scores")), (pair["profile"]["over"], pair["profile"])):
            if each and each["spearman"] is not None:
                rows.append([_name(pair["runs"]), over, f"{each['n']:,}", f"{each['spearman']:.3f}", _signed(each["ci"]), f"{each['kendall']:.3f}", *_p(compared, each["test"])])
                tests.append(each["test"])
    return ("Rank agreement", "Of the scores of the weights that both runs kept, and of the mean scores of matrices (layer x component). p: of Spearman's rho.",
            rows, tests, (0, 1))  # fmt: skip


def _components(compared: dict[str, Any]) -> tuple[str, str, Rows, list[int | None], tuple[int, ...]]:
    rows, tests = [["run", "component", "of the weights", "of the top", "top weights", "expected", "observed / expected", "p", "p*"]], []
    for run in compared["components"]:
        for each in run["components"]:
            rows.append([str(run["run"] + 1), each["component"], percent(each["share_of_weights"]), percent(each["share_of_top"]), f"{each['n_top']:,}", value(each["expected"]),
                         "\u2013" if each["enrichment"] is None else f"{each['enrichment']:.2f}", *_p(compared, each["test"])])  # fmt: skip
            tests.append(each["test"])
        if run["test"] is not None:
            test = compared["tests"][run["test"]]
            rows.append([str(run["run"] + 1), "all together", "", "", f"{run['n_top']:,}", "", f"\u03c7\u00b2 = {test['statistic']:.4g}", *_p(compared, run["test"])])
            tests.append(run["test"])
    return ("Parameter types of the top weights", "Expected: top weights drawn at random from their scope. Monte Carlo tests; top weights of one matrix are taken as independent.",
            rows, tests, (1,))  # fmt: skip


def _controls(compared: dict[str, Any]) -> tuple[str, str, Rows, list[int | None], tuple[int, ...]]:
    rows, tests = [["run", "control", "runs of top", "runs of control", "windows", "ratio of ratios", "95 % CI", "z", "p", "p*", "p of rank", "p* of rank"]], []
    for each in compared["controls"]:
        rows.append([str(each["run"] + 1), each["control"], str(each["n_top"]), str(each["n_control"]), f"{each['n_windows']:,}", ratio(each["ratio_of_ratios"]),
                     interval(each["ci"]) or NONE, value(each["z"]), *_p(compared, each["test"]), *_p(compared, each["rank_test"])])  # fmt: skip
        tests.append(each["test"])
    return ("Top weights against controls", "Ratio of ratios: perplexity after perturbing top k over that after the control. z: of its logarithm, from bootstrap intervals over "
            "the same windows. Rank: top k among the random draws; with m draws its p is at least 1 / (m + 1).", rows, tests, (1,))  # fmt: skip


def _between(compared: dict[str, Any]) -> tuple[str, str, Rows, list[int | None], tuple[int, ...]]:
    rows, tests = [["runs", "windows", "ratio of ratios", "95 % CI", "z", "p", "p*"]], []
    for each in compared["between"]:
        rows.append([_name(each["runs"]), f"{each['n_windows']:,}", ratio(each["ratio_of_ratios"]), interval(each["ci"]) or NONE, value(each["z"]), *_p(compared, each["test"])])
        tests.append(each["test"])
    return "Top weights of one run against another's", "Above 1: the first run's top weights hurt more. One model, one text, the same perturbation of as many.", rows, tests, (0,)


def _trends(compared: dict[str, Any]) -> tuple[str, str, Rows, list[int | None], tuple[int, ...]]:
    rows, tests = [["run", "layers", "Spearman", "95 % CI", "largest mean score", "smallest mean score", "p", "p*"]], []
    for each in compared["layers"]:
        trend, known = each["trend"], [(score, layer) for layer, score in zip(each["layers"], each["mean_score"], strict=True) if score is not None]
        if trend["spearman"] is not None:
            most, least = (f"{value(score)} (layer {layer})" for score, layer in (max(known), min(known)))
            rows.append([str(each["run"] + 1), str(trend["n"]), f"{trend['spearman']:.3f}", _signed(trend["ci"]), most, least, *_p(compared, trend["test"])])
            tests.append(trend["test"])
    return "Layer profiles", "Spearman: of a layer's place and the mean score of its weights.", rows, tests, ()


def _metrics(compared: dict[str, Any]) -> tuple[str, str, Rows, list[int | None], tuple[int, ...]]:
    rows, tests = [["model", "of the kept weights", "runs", "medians", "n", "epsilon squared", "p", "p*"]], []
    for each in compared["metrics"]:
        medians, sizes = ", ".join(value(median) for median in each["medians"]), ", ".join(f"{n:,}" for n in each["n"])
        rows.append([each["model"], each["what"], _name(each["runs"]), medians, sizes, value(each["epsilon_squared"]), *_p(compared, each["test"])])
        tests.append(each["test"])
    return "Metrics of one model", "Kruskal-Wallis across metrics.", rows, tests, (0, 1)


def _signed(ci: list[float] | None) -> str:
    return NONE if ci is None else f"{ci[0]:.2f} to {ci[1]:.2f}"

"""The tables of a sensitivity run: the top weights (dash-ag-grid), effects, overlaps, super weights, and their files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dash_ag_grid as dag
from dash import dcc, html

from backend.reports.sensitivity_run import TOP_COLUMNS, SensitivityRun
from components.figures.sensitivity import KINDS, SELECTIONS
from components.sensitivity_values import number, weight_link

MOST_ROWS = 5000  # of the table; the file has all
_SHORT = "d3.format(params.value != 0 && Math.abs(params.value) < 0.001 ? '.3e' : '.5~g')(params.value)"
# field -> (title, width, tooltip)
_COLUMNS: dict[str, tuple[str, int, str]] = {
    "rank": ("Rank", 78, "1 is the best of its scope"),
    "scope": ("Scope", 84, "what was ranked together: the whole model, or a layer"),
    "layer": ("Layer", 78, "the layer of the tensor"),
    "component": ("Component", 150, "the tensor within its layer"),
    "expert": ("Expert", 82, "the expert, where there are any"),
    "row": ("Row", 84, "output of the matrix"),
    "column": ("Column", 92, "input of the matrix"),
    "value": ("Weight", 106, "the weight itself"),
    "score": ("Score", 106, "of the metric"),
    "percentile": ("Percentile", 112, "share of the scope's scores below it, in percent"),
}
STATUSES = {
    "confirmed": ("badge-ok", "found by its spikes, and setting it to 0 raises the loss many times as much as the worst random weight of its matrix."),
    "published": ("badge-accent", "found by its spikes and named in a publication for this model, but setting it to 0 does not matter so much here."),
    "found": ("badge-plain", "its activations spike, but setting it to 0 does not matter so much, and no publication names it."),
}


def top_grid(run: SensitivityRun) -> dag.AgGrid:
    """The best MOST_ROWS top weights, best of their scope first; a row that is chosen leads to its weight."""
    columns = [_column(field, *about) for field, about in _COLUMNS.items() if field != "expert" or any(row["expert"] is not None for row in run.top[:MOST_ROWS])]
    options = {
        "rowSelection": {"mode": "singleRow", "enableClickSelection": True, "checkboxes": False}, "rowHeight": 31, "headerHeight": 34, "tooltipShowDelay": 400,
        "animateRows": False, "cacheQuickFilter": True, "tabToNextCell": {"function": "false"},
    }  # fmt: skip
    return dag.AgGrid(id="sens-grid", columnDefs=columns, rowData=[_row(at, row) for at, row in _best(run)], getRowId="params.data.id", dashGridOptions=options,
                      defaultColDef={"sortable": True, "resizable": True, "filter": False, "flex": 1}, className="ls-grid", style={"height": 392, "width": "100%"})  # fmt: skip


def _best(run: SensitivityRun) -> Sequence[tuple[int, dict[str, Any]]]:
    """(place in the file, row), by rank and then by score: of a run layer by layer, the best of every layer come first."""
    return sorted(enumerate(run.top), key=lambda item: (item[1]["rank"] or 0, -(item[1]["score"] or 0)))[:MOST_ROWS]


def _column(field: str, title: str, width: int, about: str) -> dict[str, Any]:
    column: dict[str, Any] = {"field": field, "headerName": title, "minWidth": width, "headerTooltip": about}
    if field in ("scope", "component"):
        return column | ({"cellClass": "mono", "tooltipField": "name"} if field == "component" else {})
    shown = {"value": _SHORT, "score": _SHORT, "percentile": "d3.format('.4f')(params.value)"}.get(field, "d3.format(',d')(params.value)")
    return column | {"type": "numericColumn", "cellClass": "num", "valueFormatter": {"function": f"params.value == null ? '–' : {shown}"}}


def _row(at: int, row: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": str(at), "name": row["name"], **{field: row[field] for field in _COLUMNS}}


def top_csv(run: SensitivityRun) -> str:
    """All rows of top_weights.csv, as the run has them."""
    return to_csv(TOP_COLUMNS, ([row[name] for name in TOP_COLUMNS] for row in run.top))


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A text that a spreadsheet would run as a formula gets an apostrophe before it."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell for cell in row] for row in rows)
    return out.getvalue()


def _table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]], numeric_from: int = 1) -> html.Div:
    """A compact table. head: (title, what it means); cells from `numeric_from` on are numbers."""
    names = [html.Th(title, title=about or None, className="num" if i >= numeric_from else "") for i, (title, about) in enumerate(head)]
    body = [html.Tr([html.Td(cell, className="num nowrap" if i >= numeric_from else "nowrap" if len(row) < 9 else "") for i, cell in enumerate(row)]) for row in rows]
    return html.Div(html.Table([html.Thead(html.Tr(names)), html.Tbody(body)], className="ls-table compact"), className="table-scroll")


def _interval(ci: Sequence[float | None] | None) -> str:
    return f"{number(ci[0])} to {number(ci[1])}" if ci else "–"


def brackets(ci: Sequence[float | None] | None) -> str:
    return f"[{number(ci[0])}, {number(ci[1])}]" if ci else ""


def effect_table(found: Mapping[str, Any]) -> html.Div:
    """The baseline and every perturbed selection. found: `perturbation` of a run."""
    base = found["baseline"]
    head = (("Weights", ""), ("Perplexity", ""),
            ("Ratio", "perplexity over the baseline's, with its 95 % interval by bootstrap over windows"),
            ("Changed", "entries whose stored value really changed"), ("Not exact", "entries that the stored format could not represent as asked"),
            ("Others", "weights of the same quantized block that moved too"))  # fmt: skip
    rows = [["baseline", number(base["perplexity"]), "1", "–", "–", "–"]]
    for run in found["runs"]:
        label = SELECTIONS[run["selection"]] + ("" if run["seed"] is None else f", seed {run['seed']}")
        rows.append([label, number(run["perplexity"]), f"{number(run['ratio'])} {brackets(run['ci'])}", number(run["changed"], ",.0f"), number(run["not_representable"], ",.0f"),
                     number(run["n_others"], ",.0f")])  # fmt: skip
    return _table(head, rows)


def overlap_table(found: Mapping[str, Any]) -> html.Div:
    """Every pair of rankings. found: `stability` of a run."""
    ks = [k for k in found["ks"]][-4:]
    head = [("Changed", ""), ("A", ""), ("B", ""), *((f"k = {k:,}", "Jaccard overlap of the two top-k") for k in ks), ("Spearman", "over the union of the kept weights")]
    rows = [[KINDS[pair["kind"]].removeprefix("another "), pair["a"], pair["b"], *(number(pair["jaccard"].get(str(k)), ".3f") for k in ks), number(pair["spearman"], ".3f")]
            for pair in found["pairs"]]  # fmt: skip
    return _table(head, rows, 3)


def super_table(run: SensitivityRun) -> html.Div:
    """Candidates, those that matter most first; the place leads to the weight in its matrix."""
    head = (("Status", ""), ("Weight", ""), ("Value", ""), ("|w| rank", "of |w| in its matrix, 1 is the largest"),
            ("Input spike", "|x| at its column, in units of the run's threshold scale"),
            ("Output spike", "|y| at its row"), ("Persistence", "share of later layers whose residual stream has its largest |value| in this channel"),
            ("Ratio at 0", "perplexity with the weight set to 0, over the baseline's"), ("95 % interval", ""))  # fmt: skip
    rows = []
    for each in sorted(run.stats["super_weights"]["candidates"], key=lambda item: -(item["ratio"] or 0)):
        colour, meaning = STATUSES[each["status"]]
        expert = "" if each["expert"] is None else f"{each['expert']}, "
        place = dcc.Link(f"{each['name']} [{expert}{each['row']}, {each['column']}]", href=weight_link(run, each), className="mono")
        rows.append([html.Span(each["status"], className=f"badge {colour}", title=meaning), place, number(each["value"]), number(each["magnitude_rank"], ",.0f"),
                     number(each["input_spike"]), number(each["output_spike"]), number(each["persistence"], ".0%"), number(each["ratio"]), _interval(each["ci"])])  # fmt: skip
    return _table(head, rows, 2)


def published_table(run: SensitivityRun) -> html.Div:
    """What publications name for this model, and whether the search found it."""
    head = (("Published", ""), ("Source", ""), ("Search", ""), ("Ratio at 0", "perplexity with the weight set to 0, over the baseline's"))
    rows = []
    for each in run.stats["super_weights"]["published"]:
        expert = "" if each.get("expert") is None else f"{each['expert']}, "
        place = f"layer {each['layer']} W_out [{expert}{each['row']}, {each['column']}]"
        rows.append([place, html.Span(each["source"], className="wrap"), "found" if each.get("found") else "not found", number(each["ratio"])])
    return _table(head, rows, 3)


def compared_table(found: Mapping[str, Any], names: Sequence[str]) -> html.Div:
    """Every pair of runs. found: `compare_runs`."""
    head = (("Runs", ""), ("k", "of each scope, the largest that both kept"), ("In both", "weights"), ("By chance", "expected if both were drawn at random"),
            ("Jaccard", ""), ("p*", ""),
            ("Scores", "Spearman's correlation of the scores that both kept"), ("Tensors", "Spearman's correlation of mean scores of tensors"),
            ("Effect", "perplexity ratio of the first run's top weights over the second's"))  # fmt: skip
    effects = {tuple(row["runs"]): row for row in found["between"]}
    rows = []
    for pair in found["agreement"]:
        deepest = pair["weights"]["overlap"][-1] if pair["weights"] and pair["weights"]["overlap"] else None
        effect = effects.get(tuple(pair["runs"]))
        counts = ["–"] * 5
        if deepest:
            counts = [f"{deepest['k']:,}", f"{deepest['both']:,}", number(deepest["expected"], ",.3g"), number(deepest["jaccard"], ".3f"), _p(found, deepest["test"])]
        scores = number(pair["weights"]["scores"]["spearman"], ".3f") if pair["weights"] else "–"
        said = f"× {number(effect['ratio_of_ratios'])} {brackets(effect['ci'])}, p* {_p(found, effect['test'])}" if effect else "–"
        label = html.Span(" and ".join(str(each + 1) for each in pair["runs"]), title="; ".join(names[each] for each in pair["runs"]))
        rows.append([label, *counts, scores, number(pair["profile"]["spearman"], ".3f"), said])
    return _table(head, rows)


def _p(found: Mapping[str, Any], test: int | None) -> str:
    return "–" if test is None else f"{found['tests'][test]['p_adjusted']:.2g}"


def super_csv(run: SensitivityRun) -> str:
    names = ("status", "layer", "name", "expert", "row", "column", "value", "magnitude_rank", "input_spike", "output_spike", "persistence", "ratio")
    return to_csv(names, ([each[name] for name in names] for each in run.stats["super_weights"]["candidates"]))

"""The table of a model's tensors (dash-ag-grid), the list of super-weight candidates, and the file of statistics."""

from __future__ import annotations

import csv
import io
import math
from typing import Any
from urllib.parse import urlencode

import dash_ag_grid as dag
from dash import dcc, html

from backend.analysis.weights import STATISTICS, super_weight_candidates
from backend.reports.weight_results import WeightReport
from components.controls import set_button

SHOWN_CANDIDATES = 12
_FORMATS = {"size": ",d", "nbytes": ",d", "bits": ".3~g", "near_zero": ".2%", "outliers": ",d", "n_nan": ",d", "n_inf": ",d"}
_SHORT = "d3.format(params.value != 0 && Math.abs(params.value) < 0.001 ? '.2e' : '.4~g')(params.value)"
# field -> (title, width, tooltip)
_COLUMNS: dict[str, tuple[str, int, str]] = {
    "dtype": ("Type", 86, "storage type"),
    "shape": ("Shape", 122, "as in the file, rows first"),
    "bits": ("Bits", 68, "bits per weight on disk"),
    "nbytes": ("Bytes", 112, "bytes on disk"),
    "mean": ("Mean", 100, STATISTICS["mean"]),
    "std": ("Std", 92, STATISTICS["std"]),
    "min": ("Min", 92, STATISTICS["min"]),
    "max": ("Max", 92, STATISTICS["max"]),
    "abs_max": ("|w| max", 92, STATISTICS["abs_max"]),
    "sigmas": ("|w| max, σ", 102, "largest |w| in standard deviations of its tensor"),
    "kurtosis": ("Kurtosis", 96, STATISTICS["kurtosis"]),
    "near_zero": ("Near zero", 100, STATISTICS["near_zero"]),
    "l2": ("L2 norm", 92, STATISTICS["l2"]),
    "outliers": ("> 6 σ", 86, STATISTICS["outliers"]),
    "n_nan": ("NaN", 74, "weights that are no number"),
    "n_inf": ("Inf", 74, "weights that are infinite"),
}
_TEXT = ("dtype", "shape")


def tensor_grid(report: WeightReport, chosen: int) -> dag.AgGrid:
    """Every tensor, sortable and searchable; ids `weights-grid`, row ids the tensors' numbers. Names are shown as text, never as markup."""
    name = {"field": "name", "headerName": "Tensor", "pinned": "left", "width": 248, "cellClass": "mono", "tooltipField": "name",
            "cellClassRules": {"marked": "params.data.mark != ''"}}  # fmt: skip
    canonical = {"field": "canonical", "headerName": "Canonical name", "width": 210, "cellClass": "mono", "tooltipField": "canonical"}
    mark = {"field": "mark", "headerName": "Mark", "width": 150, "tooltipField": "mark"}
    columns = [name, canonical, *(_column(field, *about) for field, about in _COLUMNS.items()), mark]
    options = {
        "rowSelection": {"mode": "singleRow", "enableClickSelection": True, "checkboxes": False}, "rowHeight": 31, "headerHeight": 34, "suppressCellFocus": False,
        "tooltipShowDelay": 400, "animateRows": False, "enableCellTextSelection": True, "cacheQuickFilter": True, "suppressColumnVirtualisation": False,
        "tabToNextCell": {"function": "false"},  # Tab leaves the grid, arrows move in it: cell by cell it would take thousands of presses to get past
    }  # fmt: skip
    return dag.AgGrid(id="weights-grid", columnDefs=columns, rowData=_rows(report), getRowId="params.data.id", selectedRows={"ids": [str(chosen)]}, dashGridOptions=options,
                      scrollTo={"rowId": str(chosen), "rowPosition": "middle"},
                      defaultColDef={"sortable": True, "resizable": True, "filter": False}, className="ls-grid", style={"height": 392, "width": "100%"})  # fmt: skip


def _column(field: str, title: str, width: int, about: str) -> dict[str, Any]:
    column: dict[str, Any] = {"field": field, "headerName": title, "width": width, "headerTooltip": about}
    if field in _TEXT:
        return column
    plain = f"d3.format('{_FORMATS[field]}')(params.value)" if field in _FORMATS else _SHORT
    shown = f"params.value == null ? '–' : {plain}"
    return column | {"type": "numericColumn", "cellClass": "num", "valueFormatter": {"function": shown}, "sortingOrder": ["desc", "asc", None]}


def _rows(report: WeightReport) -> list[dict[str, Any]]:
    candidates = {item["tensor"] for item in super_weight_candidates(report.rows)[:SHOWN_CANDIDATES]}
    return [_row(i, row, row["name"] in candidates) for i, row in enumerate(report.rows)]


def _row(number: int, row: dict[str, Any], is_candidate: bool) -> dict[str, Any]:
    facts = {"id": str(number), "name": row["name"], "canonical": ", ".join(row["canonical"]), "shape": shape_text(row), "mark": _mark(row, is_candidate)}
    values = {name: row[name] for name in ("dtype", "bits", "nbytes", *STATISTICS)} | {"sigmas": row["abs_max"] / row["std"] if row["std"] else math.nan}
    return facts | {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


def _mark(row: dict[str, Any], is_candidate: bool) -> str:
    marks = [row["note"], "super-weight candidate" if is_candidate else "", "not finite" if row["n_nan"] or row["n_inf"] else ""]
    return "; ".join(filter(None, marks))


def shape_text(row: dict[str, Any]) -> str:
    return " × ".join(f"{n:,}" for n in row["shape"])


def candidate_list(report: WeightReport, model: str) -> Any:
    """The super-weight candidates of the model, farthest out first; one opens its tensor at its place (store `weights-jump`)."""
    found = super_weight_candidates(report.rows)[:SHOWN_CANDIDATES]
    if not found:
        return html.P("This model has no matrix that is known as W_out of a layer.", className="muted")
    head = [html.Th("Layer"), html.Th("Component"), html.Th("Place"), *(html.Th(title, className="num") for title in ("Weight", "|w| / σ", "Rank in tensor"))]
    body = [_candidate(item) for item in found]
    table = html.Table([html.Thead(html.Tr(head)), html.Tbody(body)], className="ls-table")
    link = dcc.Link("Measure what the model loses without them", href=f"/sensitivity?{urlencode({'model': model})}")
    return html.Div([html.Div(table, className="table-scroll table-fill"), html.P(link, className="small")], className="candidates")


def _candidate(item: dict[str, Any]) -> html.Tr:
    place = ", ".join(map(str, item["index"]))
    button = set_button(f"[{place}]", "weights-jump", f"{place}|{item['tensor']}", "th-button mono", title=item["tensor"])
    numbers = (f"{item['value']:.4g}", f"{item['sigmas']:.1f}", str(item["rank"]))
    return html.Tr([html.Td(str(item["layer"])), html.Td(item["component"], className="mono"), html.Td(button), *(html.Td(text, className="num") for text in numbers)])


def statistics_csv(report: WeightReport) -> str:
    """Every tensor and every statistic. A name that a spreadsheet would run as a formula gets an apostrophe before it."""
    facts = ("name", "canonical", "layer", "component", "shape", "dtype", "size", "nbytes", "bits")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*facts, *STATISTICS, "note"])
    for row in report.rows:
        told = {**row, "canonical": " ".join(row["canonical"]), "shape": "x".join(map(str, row["shape"])), "layer": "" if row["layer"] is None else row["layer"]}
        writer.writerow([_plain(told[name]) for name in (*facts, *STATISTICS, "note")])
    return out.getvalue()


def _plain(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value

"""Sensitivity runs as a PDF document: what was run, tables, figures, the comparison with corrected p-values, the limits.

Names of models and tensors are a stranger's: reportlab reads paragraphs as XML, so that all text goes through `_text`. Equal runs give equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from reportlab.lib.colors import HexColor
from reportlab.lib.enums import TA_RIGHT
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import Flowable, KeepTogether, PageBreak, Paragraph, SimpleDocTemplate, Spacer, Table, TableStyle

from backend.errors import LayerscopeError
from backend.reports import sensitivity_text as text
from backend.reports.plot_on_page import PlotOnPage
from backend.reports.plot_style import FONTS, INK, LINE, QUIET, drawing, printable
from backend.reports.sensitivity_check import checked
from backend.reports.sensitivity_compare import MAX_RUNS, compare_runs
from backend.reports.sensitivity_compared import comparison_tables
from backend.reports.sensitivity_plots import PLOTS, left_out
from backend.reports.sensitivity_run import SensitivityRun

_MARGIN = 18 * mm
_INSET = 6  # points that reportlab's frame keeps free at each side
_WIDTH = A4[0] - 2 * (_MARGIN + _INSET)
_CELL, _LONGEST = 90, 4000  # letters of a table's cell and of a paragraph
# Parts of a run in the order of the document: heading, the part of the statistics (none: the ranking), its table, its figures.
_PARTS: tuple[tuple[str, str, Any, tuple[str, ...]], ...] = (
    ("Perturbation", "perturbation", text.perturbation_rows, ("perturbation_effects",)),
    ("Stability", "stability", text.stability_rows, ("stability_analysis",)),
    ("Pruning", "pruning", text.pruning_rows, ("pruning",)),
    ("Gradient flow", "gradient_flow", None, ("gradient_flow",)),
    ("Super weights", "super_weights", text.super_rows, ("super_weights",)),
)
_REMARKS = {
    "perturbation": "Not repr.: weights whose new value the stored format could not hold exactly.",
    "stability": f"At most {text.PAIR_ROWS} pairs are listed. Spearman: over the union of the weights that either ranking kept.",
    "super_weights": f"At most {text.PAIR_ROWS} candidates are listed. Persistence: share of the later layers whose largest channel is the weight's row. Ratio: set to 0.",
}


def write_report(runs: Sequence[SensitivityRun], path: Path, correction: str = "holm") -> None:
    """Write the document, replacing a file that is there. Raises LayerscopeError for no run, too many, a damaged one, or a path that cannot be written."""
    data = report_bytes(runs, correction)
    try:
        path.write_bytes(data)
    except OSError as error:
        raise LayerscopeError(f"The report {path} cannot be written: {error.strerror}.") from None


def report_bytes(runs: Sequence[SensitivityRun], correction: str = "holm") -> bytes:
    """The document. Raises LayerscopeError for no run, more than MAX_RUNS, a damaged one, or an unknown correction."""
    if not 1 <= len(runs) <= MAX_RUNS:
        raise LayerscopeError(f"A report is of 1 to {MAX_RUNS} runs, and here are {len(runs)}.")
    for run in runs:
        checked(run)
    _register_fonts()
    compared = compare_runs(runs, correction) if len(runs) > 1 else None
    made = io.BytesIO()
    document = SimpleDocTemplate(made, pagesize=A4, leftMargin=_MARGIN, rightMargin=_MARGIN, topMargin=16 * mm, bottomMargin=18 * mm, invariant=1,
                                 title="Sensitivity report", author="Layerscope", subject=printable("; ".join(run.label for run in runs), 200))  # fmt: skip
    footer = f"Layerscope {printable(str(runs[0].manifest.get('layerscope', '')), 20)}, sensitivity report"
    with drawing():  # figures are drawn when their page is
        story = list(_front(runs))
        for i, run in enumerate(runs, 1):
            story += _run(i, run)
        if compared:
            story += _comparison(compared)
        story += _limits(compared)
        document.build(story, canvasmaker=partial(_Pages, footer=footer))
    return made.getvalue()


class _Pages(Canvas):
    """A canvas that knows at the end how many pages there are, and writes that on each."""

    def __init__(self, *args: Any, footer: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._footer = footer
        self._states: list[dict[str, Any]] = []

    def showPage(self) -> None:
        self._states.append(dict(self.__dict__))
        self._startPage()

    def save(self) -> None:
        for state in self._states:
            self.__dict__.update(state)
            self.setFont("Report", 7)
            self.setFillColor(HexColor(QUIET))
            self.drawString(_MARGIN + _INSET, 10 * mm, self._footer)
            self.drawRightString(A4[0] - _MARGIN - _INSET, 10 * mm, f"Page {self._pageNumber} of {len(self._states)}")
            super().showPage()
        super().save()


# -- sections ------------------------------------------------------------------------------------------------------------------


def _front(runs: Sequence[SensitivityRun]) -> Iterator[Flowable]:
    yield _text("Sensitivity report", "title")
    models = list(dict.fromkeys(run.manifest["model"]["name"] for run in runs))
    metrics = list(dict.fromkeys(run.stats["metric"] for run in runs))
    listed = [", ".join(printable(name) for name in names) for names in (models, metrics)]
    yield _text(f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {listed[0]}; metrics: {listed[1]}", "lead")
    if len(runs) > 1:
        head = ["run", "model", "metric", "ranked", "kept", "windows", "top k", "random k", "bottom k"]
        rows = [[str(i), run.manifest["model"]["name"], run.stats["metric"], run.stats["mode"], f"{len(run.top):,}", f"{run.manifest['text']['n_windows']:,}",
                 *(_ratio_of(run, selection) for selection in ("top_k", "random_k", "bottom_k"))] for i, run in enumerate(runs, 1)]  # fmt: skip
        yield _table([head, *rows], (1, 2, 3))
        yield _text("Top k, random k, bottom k: perplexity after the perturbation over the baseline's; of several seeds the largest.", "remark")


def _ratio_of(run: SensitivityRun, selection: str) -> str:
    rows = (run.stats.get("perturbation") or {"runs": []})["runs"]
    return text.ratio(max((row["ratio"] for row in rows if row["selection"] == selection and row["ratio"] is not None), default=None))


def _run(i: int, run: SensitivityRun) -> Iterator[Flowable]:
    if i > 1:
        yield PageBreak()
    yield _text(f"{i}. {run.label}", "h1")
    yield _text(text.summary(run))
    yield _text("What was run", "h2")
    yield _table([["", ""], *text.facts(run)], (0, 1), head=False, widths=(26 * mm, _WIDTH - 26 * mm))
    yield _text("To repeat it:" if run.manifest["command"] else "Started on the page, with this specification:", "remark")
    yield _text(text.command(run), "code")
    without = left_out(run)
    rows, remark = text.top_rows(run)
    yield from _figures(run, ("sensitivity_distribution", "layer_comparison", "sensitivity_heatmap"), without, "Ranking")
    if len(rows) > 1:
        yield _text(f"Top {len(rows) - 1} weights", "h2")
        yield _table(rows, (2,))
        yield _text(remark, "remark")
    for heading, part, table, names in _PARTS:
        if not run.stats.get(part):
            continue
        if table:
            yield _text(heading, "h2")
            rows = table(run.stats[part])
            yield _table(rows, _words(rows)) if len(rows) > 1 else _text("Nothing was found.")
            if part in _REMARKS:
                yield _text(_REMARKS[part], "remark")
        yield from _figures(run, names, without, "" if table else heading)
    notes = [*run.manifest["notes"], *(f"There is no figure {name}: {why}." for name, why in without.items())]
    if notes:
        yield _text("Notes on this run", "h2")
        yield from (_text(f"\u2022 {note}") for note in notes)


def _figures(run: SensitivityRun, names: Sequence[str], without: dict[str, str], heading: str = "") -> Iterator[Flowable]:
    """heading: over the first figure, and never parted from it."""
    for name in names:
        if name in without:
            continue
        figure = PlotOnPage(PLOTS[name].draw(run), _WIDTH, ("Report", "Report-Bold"))
        above = [_text(heading, "h2")] if heading else [Spacer(1, 4)]
        yield KeepTogether([*above, figure, _text(text.caption(run, name), "caption")])
        heading = ""


def _comparison(compared: dict[str, Any]) -> Iterator[Flowable]:
    yield PageBreak()
    yield _text("Comparison of the runs", "h1")
    correction = compared["correction"]
    n, significant = len(compared["tests"]), sum(test["significant"] for test in compared["tests"])
    yield _text(f"p-values are corrected by {correction['method']} within {correction['over']}; {significant} of {n} tests are significant at {compared['alpha']:g}. "
                f"p: as tested. p*: corrected. Bold: significant. Runs are named by their numbers above.")  # fmt: skip
    for heading, remark, rows, bold, left in comparison_tables(compared):
        yield _text(heading, "h2")
        yield _table(rows, left, bold=bold)
        yield _text(remark, "remark")
    yield _text("Families of tests", "h2")
    rows = [[name, str(family["n_tests"]), family["question"]] for name, family in correction["families"].items()]
    yield _table([["family", "tests", "what is asked, and how"], *rows], (0, 2), widths=(38 * mm, 14 * mm, _WIDTH - 52 * mm))


def _limits(compared: dict[str, Any] | None) -> Iterator[Flowable]:
    yield _text("Limits", "h1")
    own = ["A score is what its metric says; whether a model hangs on a weight is said by the perturbation alone.",
           "Perplexities are of the text named above, and of no other.",
           "Intervals are percentile intervals of a bootstrap over windows: with few windows they are too narrow."]  # fmt: skip
    yield from (_text(f"\u2022 {note}") for note in dict.fromkeys([*own, *(compared["notes"] if compared else ())]))


# -- what a page is made of ----------------------------------------------------------------------------------------------------


@cache
def _register_fonts() -> None:
    for name, file in (("Report", "DejaVuSans"), ("Report-Bold", "DejaVuSans-Bold"), ("Report-Mono", "DejaVuSansMono")):
        pdfmetrics.registerFont(TTFont(name, str(FONTS / f"{file}.ttf")))


_BASE: dict[str, Any] = {"fontName": "Report", "fontSize": 8.5, "leading": 12, "textColor": HexColor(INK), "spaceAfter": 4}
_STYLES = {
    "body": _BASE,
    "title": _BASE | {"fontName": "Report-Bold", "fontSize": 18, "leading": 22, "spaceAfter": 3},
    "lead": _BASE | {"fontSize": 9.5, "leading": 13, "textColor": HexColor(QUIET), "spaceAfter": 8},
    "h1": _BASE | {"fontName": "Report-Bold", "fontSize": 13, "leading": 17, "spaceBefore": 10, "spaceAfter": 4, "keepWithNext": 1},
    "h2": _BASE | {"fontName": "Report-Bold", "fontSize": 9.5, "leading": 13, "spaceBefore": 9, "spaceAfter": 3, "keepWithNext": 1},
    "caption": _BASE | {"fontSize": 7, "leading": 9.5, "textColor": HexColor(QUIET), "spaceAfter": 6},
    "remark": _BASE | {"fontSize": 7, "leading": 9.5, "textColor": HexColor(QUIET), "spaceBefore": 3, "spaceAfter": 3},
    "code": _BASE | {"fontName": "Report-Mono", "fontSize": 7, "leading": 10, "backColor": HexColor("#f1f3f6"), "borderPadding": 4, "leftIndent": 4, "rightIndent": 4,
                     "spaceBefore": 4, "spaceAfter": 8},
    "cell": _BASE | {"fontSize": 7, "leading": 9, "spaceAfter": 0},
    "head": _BASE | {"fontName": "Report-Bold", "fontSize": 7, "leading": 9, "spaceAfter": 0},
}  # fmt: skip


@cache
def _style(name: str, right: bool = False) -> ParagraphStyle:
    return ParagraphStyle(name, **_STYLES[name], **({"alignment": TA_RIGHT} if right else {}))


def _text(words: str, style: str = "body", right: bool = False, limit: int = _LONGEST) -> Paragraph:
    """A paragraph of plain text: nothing in it is markup."""
    return Paragraph(escape(printable(words, limit)), _style(style, right))


def _table(rows: text.Rows, left: Sequence[int], head: bool = True, widths: Sequence[float] | None = None, bold: Sequence[int] = ()) -> Table:
    """rows: the heading first, whatever `head` says. left: columns of words, the others are numbers. Wide ones share the page by what they hold."""
    body = rows if head else rows[1:]
    limit = _LONGEST if widths else _CELL
    cells = [[_text(each, "head" if (head and i == 0) or i in bold else "cell", at not in left, limit) for at, each in enumerate(row)] for i, row in enumerate(body)]
    made = Table(cells, colWidths=list(widths) if widths else _widths(body), repeatRows=int(head), hAlign="LEFT")
    rules = [("LINEBELOW", (0, 0), (-1, -1), 0.3, HexColor(LINE)), ("VALIGN", (0, 0), (-1, -1), "TOP"), ("LEFTPADDING", (0, 0), (-1, -1), 3),
             ("RIGHTPADDING", (0, 0), (-1, -1), 3), ("TOPPADDING", (0, 0), (-1, -1), 2), ("BOTTOMPADDING", (0, 0), (-1, -1), 2)]  # fmt: skip
    if head:
        rules += [("LINEABOVE", (0, 0), (-1, 0), 0.8, HexColor(INK)), ("LINEBELOW", (0, 0), (-1, 0), 0.6, HexColor(INK)), ("VALIGN", (0, 0), (-1, 0), "BOTTOM")]
    made.setStyle(TableStyle(rules))
    return made


def _widths(rows: text.Rows) -> list[float]:
    """Every column as wide as its longest cell, its heading in two lines at least; what is too wide in all shrinks where there is most."""
    size = [max(pdfmetrics.stringWidth(printable(row[at], _CELL), "Report-Bold", 7) for row in rows[1:] or rows) for at in range(len(rows[0]))]
    least = [_two_lines(heading) for heading in rows[0]]
    found = [max(each, word) + 7 for each, word in zip(size, least, strict=True)]
    while sum(found) > _WIDTH:
        most = found.index(max(found))
        others = sorted(found)[-2] if len(found) > 1 else 0.0
        found[most] = max(found[most] - (sum(found) - _WIDTH), min(others, found[most] - 1), 12.0)
    return found


def _two_lines(heading: str) -> float:
    """The width at which a heading takes two lines at most."""
    words, width = heading.split(), partial(pdfmetrics.stringWidth, fontName="Report-Bold", fontSize=7)
    return min((max(width(" ".join(words[:at])), width(" ".join(words[at:]))) for at in range(1, len(words) + 1)), default=0.0)


def _words(rows: text.Rows) -> tuple[int, ...]:
    """Columns whose first entries are no numbers."""
    return tuple(at for at in range(len(rows[0])) if any(each[at][:1].isalpha() for each in rows[1:]))

"""How printed figures look, and how they are saved so that the same numbers give the same bytes.

Colours follow components/figures/theme.py (after Okabe and Ito 2008); type is matplotlib's own DejaVu Sans, so that no machine's fonts matter.
Nothing of pyplot's state is used. matplotlib reads its settings while it draws, too, and they belong to the process: `drawing` holds them under a lock.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

SINGLE, DOUBLE = 3.4, 7.0  # inches: one column of a paper, and two
INK, QUIET, LINE, ACCENT = "#16202e", "#667286", "#cbd2dc", "#3b5bdb"
LINES = ("#3b5bdb", "#c2571a", "#1f7a4d", "#8e3b8a", "#2a9fc4", "#b58900", "#16202e", "#9aa5b4")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
SEQUENTIAL = LinearSegmentedColormap.from_list("layerscope", ["#eef2ff", "#9db2ff", "#4b67e0", "#1b2a78"])
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FORMATS = ("png", "pdf", "svg")
DPI = 300

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 7, "axes.titlesize": 7.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 7, "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5, "legend.fontsize": 6.5, "legend.frameon": False, "legend.handlelength": 1.6, "legend.borderaxespad": 0.2, "legend.labelspacing": 0.3,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.edgecolor": QUIET, "axes.labelcolor": INK, "text.color": INK, "xtick.color": QUIET,
    "ytick.color": QUIET, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.width": 0.4, "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5, "ytick.major.size": 2.5, "xtick.minor.size": 1.5, "ytick.minor.size": 1.5, "grid.color": LINE, "grid.linewidth": 0.4, "lines.linewidth": 1.1,
    "lines.markersize": 3, "axes.axisbelow": True, "figure.dpi": 100, "savefig.dpi": DPI, "pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none",
    "svg.hashsalt": "layerscope", "figure.constrained_layout.use": True, "axes.unicode_minus": True,
}  # fmt: skip
# Dates and versions would make two equal figures differ.
_METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}, "svg": {"Date": None, "Creator": None}}
_DRAWING = threading.RLock()


@contextmanager
def drawing() -> Iterator[None]:
    """The look of every figure: matplotlib's defaults, whatever a matplotlibrc of this machine says, and ours. One thread at a time."""
    defaults: dict[Any, Any] = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with _DRAWING, matplotlib.rc_context(defaults | _STYLE):
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches, to be filled and saved inside `drawing`."""
    return Figure(figsize=(width, height), layout="constrained")


def save(made: Figure, target: Path | io.BytesIO, kind: str) -> None:
    """Write the figure as png, pdf or svg. Raises OSError."""
    made.savefig(target, format=kind, metadata=_METADATA[kind], facecolor="white")


def line(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th of several lines: 32 that can be told apart without colour."""
    return {"color": LINES[i % len(LINES)], "linestyle": DASHES[i // len(LINES) % len(DASHES)] if i >= len(LINES) else "-"}


def grid(axes: Axes, axis: Any = "both") -> None:
    axes.grid(True, axis=axis, which="major")


def printable(text: str, limit: int = 60) -> str:
    """Text of a stranger as a figure or page may show it: one line, of letters that the type has, cut at `limit`."""
    known = _letters()
    shown = "".join(each if ord(each) in known and each.isprintable() else "\ufffd" for each in " ".join(text.split()))
    return shown if len(shown) <= limit else shown[: limit - 1] + "\u2026"


def label(text: str, limit: int = 60) -> str:
    """The same for matplotlib, where two dollar signs would begin mathematics."""
    return printable(text, limit).replace("$", r"\$")


@cache
def _letters() -> frozenset[int]:
    return frozenset(FT2Font(str(FONTS / "DejaVuSans.ttf")).get_charmap())

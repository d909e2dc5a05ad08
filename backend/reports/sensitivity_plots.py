"""The printed figures of a sensitivity run, as files: PNG at 300 dpi, PDF and SVG with text as text. Equal runs give equal bytes.

A figure whose part the run lacks is not drawn; `left_out` says which and why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from backend.errors import LayerscopeError
from backend.reports import sensitivity_effects as effects
from backend.reports import sensitivity_panels as panels
from backend.reports.plot_style import FORMATS, drawing, save
from backend.reports.sensitivity_check import checked
from backend.reports.sensitivity_run import SensitivityRun


@dataclass(frozen=True)
class Plot:
    """draw: the figure, inside `drawing`    lacks: why a run has no such figure, or nothing"""

    draw: Callable[[SensitivityRun], Figure]
    lacks: Callable[[dict[str, Any]], str]


def _ranked(stats: dict[str, Any]) -> str:
    return "" if any(row["layer"] is not None and row["n"] for row in stats["tensors"]) else "no tensor of a layer was ranked"


def _distributed(stats: dict[str, Any]) -> str:
    return "" if any(sum(row["histogram"]["counts"]) for row in stats["tensors"]) else "no tensor has a score above 0"


def _rows(part: str, rows: str, number: str, measured: str) -> Callable[[dict[str, Any]], str]:
    """Of a part with rows: it is there, and at least one row has its number."""

    def lacks(stats: dict[str, Any]) -> str:
        if not stats.get(part):
            return f"{measured} was not measured in this run"
        return "" if any(row[number] is not None for row in stats[part][rows]) else f"{measured} gave no finite number in this run"

    return lacks


def _flow(stats: dict[str, Any]) -> str:
    if not stats.get("gradient_flow"):
        return "the gradient flow was not measured in this run"
    known = any(value for row in stats["gradient_flow"]["norm"] for value in row)
    return "" if known else "the gradient flow has no norm above 0"


PLOTS: dict[str, Plot] = {
    "sensitivity_distribution": Plot(panels.distribution, _distributed),
    "layer_comparison": Plot(panels.layer_comparison, _ranked),
    "sensitivity_heatmap": Plot(panels.heatmap, _ranked),
    "perturbation_effects": Plot(effects.perturbation, _rows("perturbation", "runs", "ratio", "perturbation")),
    "stability_analysis": Plot(effects.stability, _rows("stability", "pairs", "spearman", "stability")),
    "pruning": Plot(effects.pruning, _rows("pruning", "rows", "ratio", "pruning")),
    "gradient_flow": Plot(effects.gradient_flow, _flow),
    "super_weights": Plot(effects.super_weights, _rows("super_weights", "candidates", "ratio", "the search for super weights")),
}


def left_out(run: SensitivityRun) -> dict[str, str]:
    """The figures that this run has not, each with the reason."""
    return {name: why for name, plot in PLOTS.items() if (why := plot.lacks(checked(run).stats))}


def figures(run: SensitivityRun) -> dict[str, Figure]:
    """The figures that the run has, by name. To be called, and the figures saved, inside `plot_style.drawing`."""
    without = left_out(run)
    return {name: plot.draw(run) for name, plot in PLOTS.items() if name not in without}


def save_plots(run: SensitivityRun, folder: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write every figure that the run has into the folder, replacing files of the same name; the paths, in the order of PLOTS.

    Raises LayerscopeError for a format that is not one of FORMATS, a damaged run, and a folder that cannot be written.
    """
    if wrong := [each for each in formats if each not in FORMATS]:
        raise LayerscopeError(f"Figures cannot be saved as {wrong[0]!r}; they can as {', '.join(FORMATS)}.")
    without, written = left_out(run), []
    for name, plot in PLOTS.items():
        if name in without:
            continue
        with drawing():
            made = plot.draw(run)
            for kind in dict.fromkeys(formats):
                path = folder / f"{name}.{kind}"
                try:
                    save(made, path, kind)
                except OSError as error:
                    raise LayerscopeError(f"The figure {path} cannot be written: {error.strerror}.") from None
                written.append(path)
    return written

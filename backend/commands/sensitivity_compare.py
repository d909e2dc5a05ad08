"""python -m backend sensitivity compare: runs set side by side as JSON. sensitivity report: runs as a PDF document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from backend.errors import LayerscopeError

Force = Annotated[bool, typer.Option("--force", help="Replace the output file if it is there.")]
More = Annotated[list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Further folders.", show_default=False)]
Correction = Annotated[str, typer.Option("--correction", help="Of p-values, within each family of tests: holm or benjamini-hochberg.")]


def register(group: typer.Typer) -> None:
    """Add the commands to the group `sensitivity`."""

    @group.command()
    def compare(
        result_dirs: Annotated[list[Path], typer.Option("--result-dirs", help="Folders of runs, or folders that hold such folders: --result-dirs A B C.")],
        output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")],
        more: More = None,
        correction: Correction = "holm",
        force: Force = False,
    ) -> None:
        """Compare runs of several metrics, seeds or models: agreement, layer profiles, shares of components, with corrected p-values.

        Example: python -m backend sensitivity compare --result-dirs runs/wanda runs/magnitude --output statistical_analysis.json
        """
        _free(output, force)
        from backend.reports.sensitivity_compare import compare_runs, open_runs

        found = compare_runs(open_runs([*result_dirs, *(more or ())]), correction)
        _write(output, (json.dumps(found, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode())
        significant = sum(test["significant"] for test in found["tests"])
        typer.echo(f"{len(found['runs'])} runs compared: {significant} of {len(found['tests'])} tests are significant at {found['alpha']:g} after "
                   f"{found['correction']['method']}'s correction. Written to {output}")  # fmt: skip

    @group.command()
    def report(
        input_dirs: Annotated[list[Path], typer.Option("--input-dirs", help="Folders of runs, or folders that hold such folders: --input-dirs A B C.")],
        output: Annotated[Path, typer.Option("--output", "-o", help="The PDF file to write.")],
        more: More = None,
        correction: Correction = "holm",
        force: Force = False,
    ) -> None:
        """Write one run or several as a document: what was run, tables, figures, the comparison, the limits.

        Example: python -m backend sensitivity report --input-dirs runs/wanda runs/magnitude --output report.pdf
        """
        _free(output, force)
        from backend.reports.sensitivity_compare import open_runs
        from backend.reports.sensitivity_report import report_bytes

        runs = open_runs([*input_dirs, *(more or ())])
        _write(output, report_bytes(runs, correction))
        typer.echo(f"{len(runs)} run{'s' if len(runs) > 1 else ''} written to {output}")


def _free(output: Path, force: bool) -> None:
    """Said before the work is done, not after."""
    if not output.absolute().parent.is_dir():
        raise LayerscopeError(f"There is no folder {output.absolute().parent} to write {output.name} in.")
    if output.is_dir():
        raise LayerscopeError(f"{output} is a folder; name a file.")
    if output.exists() and not force:
        raise LayerscopeError(f"{output} exists and is not replaced; name another file, or give --force.")


def _write(output: Path, data: bytes) -> None:
    try:
        output.write_bytes(data)
    except OSError as error:
        raise LayerscopeError(f"{output} cannot be written: {error.strerror}.") from None

"""python -m backend weights: which tensors a model has, and what their numbers look like."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from typing import Annotated, Any

import typer

from backend.errors import LayerscopeError

_FORMATS = ("json", "csv")
_FACTS = ("name", "canonical", "layer", "component", "shape", "dtype", "size", "nbytes", "bits")
_LEADING = 10  # singular values that the text form lists


def register(app: typer.Typer, bar: Callable[[], Any]) -> None:
    """Add the command to the application. bar: makes a progress callback that is a context manager."""

    @app.command()
    def weights(
        model: Annotated[str, typer.Option("--model", "-m", help="A preset (see `models`), a .gguf file, a folder of safetensors, or a cached hub id.")],
        tensor: Annotated[str | None, typer.Option("--tensor", "-t", help="One tensor, by the file's name or the canonical one: statistics, norms, singular values.")] = None,
        index: Annotated[int, typer.Option("--index", "-i", help="With --tensor: which matrix of a stack, for example the expert.")] = 0,
        stats: Annotated[str | None, typer.Option("--stats", help="Statistics of every tensor, as json (one object) or csv (a line a tensor).")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    ) -> None:
        """List a model's tensors; with --stats read them all and print their statistics; with --tensor look at one.

        Example: python -m backend weights --model demo-dense-q4_k_m --stats csv > weights.csv
        """
        from backend import open_weights

        if stats is not None and stats not in _FORMATS:
            raise LayerscopeError(f"The format {stats!r} is not one of {', '.join(_FORMATS)}.")
        if stats == "csv" and (as_json or tensor is not None):
            raise LayerscopeError("--stats csv prints a table of all tensors; it goes with neither --json nor --tensor.")
        opened = open_weights(model)
        with bar() as progress:
            if tensor is not None:
                found = one_tensor(opened, tensor, index, progress)
                typer.echo(_json(found) if as_json or stats else describe_tensor(found))
                return
            table = listing(opened) if stats is None else statistics(opened, progress)
        typer.echo(_csv(table["tensors"]) if stats == "csv" else _json(table) if as_json or stats else describe(table), nl=stats != "csv")


def listing(weights: Any) -> dict[str, Any]:
    """Every stored tensor as its header describes it; nothing of it is read."""
    from backend.analysis.weights import place

    canonical = weights.canonical_names()
    rows = []
    for name in weights.native_names:
        tensor = weights.stored(name)
        layer, component = place(name, canonical[name])
        values = (name, canonical[name], layer, component, list(tensor.shape), tensor.dtype, tensor.size, tensor.nbytes, 8 * tensor.nbytes / max(tensor.size, 1))
        rows.append(dict(zip(_FACTS, values, strict=True)))
    return _about(weights) | {"tensors": rows}


def statistics(weights: Any, progress: Any) -> dict[str, Any]:
    """`listing` with the statistics of every tensor, its largest weights, and the super-weight candidates of the model."""
    from backend.analysis.weights import STATISTICS, super_weight_candidates
    from backend.experiments.weight_report import weight_report

    report = weight_report(weights, progress)
    rows = [{name: row[name] for name in (*_FACTS, *STATISTICS, "largest", "note")} for row in report.rows]
    return _about(weights) | {"tensors": rows, "super_weight_candidates": super_weight_candidates(report.rows)}


def one_tensor(weights: Any, name: str, index: int, progress: Any) -> dict[str, Any]:
    """Statistics and histogram of a tensor; for a matrix also the norms of rows and columns and the singular values."""
    from backend.analysis.weights import STATISTICS, bin_edges
    from backend.experiments.weight_report import tensor_detail, tensor_report
    from backend.reports.weight_matrix import Matrix

    parts = weights.lazy(name).native
    apart = len(parts) > 1  # experts that the file stores one by one
    if apart and not 0 <= index < len(parts):
        raise LayerscopeError(f"{name} has {len(parts):,} matrices; there is no number {index}.")
    stored = weights.stored(parts[index] if apart else name)
    row, bins = tensor_report(stored, weights.canonical_names()[stored.name])
    if row["note"]:
        raise LayerscopeError(row["note"])
    found = {key: row[key] for key in (*_FACTS, *STATISTICS, "largest")}
    found["histogram"] = {"edges": bin_edges(row["exponent"]).tolist(), "counts": bins.tolist()}
    if stored.ndim > 1 and stored.size:
        detail = tensor_detail(Matrix(stored, 0 if apart else index), progress)
        found |= {"index": index, "row_norms": detail.row_norms.tolist(), "column_norms": detail.column_norms.tolist()}
        if detail.spectrum is not None:
            spectrum = detail.spectrum
            found |= {"singular_values": spectrum.values.tolist(), "n_singular_values": spectrum.n, "stable_rank": spectrum.stable_rank,
                      "effective_rank": spectrum.effective_rank}  # fmt: skip
    return found


def _about(weights: Any) -> dict[str, Any]:
    info = weights.info
    return {"model": info.name, "path": info.source, "architecture": info.architecture, "n_layers": info.n_layers, "n_params": info.n_params, "n_bytes": info.n_bytes}


def describe(table: dict[str, Any]) -> str:
    """The listing as a person reads it in a terminal."""
    lines = [f"{table['model']}  {table['architecture']}, {table['n_params']:,} weights, {table['n_bytes']:,} bytes", ""]
    wide = max((len(row["name"]) for row in table["tensors"]), default=0)
    lines += [f"{'tensor':<{wide}}  {'type':<7} {'bits':>6} {'bytes':>14}  {'shape':<20} canonical name"]
    for row in table["tensors"]:
        shape = " x ".join(map(str, row["shape"]))
        lines.append(f"{row['name']:<{wide}}  {row['dtype']:<7} {row['bits']:>6.3g} {row['nbytes']:>14,}  {shape:<20} {', '.join(row['canonical']) or '-'}")
    return "\n".join(lines)


def describe_tensor(found: dict[str, Any]) -> str:
    """One tensor as a person reads it in a terminal."""
    from backend.analysis.weights import STATISTICS

    shape = " x ".join(map(str, found["shape"]))
    title = f"{found['name']}  {', '.join(found['canonical']) or 'no canonical name'}"
    lines = [title, f"{shape}, {found['dtype']}, {found['bits']:.3g} bits a weight, {found['nbytes']:,} bytes", ""]
    lines += [f"{name:<10} {found[name]:>14.6g}  {words}" for name, words in STATISTICS.items()]
    lines += ["", "largest    " + ", ".join(f"{value:.4g} at {tuple(at)}" for at, value in found["largest"])]
    if "singular_values" in found:
        known = found["singular_values"]
        lines += [f"singular   {', '.join(f'{value:.4g}' for value in known[:_LEADING])}{', ...' if found['n_singular_values'] > _LEADING else ''}"]
        about = "" if len(known) == found["n_singular_values"] else f" (at most, from the {len(known)} largest of {found['n_singular_values']:,})"
        lines += [f"rank       stable {found['stable_rank']:.4g}, effective {found['effective_rank']:.4g}{about}"]
    return "\n".join(lines)


def _csv(rows: list[dict[str, Any]]) -> str:
    from backend.analysis.weights import STATISTICS

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_FACTS, *STATISTICS, "note"])
    for row in rows:
        facts = {**row, "canonical": " ".join(row["canonical"]), "shape": "x".join(map(str, row["shape"])), "layer": "" if row["layer"] is None else row["layer"]}
        writer.writerow([facts[name] for name in (*_FACTS, *STATISTICS, "note")])
    return out.getvalue()


def _json(value: Any) -> str:
    return json.dumps(_plain(value), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

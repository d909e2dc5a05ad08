"""python -m backend embed: project a vocabulary or the states of traces to a file; or print the nearest tokens of a token."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from backend.errors import LayerscopeError

_SUFFIXES = (".csv", ".npz")


def register(app: typer.Typer, bar: Callable[[], Any]) -> None:
    """Add the command to the application. bar: makes a progress callback that is a context manager."""

    @app.command()
    def embed(
        model: Annotated[str | None, typer.Option("--model", "-m", help="A preset (see `models`), a .gguf file, a folder of safetensors, or a cached hub id.")] = None,
        what: Annotated[str, typer.Option("--what", "-w", help="W_E, W_U, or with --trace a site with one vector a position.")] = "W_E",
        trace: Annotated[list[str] | None, typer.Option("--trace", "-t", help="A trace file or an id in the traces folder; repeat for more of the same model.")] = None,
        layer: Annotated[int | None, typer.Option("--layer", "-l", help="With --trace: one layer. Default: all, in one projection.")] = None,
        method: Annotated[str, typer.Option(help="pca, umap or tsne.")] = "pca",
        dims: Annotated[int, typer.Option(help="2 or 3.")] = 2,
        unit: Annotated[bool, typer.Option("--unit", help="Bring every vector to length 1 first, so that distances are angles.")] = False,
        seed: Annotated[int, typer.Option(help="The same seed gives the same picture.")] = 0,
        sample: Annotated[int | None, typer.Option(help="Project a random sample of at most so many vectors. Default: what the method can take.")] = None,
        out: Annotated[Path | None, typer.Option("--out", "-o", help="The file to write: .csv (a line a point) or .npz.")] = None,
        neighbours: Annotated[str | None, typer.Option("--neighbours", "-n", help="Print the nearest tokens of this one instead, such as ' Paris', or '#12' for an id.")] = None,
        k: Annotated[int, typer.Option("-k", help="How many neighbours.")] = 10,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    ) -> None:
        """Project embeddings or hidden states to two or three dimensions, or print nearest tokens by cosine.

        Examples: python -m backend embed --model demo-dense --what W_E --method pca --dims 2 --out embeddings.csv
        python -m backend embed --model demo-dense --what W_U --neighbours " Paris" -k 10
        """
        if neighbours is not None:
            found = _neighbours(model, what, neighbours, k)
            typer.echo(json.dumps(found, ensure_ascii=False) if as_json else describe_neighbours(found))
            return
        if out is None or out.suffix.lower() not in _SUFFIXES:
            raise LayerscopeError(f"Give --out with a name that ends in {' or '.join(_SUFFIXES)}" + (f", not {out.name[:80]!r}." if out else ", or --neighbours with a token."))
        if sample is not None and sample < 5:
            raise LayerscopeError(f"A sample of {sample} vectors is too small; at least 5 are needed.")
        with bar() as progress:
            facts = _project(model, what, trace or [], layer, {"method": method, "dims": dims, "scale": "unit" if unit else "raw", "seed": seed}, sample, out, progress)
        typer.echo(json.dumps(facts, ensure_ascii=False) if as_json else describe_projection(facts, out))


def _project(model: str | None, what: str, traces: list[str], layer: int | None, how: dict[str, Any], sample: int | None, out: Path, progress: Any) -> dict[str, Any]:
    """Writes the file; the projection's facts."""
    from backend import open_trace
    from backend.experiments.embeddings import project
    from backend.reports.projection import ProjectionSpec
    from backend.reports.vectors import MATRICES, Choice, MatrixRows, TraceRows

    choice = Choice(model or "", what, tuple(traces), layer)
    spec = ProjectionSpec(choice, **how).checked()
    vectors: MatrixRows | TraceRows
    if what in MATRICES:
        path, weights = _open(model, what)
        vectors, texts = MatrixRows(weights, what), _texts(path, weights.info.d_vocab)
        columns = _token_columns(texts)
    else:
        if not traces:
            raise LayerscopeError(f"{what[:80]!r} is a site of a run; name the run with --trace, or project W_E or W_U.")
        opened = [open_trace(trace) for trace in traces]
        vectors = TraceRows(opened, what, layer)
        columns = _state_columns(vectors)
    found = project(vectors, spec, progress, limit=sample)
    kept = {name: [values[row] for row in found.rows] for name, values in columns.items()}
    kept |= {"length": found.norms[found.rows].tolist()}
    coords = found.coords[:, : spec.dims]
    _write(out, coords, kept, found.rows, found.ratio)
    return {**found.facts, "n_points": len(found.rows), "method": spec.method, "explained_variance": found.ratio[:10].tolist()}


def _open(model: str | None, what: str) -> tuple[Path, Any]:
    """(where the model lies, its weights)."""
    from backend import open_weights

    if not model:
        raise LayerscopeError(f"{what} belongs to a model; name it with --model.")
    weights = open_weights(model)
    return Path(weights.info.source), weights


def _texts(path: Path, n_rows: int) -> Any:
    from backend.analysis.token_classes import token_classes
    from backend.engines.vocabulary import token_texts
    from backend.reports.projection import VocabularyTexts

    found = token_texts(path, n_rows)
    return VocabularyTexts(found.texts, token_classes(found.texts, found.special, found.unused), frozenset(found.special))


def _token_columns(texts: Any) -> dict[str, Any]:
    from backend.analysis.token_classes import CLASSES

    names = list(CLASSES)
    return {"id": range(len(texts.texts)), "token": texts.texts, "class": [names[number] for number in texts.classes]}


def _state_columns(vectors: Any) -> dict[str, Any]:
    first = "embed" if vectors.what == "resid_post" else ""
    traces, numbers, positions = vectors.traces, vectors.trace.tolist(), vectors.position.tolist()
    return {
        "trace": [traces[n].id for n in numbers], "layer": [first if layer < 0 else layer for layer in vectors.layer.tolist()], "position": positions,
        "token": [traces[n].token_texts[at] for n, at in zip(numbers, positions, strict=True)], "category": [traces[n].category for n in numbers],
    }  # fmt: skip


def _write(out: Path, coords: Any, columns: dict[str, list[Any]], rows: Any, ratio: Any) -> None:
    """The whole file or none of it."""
    import os

    import numpy as np

    from backend.durable import publish

    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        if out.suffix.lower() == ".npz":
            with open(part, "wb") as file:
                named: dict[str, Any] = {name: np.array(_alike(values)) for name, values in columns.items()}
                np.savez_compressed(file, coords=coords, rows=rows, explained_variance=ratio, **named)
        else:
            part.write_text(_csv(coords, columns), encoding="utf-8")
        publish(part, out)
    except OSError as error:
        raise LayerscopeError(f"{out} cannot be written: {error.strerror}.") from None
    finally:
        part.unlink(missing_ok=True)


def _alike(values: list[Any]) -> list[Any]:
    """Texts where one of them is a text: an array of objects would be a pickle."""
    return [str(value) for value in values] if any(isinstance(value, str) for value in values) else values


def _csv(coords: Any, columns: dict[str, list[Any]]) -> str:
    """Text that a spreadsheet would run as a formula gets an apostrophe before it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # a token may be a carriage return
    writer.writerow([*(f"x{i + 1}" for i in range(coords.shape[1])), *columns])
    for i, place in enumerate(coords.tolist()):
        cells = (values[i] for values in columns.values())
        writer.writerow([*place, *(f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell for cell in cells)])
    return text.getvalue()


def _neighbours(model: str | None, what: str, text: str, k: int) -> dict[str, Any]:
    """The k nearest rows of W_E or W_U to one token's row in it."""
    from backend.reports.embedding_neighbours import nearest
    from backend.reports.vectors import MATRICES, MatrixRows

    if what not in MATRICES:
        raise LayerscopeError(f"Neighbours of a token are looked for in W_E or W_U, not in {what[:80]!r}.")
    if not 1 <= k <= 1000:
        raise LayerscopeError(f"{k} neighbours cannot be listed; 1 to 1,000 can.")
    path, weights = _open(model, what)
    matrix, texts = MatrixRows(weights, what), _texts(path, weights.info.d_vocab)
    matches = texts.find(text, 6)
    if not matches:
        raise LayerscopeError(f"No token of {weights.info.name} holds the text {text[:80]!r}.")
    row = matrix.row(matches[0])
    found = nearest(matrix, row, k, matches[0]) if row.any() else []
    listed = [{"id": int(i), "token": texts.texts[int(i)], "cosine": round(cosine, 6)} for i, cosine in found]
    return {"model": weights.info.name, "matrix": what, "tied": matrix.tied, "id": matches[0], "token": texts.texts[matches[0]],
            "also": [texts.texts[i] for i in matches[1:]], "neighbours": listed}  # fmt: skip


def describe_neighbours(found: dict[str, Any]) -> str:
    """The neighbours as a person reads them in a terminal."""
    tied = " (tied to W_E)" if found["tied"] else ""
    lines = [f"nearest to {found['token']!r} (id {found['id']}) in {found['matrix']}{tied} of {found['model']}", f"{'cosine':>8} {'id':>8}  token"]
    lines += [f"{item['cosine']:>8.4f} {item['id']:>8}  {item['token']!r}" for item in found["neighbours"]]
    if found["also"]:
        lines.append(f"also found: {', '.join(map(repr, found['also']))}")
    return "\n".join(lines)


def describe_projection(facts: dict[str, Any], out: Path) -> str:
    """What was written, and what was left out, in two or three lines."""
    lines = [f"{out}  {facts['n_points']:,} points of {facts['n']:,} vectors with {facts['d']:,} dimensions, {facts['seconds']:.1f} s"]
    if facts["n_left_out"]:
        lines.append(f"{facts['n_left_out']:,} vectors with NaN or infinite values are left out")
    if facts["n_sampled_from"]:
        lines.append(f"a random sample of {facts['n_sampled_from']:,}")
    lines.append("variance of the first components: " + ", ".join(f"{100 * share:.1f} %" for share in facts["explained_variance"][:3]))
    return "\n".join(lines)

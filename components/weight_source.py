"""What the Weights page shows comes from here: the model by its name, its report and details from the cache, the jobs that make them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from dash import dcc, html, no_update
from dash.exceptions import PreventUpdate
from numpy.typing import NDArray

from backend.analysis.activations import bucket_edges, reduce_signed
from backend.analysis.spectrum import FULL_SIDE, N_LEADING
from backend.analysis.weights import SignedMap
from backend.model_files import ModelEntry, identity
from backend.reports.weight_matrix import Matrix
from backend.reports.weight_results import MAP_SIDE, TensorDetail, WeightReport
from backend.weights import Weight, Weights, open_weights
from components.jobs_tray import job_or_none, job_panel
from components.services import services
from components.states import empty, error

MAP_ROWS, MAP_COLUMNS = 320, 640
READ_AT_ONCE = 1 << 26  # weights that the server reads for one picture: a few tenths of a second
# Read without asking: some twenty seconds on two cores. Both rates are only ever shown as "about".
_AT_ONCE_S = 20.0
_WEIGHTS_PER_S, _MULTIPLY_ADDS_PER_S = 1.5e8, 3e10

Region = tuple[int, int, int, int]  # first row, last row + 1, first column, last column + 1
Edges = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """A model of the shelf. identity: "" while its file is not made yet."""

    entry: ModelEntry
    identity: str

    @property
    def report(self) -> WeightReport | None:
        try:
            return _report(self.identity) if self.identity else None
        except LookupError:
            return None

    @property
    def weights(self) -> Weights:
        return _weights(self.identity, str(self.entry.path))

    def detail(self, name: str, index: int) -> TensorDetail | None:
        return TensorDetail.load(services().derived, self.identity, name, index)


def source(model: str) -> Source:
    """Raises LayerscopeError where there is no such model, or it cannot be opened."""
    entry = services().library.resolve_model(model)
    return Source(entry, identity(entry.path) if entry.path.exists() else "")


def reported(model: str) -> tuple[Source, WeightReport]:
    """A model whose page shows its report. The cache may have dropped it since: then the page, loaded again, makes it anew."""
    found = source(model)
    if found.report is None:
        raise PreventUpdate
    return found, found.report


@functools.lru_cache(maxsize=4)
def _report(key: str) -> WeightReport:
    report = WeightReport.load(services().derived, key)
    if report is None:
        raise LookupError(key)
    return report


@functools.lru_cache(maxsize=4)
def _weights(key: str, path: str) -> Weights:
    """Headers alone; the key changes with the file."""
    return open_weights(path)


# -- what is not there yet ----------------------------------------------------------------------------------------------------------


def report_missing(found: Source) -> html.Div:
    """The state of the page before the model was read: the job that does it, started at once where it takes seconds."""
    n_params = found.entry.info.n_params if found.entry.info else 0
    seconds = n_params / _WEIGHTS_PER_S
    words = f"Every tensor is read once through, {n_params:,} weights: {_about(seconds)} on two cores. The result is kept until the file changes."
    button = html.Button("Read them", id="weights-compute", className="btn btn-primary", n_clicks=1 if seconds <= _AT_ONCE_S else 0)
    return html.Div([empty(f"The weights of {found.entry.name} have not been read yet", words, button, "weight"), dcc.Store(id="weights-job"), dcc.Store(id="weights-ready"),
                     html.Div(id="weights-progress", className="home-progress")])  # fmt: skip


def detail_seconds(shape: tuple[int, int]) -> float:
    """About how long norms and singular values of a matrix take on two cores."""
    size, short = shape[0] * shape[1], min(shape)
    return size * (short if short <= FULL_SIDE else 20 * N_LEADING) / _MULTIPLY_ADDS_PER_S + size / _WEIGHTS_PER_S


def detail_missing(shape: tuple[int, int]) -> html.Div:
    """In place of norms and singular values, before they were computed."""
    seconds = detail_seconds(shape)
    at_once = seconds <= _AT_ONCE_S / 2
    button = html.Button("Compute them", id="weights-detail-compute", className="btn btn-primary", n_clicks=1 if at_once else 0)
    return html.Div([empty("Norms and singular values", f"This matrix is read a few times: {_about(seconds)} on two cores.", button, "circle-dashed"),
                     dcc.Store(id="weights-detail-job"), html.Div(id="weights-detail-progress", className="home-progress")])  # fmt: skip


def follow(job_id: str | None) -> tuple[Any, Any]:
    """(what is shown of a job, its id once it is done)."""
    job = job_or_none(job_id)
    if job is None:
        return no_update, no_update
    if job.state == "done":
        return no_update, job.id
    return job_panel(job) if job.is_active else error(job.error or f"The job was {job.state.replace('_', ' ')}."), no_update


def _about(seconds: float) -> str:
    return f"about {max(1, round(seconds)):,} seconds" if seconds < 120 else f"about {seconds / 60:,.0f} minutes"


# -- the picture of a matrix ----------------------------------------------------------------------------------------------------------


def picture(matrix: Matrix, region: Region | None, detail: Callable[[], TensorDetail | None]) -> tuple[NDArray[np.float32], tuple[Edges, Edges]] | None:
    """The matrix, or a part of it, in at most MAP_ROWS x MAP_COLUMNS cells, and the cells' edges in the matrix' indices.

    What is small enough is read from the file, so that the picture is exact once each cell is a weight; a larger part is cut out of the
    map that the detail job made; None while there is none.
    """
    top, bottom, left, right = region or (0, matrix.shape[0], 0, matrix.shape[1])
    if (bottom - top) * matrix.shape[1] <= READ_AT_ONCE:
        seen = SignedMap((bottom - top, right - left), MAP_ROWS, MAP_COLUMNS)
        for first, block in matrix.blocks((top, bottom), (left, right)):
            seen.add(first - top, block)
        return seen.cells, (seen.row_edges + top, seen.column_edges + left)
    known = detail()
    if known is None:
        return None
    edges = [bucket_edges(n, min(MAP_SIDE, n)) for n in matrix.shape]
    spans = [slice(int(np.searchsorted(e, a, side="right")) - 1, int(np.searchsorted(e, b, side="left"))) for e, a, b in zip(edges, (top, left), (bottom, right), strict=True)]
    cells, rows, columns = reduce_signed(known.map[spans[0], spans[1]], MAP_ROWS, MAP_COLUMNS)
    return cells, (edges[0][spans[0].start :][rows], edges[1][spans[1].start :][columns])


def read_region(text: str | None, shape: tuple[int, int]) -> Region | None:
    """ "10-20,0-64" (rows, columns, ends left out) -> a region inside the matrix; None for the whole, and for anything that is not one."""
    try:
        rows, columns = (part.split("-") for part in (text or "").split(","))
        return clipped((float(rows[0]), float(rows[1]), float(columns[0]), float(columns[1])), shape)
    except (ValueError, IndexError, OverflowError):
        return None


def read_place(text: str | None) -> list[int] | None:
    """ "788,2427" -> [row, column]; None for anything that is not one."""
    parts = (text or "").split(",")
    return [int(part) for part in parts] if len(parts) == 2 and all(part.isdecimal() and len(part) < 16 for part in parts) else None


def clipped(region: tuple[float, float, float, float], shape: tuple[int, int]) -> Region | None:
    """Whole rows and columns that a zoom touches, inside the matrix and at least 4 each; None if that is all of it."""
    found: list[int] = []
    for low, high, n in ((*region[:2], shape[0]), (*region[2:], shape[1])):
        start, stop = max(int(np.floor(min(low, high))), 0), min(int(np.ceil(max(low, high))), n)
        start = max(min(start, n - 4), 0)
        found += [start, max(stop, min(start + 4, n))]
    whole = found == [0, shape[0], 0, shape[1]]
    return None if whole else (found[0], found[1], found[2], found[3])


def axis_names(row: dict[str, Any]) -> tuple[str, str]:
    """What the rows and columns of a tensor's matrices are, as far as its name tells."""
    first = {"embed.W_E": "token", "unembed.W_U": "token", "pos_embed.W_pos": "position"}
    return next(((first[name], "d_model") for name in row["canonical"] if name in first), ("row", "column"))


def stored_tensor(found: Source, row: dict[str, Any]) -> Weight:
    return found.weights.stored(row["name"])

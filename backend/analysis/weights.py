"""What a tensor of weights looks like: moments, histogram, outliers, largest weights, norms of rows and columns.

A tensor is read in pieces and never whole, twice. The first pass takes the moments: each piece's own, about its own mean, merged
with the update of Chan, Golub and LeVeque (1979) for higher moments (Pebay 2008, SAND2008-6212, eq. 3.1), so that a large mean
costs no digits. The second pass counts what needs the first one's result: a linear histogram whose range is known by then, values
near zero, values beyond 6 standard deviations, and the largest |w| with their places. Dequantizing twice costs less than
any way around it. NaN and infinite values are counted and left out of everything else.

The histogram's range is a power of two, +-2^e with 2^(e-1) <= max|w| < 2^e, in N_BINS equal bins: so a bin's number is exact in
float32, and histograms of different tensors are brought to one range by adding neighbours, exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array

from backend.analysis.activations import bucket_edges

N_BINS = 512
N_LARGEST = 8
OUTLIER_SIGMAS = 6.0
NEAR_ZERO_SIGMAS = 0.01
# name -> how it is defined, in words for the page; the order is that of the table's columns
STATISTICS = {
    "mean": "mean",
    "std": "standard deviation (population)",
    "min": "smallest",
    "max": "largest",
    "abs_max": "largest |w|",
    "kurtosis": "Pearson's kurtosis, 3 for a normal distribution",
    "near_zero": f"share of |w| up to {NEAR_ZERO_SIGMAS:g} standard deviations",
    "l2": "L2 (Frobenius) norm",
    "outliers": f"weights farther than {OUTLIER_SIGMAS:g} standard deviations from the mean",
    "n_nan": "NaN",
    "n_inf": "infinite",
}
# Components in the order of a forward pass, by how their names begin; what is not here comes after, in the order of the file.
_ORDER = (
    "ln1.", "attn.W_Q", "attn.b_Q", "attn.q_", "attn.W_K", "attn.b_K", "attn.k_", "attn.W_V", "attn.b_V", "attn.W_O", "attn.b_O", "attn.", "ln1_post.", "ln2.",
    "mlp.W_router", "mlp.b_router", "mlp.W_gate", "mlp.b_gate", "mlp.W_in", "mlp.b_in", "mlp.W_out", "mlp.b_out",
    "mlp.experts.W_gate", "mlp.experts.W_in", "mlp.experts.W_out", "mlp.experts.", "mlp.shared.", "mlp.", "ln2_post.",
)  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)(?:blocks|blk|layers?|h)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Moments:
    """Of the finite values: number, mean, sums of the 2nd to 4th power of the distance from the mean, least and greatest; and the counts of the others."""

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    n_nan: int = 0
    n_inf: int = 0

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of values together (Pebay 2008, eq. 3.1)."""
        n_nan, n_inf = self.n_nan + other.n_nan, self.n_inf + other.n_inf
        if not self.n or not other.n:
            kept = other if other.n else self
            return Moments(kept.n, kept.mean, kept.m2, kept.m3, kept.m4, kept.low, kept.high, n_nan, n_inf)
        a, b, n = self.n, other.n, self.n + other.n
        delta = other.mean - self.mean
        m2 = self.m2 + other.m2 + delta**2 * a * b / n
        m3 = self.m3 + other.m3 + delta**3 * a * b * (a - b) / n**2 + 3 * delta * (a * other.m2 - b * self.m2) / n
        m4 = self.m4 + other.m4 + delta**4 * a * b * (a * a - a * b + b * b) / n**3
        m4 += 6 * delta**2 * (a * a * other.m2 + b * b * self.m2) / n**2 + 4 * delta * (a * other.m3 - b * self.m3) / n
        return Moments(n, self.mean + delta * b / n, m2, m3, m4, min(self.low, other.low), max(self.high, other.high), n_nan, n_inf)

    @property
    def std(self) -> float:
        return math.sqrt(self.m2 / self.n) if self.n else math.nan

    @property
    def abs_max(self) -> float:
        return max(-self.low, self.high) if self.n else math.nan

    @property
    def kurtosis(self) -> float:
        return self.n * self.m4 / self.m2**2 if self.m2 else math.nan

    @property
    def l2(self) -> float:
        return math.sqrt(self.m2 + self.n * self.mean**2)

    def to_json(self) -> list[float]:
        return list(astuple(self))


@dataclass(frozen=True)
class Counts:
    """What the second pass found. bins: (N_BINS,) int64; largest: up to N_LARGEST of (flat index, w), the largest |w| first."""

    bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(N_BINS, np.int64))
    near_zero: int = 0
    outliers: int = 0
    largest: tuple[tuple[int, float], ...] = ()

    def merged(self, other: Counts) -> Counts:
        largest = sorted((*self.largest, *other.largest), key=lambda item: (-abs(item[1]), item[0]))[:N_LARGEST]
        return Counts(self.bins + other.bins, self.near_zero + other.near_zero, self.outliers + other.outliers, tuple(largest))


def moments(pieces: Iterable[NDArray[np.float32]]) -> tuple[Moments, list[float]]:
    """Moments of all pieces together, and the largest |w| of each piece. pieces: flat float32, all but the last of one size."""
    found, peaks = Moments(), []
    centred = squares = np.empty(0)
    for values in pieces:
        if len(centred) < len(values):
            centred, squares = np.empty(len(values)), np.empty(len(values))
        one = _piece_moments(values, centred, squares)
        found = found.merged(one)
        peaks.append(one.abs_max)
    return found, peaks


def _piece_moments(values: NDArray[np.float32], centred: NDArray[np.float64], squares: NDArray[np.float64]) -> Moments:
    d, n_nan, n_inf = centred[: len(values)], 0, 0
    np.copyto(d, values)
    total = float(d.sum())
    if not math.isfinite(total):  # the sum of finite float32 values is finite in float64
        n_nan = int(np.isnan(values).sum())
        values = values[np.isfinite(values)]
        n_inf = len(d) - len(values) - n_nan
        d = d[: len(values)]
        np.copyto(d, values)
        total = float(d.sum())
    n = len(values)
    if not n:
        return Moments(n_nan=n_nan, n_inf=n_inf)
    mean = total / n
    d -= mean
    d2 = np.multiply(d, d, out=squares[:n])
    return Moments(n, mean, float(d2.sum()), float(np.dot(d2, d)), float(np.dot(d2, d2)), float(values.min()), float(values.max()), n_nan, n_inf)


def histogram_exponent(abs_max: float) -> int:
    """e of the range +-2^e; 0 where every value is 0 or none is finite."""
    if not abs_max > 0 or not math.isfinite(abs_max):
        return 0
    return max(math.frexp(abs_max)[1], -100)  # far below any weight; keeps the scale inside float32


def bin_edges(exponent: int) -> NDArray[np.float64]:
    """(N_BINS + 1,) edges of the histogram of that range; a bin holds its left edge."""
    return np.linspace(-(2.0**exponent), 2.0**exponent, N_BINS + 1)


def counts(pieces: Iterable[NDArray[np.float32]], found: Moments, floor: float, start: int = 0) -> Counts:
    """The second pass over a tensor, or over a part of it that begins at the flat index `start`.

    found: the moments of the whole tensor; floor: see `largest_floor`.
    """
    scale = np.float32(2.0 ** (N_BINS.bit_length() - 2 - histogram_exponent(found.abs_max)))
    near, low, high = _down(NEAR_ZERO_SIGMAS * found.std), -_down(OUTLIER_SIGMAS * found.std - found.mean), _down(OUTLIER_SIGMAS * found.std + found.mean)
    bins, near_zero, outliers, largest = np.zeros(N_BINS, np.int64), 0, 0, Counts()
    binner = _Binner(0)
    for values in pieces:
        finite = values[np.isfinite(values)] if found.n_nan or found.n_inf else values
        if len(finite):
            binner = binner if len(binner.scaled) == len(finite) else _Binner(len(finite))
            bins += binner.count(finite, scale)
            size = np.abs(finite, out=binner.scaled)
            near_zero += int(np.count_nonzero(size <= near))
            top = size.max()
            if top > min(-low, high):
                outliers += int(np.count_nonzero(finite < low) + np.count_nonzero(finite > high))
            if top >= floor:
                largest = largest.merged(Counts(largest=_largest_of(values, floor, start)))
        start += len(values)
    return Counts(bins, near_zero, outliers, largest.largest)


class _Binner:
    """Counts n values into bins: a sparse matrix of one column with a 1 in the row of each value's bin, times 1, adds up the rows' ones.

    So np.bincount, which takes half as long again and lets no other thread run for the greater part of it.
    """

    def __init__(self, n: int) -> None:
        self.scaled = np.empty(n, np.float32)
        self._one = np.ones(1, np.int32)
        self._matrix = csc_array((np.ones(n, np.int32), np.zeros(n, np.int32), np.array([0, n], np.int32)), shape=(N_BINS, 1))

    def count(self, values: NDArray[np.float32], scale: np.float32) -> NDArray[np.int64]:
        t = np.multiply(values, scale, out=self.scaled)
        np.floor(t, out=t)
        t += N_BINS // 2
        np.clip(t, 0, N_BINS - 1, out=t)  # a file that changes between the two passes must not write outside the bins
        np.copyto(self._matrix.indices, t, casting="unsafe")
        return (self._matrix @ self._one).astype(np.int64)


def largest_floor(peaks: Sequence[float]) -> float:
    """A bound that at least N_LARGEST of the tensor's |w| reach: the peak that is N_LARGEST-th among those of its pieces, or 0."""
    usable = sorted((peak for peak in peaks if math.isfinite(peak)), reverse=True)
    return usable[N_LARGEST - 1] if len(usable) >= N_LARGEST else 0.0


def _largest_of(values: NDArray[np.float32], floor: float, start: int) -> tuple[tuple[int, float], ...]:
    """The largest |w| of one piece that reach `floor`."""
    size = np.where(np.isfinite(values), np.abs(values), -1)
    if not floor:  # few pieces: the largest of each are asked for
        n = min(N_LARGEST, int(np.count_nonzero(size >= 0)))
        floor = float(np.partition(size, len(size) - n)[len(size) - n])
    at = np.flatnonzero(size >= np.float32(floor))
    at = at[np.argsort(-size[at], kind="stable")][:N_LARGEST]
    return tuple((start + int(i), float(values[i])) for i in at)


def _down(limit: float) -> np.float32:
    """The largest float32 that is not above `limit`: comparing float32 values with it is comparing them with `limit` itself."""
    near = np.float32(limit)
    return np.nextafter(near, np.float32(-np.inf)) if float(near) > limit else near


def statistics(found: Moments, counted: Counts) -> dict[str, float]:
    """name -> value, the names of STATISTICS; NaN where no value is finite."""
    return {
        "mean": found.mean if found.n else math.nan,
        "std": found.std,
        "min": found.low if found.n else math.nan,
        "max": found.high if found.n else math.nan,
        "abs_max": found.abs_max,
        "kurtosis": found.kurtosis,
        "near_zero": counted.near_zero / found.n if found.n else math.nan,
        "l2": found.l2,
        "outliers": counted.outliers,
        "n_nan": found.n_nan,
        "n_inf": found.n_inf,
    }


def rebinned(bins: NDArray[np.int64], exponent: int, wider: int) -> NDArray[np.int64]:
    """A histogram of range +-2^exponent as one of range +-2^wider, (N_BINS,) each; exact, since the edges of the wider one are among its own."""
    factor = 1 << (wider - exponent)
    out = np.zeros(N_BINS, bins.dtype)
    if factor >= N_BINS:  # all of it lies in the two bins beside zero
        out[N_BINS // 2 - 1], out[N_BINS // 2] = bins[: N_BINS // 2].sum(), bins[N_BINS // 2 :].sum()
        return out
    width = N_BINS // factor
    out[(N_BINS - width) // 2 : (N_BINS + width) // 2] = bins.reshape(width, factor).sum(axis=1)
    return out


# -- names ----------------------------------------------------------------------------------------------------------------------


def place(native: str, canonical: Sequence[str]) -> tuple[int | None, str]:
    """(layer, component) of a stored tensor: ("blocks.3.mlp.W_out",) -> (3, "mlp.W_out"); a fused one joins its parts, "attn.W_Q + W_K + W_V".

    A tensor without a canonical name keeps its own, less the layer and the number of an expert.
    """
    name = canonical[0] if canonical else _EXPERT.sub(".experts.", native)
    match = _LAYER.search(name)
    layer = int(match[1]) if match else None
    component = name[match.end() :] if match else name
    parts = list(dict.fromkeys(other.rpartition(".")[2] for other in canonical[1:])) if match else []
    return layer, " + ".join([component, *(part for part in parts if not component.endswith(part))])


def by_component(rows: Iterable[dict[str, Any]]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """component -> layer -> the tensors of that place (several where experts are stored one by one), in the order of a forward pass.

    Tensors outside the layers, and those without numbers, are left out.
    """
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["layer"] is not None and not row["note"]:
            found.setdefault(row["component"], {}).setdefault(row["layer"], []).append(row)
    order = {name: next((i for i, prefix in enumerate(_ORDER) if name.startswith(prefix)), len(_ORDER)) for name in found}
    return {name: found[name] for name in sorted(found, key=lambda name: order[name])}


def joint(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The statistics of several tensors taken together; outliers and near-zero weights are counted against each tensor's own spread."""
    found = Moments()
    for row in rows:
        found = found.merged(Moments(*row["moments"]))
    near = sum(row["near_zero"] * row["moments"][0] for row in rows if row["moments"][0])
    return statistics(found, Counts(near_zero=near, outliers=int(sum(row["outliers"] for row in rows))))


# -- super weights --------------------------------------------------------------------------------------------------------------


def super_weight_candidates(rows: Iterable[dict[str, Any]], each: int = 3) -> list[dict[str, Any]]:
    """The `each` largest |w| of every layer's W_out in units of its standard deviation, the farthest out first.

    Yu et al. 2024 (arXiv 2411.07191) found the weights without which a model writes nonsense in W_out of an early layer, among the
    largest of their matrix; most large weights are none, so these are candidates and no more.
    Returns {"tensor", "layer", "component", "index", "value", "sigmas", "rank"}; index and rank (1: the largest |w|) are those in the stored tensor.
    """
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["layer"] is None or row["note"] or not row["std"] > 0 or not re.search(r"(^|\.)W_out( |$)", row["component"]):
            continue
        for rank, (index, value) in enumerate(row["largest"][:each], start=1):
            place = found.setdefault((row["layer"], row["component"]), [])
            place.append({"tensor": row["name"], "layer": row["layer"], "component": row["component"], "index": index, "value": value,
                          "sigmas": abs(value) / row["std"], "rank": rank})  # fmt: skip
    farthest = [sorted(place, key=lambda item: -item["sigmas"])[:each] for place in found.values()]
    return sorted((item for place in farthest for item in place), key=lambda item: -item["sigmas"])


# -- one matrix -------------------------------------------------------------------------------------------------------------------


class Norms:
    """L2 norms of the rows (row,) and columns (column,) of a matrix, from blocks of whole rows in any order."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._rows, self._columns = np.zeros(shape[0]), np.zeros(shape[1])

    def add(self, first: int, block: NDArray[np.float32]) -> None:
        """block: (n, column), the rows first .. first + n - 1."""
        squares = np.square(block, dtype=np.float64)
        self._rows[first : first + len(block)] = squares.sum(axis=1)
        self._columns += squares.sum(axis=0)

    @property
    def rows(self) -> NDArray[np.float32]:
        return np.sqrt(self._rows).astype(np.float32)

    @property
    def columns(self) -> NDArray[np.float32]:
        return np.sqrt(self._columns).astype(np.float32)


class SignedMap:
    """`activations.reduce_signed` of a matrix that arrives in blocks of whole rows, in any order.

    cells: (<= rows, <= columns), each the value of the largest |w| among those it stands for, NaN where one of them is NaN.
    """

    def __init__(self, shape: tuple[int, int], rows: int, columns: int) -> None:
        self.row_edges, self.column_edges = bucket_edges(shape[0], min(rows, shape[0])), bucket_edges(shape[1], min(columns, shape[1]))
        size = (len(self.row_edges) - 1, len(self.column_edges) - 1)
        self._high, self._low = np.full(size, -np.inf, np.float32), np.full(size, np.inf, np.float32)

    def add(self, first: int, block: NDArray[np.float32]) -> None:
        """block: (n, column), the rows first .. first + n - 1."""
        cells = np.searchsorted(self.row_edges, np.arange(first, first + len(block)), side="right") - 1
        starts = np.flatnonzero(np.diff(cells, prepend=-1))
        for bound, kept in ((np.maximum, self._high), (np.minimum, self._low)):
            reduced = bound.reduceat(bound.reduceat(block, starts, axis=0), self.column_edges[:-1], axis=1)
            kept[cells[starts]] = bound(kept[cells[starts]], reduced)

    @property
    def cells(self) -> NDArray[np.float32]:
        return np.where(-self._low > self._high, self._low, self._high)

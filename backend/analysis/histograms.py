"""Histograms over different bins, brought to the same ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Edges = NDArray[np.floating]
Counts = NDArray[np.floating]


def on_edges(edges: Edges, counts: Counts, wanted: Edges) -> NDArray[np.float64]:
    """Counts of a histogram, (bin,), over other bins, (wanted - 1,), each bin's entries spread evenly over it: exact where the edges coincide."""
    below = np.concatenate([[0.0], np.cumsum(np.asarray(counts, np.float64))])
    return np.diff(np.interp(wanted, edges, below))


def common(histograms: Sequence[tuple[Edges, Counts]], n_bins: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(edges (bin + 1,), counts (histogram, bin)) over `n_bins` equal bins that hold all of them; empty histograms have counts of 0."""
    filled = [(np.asarray(edges, np.float64), np.asarray(counts, np.float64)) for edges, counts in histograms]
    held = [edges for edges, counts in filled if len(counts) and counts.sum()]
    if not held:
        return np.zeros(n_bins + 1), np.zeros((len(filled), n_bins))
    low, high = min(float(edges[0]) for edges in held), max(float(edges[-1]) for edges in held)
    wanted = np.linspace(low, high if high > low else low + 1, n_bins + 1)
    return wanted, np.stack([on_edges(edges, counts, wanted) if len(counts) else np.zeros(n_bins) for edges, counts in filled])

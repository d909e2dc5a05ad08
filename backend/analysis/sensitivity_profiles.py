"""Scores of a model's tensors as tables of layer and component: what figures draw of a sensitivity run, and what comparisons set side by side.

    pooled       histograms with edges of their own, added on common edges: every bin's entries are taken to lie evenly in it
    resampled    a profile at other relative depths, (layer + 0.5) / n_layers, linear between layers: for models of different depth
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Profile:
    """Tensors by (component, layer); several tensors of one place are one, weighted by their size. NaN (0 in n and top): there is none.

    n: weights    mean, maximum: of their scores    top: how many are among the top weights
    """

    components: tuple[str, ...]
    layers: tuple[int, ...]
    n: NDArray[np.float64]
    mean: NDArray[np.float64]
    maximum: NDArray[np.float64]
    top: NDArray[np.float64]

    @property
    def layer_mean(self) -> NDArray[np.float64]:
        """(layer,) mean score of all weights of the layer."""
        return _weighted(self.mean, self.n)

    @property
    def layer_total(self) -> NDArray[np.float64]:
        """(layer,) sum of all scores of the layer."""
        return np.asarray(np.nansum(self.mean * self.n, axis=0))


def profile(component: Sequence[str], layer: Sequence[int], n: ArrayLike, mean: ArrayLike, maximum: ArrayLike, top: ArrayLike) -> Profile:
    """The table of tensors given as columns. Components stay in the order in which they first come."""
    components, layers = tuple(dict.fromkeys(component)), tuple(sorted(set(layer)))
    at = (np.array([components.index(each) for each in component], int), np.array([layers.index(each) for each in layer], int))
    sizes, means, maxima, tops = (np.asarray(each, float) for each in (n, mean, maximum, top))
    shape = (len(components), len(layers))
    known = np.isfinite(means)
    count, weights, total, best, chosen = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.full(shape, np.nan), np.zeros(shape)
    np.add.at(count, at, sizes)
    np.add.at(weights, at, np.where(known, sizes, 0))
    np.add.at(total, at, np.where(known, sizes * np.nan_to_num(means), 0))
    np.fmax.at(best, at, maxima)
    np.add.at(chosen, at, tops)
    mean_of = np.divide(total, weights, out=np.full(shape, np.nan), where=weights > 0)
    return Profile(components, layers, count, mean_of, best, chosen)


def pooled(edges: Sequence[ArrayLike], counts: Sequence[ArrayLike], onto: NDArray[np.float64]) -> NDArray[np.float64]:
    """(bin,) entries of all histograms between the edges `onto`; entries outside are in no bin."""
    found = np.zeros(len(onto) - 1)
    for own, each in zip(edges, counts, strict=True):
        if len(np.asarray(each)):
            found += np.diff(np.interp(onto, np.asarray(own, float), np.concatenate([[0.0], np.cumsum(np.asarray(each, float))])))
    return found


def resampled(values: NDArray[np.float64], depths: int) -> NDArray[np.float64]:
    """(..., layer) to (..., depths); a row that is not finite everywhere becomes NaN."""
    n_layers = values.shape[-1]
    own, other = ((np.arange(size) + 0.5) / size for size in (n_layers, depths))
    rows = [np.interp(other, own, row) if np.isfinite(row).all() else np.full(depths, np.nan) for row in values.reshape(-1, n_layers)]
    return np.array(rows).reshape(*values.shape[:-1], depths)


def _weighted(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    known = np.isfinite(values)
    size = np.where(known, weights, 0).sum(axis=0)
    return np.divide(np.nansum(values * weights, axis=0), size, out=np.full(size.shape, np.nan), where=size > 0)

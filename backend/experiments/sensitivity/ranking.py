"""The weights that a metric puts first and last, kept while their scores stream by; controls to hold them against; and how far two rankings agree."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.analysis import sensitivity as analysis
from backend.analysis.selection import Selected, TopAndBottom, joined
from backend.engines import Engine, ShouldStop, never_stop
from backend.engines.hf import HfEngine
from backend.errors import LayerscopeError, ranges
from backend.experiments import Progress, no_progress
from backend.experiments.sensitivity import MAX_TOPK, MODES
from backend.experiments.sensitivity.contracts import Chosen, Ranking
from backend.experiments.sensitivity.inputs import weights_of
from backend.experiments.sensitivity.scores import BACKWARD, Windows, scored
from backend.weights import Weights

RANKING = "tensors ranked"


def matrices(model: Engine | Weights, layers: Sequence[int] | None = None, components: Sequence[str] | None = None) -> tuple[str, ...]:
    """Canonical names of a model's matrices in model order; components None: those of attention, MLPs and experts.

    Raises LayerscopeError for a layer or a component that the model does not have, naming those it has.
    """
    weights = model if isinstance(model, Weights) else weights_of(model)
    info = weights.info
    every = [(name, *place(name)) for name in weights if name.rpartition(".")[2].startswith("W_")]
    if not every:
        raise LayerscopeError(f"{info.name} has the architecture {info.architecture[:40]!r}, whose weights have no canonical names; none can be ranked.")
    for layer in layers or ():
        if not 0 <= layer < info.n_layers:
            raise LayerscopeError(f"Layer {layer} is outside 0-{info.n_layers - 1} of {info.name}.")
    there = list(dict.fromkeys(component for _, _, component in every))
    for component in components or ():
        if component not in there:
            raise LayerscopeError(f"{info.name} has no component {component[:60]!r}; it has {', '.join(there)}.")
    found = tuple(name for name, layer, component in every
                  if (layers is None or layer in layers) and (component in components if components is not None else layer is not None))  # fmt: skip
    if not found:
        where = f"layers {ranges(sorted(set(layers)))}" if layers else "no layer"
        raise LayerscopeError(f"{info.name} has no {' or '.join(components or ('matrix',))} in {where}.")
    return found


def place(name: str) -> tuple[int | None, str]:
    """(layer, component) of a canonical name: "blocks.3.mlp.W_out" -> (3, "mlp.W_out")."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def rank(engine: Engine, windows: Windows, metric: str, names: Sequence[str], k: int, mode: str = "global", *, seed: int = 0, probes: int = 8,
         progress: Progress = no_progress, should_stop: ShouldStop = never_stop) -> Ranking:  # fmt: skip
    """The k weights with the highest scores of all `names` (mode global) or of each layer (per_layer), in one stream of scores.

    bottom: in each tensor as many of the lowest scores as the tensor has among the top, lowest first within a scope. Scores that are not
    finite are in neither; each row of `tensors` has their number under not_finite. Equal scores rank by place, so that the same seed gives
    the same ranking. Memory: about 100 bytes an entry of the top, and a few copies of the largest tensor. Raises LayerscopeError as
    `scored` does, and for an unknown mode, a k below 1 or above what a scope holds.
    """
    shapes = _shapes(engine, names)
    scopes = _scopes(names, shapes, k, mode)
    kept = {scope: TopAndBottom(k) for scope in scopes.values()}
    rows: list[dict[str, Any]] = []
    for i, (name, scores, weights) in enumerate(scored(engine, windows, metric, names, seed, probes, progress, should_stop)):
        kept[scopes[name]].add(i, scores, weights)
        layer, component = place(name)
        rows.append({"name": name, "layer": layer, "component": component, **analysis.summary(scores)})
        progress(RANKING, i + 1, len(names))
    top = _chosen(names, {scope: each.top() for scope, each in kept.items()})
    bottom = _chosen(names, {scope: each.bottom() for scope, each in kept.items()})
    for i, n_top in enumerate(np.bincount(top.tensor, minlength=len(names)).tolist()):
        rows[i]["n_top"] = n_top
    return Ranking(metric, mode, top, bottom, rows, shapes)


def random_like(ranking: Ranking, seed: int, weight: Callable[[str], NDArray[np.float32]] | None = None) -> Chosen:
    """As many weights of each tensor as the top has there, drawn without the top's own; in the order of their places within a scope.

    value is what `weight` (as Engine.weight) gives, NaN without it; score is NaN: nobody keeps the scores of all weights.
    Raises LayerscopeError for a tensor of which the top takes more than half.
    """
    top = ranking.top
    parts: list[Selected] = []
    scopes: list[NDArray[np.int64]] = []
    for i in np.unique(top.tensor).tolist():
        mine = top.tensor == i
        name, taken = top.names[i], np.sort(top.at[mine])
        left = math.prod(ranking.shapes[name]) - len(taken)
        if left < len(taken):
            raise LayerscopeError(f"The top has {len(taken):,} of the {left + len(taken):,} weights of {name}, more than half: there are not as many others to draw.")
        # Numbers among those that are left, then as places.
        drawn = np.sort(np.random.default_rng([seed, i]).choice(left, len(taken), replace=False)).astype(np.int64)
        at = drawn + np.searchsorted(taken - np.arange(len(taken)), drawn, side="right")
        value = np.full(len(at), np.nan, np.float32) if weight is None else weight(name).reshape(-1)[at]
        parts.append(Selected(np.full(len(at), i, np.int64), at, value, np.full(len(at), np.nan, np.float32)))
        scopes.append(top.scope[mine])
    drawn_from = joined(parts)
    return Chosen(top.names, drawn_from.tensor, drawn_from.at, drawn_from.value, drawn_from.score, np.concatenate(scopes))


def agreement(a: Ranking, b: Ranking, ks: Sequence[int]) -> dict[str, Any]:
    """{"jaccard": {"k": overlap of the k best of each scope}, "spearman": of the ranks within scopes, over the union of what both kept, or None}."""
    names = list(dict.fromkeys((*a.top.names, *b.top.names)))
    offsets = dict(zip(names, np.cumsum([0, *(math.prod((a.shapes | b.shapes)[name]) for name in names)]).tolist(), strict=False))
    (ids_a, ranks_a), (ids_b, ranks_b) = (_numbered(each.top, offsets) for each in (a, b))
    overlap = {str(k): analysis.jaccard(ids_a[ranks_a <= k], ids_b[ranks_b <= k]) for k in ks}
    return {"jaccard": overlap, "spearman": analysis.spearman(ids_a, ranks_a, ids_b, ranks_b)}


def gradient_flow(engine: Engine, windows: Windows, names: Sequence[str] | None = None, progress: Progress = no_progress,
                  should_stop: ShouldStop = never_stop) -> dict[str, Any]:  # fmt: skip
    """{layers, components, norm: [component][layer] L2 norms of dL/dW (None: no such tensor, or not finite), n_windows}; names None: all matrices of the layers.

    Raises LayerscopeError for a GGUF model, which has no gradients.
    """
    if not isinstance(engine, HfEngine):
        raise LayerscopeError(f"{engine.info.name} is a GGUF file, and llama.cpp gives no gradients; gradient flow needs a Hugging Face model.")
    gradients = engine.gradients(matrices(engine) if names is None else names)
    norms: dict[tuple[int | None, str], float] = {}
    for name, gradient in gradients.mean(windows, should_stop, lambda done: progress(BACKWARD, done, len(windows))):
        norm = float(np.sqrt(np.einsum("i,i->", gradient.reshape(-1), gradient.reshape(-1), dtype=np.float64)))
        norms[place(name)] = norm
    layers = sorted({layer for layer, _ in norms if layer is not None})
    components = list(dict.fromkeys(component for layer, component in norms if layer is not None))
    table = [[_finite(norms.get((layer, component))) for layer in layers] for component in components]
    return {"layers": layers, "components": components, "norm": table, "n_windows": len(windows)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _shapes(engine: Engine, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    weights = weights_of(engine)
    return {name: weights.lazy(name).shape for name in names}


def _scopes(names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], k: int, mode: str) -> dict[str, int]:
    """Name -> its scope, in which k weights are kept."""
    if mode not in MODES:
        raise LayerscopeError(f"There is no mode {mode[:40]!r}; modes are {', '.join(MODES)}.")
    if not 1 <= k <= MAX_TOPK:
        raise LayerscopeError(f"The number of top weights is {k:,}; it must be between 1 and {MAX_TOPK:,}.")
    scopes: dict[str, int] = {}
    for name in names:
        layer, _ = place(name)
        if mode == "per_layer" and layer is None:
            raise LayerscopeError(f"{name[:80]} is in no layer, and mode per_layer ranks within layers; mode global takes it.")
        scopes[name] = 0 if mode == "global" or layer is None else layer
    for scope in dict.fromkeys(scopes.values()):
        size = sum(math.prod(shapes[name]) for name in names if scopes[name] == scope)
        if k > size:
            where = "the chosen matrices" if mode == "global" else f"the chosen matrices of layer {scope}"
            raise LayerscopeError(f"The top {k:,} are asked for, and {where} have {size:,} weights.")
    return scopes


def _chosen(names: Sequence[str], of_scopes: Mapping[int, Selected]) -> Chosen:
    scope = np.repeat(np.array(list(of_scopes), np.int64), [len(part) for part in of_scopes.values()])
    every = joined(list(of_scopes.values()))
    return Chosen(tuple(names), every.tensor, every.at, every.value, every.score, scope)


def _numbered(top: Chosen, offsets: Mapping[str, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(a number for each weight that is the same in every ranking, its rank within its scope, from 1)."""
    ids = np.array([offsets[name] for name in top.names], np.int64)[top.tensor] + top.at
    ranks = np.zeros(len(ids), np.int64)
    for scope in np.unique(top.scope):
        mine = top.scope == scope
        ranks[mine] = np.arange(1, int(mine.sum()) + 1)
    return ids, ranks

"""What the Activations page says of a whole site: which sites it can show, their norms and moments layer by layer, what stands out."""

from __future__ import annotations

import numpy as np
from dash import html
from numpy.typing import NDArray

from backend.analysis.activations import STATISTICS, l2_norms, site_statistics, top_dimensions
from backend.sites import SITES
from backend.trace import Trace
from components.drawn import still
from components.figures.activations import STATISTIC_TITLES
from components.services import services
from components.token_label import token_label

# Attention maps have a page of their own; expert indices are names, not sizes; a head's own output needs the model's weights.
_LEFT_OUT = ("result", "expert_indices")


def viewable_sites(trace: Trace) -> list[str]:
    """Sites with layers and dimensions that this trace can give, in the order of computation."""
    return [name for name, site in SITES.items() if site.per_layer and not site.is_attention_map and name not in _LEFT_OUT and trace.has(name)]


def site_summary(trace: Trace, site: str) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """Norms (layer, pos) and each statistic (layer,) of every layer of a site; computed once a trace and site."""
    derived, keys = services().derived, (("norms", trace.id, site), ("statistics", trace.id, site))
    norms, statistics = (derived.get_array(key) for key in keys)
    if norms is None or statistics is None:
        found = [(l2_norms(values), site_statistics(values)) for values in (trace[site, layer] for layer in trace.layers(site))]
        norms = np.stack([lengths for lengths, _ in found])
        statistics = np.array([[moments[name] for name in STATISTICS] for _, moments in found], np.float32)
        for key, values in zip(keys, (norms, statistics), strict=True):
            derived.put_array(key, values)
    return norms, {name: statistics[:, i] for i, name in enumerate(STATISTICS)}


def largest_value(trace: Trace, flat: NDArray[np.float32]) -> str:
    """Where the layer's largest value lies; the three dimensions that stand out most."""
    dims = top_dimensions(flat, 3)
    at = int(np.argmax(np.nan_to_num(np.abs(flat[:, dims[0]]), nan=np.inf)))
    token = token_label(trace.token_texts[at], at in trace.special, 12)
    others = ", ".join(str(d) for d in dims[1:])
    also = f" Then dimensions {others}." if others else ""
    return f"{flat.shape[0]} tokens × {flat.shape[1]:,} dimensions. Largest |x|: {flat[at, dims[0]]:.4g} in dimension {dims[0]} at {token} (position {at}).{also}"


def statistics_table(by_name: dict[str, NDArray[np.float32]], layers: list[int], chosen: int) -> html.Div:
    """One row a layer, one column a statistic; the chosen layer marked."""
    head = html.Tr([html.Th("Layer"), *(html.Th(STATISTIC_TITLES[name], className="num") for name in STATISTICS)])
    rows = [
        html.Tr([html.Td(str(layer)), *(html.Td(_shown(name, float(by_name[name][i])), className="num") for name in STATISTICS)],
                className="chosen" if layer == chosen else "")
        for i, layer in enumerate(layers)
    ]  # fmt: skip
    return still(html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table"))


def _shown(name: str, value: float) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:,.0f}" if name in ("n_nan", "n_inf") else f"{value:.3g}"

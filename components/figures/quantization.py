"""Quantization as pictures: the way from the error of weights through the layers to the predictions, and each of the three by itself.

`error_path` draws one column a layer. In it every matrix has a slot, and the activation that this matrix makes stands in the same slot
below: a tall bar above a jump of the curve is a cause above its effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from components.figures.theme import LINES, MONO, colours, compact, escape, figure, number, scale_bar, sequential, template, token_ticks, with_scale

# name -> title, unit of the hover
WEIGHT_METRICS: Mapping[str, tuple[str, str]] = {
    "relative_rmse": ("relative RMSE, %", "%"),
    "sqnr_db": ("SQNR, dB", "dB"),
    "rmse": ("RMSE", ""),
    "max_error": ("largest error", ""),
    "cosine": ("1 − cosine", ""),
}
ACTIVATION_METRICS: Mapping[str, tuple[str, str]] = {
    "relative_l2": ("relative L2, %", "%"),
    "cosine": ("1 − cosine", ""),
    "cka": ("1 − linear CKA", ""),
}
_MOST_POINTS = 2000  # predictions drawn as points
_WRITTEN_COLUMNS = 14  # layers up to which a map's cells show their number
_NAMED_SLOTS = 90  # slots in all beyond which only layers are named


@dataclass(frozen=True)
class Slot:
    """A place in every layer's column: the weights that are used there and the site that is computed there. branch: which line it belongs to."""

    label: str
    components: tuple[str, ...] = ()
    site: str = ""
    branch: str = "attention"


# The order of a forward pass. A model has those whose weights or sites it has.
SLOTS = (
    Slot("ln1", ("ln1.w",), "ln1_out"),
    Slot("Q", ("attn.W_Q",), "q"),
    Slot("K", ("attn.W_K",), "k"),
    Slot("V", ("attn.W_V",), "v"),
    Slot("pattern", (), "attn_pattern"),
    Slot("z", (), "z"),
    Slot("O", ("attn.W_O",), "attn_out"),
    Slot("mid", (), "resid_mid", "stream"),
    Slot("ln2", ("ln2.w",), "ln2_out", "mlp"),
    Slot("router", ("mlp.W_router",), "router_probs", "mlp"),
    Slot("gate", ("mlp.W_gate", "mlp.experts.W_gate"), "mlp_pre", "mlp"),
    Slot("in", ("mlp.W_in", "mlp.experts.W_in"), "mlp_pre_linear", "mlp"),
    Slot("hidden", (), "mlp_post", "mlp"),
    Slot("out", ("mlp.W_out", "mlp.experts.W_out"), "mlp_out", "mlp"),
    Slot("post", (), "resid_post", "stream"),
)  # fmt: skip
_BRANCHES = {"stream": "residual stream", "attention": "attention", "mlp": "MLP"}


def drawn(values: NDArray[np.floating], metric: str) -> NDArray[np.float64]:
    """What is drawn of a stored metric: shares in percent, 1 minus a similarity (which rounding may take below 0)."""
    shown = np.asarray(values, np.float64)
    if metric in ("relative_rmse", "relative_l2"):
        return 100 * shown
    return np.maximum(1 - shown, 0.0) if metric in ("cosine", "cka") else shown


def written(value: float, metric: str, titles: Mapping[str, tuple[str, str]]) -> str:
    """A metric in a hover: its name, the number as drawn, its unit."""
    title, unit = titles[metric]
    return f"{title.split(', ')[0]} {number(float(drawn(np.array([value]), metric)[0]))} {unit}".rstrip()


def error_path(weights: Sequence[Mapping[str, Any]], places: Sequence[tuple[str, int | None]], divergence: NDArray[np.floating], n_layers: int,
               predictions: Mapping[str, NDArray[Any]], tokens: Sequence[str], theme: str = "light", agreement: str = "") -> go.Figure:  # fmt: skip
    """Weight error, activation divergence and KL in one picture, aligned by layer and by what makes what.

    weights: rows with name, layer, component, dtype, bits and relative_rmse; places and divergence (place,): relative L2;
    predictions: kl (pos,) in nats and changed (pos,) bool, over all prompts; tokens: display text of those positions.
    """
    slots = _slots_of(weights, places)
    column = _Columns([slot.label for slot in slots], n_layers, _ends(weights, places))
    found = make_subplots(rows=2, cols=2, column_widths=[0.83, 0.17], row_heights=[0.42, 0.58], shared_xaxes="columns", horizontal_spacing=0.06, vertical_spacing=0.05,
                          specs=[[{}, {"rowspan": 2}], [{}, None]])  # fmt: skip
    for trace in _weight_bars(weights, slots, column, theme):
        found.add_trace(trace, row=1, col=1)
    for trace in _divergence_lines(places, divergence, slots, column, theme):
        found.add_trace(trace, row=2, col=1)
    for points in _kl_points(predictions, tokens, theme):
        found.add_trace(points, row=1, col=2)
    _lay_out_path(found, column, predictions, theme, agreement)
    return found


class _Columns:
    """Where each slot of each layer stands: layer columns side by side, the embedding before them and the unembedding after."""

    def __init__(self, labels: Sequence[str], n_layers: int, ends: tuple[bool, bool]) -> None:
        self.labels, self.n_layers = list(labels), n_layers
        self.width = len(labels) + 1.5  # a gap between columns
        self.start = 2.0 if ends[0] else 0.0
        self.embed, self.last = 0.0, self.start + n_layers * self.width

    def at(self, layer: int, slot: int) -> float:
        return self.start + layer * self.width + slot

    def ticks(self) -> tuple[list[float], list[str]]:
        if self.n_layers * len(self.labels) > _NAMED_SLOTS:
            return [], []
        inside = [(self.at(layer, i), label) for layer in range(self.n_layers) for i, label in enumerate(self.labels)]
        return [x for x, _ in inside], [label for _, label in inside]


def _slots_of(weights: Sequence[Mapping[str, Any]], places: Sequence[tuple[str, int | None]]) -> list[Slot]:
    components, sites = {row["component"] for row in weights}, {site for site, _ in places}
    return [slot for slot in SLOTS if components & set(slot.components) or slot.site in sites]


def _ends(weights: Sequence[Mapping[str, Any]], places: Sequence[tuple[str, int | None]]) -> tuple[bool, bool]:
    names = {row["name"] for row in weights} | {site for site, layer in places if layer is None}
    return bool(names & {"embed.W_E", "embed"}), bool(names & {"unembed.W_U", "ln_final_out"})


def _weight_bars(weights: Sequence[Mapping[str, Any]], slots: Sequence[Slot], column: _Columns, theme: str) -> list[go.Bar]:
    """A bar a matrix, in its slot; one trace a branch, for its colour."""
    where = {component: (i, slot.branch) for i, slot in enumerate(slots) for component in slot.components}
    bars: dict[str, list[tuple[float, float, str]]] = {branch: [] for branch in _BRANCHES}
    for row in weights:
        if row["layer"] is not None and row["component"] in where:
            slot, branch = where[row["component"]]
            x = column.at(row["layer"], slot)
        elif row["name"] in ("embed.W_E", "unembed.W_U"):
            x, branch = column.embed if row["name"] == "embed.W_E" else column.last, "stream"
        else:
            continue
        bars[branch].append((x, 100 * row["relative_rmse"], f"{escape(row['name'])}<br>{row['dtype']}, {row['bits']:.2f} bits a weight<br>{100 * row['relative_rmse']:.3g} % off"))
    colour = _branch_colours(theme)
    return [
        go.Bar(x=compact([x for x, _, _ in rows]), y=compact([y for _, y, _ in rows]), width=0.86, customdata=[text for _, _, text in rows],
               hovertemplate="%{customdata}<extra></extra>", marker={"color": colour[branch], "line": {"width": 0}}, name=f"weights, {_BRANCHES[branch]}", showlegend=False)
        for branch, rows in bars.items() if rows
    ]  # fmt: skip


def _divergence_lines(places: Sequence[tuple[str, int | None]], divergence: NDArray[np.floating], slots: Sequence[Slot], column: _Columns,
                      theme: str) -> list[go.Scatter]:  # fmt: skip
    """The residual stream as one curve through all layers, over it the branches, a line within each layer."""
    value = {place: 100 * float(v) for place, v in zip(places, divergence, strict=True)}
    points: dict[str, list[tuple[float, float, str]]] = {branch: [] for branch in _BRANCHES}
    if ("embed", None) in value:
        points["stream"].append((column.embed, value["embed", None], "embed"))
    for layer in range(column.n_layers):
        for i, slot in enumerate(slots):
            if (slot.site, layer) in value:
                points[slot.branch].append((column.at(layer, i), value[slot.site, layer], f"{slot.site} at layer {layer}"))
        for branch in ("attention", "mlp"):
            points[branch].append((column.at(layer, len(slots)), np.nan, ""))  # the line ends with its layer
    if ("ln_final_out", None) in value:
        points["stream"].append((column.last, value["ln_final_out", None], "ln_final_out"))
    colour, lines = _branch_colours(theme), []
    for branch in ("attention", "mlp", "stream"):
        rows, thick = points[branch], branch == "stream"
        lines.append(go.Scatter(
            x=compact([x for x, _, _ in rows]), y=compact([y for _, y, _ in rows]), mode="lines+markers", connectgaps=False,
            line={"color": colour[branch], "width": 2.5 if thick else 1}, marker={"size": 6 if thick else 5, "color": colour[branch]},
            fill="tozeroy" if thick else None, fillcolor=_tint(colour[branch]) if thick else None,
            customdata=[f"{text}<br>{y:.3g} % from the reference" for _, y, text in rows], hovertemplate="%{customdata}<extra></extra>", name=_BRANCHES[branch],
        ))  # fmt: skip
    return lines


def _kl_points(predictions: Mapping[str, NDArray[Any]], tokens: Sequence[str], theme: str) -> list[go.Scatter]:
    """A point a position, the largest KL always among them, spread sideways so that they do not hide each other; a trace for the changed ones."""
    kl, changed = np.asarray(predictions["kl"], np.float64), np.asarray(predictions["changed"], bool)
    order = np.argsort(-kl, kind="stable")
    kept = np.sort(order[:: max(1, -(-len(order) // _MOST_POINTS))])
    spread = (np.arange(len(kl)) * 0.618034) % 1.0  # the golden ratio: even and the same at every drawing
    colour, traces = colours(theme), []
    for which, name in ((False, "same best token"), (True, "best token changed")):
        rows = kept[changed[kept] == which]
        said = [f"after {escape(tokens[i])} (position {i})<br>KL {number(float(kl[i]))} nats<br>{name}" for i in rows]
        mark = {"size": 7, "opacity": 0.75, "color": colour["pos"] if which else colour["accent"], "line": {"width": 0}}
        traces.append(go.Scatter(x=compact(spread[rows]), y=compact(np.maximum(kl[rows], kl_floor(kl))), mode="markers", customdata=said, marker=mark, showlegend=which,
                                 hovertemplate="%{customdata}<extra></extra>", name=name))  # fmt: skip
    return traces


def kl_floor(kl: NDArray[np.floating]) -> float:
    """Where a KL of 0 is drawn on a logarithmic axis."""
    positive = np.asarray(kl)[np.asarray(kl) > 0]
    return max(float(positive.min()), 1e-9) if len(positive) else 1e-9


def _lay_out_path(found: go.Figure, column: _Columns, predictions: Mapping[str, NDArray[Any]], theme: str, agreement: str) -> None:
    colour, kl = colours(theme), np.asarray(predictions["kl"], np.float64)
    found.update_layout(template=template(theme), margin={"l": 8, "r": 8, "t": 40, "b": 8}, bargap=0, barmode="overlay", hovermode="closest",
                        legend={"orientation": "h", "x": 0, "y": 0.545, "yanchor": "bottom", "font": {"size": 11}, "bgcolor": "rgba(0,0,0,0)"}, showlegend=True)  # fmt: skip
    at, names = column.ticks()
    found.update_xaxes(showgrid=False, zeroline=False, range=[-0.8, column.last + 0.8], col=1, showticklabels=False, showspikes=True, spikemode="across",
                       spikethickness=1, spikedash="dot", spikecolor=colour["ink-3"])  # fmt: skip
    found.update_xaxes(tickmode="array", tickvals=at, ticktext=names, tickangle=-90, tickfont={"family": MONO, "size": 9}, showticklabels=True, row=2, col=1)
    for layer in range(column.n_layers):
        left = column.at(layer, 0) - 0.9
        if layer % 2 == 0:
            found.add_shape(type="rect", xref="x", yref="paper", x0=left, x1=left + column.width, y0=0, y1=1, fillcolor=colour["surface-2"], line={"width": 0}, layer="below")
    step = max(1, column.n_layers // 32)
    for layer in range(0, column.n_layers, step):
        _note(found, column.at(layer, 0) - 0.9 + column.width / 2, f"L{layer}", theme)
    lift = 20 if column.n_layers > 8 else 6  # over the names of narrow columns
    if column.start:
        _note(found, column.embed, "embed", theme, "center" if lift == 6 else "left", lift)
    _note(found, column.last, "unembed", theme, "right", lift)
    found.update_yaxes(title="weights off, %", rangemode="tozero", nticks=5, row=1, col=1)
    found.update_yaxes(title="activations off, %", rangemode="tozero", nticks=6, row=2, col=1)
    found.update_xaxes(visible=False, range=[-0.25, 1.25], row=1, col=2)
    found.update_yaxes(type="log", dtick=1, exponentformat="e", row=1, col=2)
    mean = float(kl.mean()) if len(kl) else 0.0
    if mean > 0:
        found.add_hline(y=mean, line={"color": colour["ink-2"], "width": 1.5, "dash": "dot"}, row=1, col=2)
    words = f"KL of each prediction, nats<br>mean {mean:.3g}{f', {agreement} agree' if agreement else ''}"
    found.add_annotation(text=words, xref="paper", yref="paper", x=1, y=1, xanchor="right", yanchor="bottom", yshift=4, showarrow=False, align="right",
                         font={"size": 11, "color": colour["ink-2"]})  # fmt: skip


def _note(found: go.Figure, x: float, text: str, theme: str, anchor: str = "center", lift: int = 6) -> None:
    font = {"size": 11, "color": colours(theme)["ink-2"]}
    found.add_annotation(text=text, xref="x", yref="paper", x=x, y=1, yanchor="bottom", xanchor=anchor, yshift=lift, showarrow=False, font=font)


def _branch_colours(theme: str) -> dict[str, str]:
    lines = LINES["dark" if theme == "dark" else "light"]
    return {"stream": lines[0], "attention": lines[1], "mlp": lines[2]}


def _tint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.12)"


def depth_map(values: NDArray[np.floating], rows: Sequence[str], columns: Sequence[str], metric: str, titles: Mapping[str, tuple[str, str]], hovers: NDArray[Any],
              theme: str = "light", chosen: str = "") -> go.Figure:  # fmt: skip
    """A metric over depth: a row a component or site, a column a layer.

    values: (row, column) as stored; NaN where there is no such tensor or site; hovers: (row, column) text, escaped; chosen: a row to frame.
    """
    shown = drawn(values, metric)
    finite = shown[np.isfinite(shown)]
    # Where more is better, the worst cell is the darkest, as everywhere else.
    scale = [[1 - at, colour] for at, colour in reversed(sequential(theme))] if metric == "sqnr_db" else sequential(theme)
    low, high = (float(finite.min()) if metric == "sqnr_db" else 0.0, float(finite.max())) if len(finite) else (0.0, 1.0)
    cells = go.Heatmap(z=compact(np.where(np.isfinite(shown), shown, np.nan)), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", hoverongaps=False,
                       zmin=low, zmax=high if high > low else low + 1, colorscale=scale, colorbar=scale_bar(nticks=4), xgap=1, ygap=1)  # fmt: skip
    if shown.shape[1] <= _WRITTEN_COLUMNS:
        cells.update(text=[[f"{v:.3g}" if np.isfinite(v) else "" for v in row] for row in shown], texttemplate="%{text}", textfont={"size": 10})
    found = figure(theme, cells, plot_bgcolor=colours(theme)["surface-2"])
    step = max(1, len(columns) // 24)
    found.update_xaxes(side="top", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(columns), step)), ticktext=[escape(c) for c in columns[::step]])
    found.update_yaxes(showgrid=False, zeroline=False, autorange="reversed", tickmode="array", tickvals=list(range(len(rows))), ticktext=[escape(r) for r in rows],
                       tickfont={"family": MONO, "size": 11})  # fmt: skip
    if chosen in rows:
        at = list(rows).index(chosen)
        found.add_shape(type="rect", xref="paper", x0=0, x1=1, y0=at - 0.5, y1=at + 0.5, line={"color": colours(theme)["accent"], "width": 1.5})
    return with_scale(found, titles[metric][0], theme)


def position_map(values: NDArray[np.floating], rows: Sequence[str], labels: Sequence[str], metric: str, site: str, theme: str = "light") -> go.Figure:
    """One site's divergence at every layer and token: (row, pos) as stored. labels: display text of the tokens."""
    shown = drawn(values, metric)
    hovers = np.array([[f"{site}, {row}, {escape(label)} (position {p})<br>{written(values[r, p], metric, ACTIVATION_METRICS)}"
                        for p, label in enumerate(labels)] for r, row in enumerate(rows)], dtype=object)  # fmt: skip
    finite = shown[np.isfinite(shown)]
    gaps = {"xgap": 1, "ygap": 1} if shown.shape[1] <= 64 else {}
    cells = go.Heatmap(z=compact(np.where(np.isfinite(shown), shown, np.nan)), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", zmin=0,
                       zmax=float(finite.max()) if len(finite) and finite.max() > 0 else 1.0, colorscale=sequential(theme), colorbar=scale_bar(nticks=4), **gaps)  # fmt: skip
    found = figure(theme, cells, **({"plot_bgcolor": colours(theme)["line"]} if gaps else {}))
    found.update_xaxes(side="top", tickangle=-45, showgrid=False, zeroline=False, **token_ticks(labels))
    step = max(1, len(rows) // 24)
    found.update_yaxes(showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(rows), step)), ticktext=list(rows)[::step])
    return with_scale(found, ACTIVATION_METRICS[metric][0], theme)


def kl_bars(kl: NDArray[np.floating], changed: NDArray[np.bool_], labels: Sequence[str], hovers: Sequence[str], theme: str = "light") -> go.Figure:
    """KL of the prediction at each token, in nats; bars where the best token changed stand out. hovers: escaped text, one a position."""
    colour = colours(theme)
    bars = go.Bar(x=np.arange(len(kl), dtype=np.int32), y=compact(kl), marker={"color": [colour["pos"] if c else colour["accent"] for c in changed], "line": {"width": 0}},
                  customdata=list(hovers), hovertemplate="%{customdata}<extra></extra>", name="KL, nats")  # fmt: skip
    found = figure(theme, bars, bargap=0.15)
    found.update_xaxes(tickangle=-45, showgrid=False, zeroline=False, **token_ticks(labels, most=64))
    found.update_yaxes(title="KL, nats", rangemode="tozero", nticks=5, exponentformat="e")
    return found

"""A sensitivity run as pictures: how its scores are distributed, what changing the best weights does, how stable the ranking is, pruning, runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from components.figures.theme import LINES, MONO, colours, compact, escape, figure, no_figure, number, scale_bar, sequential, template, with_names, with_scale

SELECTIONS = {"top_k": "top", "random_k": "random", "bottom_k": "bottom"}
KINDS = {"seed": "another seed", "sample": "another half of the text", "metric": "another metric"}
_POWERS = {"tickprefix": "10<sup>", "ticksuffix": "</sup>"}
_LEGEND = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}}
_DASHES = ("solid", "dash", "dot", "dashdot")


def _numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def score_distribution(edges: NDArray[np.floating], counts: NDArray[np.floating], names: Sequence[str], cuts: Sequence[float | None] = (), theme: str = "light") -> go.Figure:
    """Scores above 0 on a logarithmic axis: all of them as bars, and below a row a group, its colour the share of the group's scores.

    edges: (bin + 1,) log10 of scores; counts: (group, bin); cuts: log10 of the least score that is among the top weights, one for all groups or one
    each, marked by a line and by ticks.
    """
    if not counts.sum():
        return no_figure(theme, "No score is above 0.")
    c, middle, total = colours(theme), (edges[:-1] + edges[1:]) / 2, counts.sum(axis=0)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-300)
    found = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.05, row_heights=[0.34, 0.66])
    found.add_trace(go.Bar(x=compact(middle), y=compact(total / total.sum()), width=compact(np.diff(edges)), marker={"color": c["accent"], "line": {"width": 0}},
                           customdata=[f"score {_score(m)}<br>{n:,.0f} weights" for m, n in zip(middle, total, strict=True)], name="share of all scores",
                           hovertemplate="%{customdata}<extra></extra>"), row=1, col=1)  # fmt: skip
    hovers = np.array([[f"{escape(name)}<br>score {_score(m)}<br>{s:.3%} of its scores" for m, s in zip(middle, row, strict=True)] for name, row in zip(names, share, strict=True)],
                      dtype=object)  # fmt: skip
    found.add_trace(go.Heatmap(z=compact(np.where(counts > 0, share, np.nan)), x=compact(middle), y=np.arange(len(names), dtype=np.int32), customdata=hovers, zmin=0,
                               zmax=float(share.max()), colorscale=sequential(theme), hoverongaps=False, hovertemplate="%{customdata}<extra></extra>",
                               colorbar=scale_bar(nticks=3, tickformat=".0%"), name="share of the row's scores"), row=2, col=1)  # fmt: skip
    _mark_cuts(found, cuts, len(names), theme)
    found.update_layout(template=template(theme), margin={"l": 8, "r": 8, "t": 8, "b": 8}, bargap=0)
    found.update_yaxes(title="share", tickformat=".0%", nticks=4, rangemode="tozero", row=1, col=1)
    step = max(1, len(names) // 20)
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(0, len(names), step)),
                       ticktext=[escape(name) for name in list(names)[::step]], tickfont={"family": MONO, "size": 11}, row=2, col=1)  # fmt: skip
    found.update_xaxes(zeroline=False, showgrid=False, nticks=9, **_POWERS)
    found.update_xaxes(title="score, log scale", row=2, col=1)
    return _under(with_names(found, y=names), "share of the row's scores in a bin", theme)


def _under(found: go.Figure, title: str, theme: str) -> go.Figure:
    """The unit of a scale bar that stands below an axis' own title."""
    found.add_annotation(text=escape(title), showarrow=False, xref="paper", yref="paper", x=0, y=0, xanchor="left", yanchor="middle", xshift=188, yshift=-66,
                         font={"size": 11, "color": colours(theme)["ink-2"]})  # fmt: skip
    found.update_layout(margin={"b": 90})
    return found


def _mark_cuts(found: go.Figure, cuts: Sequence[float | None], n_rows: int, theme: str) -> None:
    ink, known = colours(theme)["ink"], [(row, cut) for row, cut in enumerate(cuts) if cut is not None]
    if len(cuts) == 1 and known:
        found.add_vline(x=known[0][1], line={"color": ink, "width": 1, "dash": "dash"})
        found.add_annotation(text="top weights →", x=known[0][1], xref="x", y=1, yref="paper", yanchor="top", xanchor="right", xshift=-4, showarrow=False,
                             font={"size": 11, "color": colours(theme)["ink-2"]})  # fmt: skip
    elif len(cuts) == n_rows and known:
        marks = {"symbol": "line-ns", "size": 12, "line": {"color": ink, "width": 2}}
        found.add_trace(go.Scatter(x=compact([cut for _, cut in known]), y=[row for row, _ in known], mode="markers", marker=marks, name="the top weights begin",
                                   customdata=[_score(cut) for _, cut in known], hovertemplate="the top weights begin at %{customdata}<extra></extra>"), row=2, col=1)  # fmt: skip


def _score(log10: float) -> str:
    return f"{10.0**log10:.3g}" if -300 < log10 < 300 else f"1e{log10:.0f}"


def effect_points(runs: Sequence[Mapping[str, Any]], theme: str = "light") -> go.Figure:
    """Perplexity over the baseline's of each perturbed selection, with its interval, on a log axis. runs: those of `perturbation.runs`."""
    shown = [run for run in runs if run["ratio"] is not None and run["ratio"] > 0]
    if not shown:
        return no_figure(theme, "No perplexity is finite.")
    tones = dict(zip(SELECTIONS, (colours(theme)["pos"], LINES["dark" if theme == "dark" else "light"][0], colours(theme)["ink-3"]), strict=True))
    labels = [f"{SELECTIONS[run['selection']]} {run['n']:,}" + ("" if run["seed"] is None else f", seed {run['seed']}") for run in shown]
    traces = []
    for name, tone in tones.items():
        at = [i for i, run in enumerate(shown) if run["selection"] == name]
        ratio = _numbers([shown[i]["ratio"] for i in at])
        low, high = (_numbers([(shown[i]["ci"] or [None, None])[side] for i in at]) for side in (0, 1))
        bars = {"type": "data", "symmetric": False, "array": compact(np.maximum(np.nan_to_num(high - ratio), 0)), "arrayminus": compact(np.maximum(np.nan_to_num(ratio - low), 0)),
                "thickness": 1.5, "width": 5, "color": tone}  # fmt: skip
        said = [f"{labels[i]}<br>perplexity × {number(r)} [{number(a)}, {number(b)}]" for i, r, a, b in zip(at, ratio, low, high, strict=True)]
        traces.append(go.Scatter(x=compact(ratio), y=at, mode="markers", marker={"size": 10, "color": tone}, error_x=bars, customdata=said, name=SELECTIONS[name],
                                 hovertemplate="%{customdata}<extra></extra>"))  # fmt: skip
    found = figure(theme, *(trace for trace in traces if len(trace.x)))
    found.add_vline(x=1, line={"color": colours(theme)["line-strong"], "width": 1, "dash": "dash"})
    found.update_xaxes(title="perplexity / baseline, log scale", type="log", zeroline=False, exponentformat="power", **_decades([run["ratio"] for run in shown]))
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, tickmode="array", tickvals=list(range(len(labels))), ticktext=labels, range=[len(labels) - 0.5, -0.5])
    return with_names(found, y=labels)


def _decades(values: Sequence[float | None]) -> dict[str, Any]:
    """Where values span decades, a log axis is labelled at those; within one, at round numbers."""
    finite = [value for value in values if value]
    return {"dtick": 1} if finite and max(finite) / min(finite) > 100 else {"nticks": 5, "tickformat": ".5~g"}


def overlap_lines(ks: Sequence[int], pairs: Sequence[Mapping[str, Any]], theme: str = "light") -> go.Figure:
    """Jaccard overlap of two rankings at several k: a line a pair, coloured by what was changed. pairs: those of `stability.pairs`."""
    if not pairs or not ks:
        return no_figure(theme, "No two rankings were compared.")
    palette, lines, named = LINES["dark" if theme == "dark" else "light"], [], set()
    for pair in pairs:
        tone, words = palette[list(KINDS).index(pair["kind"])], f"{escape(pair['a'])} and {escape(pair['b'])}"
        mark = {"color": tone, "width": 2 if pair["kind"] != "metric" else 1.5, "dash": "dot" if pair["kind"] == "metric" else "solid"}
        lines.append(go.Scatter(x=list(ks), y=compact(_numbers([pair["jaccard"].get(str(k)) for k in ks])), mode="lines+markers", line=mark, marker={"size": 6, "color": tone},
                                name=KINDS[pair["kind"]], legendgroup=pair["kind"], showlegend=pair["kind"] not in named, customdata=[words] * len(ks),
                                hovertemplate="%{customdata}<br>k = %{x:,}: %{y:.3f}<extra></extra>"))  # fmt: skip
        named.add(pair["kind"])
    found = figure(theme, *lines, showlegend=True, legend=_LEGEND, margin={"t": 30, "l": 8, "r": 8, "b": 8})
    found.update_xaxes(title="k, weights of each ranking", type="log", tickmode="array", tickvals=list(ks), ticktext=[f"{k:,}" for k in ks], zeroline=False)
    found.update_yaxes(title="Jaccard overlap", range=[-0.03, 1.03], nticks=6)
    return found


def pruning_curve(rows: Sequence[Mapping[str, Any]], theme: str = "light") -> go.Figure:
    """Perplexity over the baseline's at each sparsity that was reached, with its interval. rows: those of `pruning.rows`."""
    shown = sorted((row for row in rows if row["ratio"] and row["zeros"] is not None), key=lambda row: float(row["zeros"]))
    if not shown:
        return no_figure(theme, "No perplexity of a pruned model is finite.")
    tone = LINES["dark" if theme == "dark" else "light"][0]
    x, ratio = _numbers([row["zeros"] for row in shown]), _numbers([row["ratio"] for row in shown])
    low, high = (_numbers([(row["ci"] or [row["ratio"]] * 2)[side] for row in shown]) for side in (0, 1))
    band = go.Scatter(x=compact(np.concatenate([x, x[::-1]])), y=compact(np.concatenate([high, low[::-1]])), fill="toself", fillcolor=f"{tone}2a", line={"width": 0}, mode="lines",
                      hoverinfo="skip", name="95 % interval")  # fmt: skip
    said = [f"{row['sparsity'] or 0:.0%} asked, {z:.1%} zeros<br>perplexity × {number(r)} [{number(a)}, {number(b)}]"
            for row, z, r, a, b in zip(shown, x, ratio, low, high, strict=True)]  # fmt: skip
    line = go.Scatter(x=compact(x), y=compact(ratio), mode="lines+markers", line={"color": tone, "width": 2}, marker={"size": 7}, customdata=said, name="perplexity / baseline",
                      hovertemplate="%{customdata}<extra></extra>")  # fmt: skip
    found = figure(theme, band, line)
    found.add_hline(y=1, line={"color": colours(theme)["line-strong"], "width": 1, "dash": "dash"})
    found.update_xaxes(title="weights that are 0", tickformat=".0%", zeroline=False)
    found.update_yaxes(title="perplexity / baseline, log scale", type="log", exponentformat="power", zeroline=False, **_decades([*low, *high]))
    return found


def depth_cells(values: NDArray[np.floating], rows: Sequence[str], columns: Sequence[str], unit: str, hovers: NDArray[Any], theme: str = "light", across: str = "",
                top: float | None = None, text: str = "") -> go.Figure:  # fmt: skip
    """A quantity over two lists of names: values (row, column), NaN where there is none; hovers escaped; top: of the scale; text: how cells write their number."""
    finite = values[np.isfinite(values)]
    most = top if top is not None else float(finite.max()) if len(finite) and finite.max() > 0 else 1.0
    cells = go.Heatmap(z=compact(values), customdata=hovers, hovertemplate="%{customdata}<extra></extra>", hoverongaps=False, zmin=0, zmax=most, colorscale=sequential(theme),
                       colorbar=scale_bar(nticks=4), xgap=1, ygap=1, name=unit)  # fmt: skip
    if text and values.size <= 150:
        cells.update(text=[[format(v, text) if np.isfinite(v) else "" for v in row] for row in values], texttemplate="%{text}", textfont={"size": 11})
    found = figure(theme, cells, plot_bgcolor=colours(theme)["surface-2"])
    found.update_xaxes(title=across, side="top", showgrid=False, zeroline=False, **_ticks(columns))
    found.update_yaxes(autorange="reversed", showgrid=False, zeroline=False, **_ticks(rows))
    return with_scale(with_names(found, columns, rows), unit, theme)


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    step = max(1, len(names) // 20)
    return {"tickmode": "array", "tickvals": list(range(0, len(names), step)), "ticktext": [escape(name) for name in list(names)[::step]], "tickfont": {"size": 11}}


def profile_lines(shares: NDArray[np.floating], places: Sequence[str], names: Sequence[str], across: str, unit: str,
                  theme: str = "light") -> go.Figure:  # fmt: skip
    """Where several runs' weights lie: a line a run. shares: (run, place) of what `unit` says, NaN where a run has no such place; places: layers or components."""
    palette = LINES["dark" if theme == "dark" else "light"]
    lines = [
        go.Scatter(x=list(range(len(places))), y=compact(row), mode="lines+markers", name=escape(name), marker={"size": 6},
                   customdata=[f"{escape(name)}<br>{escape(place)}: {share:.1%}" for place, share in zip(places, row, strict=True)],
                   hovertemplate="%{customdata}<extra></extra>",
                   line={"color": palette[i % len(palette)], "width": 2, "dash": _DASHES[i // len(palette) % len(_DASHES)]})
        for i, (name, row) in enumerate(zip(names, shares, strict=True))
    ]  # fmt: skip
    found = figure(theme, *lines, showlegend=True, legend=_LEGEND, margin={"t": 34, "l": 8, "r": 8, "b": 8})
    found.update_xaxes(title=across, zeroline=False, **_ticks(places))
    found.update_yaxes(title=unit, tickformat=".0%", rangemode="tozero", nticks=6)
    return with_names(found, places)

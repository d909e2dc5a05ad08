"""Tables of the document, in one form for every section: medians with least and most, ratios within a round, goals beside figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.measure import Runs

RESIDUAL_AND_ATTENTION = ["embed", "attn_pattern", "resid_mid", "resid_post"]


@dataclass(frozen=True)
class Goal:
    """At most `limit` times the median of the row `than`."""

    limit: float
    than: str

    def says(self, ratio: float) -> str:
        return f"<= {self.limit:.2f} x {self.than}: {'met' if ratio <= self.limit else 'NOT met'}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
    return "\n".join(lines)


def time_table(runs: Mapping[str, Runs], base: str, goals: Mapping[str, Goal]) -> str:
    """One row a case: seconds, the ratio to the case `base`, extra peak memory, and the goal."""
    rows = []
    for name, case in runs.items():
        ratio, least, most = case.ratio(runs[base])
        goal = goals[name].says(case.ratio(runs[goals[name].than])[0]) if name in goals else ""
        seconds = f"{case.median:.3f} ({min(case.seconds):.3f} - {max(case.seconds):.3f})"
        ratios = ["1", "1"] if name == base else [f"{ratio:.2f} ({least:.2f} - {most:.2f})", f"{case.least_ratio(runs[base]):.2f}"]
        rows.append([name, seconds, *ratios, f"{statistics.median(case.cpu_seconds):.2f}", megabytes(case.extra_bytes), goal])
    return table(["case", "seconds, median (least - most)", f"x {base}", "least x least", "CPU seconds", "extra peak memory", "goal"], rows)


def timings_table(runs: Mapping[str, Runs]) -> str:
    """The seconds that each trace of the last round says of itself, a column a stage."""
    told = {name: case.last["timings"] for name, case in runs.items() if "timings" in case.last}
    stages = list(dict.fromkeys(stage for timings in told.values() for stage in timings))
    rows = [[name, *(f"{timings[stage]:.3f}" if stage in timings else "" for stage in stages), f"{runs[name].last['seconds']:.3f}"] for name, timings in told.items()]
    return table(["case", *stages, "whole call"], rows)


def megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"

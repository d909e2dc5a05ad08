"""The document's parts: tables with median, least and most; goals beside what was measured; the machine; docs/benchmarks.md.

A section is kept as JSON under data/bench/sections, so that one part can be measured again without the others.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path

import psutil

from bench.measure import ROOT, ROUNDS, Runs, n_threads

RESIDUAL_AND_ATTENTION = ["embed", "attn_pattern", "resid_mid", "resid_post"]
DOCUMENT, SECTIONS = ROOT / "docs" / "benchmarks.md", ROOT / "data" / "bench" / "sections"
PEERS_REQUIREMENTS = ROOT / "bench" / "requirements-peers.txt"
_PACKAGES = ("llama-cpp-python", "torch", "transformers", "numpy", "h5py", "hdf5plugin")

_INTRODUCTION = """# What Layerscope costs

Written by `make bench` (peers: `make peers-env` first); `make bench ONLY=gguf` measures one section again. The scripts are in `bench/`.

How it is measured: every case is a process of its own with its model loaded. The cases of one table run in turn (A B C A B C ...), after a
warm-up round as many rounds as the section says, all with the same number of threads; figures are medians, with least and most in parentheses, and
ratios are taken within a round. Where something else used the machine the spread says so; *least x least* compares the undisturbed rounds. *CPU seconds* count all
threads, waiting ones included. *Extra peak memory* is the most resident memory during a run above what it was with the model loaded and warmed up
on four tokens (Linux' VmHWM, set back before each run).
"""


@dataclass(frozen=True)
class Goal:
    """One goal and what was measured, in words; `met` decides."""

    goal: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Section:
    """One part of the document. `text` is Markdown without its title."""

    title: str
    text: str
    goals: list[Goal] = field(default_factory=list)
    rounds: int = ROUNDS


def at_most(limit: float, what: str, than: str, runs: Mapping[str, Runs]) -> Goal:
    """The goal that `what` takes at most `limit` times as long as `than`."""
    ratio, least, most = runs[what].ratio(runs[than])
    measured = f"{ratio:.2f} ({least:.2f} - {most:.2f}); least x least {runs[what].least_ratio(runs[than]):.2f}"
    return Goal(f"{what}: at most {limit:.2f} x the time of {than}", measured, ratio <= limit)


def at_most_memory(limit: float, what: str, than: str, runs: Mapping[str, Runs]) -> Goal:
    """The goal that `what` needs at most `limit` times the extra peak memory of `than`."""
    ratio = runs[what].extra_bytes / runs[than].extra_bytes
    return Goal(f"{what}: at most {limit:.2f} x the extra peak memory of {than}", f"{ratio:.2f}", ratio <= limit)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; the first columns are text, the others numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def time_table(runs: Mapping[str, Runs], base: str) -> str:
    """One row a case: seconds, the ratio to the case `base`, CPU seconds, extra peak memory."""
    rows = []
    for name, case in runs.items():
        ratio, least, most = case.ratio(runs[base])
        seconds = f"{case.median:.3f} ({min(case.seconds):.3f} - {max(case.seconds):.3f})"
        ratios = ["1", "1"] if name == base else [f"{ratio:.2f} ({least:.2f} - {most:.2f})", f"{case.least_ratio(runs[base]):.2f}"]
        rows.append([name, seconds, *ratios, f"{statistics.median(case.cpu_seconds):.2f}", megabytes(case.extra_bytes)])
    return table(["case", "seconds", f"x {base}", "least x least", "CPU seconds", "extra peak memory"], rows)


def timings_table(runs: Mapping[str, Runs]) -> str:
    """The seconds that each trace of the last round says of itself, a column a stage."""
    told = {name: case.last["timings"] for name, case in runs.items() if "timings" in case.last}
    stages = list(dict.fromkeys(stage for timings in told.values() for stage in timings))
    rows = [[name, *(f"{timings[stage]:.3f}" if stage in timings else "" for stage in stages), f"{runs[name].last['seconds']:.3f}"] for name, timings in told.items()]
    return table(["case", *stages, "whole call"], rows)


def goals_table(goals: Iterable[Goal]) -> str:
    return table(["goal", "measured", "met"], [[goal.goal, goal.measured, "yes" if goal.met else "**no**"] for goal in goals], text_columns=3)


def megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def markdown(section: Section, measured_on: str) -> str:
    goals = f"\n{goals_table(section.goals)}\n" if section.goals else ""
    return f"## {section.title}\n\n{section.text.strip()}\n{goals}\n{measured_on}\n"


def machine() -> str:
    """Cores, memory, versions and date, in one sentence."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    peers = ", ".join(line.replace("==", " ") for line in PEERS_REQUIREMENTS.read_text().splitlines() if line.startswith(("transformer-lens", "nnsight")))
    # Waiting threads spin by default, which costs most where others want the cores; who changes that says so.
    waiting = f"; OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}" if "OMP_WAIT_POLICY" in os.environ else ""
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{_cpu()}, {n_threads()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB of memory, {system}, {versions}; peers: {peers}{waiting}"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown CPU")


def keep(part: str, section: Section, load: float) -> None:
    """Store a section with the machine and date; `load`: the machine's load average when it began."""
    SECTIONS.mkdir(parents=True, exist_ok=True)
    about = f"Measured {date.today().isoformat()}, {section.rounds} round{'s' if section.rounds > 1 else ''}, load average at the start {load:.1f} on {os.cpu_count()} cores."
    (SECTIONS / f"{part}.json").write_text(json.dumps({**asdict(section), "measured_on": about, "machine": machine()}, indent=1))


def write_document(parts: Sequence[str]) -> None:
    """docs/benchmarks.md from the sections there are, in the order of `parts`."""
    stored = [json.loads(path.read_text()) for path in (SECTIONS / f"{part}.json" for part in parts) if path.is_file()]
    sections = [(Section(entry["title"], entry["text"], [Goal(**goal) for goal in entry["goals"]]), entry) for entry in stored]
    machines = list(dict.fromkeys(entry["machine"] for entry in stored))
    goals = [goal for section, _ in sections for goal in section.goals]
    unmet = sum(not goal.met for goal in goals)
    missing = [part for part in parts if not (SECTIONS / f"{part}.json").is_file()]
    verdict = f"All {len(goals)} goals are met." if not unmet else f"{unmet} of {len(goals)} goals are **not** met; they are marked."
    verdict += f" Not measured here yet: {', '.join(missing)}." if missing else ""
    top = [_INTRODUCTION, "Machine: " + " | ".join(machines) + ".\n", f"## Goals\n\n{verdict}\n\n{goals_table(goals)}\n"]
    DOCUMENT.write_text("\n".join([*top, *(markdown(section, entry["measured_on"]) for section, entry in sections)]))

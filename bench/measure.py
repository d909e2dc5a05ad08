"""Time and peak memory of cases that live in processes of their own. Standard library only: the peers' environment imports it too.

A case is a child process with its model loaded, which runs once whenever it is asked to. The cases of one table run in turn
(A B C A B C ...), so that whatever else the machine does meets them all alike, and ratios are taken within a round. The first round
is the warm-up: it counts for memory and not for time.
"""

from __future__ import annotations

import gc
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHON, PEERS_PYTHON = (ROOT / venv / "bin" / "python" for venv in (".venv", ".venv-peers"))
TIMEOUT_S = 600.0
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "7"))


def n_threads() -> int:
    """Threads that every case is given: the cores this process may use."""
    return len(os.sched_getaffinity(0))


# -- the child ----------------------------------------------------------------------------------------------------------------


def serve(run: Callable[[], Any], warm_up: Callable[[], object], about: Callable[[Any], Mapping[str, Any]] = lambda result: {}) -> None:
    """Be a case: after `warm_up` (a small input, so that everything is loaded), answer each line of stdin with one timed `run`.

    An answer is a JSON object: seconds, cpu_seconds (of all threads), extra_bytes (peak resident memory above what it was after `warm_up`), and what `about` says of
    the result, untimed.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not reach the parent
    warm_up()
    gc.collect()
    before = _resident("VmRSS")
    print(json.dumps({}), file=answers, flush=True)
    for _ in sys.stdin:
        gc.collect()
        # 5 sets the peak (VmHWM) back to what is resident now; see proc_pid_clear_refs(5)
        Path("/proc/self/clear_refs").write_text("5")
        start, cpu = time.perf_counter(), time.process_time()
        result = run()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_bytes": _resident("VmHWM") - before, **about(result)}
        del result
        print(json.dumps(answer), file=answers, flush=True)


def _resident(row: str) -> int:
    """Bytes in a row of /proc/self/status: VmRSS, resident now, or VmHWM, the most since the peak was set back."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(row))
    return int(line.split()[1]) * 1024


# -- the parent ---------------------------------------------------------------------------------------------------------------


class Case:
    """A running child, `python -m bench.<module> <arguments as JSON>`, with n_threads() threads unless the arguments say `n_threads`. Use as a context manager."""

    def __init__(self, module: str, *, python: Path = PYTHON, **arguments: Any) -> None:
        said = {name: value for name, value in arguments.items() if not isinstance(value, list)}
        self.what, self._python = f"{module} {said}", python
        self._n_threads = arguments.setdefault("n_threads", n_threads())
        self._words = ["-m", f"bench.{module}", json.dumps(arguments)]

    def __enter__(self) -> Case:
        threads = str(self._n_threads)
        limits = {f"{name}_NUM_THREADS": threads for name in ("OMP", "OPENBLAS", "MKL")} | {"LAYERSCOPE_N_THREADS": threads}
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        self._errors = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            [self._python, *self._words], cwd=ROOT, env={**os.environ, **limits, **offline}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        try:
            self._answer()
        except BaseException:
            self._end()
            raise
        return self

    def run(self) -> dict[str, Any]:
        """One timed run in the child: seconds, extra_bytes and what the case adds."""
        assert self._child.stdin is not None
        self._child.stdin.write("run\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], TIMEOUT_S)
        line = self._child.stdout.readline() if ready else ""
        if not line:
            self._end()
            self._errors.seek(0)
            end = self._errors.read().decode("utf-8", "replace")[-2000:]
            raise RuntimeError(f"{self.what} {'ended' if ready else f'gave no answer in {TIMEOUT_S:.0f} s'} (status {self._child.returncode}):\n{end}")
        return json.loads(line)

    def _end(self) -> None:
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()


@dataclass
class Runs:
    """What one case gave: seconds of every round after the warm-up, the peak over all rounds, and the last answer."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    extra_bytes: int = 0
    last: dict[str, Any] = field(default_factory=dict)

    def add(self, answer: dict[str, Any], warm_up: bool) -> None:
        """One more answer of `Case.run`; that of the warm-up round counts for memory and not for time."""
        self.extra_bytes, self.last = max(self.extra_bytes, answer["extra_bytes"]), answer
        if not warm_up:
            self.seconds.append(answer["seconds"])
            self.cpu_seconds.append(answer["cpu_seconds"])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: Runs) -> tuple[float, float, float]:
        """(median, least, most) of seconds / the other's seconds in the same round."""
        ratios = [mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    def least_ratio(self, other: Runs) -> float:
        """Least seconds / the other's least: what is left when nothing else ran on the machine, at least once for each."""
        return min(self.seconds) / min(other.seconds)


def in_turn(cases: Mapping[str, Case], rounds: int = ROUNDS) -> dict[str, Runs]:
    """Run every case `rounds` + 1 times, in turn; the first round is the warm-up."""
    from contextlib import ExitStack

    found = {name: Runs() for name in cases}
    with ExitStack() as stack:
        for case in cases.values():
            stack.enter_context(case)
        for number in range(rounds + 1):
            for name, case in cases.items():
                found[name].add(case.run(), warm_up=number == 0)
            print(f"round {number} of {rounds}: " + ", ".join(f"{name} {runs.last['seconds']:.2f} s" for name, runs in found.items()), file=sys.stderr)
    return found

"""The Attention page in Chromium, against the real server: the grid's first view, stepping from head to head, one head of a long prompt, server memory."""

from __future__ import annotations

import socket
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from backend.library import Library
from bench.attention_traces import write_trace
from bench.measure import PYTHON, ROOT
from bench.models import FOLDER
from bench.report import Goal, Section, megabytes, table
from config import load_settings

WIDE, LONG = ("bench_wide_1024", 32, 32, 1024), ("bench_long_8192", 4, 8, 8192)
LONG_HEADS = 8
SWITCHES, VIEWS = 20, 5
_REST_MS = 800  # the token's card and the heatmap's frame follow the pattern
GRID_S, SWITCH_S, LONG_S, MEMORY = 2.0, 0.2, 1.0, 300e6
CHROMIUM = "/usr/bin/chromium"

# From the click to the frame after the new head is drawn.
_SWITCH = """([layer, head]) => new Promise((resolve, reject) => {
    const graph = document.querySelector('#pattern .js-plotly-plot'), before = graph._fullData[0].z, start = performance.now();
    const drawn = () => {
        if (graph._fullData[0].z === before) return;
        graph.removeListener('plotly_afterplot', drawn);
        requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - start)));
    };
    graph.on('plotly_afterplot', drawn);
    setTimeout(() => reject(new Error('the head was not drawn')), 30000);
    document.querySelector(`#head-grid .head[data-layer="${layer}"][data-head="${head}"]`).click();
})"""

# Every cell is there and its sprite has arrived.
_GRID = """n => { const cells = document.querySelectorAll('#head-grid .head');
    return cells.length === n && performance.getEntriesByType('resource').some(entry => entry.name.includes('/thumbs/') && entry.responseEnd > 0); }"""


@dataclass(frozen=True)
class _Server:
    address: str
    pid: int

    def reset_peak(self) -> int:
        """Resident bytes now; the peak counts from here."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
        return _resident(self.pid, "VmRSS")

    @property
    def peak(self) -> int:
        return _resident(self.pid, "VmHWM")


def section() -> Section:
    data = FOLDER / "attention"
    settings = load_settings(data_dir=data)
    settings.traces_dir.mkdir(parents=True, exist_ok=True)
    library = Library.from_settings(settings)
    for name, layers, heads, tokens in (WIDE, LONG):
        library.add(write_trace(settings.traces_dir, name, layers, heads, tokens, LONG_HEADS if (name, layers, heads, tokens) == LONG else None))
    with started_server(data) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(server.address)
        page.wait_for_selector(".page-title")
        idle = server.reset_peak()
        grid = [_grid_view(page, server) for _ in range(VIEWS)]
        switches = [_switch(page, 1 + i // 8, 3 * (i % 8) + 1) for i in range(SWITCHES)]
        wide_memory = server.peak - idle
        idle = server.reset_peak()
        _open(page, server, LONG[0], 0)
        long = [_switch(page, 0, head) for head in range(1, LONG_HEADS)]
        long_memory = server.peak - idle
        browser.close()
    return _section(grid, switches, long, wide_memory, long_memory)


def _grid_view(page: Page, server: _Server) -> float:
    """Seconds from the address to a grid with its pictures."""
    page.goto("about:blank")
    page.goto(f"{server.address}/attention?trace={WIDE[0]}&layer=0&head=0", wait_until="commit")
    page.wait_for_function(_GRID, arg=WIDE[1] * WIDE[2], polling=10)
    seconds = page.evaluate("() => performance.now()") / 1e3  # since the navigation began
    page.wait_for_function("() => document.querySelector('#pattern .js-plotly-plot')?._fullData?.length > 0")
    page.wait_for_load_state("networkidle")
    return float(seconds)


def _switch(page: Page, layer: int, head: int) -> float:
    """Seconds from a click to the drawn head, on a page that has come to rest."""
    page.wait_for_timeout(_REST_MS)
    return float(page.evaluate(_SWITCH, [layer, head])) / 1e3


def _open(page: Page, server: _Server, trace: str, head: int) -> None:
    page.goto(f"{server.address}/attention?trace={trace}&layer=0&head={head}")
    page.wait_for_function("() => document.querySelector('#pattern .js-plotly-plot')?._fullData?.length > 0")
    page.wait_for_load_state("networkidle")


def _section(grid: list[float], switches: list[float], long: list[float], wide_memory: int, long_memory: int) -> Section:
    rows = [
        ["grid of 1,024 heads, first view of the page", *_figures(grid), megabytes(wide_memory)],
        ["from head to head, 1,024 tokens", *_figures(switches), megabytes(wide_memory)],
        ["from head to head, 8,192 tokens", *_figures(long), megabytes(long_memory)],
    ]
    text = f"""
A synthetic trace of {WIDE[1]} layers, {WIDE[2]} heads and {WIDE[3]:,} tokens, and one of {LONG_HEADS} heads and {LONG[3]:,} tokens, opened in Chromium on the
server's own machine. *First view*: from the address to all cells with their pictures, the first of {VIEWS} times with nothing cached on the server.
*From head to head*: from the click to the frame after the new pattern is drawn, reading, reducing, sending and drawing included, on a page at rest. Server memory is
the most above what it was idle.

{table(["view", "seconds", "least", "most", "server memory above idle"], rows)}
"""
    goals = [
        Goal(f"grid of {WIDE[1]} layers × {WIDE[2]} heads, {WIDE[3]:,} tokens: under {GRID_S:g} s", _measured(grid), statistics.median(grid) < GRID_S),
        Goal(f"head switch at {WIDE[3]:,} tokens: under {1e3 * SWITCH_S:g} ms end to end", _measured(switches), statistics.median(switches) < SWITCH_S),
        Goal(f"one head of {LONG[3]:,} tokens: under {LONG_S:g} s", _measured(long), statistics.median(long) < LONG_S),
        Goal(f"server memory of these views: under {MEMORY / 1e6:g} MB above idle", megabytes(max(wide_memory, long_memory)), max(wide_memory, long_memory) < MEMORY),
    ]
    return Section("The Attention page", text, goals, SWITCHES)


def _figures(seconds: list[float]) -> list[str]:
    return [f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}", f"{max(seconds):.3f}"]


def _measured(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.3f} s of {len(seconds)} ({min(seconds):.3f} - {max(seconds):.3f})"


def _resident(pid: int, row: str) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(row))
    return int(line.split()[1]) * 1024


@contextmanager
def started_server(data: Path) -> Iterator[_Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process: Any = subprocess.Popen([PYTHON, "app.py", "--port", str(port), "--data-dir", str(data)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        if "Layerscope is on" not in process.stdout.readline():
            raise RuntimeError("the server did not start")
        yield _Server(f"http://127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        process.wait(20)

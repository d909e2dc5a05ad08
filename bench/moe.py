"""MoE routing: what capturing the routers costs in both engines, the MoE page in Chromium, and a sweep over all experts of the demo model."""

from __future__ import annotations

import statistics
import tomllib

from playwright.sync_api import Page, sync_playwright

from backend.library import Library
from backend.reports.routing import SITES
from bench.attention import CHROMIUM, started_server
from bench.measure import ROOT, Case, Runs, in_turn, n_threads
from bench.models import FOLDER, random_ids
from bench.moe_model import SIZES, describe, gguf_file, hf_folder
from bench.moe_traces import write_trace
from bench.report import Goal, Section, at_most, table, time_table
from config import load_settings

N_TOKENS, ROUNDS = 1024, 9
TRACE = ("bench_moe_4096", 16, 64, 8, 4096)  # layers, experts, k, tokens
VIEWS = 7
SWEPT, SWEEP_ROUNDS = 20, 1
MOST, PAGE_S, SWEEP_S = 1.05, 1.0, 60.0
_FIRST = ["moe-load", "moe-map"]  # what 1,000 pixels show; the cards below are drawn after it
_GRAPHS = ["moe-load", "moe-map", "moe-probs", "moe-together", "moe-next", "moe-repeats", "moe-margins"]
# Every card that a trace fills by itself: the rest of them wait for a press.
_DRAWN = """graphs => graphs.every(id => document.querySelector(`#${id} .js-plotly-plot`)?._fullData?.length > 0)
    && (graphs.length < 3 || ['#moe-measures tr.chosen', '#moe-strip .moe-tok', '#moe-tokens tbody tr'].every(one => document.querySelector(one)))"""


def section() -> Section:
    runs, kept = _routers()
    by_address, by_rail = _page()
    first, whole = [each[0] for each in by_rail], [each[1] for each in by_rail]
    sweep = in_turn({"sweep": Case("run_sweep", path=str(ROOT / "models" / "demo-moe"), prompts=_prompts())}, SWEEP_ROUNDS)["sweep"]
    rows = [
        ["by the rail, from another page of the trace: first screen", *_figures(first)], ["the same: the last card", *_figures(whole)],
        ["by its address, the program loaded too: first screen", *_figures([each[0] for each in by_address])],
        ["the same: the last card", *_figures([each[1] for each in by_address])],
    ]  # fmt: skip
    text = f"""
{describe()}, {N_TOKENS:,} tokens, CPU. *plain* is the engine's own run with the logits of every position; *routers* receives {", ".join(SITES)} of every layer too.
Both in one process, in turn: two processes with the same model differ by up to a tenth for as long as they live. PyTorch computes experts as transformers does by default.

{time_table({name: each for name, each in runs.items() if name.startswith("PyTorch")}, "PyTorch, plain")}

{time_table({name: each for name, each in runs.items() if name.startswith("GGUF")}, "GGUF, plain")}

The same, kept as a trace: logit summaries, integrity checks and the file on disk included, beside transformers' and llama.cpp's own runs.

{table(["case", "seconds", "least", "most"], [[name, *_figures(each.seconds)] for name, each in kept.items()])}

The MoE page of a synthetic trace of {TRACE[1]} layers, {TRACE[2]} experts, {TRACE[3]} of which serve each of {TRACE[4]:,} tokens, in Chromium on the server's own machine:
until the cards are drawn that the window shows (1440 x 1000 pixels), and until the last one that a trace fills by itself.

{table(["page", "seconds", "least", "most"], rows)}

Every expert of demo-moe taken out in turn over {SWEPT} prompts: {sweep.last["n_runs"]:,} runs of {sweep.last["n_tokens"] / SWEPT:.0f} tokens on average.
"""
    goals = [
        at_most(MOST, "PyTorch, routers", "PyTorch, plain", runs), at_most(MOST, "GGUF, routers", "GGUF, plain", runs),
        Goal(f"MoE page of {TRACE[1]} layers, {TRACE[2]} experts, {TRACE[4]:,} tokens: first screen under {PAGE_S:g} s", _measured(first), statistics.median(first) < PAGE_S),
        Goal(f"sweep of all experts of demo-moe over {SWEPT} prompts: under {SWEEP_S:g} s on {n_threads()} threads", f"{sweep.median:.1f} s", sweep.median < SWEEP_S),
    ]  # fmt: skip
    return Section("MoE routing", text, goals, ROUNDS)


def _routers() -> tuple[dict[str, Runs], dict[str, Runs]]:
    """Engine runs with and without the routers' sites; and captures on disk beside the plain runs of both libraries."""
    ids = [i % SIZES["vocab_size"] for i in random_ids(N_TOKENS)]
    paths = {"PyTorch": str(hf_folder()), "GGUF": str(gguf_file())}
    runs: dict[str, Runs] = {}
    for name, path in paths.items():
        with Case("run_routing", path=path, ids=ids) as case:
            for number in range(ROUNDS + 1):
                for what in ("plain", "routers"):
                    runs.setdefault(f"{name}, {what}", Runs()).add(case.run(), warm_up=number == 0)
    kept = in_turn({
        "transformers": Case("run_transformers", path=paths["PyTorch"], ids=ids),
        "PyTorch, routers on disk": Case("run_capture", path=paths["PyTorch"], ids=ids, sites=list(SITES)),
        "llama.cpp": Case("run_llama", path=paths["GGUF"], ids=ids),
        "GGUF, routers on disk": Case("run_capture", path=paths["GGUF"], ids=ids, sites=list(SITES)),
    }, ROUNDS)  # fmt: skip
    return runs, kept


def _page() -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Seconds until the first screen and until the whole page is drawn: opened by its address, and from another page of the same trace."""
    data = FOLDER / "moe"
    settings = load_settings(data_dir=data)
    settings.traces_dir.mkdir(parents=True, exist_ok=True)
    Library.from_settings(settings).add(write_trace(settings.traces_dir, *TRACE))
    with started_server(data) as found, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        _by_address(page, found.address)  # the first opens the program's own files, and computes the measures
        by_address = [_by_address(page, found.address) for _ in range(VIEWS)]
        by_rail = [_by_rail(page) for _ in range(VIEWS)]
        browser.close()
    return by_address, by_rail


def _by_address(page: Page, address: str) -> tuple[float, float]:
    page.goto("about:blank")
    page.goto(f"{address}/moe?trace={TRACE[0]}", wait_until="commit")
    return _drawn(page, 0.0)  # the page's own clock begins with the navigation


def _by_rail(page: Page) -> tuple[float, float]:
    page.evaluate("() => document.querySelector('nav a[href^=\"/trace\"]').click()")
    page.wait_for_function("() => !document.querySelector('#moe-load')")
    page.wait_for_load_state("networkidle")
    return _drawn(page, page.evaluate("() => { const start = performance.now(); document.querySelector('nav a[href^=\"/moe\"]').click(); return start; }"))


def _drawn(page: Page, start: float) -> tuple[float, float]:
    seconds = []
    for graphs in (_FIRST, _GRAPHS):
        page.wait_for_function(_DRAWN, arg=graphs, polling=10)
        seconds.append(float(page.evaluate("start => performance.now() - start", start)) / 1e3)
    page.wait_for_load_state("networkidle")
    return seconds[0], seconds[1]


def _prompts() -> list[str]:
    """The demo prompts with numbers behind them, so that there are enough of them and no two are alike."""
    texts = [row["text"] for row in tomllib.loads((ROOT / "config" / "presets.toml").read_text())["prompts"]["demo"]]
    return [f"{texts[i % len(texts)]} {i}" for i in range(SWEPT)]


def _figures(seconds: list[float]) -> list[str]:
    return [f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}", f"{max(seconds):.3f}"]


def _measured(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.3f} s of {len(seconds)} ({min(seconds):.3f} - {max(seconds):.3f})"

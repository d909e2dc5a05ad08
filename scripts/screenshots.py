"""Photographs every page of a running Layerscope in both themes, at 1440 and 1024 pixels: python scripts/screenshots.py FOLDER [URL] [TRACE_ID].

Without a trace id the newest trace of the library is shown. Says what the browser complained about, and exits 1 if it did.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTHS, THEMES, HEIGHT = (1440, 1024), ("light", "dark"), 1000
RUN_PAGES = {
    "home": "/",
    "generate": "/generate",
    "batch": "/batch",
    "library": "/library",
    "jobs": "/jobs",
    "weights": "/weights",
    "architecture": "/architecture",
    "graph": "/graph",
    "quantization": "/quantization",
    "sensitivity": "/sensitivity",
}
TRACE_PAGES = {name: f"/{name}" for name in ("trace", "attention", "activations", "neurons", "lens", "logits", "attribution", "embeddings", "moe")}
CHROMIUM = "/usr/bin/chromium"


def main(folder: Path, url: str, trace_id: str = "") -> int:
    folder.mkdir(parents=True, exist_ok=True)
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for theme in THEMES:
            for width in WIDTHS:
                context = browser.new_context(viewport={"width": width, "height": HEIGHT}, color_scheme=theme)
                page = context.new_page()
                page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
                page.on("pageerror", lambda error: complaints.append(str(error)))
                trace_id = trace_id or newest_trace(page, url)
                pages = RUN_PAGES | {name: f"{path}?trace={trace_id}" for name, path in TRACE_PAGES.items()}
                for name, path in pages.items():
                    photograph(page, f"{url}{path}", folder / f"{name}-{theme}-{width}.png")
                context.close()
        browser.close()
    for complaint in dict.fromkeys(complaints):
        print(complaint[:400])
    return 1 if complaints else 0


def newest_trace(page: Page, url: str) -> str:
    page.goto(f"{url}/library")
    href = page.locator("a.row-link").first.get_attribute("href") or ""
    return href.partition("trace=")[2]


def photograph(page: Page, address: str, file: Path) -> None:
    page.goto(address)
    page.wait_for_selector(".page-title")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(900)  # Plotly draws after its data has arrived
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if overflow > 0:
        print(f"{file.name}: {overflow} pixels wider than the window")
    page.screenshot(path=file, full_page=True)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8050", *sys.argv[3:]))

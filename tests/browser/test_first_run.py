"""A newcomer's first visit, driven in Chromium: run an example, look at it, share the link, cancel a job; nothing breaks the policy."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Page, expect

ROOT = Path(__file__).parent.parent.parent
MODEL = "demo-dense"
JOB_MS = 240_000  # the first run imports torch; on a busy machine that alone takes a minute

expect.set_options(timeout=40_000)  # on two busy cores a page may take long; nothing here is a claim about speed

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (ROOT / "models" / MODEL / "model.safetensors").exists(), reason=f"needs the demo model {MODEL}"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`python app.py` on a port of its own, with its worker; the address it says."""
    data = tmp_path_factory.mktemp("first-run")
    environment = {**os.environ, "LAYERSCOPE_USE_HF_CACHE": "false", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "app.py", "--port", "0", "--data-dir", str(data)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found, said
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(15)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh visitor. What the browser complains about (scripts, the policy, requests that fail) fails the test."""
    context = browser.new_context(viewport={"width": 1440, "height": 1000})
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def traced(server: str, browser: Browser) -> str:
    """The address of the Overview of one finished run, made by clicking: an example prompt, then Run."""
    context = browser.new_context(viewport={"width": 1440, "height": 1000})
    page = context.new_page()
    page.goto(server)
    page.get_by_role("button", name="Indirect object").click()
    expect(page.locator("#run-prompt")).to_have_value(re.compile("When Mary and John"))
    expect(page.locator("#run-estimate")).to_contain_text("of memory")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("#home-progress .job")).to_be_visible()
    page.wait_for_url("**/trace?trace=*", timeout=JOB_MS)
    expect(page.locator("#token-strip .tok.chosen")).to_have_text("·to")
    address = page.url
    context.close()
    return address


def test_an_example_prompt_runs_and_shows_its_tokens(page: Page, traced: str):
    page.goto(traced)
    tokens = page.locator("#token-strip .tok")
    expect(tokens.nth(1)).to_have_text("When")
    expect(page.locator("#token-strip .tok.generated").first).to_be_visible()
    expect(page.locator("summary.badge")).to_contain_text(re.compile(r"\d+ identities hold"))
    tokens.nth(2).click()
    expect(page.locator("#top-title")).to_have_text("Next token after ·Mary")
    assert "pos=2" in page.url


def test_the_way_from_the_trace_to_a_head_and_its_link(page: Page, browser: Browser, traced: str):
    page.goto(traced)
    page.locator(".rail-link", has_text="Attention").click()
    expect(page.locator("#head-grid .head")).to_have_count(32)
    page.locator('#head-grid .head[data-layer="1"][data-head="6"]').click()
    expect(page.locator("#pattern-title")).to_have_text("Pattern of 1.6")
    page.locator("#head-grid").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#pattern-title")).to_have_text("Pattern of 1.7")
    page.wait_for_url(re.compile(r"layer=1.*head=7"))
    link = page.url

    visitor = browser.new_context().new_page()
    visitor.goto(link)
    expect(visitor.locator("#pattern-title")).to_have_text("Pattern of 1.7")
    expect(visitor.locator("#head-grid .head.chosen")).to_have_attribute("data-head", "7")
    visitor.context.close()
    page.reload()
    expect(page.locator("#pattern-title")).to_have_text("Pattern of 1.7")


def test_the_thumbnails_are_one_picture_for_each_theme(page: Page, traced: str):
    pictures: list[str] = []
    page.on("response", lambda response: pictures.append(response.url) if "/thumbs/" in response.url and response.ok else None)
    page.goto(traced.replace("/trace?", "/attention?"))
    expect(page.locator("#pattern-title")).to_contain_text("Pattern of")
    page.locator("#theme-button").click()
    expect(page.locator("html")).to_have_attribute("data-bs-theme", "dark")
    page.wait_for_timeout(300)
    assert [address.rsplit("/", 1)[1] for address in pictures] == ["light.png", "dark.png"]


def test_the_keyboard_moves_through_the_tokens(page: Page, traced: str):
    page.goto(traced)
    expect(page.locator("#token-strip .tok.chosen")).to_be_visible()
    page.locator("#token-strip").focus()
    page.keyboard.press("Home")
    expect(page.locator("#top-title")).to_have_text("Next token after ‹s›")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#top-title")).to_have_text("Next token after When")


def test_the_library_lists_the_run_and_downloads_it(page: Page, server: str, traced: str):
    page.goto(f"{server}/library?search=Mary")
    expect(page.locator("a.row-link").first).to_contain_text("When Mary and John")
    page.locator("a.row-link").first.click()
    page.wait_for_url("**/trace?trace=*")
    with page.expect_download() as download:
        page.locator("a.btn", has_text="Export").click()
    assert download.value.suggested_filename.endswith(".h5")
    assert Path(download.value.path()).read_bytes()[:8] == b"\x89HDF\r\n\x1a\n"


def test_a_running_job_is_cancelled_from_its_page(page: Page, server: str):
    page.goto(f"{server}/?prompt={'river table cloud stone garden music ' * 20}&new=400")
    page.get_by_role("button", name="Run", exact=True).click()
    cancel = page.locator("#home-progress button", has_text="Cancel")
    expect(cancel).to_be_visible()
    cancel.click()
    expect(page.locator("#home-progress .badge")).to_have_text("cancelled", timeout=40_000)
    page.goto(f"{server}/jobs")
    expect(page.locator("#jobs-list tbody tr").first).to_contain_text("cancelled")


def test_an_unknown_trace_is_one_sentence(page: Page, server: str):
    for bad in ("abcdefgh", "../../etc/passwd", "<img src=x onerror=alert(1)>"):
        page.goto(f"{server}/trace?trace={bad}")
        expect(page.locator(".state-error")).to_be_visible()
        assert page.locator(".state-error").inner_text().count(".") >= 1


def test_stopping_the_server_ends_its_worker(tmp_path: Path):
    process = subprocess.Popen([sys.executable, "app.py", "--port", "0", "--data-dir", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().split()[-1]
    with urllib.request.urlopen(f"{address}/healthz") as answer:
        assert answer.read() == b"ok, 0 traces\n"
    children = _children(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children and not any(Path(f"/proc/{pid}").exists() for pid in children)


def _children(pid: int) -> list[str]:
    """Children started by any thread of a process."""
    return [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]

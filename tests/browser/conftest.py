"""Chromium for all browser tests: Debian's own, one instance a session (pytest-playwright)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import expect

expect.set_options(timeout=60_000)  # other programs may want the cores: a page that comes late is no failure

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="session")
def browser_type_launch_args() -> dict:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    return {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}


# `make late`: each answer of a callback reaches the page up to so many milliseconds late, at random, so that two that were asked together
# come in either order. A test that reads the page once, when it may not be there yet, passes on an idle machine and fails here.
LATE = int(os.environ.get("LATE_ANSWERS_MS", "0"))

_LATE_FETCH = """
const fetched = window.fetch;
window.fetch = async (...asked) => {
  const answer = await fetched(...asked);
  if (String(asked[0]?.url ?? asked[0]).includes("_dash-update-component")) await new Promise((go) => setTimeout(go, Math.random() * %d));
  return answer;
};
"""


@pytest.fixture(scope="session", autouse=LATE > 0)
def late_answers(browser):
    new_context = browser.new_context

    def late_context(*arguments, **named):
        context = new_context(*arguments, **named)
        context.add_init_script(_LATE_FETCH % LATE)
        return context

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(browser, "new_context", late_context)
        yield

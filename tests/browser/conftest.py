"""Chromium for all browser tests: Debian's own, one instance a session (pytest-playwright)."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

import pytest
from playwright.sync_api import Page, TimeoutError, expect

expect.set_options(timeout=60_000)  # other programs may want the cores: a page that comes late is no failure

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="session")
def browser_type_launch_args() -> dict:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    return {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}


# What a page shows comes by many callbacks, which may answer in any order. A test waits for one thing and then reads others: so every wait goes on
# until nothing that was asked is unanswered, what the answers have asked in turn included. A page that follows a generation asks again and again.
SETTLING_MS = 5_000
QUIET_MS = 60  # what an answer leads to is asked well before
_LIVE = "document.querySelector('#gen-stop:not([hidden])')"
_SETTLED = f"() => {_LIVE} || (!window.unanswered && performance.now() - (window.answeredAt ?? 0) > {QUIET_MS})"

# `make late`: each answer reaches the page up to so many milliseconds late, at random, so that two that were asked together come in either order. A test that
# reads what may not be there yet passes on an idle machine and fails here.
LATE = int(os.environ.get("LATE_ANSWERS_MS", "0"))

_COUNTING_FETCH = """
{ const fetched = window.fetch;
  window.unanswered = 0;
  window.fetch = async (...asked) => {
    if (!String(asked[0]?.url ?? asked[0]).includes("_dash-update-component")) return fetched(...asked);
    window.unanswered += 1;
    try {
      const answer = await fetched(...asked);
      await answer.clone().arrayBuffer();
      if (%(late)d) await new Promise((go) => setTimeout(go, Math.random() * %(late)d));
      return answer;
    } finally { window.unanswered -= 1; window.answeredAt = performance.now(); }
  }; }
"""


@pytest.fixture(scope="session", autouse=True)
def waits_settle(browser):
    """Every context counts its answers, and every wait for a function or an element is followed by one for them."""
    new_context = browser.new_context

    def counting_context(*arguments, **named):
        context = new_context(*arguments, **named)
        context.add_init_script(_COUNTING_FETCH % {"late": LATE})
        return context

    def settling(wait, wait_for_function=Page.wait_for_function):
        @functools.wraps(wait)
        def wait_and_settle(page, *arguments, **named):
            found = wait(page, *arguments, **named)
            with contextlib.suppress(TimeoutError):
                wait_for_function(page, _SETTLED, timeout=SETTLING_MS)
            return found

        return wait_and_settle

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(browser, "new_context", counting_context)
        for name in ("wait_for_function", "wait_for_selector"):
            patched.setattr(Page, name, settling(getattr(Page, name)))
        yield

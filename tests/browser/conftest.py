"""Chromium for all browser tests: Debian's own, one instance a session (pytest-playwright)."""

from __future__ import annotations

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

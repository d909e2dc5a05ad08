"""Chromium for all browser tests: Debian's own, one instance a session (pytest-playwright)."""

from __future__ import annotations

from pathlib import Path

import pytest

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="session")
def browser_type_launch_args() -> dict:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"needs Chromium at {CHROMIUM}")
    return {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}

"""The dashboard as tests use it: one app a process (Dash's pages register once), on a data folder of its own, without a worker."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import dash

from app import create_app
from config import load_settings


@functools.cache
def web_app() -> dash.Dash:
    """The app, its shelf empty and its library empty at first."""
    folder = Path(tempfile.mkdtemp(prefix="layerscope-tests-"))
    settings = load_settings(data_dir=folder / "data", models_dirs=[folder / "models"], use_hf_cache=False, max_body_mb=1, allowed_hosts=["lab.example"])
    return create_app(settings)

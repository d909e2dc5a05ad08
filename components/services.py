"""What the pages may reach: the shelf of models and traces, the job queue, the cache of derived arrays, the settings, live records,
batches.

`app.create_app` puts one `Services` object on the Flask server; pages and components ask for it with `services()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flask

SERVER_KEY = "LAYERSCOPE"


@dataclass(frozen=True)
class Services:
    """The long-lived objects of one server; every one of them is safe to call from several threads."""

    library: Any
    jobs: Any
    derived: Any
    settings: Any
    live: Any
    batches: Any


def services() -> Services:
    """The services of the app that is answering the current request."""
    return flask.current_app.config[SERVER_KEY]

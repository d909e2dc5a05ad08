"""Layerscope's server: `python app.py` builds the Dash app, starts the worker beside it and serves both until it is stopped.

`create_app(settings)` makes the app alone: the shell, the pages, the guard, and the library and the job queue on `app.server`.
Nothing here or below it imports an engine; models are opened in the worker.
"""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

import dash
import waitress

from backend.batches import Batches
from backend.derived import Derived
from backend.errors import LayerscopeError
from backend.jobs.records import Jobs
from backend.jobs.worker_process import WorkerKeeper
from backend.library import Library
from backend.live import LiveRecords
from backend.web_guard import guard
from components.routes import add_routes
from components.services import SERVER_KEY, Services
from components.shell import INDEX, shell, show_problem
from config import Settings, load_settings

ROOT = Path(__file__).resolve().parent
THREADS = 8


def create_app(settings: Settings) -> dash.Dash:
    """The Dash app with its services on `app.server.config["LAYERSCOPE"]`. Starts no process and listens on no port."""
    app = dash.Dash(
        "layerscope",
        use_pages=True,
        pages_folder=str(ROOT / "pages"),
        assets_folder=str(ROOT / "assets"),
        assets_ignore=r"theme_first\.js",
        assets_path_ignore=["vendor"],
        external_stylesheets=["/assets/vendor/bootstrap.min.css"],
        serve_locally=True,
        suppress_callback_exceptions=True,  # the components of a page exist only while it is shown
        title="Layerscope",
        update_title="",
        include_pages_meta=False,
        index_string=INDEX,
        on_error=show_problem,
        enable_mcp=False,
    )
    app.enable_dev_tools(debug=False)
    app.layout = shell
    library = Library.from_settings(settings)
    derived = Derived(settings.data_dir / "cache", settings.derived_cache_mb << 20)
    app.server.config[SERVER_KEY] = Services(library, Jobs(settings), derived, settings, LiveRecords(settings.data_dir), Batches(settings.data_dir))
    add_routes(app.server)
    guard(app.server, settings.allowed_hosts, settings.max_body_mb << 20, app.csp_hashes)
    return app


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit code: 0, or 2 after one sentence on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        settings = load_settings(**vars(_parse(arguments)))
        check_address(settings)
        with settings.lock():
            serve(settings)
    except LayerscopeError as problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    return 0


def check_address(settings: Settings) -> None:
    """Refuse an address that others can reach unless the names it may be asked by were allowed."""
    if not settings.is_loopback and not settings.allowed_hosts:
        raise LayerscopeError(
            f"Host {settings.host} can be reached from other machines, and Layerscope has no password; "
            "set LAYERSCOPE_ALLOWED_HOSTS to the names it may be asked by (for a port published from a container: localhost)."
        )


def serve(settings: Settings) -> None:
    """Bind the port, start the worker, say where Layerscope is, and answer until stopped; the worker ends with the server."""
    app = create_app(settings)
    services: Services = app.server.config[SERVER_KEY]
    services.library.rescan()
    services.jobs.reap()
    try:
        server = waitress.create_server(
            app.server, host=settings.host, port=settings.port, threads=THREADS, max_request_body_size=settings.max_body_mb << 20, ident=None
        )
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise LayerscopeError(f"Port {settings.port} of {settings.host} is taken; stop what uses it or choose another with --port.") from None
        raise LayerscopeError(f"Layerscope cannot listen on {settings.host}:{settings.port} ({problem.strerror}).") from None
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        with WorkerKeeper(settings):
            sys.stdout.write(f"Layerscope is on http://{_in_url(settings.host)}:{server.effective_port}\n")
            sys.stdout.flush()
            server.run()
    finally:
        server.close()


def _stop(_: int, __: FrameType | None) -> None:
    raise SystemExit(0)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python app.py", description="Serve Layerscope's dashboard with its worker. Settings: config/default.toml, LAYERSCOPE_*.")
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (8050)")
    parser.add_argument("--data-dir", type=Path, help="folder of traces, queue and logs (./data)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

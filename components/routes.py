"""Routes beside Dash's own: head thumbnails, the download of a trace file, and a health check. All behind the guard."""

from __future__ import annotations

from flask import Flask, Response, abort, request, send_file

from backend.errors import LayerscopeError
from components.heads import THUMBS, thumbnail_sprite
from components.services import services

THEMES = ("light", "dark")
_KEPT = "private, max-age=31536000, immutable"


def add_routes(server: Flask) -> None:
    """Register the routes on a server."""
    server.add_url_rule("/thumbs/<trace_id>/<theme>.png", view_func=thumbs)
    server.add_url_rule("/download/<trace_id>.h5", view_func=download)
    server.add_url_rule("/healthz", view_func=health)
    server.after_request(keep_versions)


def keep_versions(answer: Response) -> Response:
    """Let the browser keep an asset whose address names its version, as Dash writes it (?m=modified): asking after 40 of them takes a third of a second."""
    if request.path.startswith("/assets/") and "m" in request.args and answer.status_code in (200, 304):
        answer.headers["Cache-Control"] = _KEPT
    return answer


def thumbs(trace_id: str, theme: str) -> Response:
    """The sprite of a trace's head thumbnails. A trace never changes, so the browser may keep it."""
    if theme not in THEMES:
        abort(404)
    try:
        trace = services().library.open(trace_id)  # checks the id
        key = (THUMBS, trace.id, theme)
        picture = services().derived.get_bytes(key)
        if picture is None:
            picture = thumbnail_sprite(trace.result(THUMBS), theme)
            services().derived.put_bytes(key, picture)
    except LayerscopeError:
        abort(404)
    return Response(picture, mimetype="image/png", headers={"Cache-Control": _KEPT})


def download(trace_id: str) -> Response:
    """The trace file itself."""
    try:
        path = services().library.path_of(trace_id)  # checks the id
    except LayerscopeError:
        abort(404)
    return send_file(path, mimetype="application/x-hdf5", as_attachment=True, download_name=f"{trace_id}.h5")


def health() -> Response:
    """200 while the server answers and its index can be read."""
    return Response(f"ok, {services().library.count_traces()} traces\n", mimetype="text/plain")

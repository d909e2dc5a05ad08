"""The guard in front of every route: who may ask, what a page may load, how much may be sent.

The dashboard listens on loopback without a password, so any page in the user's browser could try to use it. Three checks stop that,
for every route and method, callbacks, assets and error pages alike:

- Host must be a name of this machine or one that was allowed: a foreign name that resolves to 127.0.0.1 (DNS rebinding) gets 400.
- Origin, when it is sent, must be the address that was asked for; `null` is not.
- Sec-Fetch-Site, when it is sent, must be same-origin or none (typed, pasted, bookmarked). One exception: following a link from
  another site to a page (GET, a top-level navigation to a document). Opening a page changes nothing and its answer cannot be read by
  the site that holds the link, while refusing it would break every link in a mail or a ticket. Downloads and pictures are no pages.

A client that sends neither header is no browser and needs no guard: it could send whatever it likes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import urlsplit

from flask import Flask, Request, Response, request
from werkzeug.exceptions import HTTPException

log = logging.getLogger(__name__)

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
# The rules under which Dash serves its one HTML document.
PAGE_RULES = ("/", "/<path:path>")

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


def guard(server: Flask, allowed_hosts: Iterable[str], max_body_bytes: int, script_hashes: Callable[[], Sequence[str]]) -> None:
    """Put the guard on a server. `script_hashes()` is asked at the first answer, when every inline script is known."""
    server.config.update(TRUSTED_HOSTS=[*LOOPBACK_NAMES, *allowed_hosts], MAX_CONTENT_LENGTH=max_body_bytes, PROPAGATE_EXCEPTIONS=False)
    policy: list[str] = []

    @server.before_request
    def refuse_other_sites() -> Response | None:
        reason = refusal(request)
        return _sentence(403, reason) if reason else None

    @server.after_request
    def add_headers(response: Response) -> Response:
        if not policy:
            policy.append(content_security_policy(script_hashes()))
        response.headers["Content-Security-Policy"] = policy[0]
        response.headers.update(_HEADERS)
        return response

    @server.errorhandler(HTTPException)
    def answer_in_a_sentence(error: HTTPException) -> Response:
        words = {
            400: "This address or request is not one that Layerscope answers.",
            404: "There is nothing at this address.",
            413: f"The request is larger than the limit of {max_body_bytes / 2**20:g} MiB.",
            500: "Internal error; the log has the traceback.",
        }
        return _sentence(error.code or 500, words.get(error.code or 500, f"{error.name}."))


def refusal(incoming: Request) -> str | None:
    """Why a request is refused, or None. `incoming.host` has been checked by Flask (TRUSTED_HOSTS) before."""
    origin = incoming.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != incoming.host:
        return "This request comes from another site, and Layerscope answers only its own pages."
    site = incoming.headers.get("Sec-Fetch-Site")
    if site in (None, "same-origin", "none") or _is_followed_link(incoming):
        return None
    return "This request comes from another site, and Layerscope answers only its own pages."


def _is_followed_link(incoming: Request) -> bool:
    return (
        incoming.method == "GET"
        and incoming.headers.get("Sec-Fetch-Mode") == "navigate"
        and incoming.headers.get("Sec-Fetch-Dest") == "document"
        and incoming.url_rule is not None
        and incoming.url_rule.rule in PAGE_RULES
    )


def content_security_policy(script_hashes: Sequence[str]) -> str:
    """Everything from this server; inline styles, since Plotly and Dash write them; inline scripts only by their hash."""
    return "; ".join(
        (
            "default-src 'self'",
            f"script-src 'self' {' '.join(script_hashes)}".strip(),
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        )
    )


def _sentence(status: int, text: str) -> Response:
    return Response(f"{text}\n", status, mimetype="text/plain")

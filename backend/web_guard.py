"""The guard in front of every route: who may ask, what a page may load, how much may be sent.

The dashboard listens on loopback without a password, so any page in the user's browser could try to use it. Three checks stop that,
for every route and method, callbacks, assets and error pages alike:

- Host must be a name of this machine or one that was allowed: a foreign name that resolves to 127.0.0.1 (DNS rebinding) gets 400.
  Any port goes, since a tunnel or a container may publish another one. (Flask's own TRUSTED_HOSTS cannot hold [::1].)
- Origin, when it is sent, must be the address that was asked for; `null` is not.
- Sec-Fetch-Site, when it is sent, must be same-origin or none (typed, pasted, bookmarked). One exception: following a link from
  another site to a page (GET, a top-level navigation to a document). Opening a page changes nothing and its answer cannot be read by
  the site that holds the link, while refusing it would break every link in a mail or a ticket. Downloads and pictures are no pages.

A client that sends neither header is no browser and needs no guard: it could send whatever it likes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import urlsplit

from flask import Flask, Request, Response, request
from werkzeug.exceptions import HTTPException

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII)
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
    server.config.update(MAX_CONTENT_LENGTH=max_body_bytes, PROPAGATE_EXCEPTIONS=False)
    names = frozenset(name.lower() for name in (*LOOPBACK_NAMES, *allowed_hosts))
    policy: list[str] = []

    @server.before_request
    def refuse_strangers() -> Response | None:
        if host_name(request.headers.get("Host", "")) not in names:
            return _sentence(400, "Layerscope does not answer under this host name; LAYERSCOPE_ALLOWED_HOSTS can allow it.")
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


def host_name(host: str) -> str | None:
    """The name in a Host header, in lower case and without its port; None if it is not exactly one name.

    >>> host_name("LocalHost:8050"), host_name("[::1]:8050"), host_name("localhost@evil.example")
    ('localhost', '[::1]', None)
    """
    match = _HOST.fullmatch(host.lower())
    return match[1] if match else None


def refusal(incoming: Request) -> str | None:
    """Why a request whose Host is good is refused, or None."""
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

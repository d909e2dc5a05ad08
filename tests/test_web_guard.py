"""Claims about the guard: another site can make the dashboard do nothing and read nothing from it, whatever route or method it tries."""

from __future__ import annotations

import itertools
import re

import pytest

from app import check_address, main
from backend.errors import LayerscopeError
from components.services import SERVER_KEY
from config import load_settings
from tests.web_app import web_app

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
FOREIGN = (
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "http://localhost:9999"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"},
)
LINK = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


def addresses() -> list[str]:
    """One address for every rule of the server, its variables filled in."""
    return sorted({re.sub(r"<[^>]+>", "x", rule.rule) for rule in web_app().server.url_map.iter_rules()})


def test_the_enumeration_sees_our_routes_and_dashs():
    assert {"/", "/_dash-update-component", "/thumbs/x/x.png", "/download/x.h5", "/healthz", "/assets/x"} <= set(addresses())


@pytest.mark.parametrize("headers", FOREIGN, ids=lambda headers: ",".join(headers.values()))
def test_another_site_is_refused_on_every_route_and_method(headers):
    client = web_app().server.test_client()
    for address, method in itertools.product(addresses(), METHODS):
        answer = client.open(address, method=method, headers=headers)
        assert answer.status_code in (403, 405), (method, address, answer.status_code)
        if method in ("GET", "POST") and answer.status_code == 405:
            continue
        assert b"<" not in answer.data, (method, address)


def test_another_site_cannot_start_a_job():
    server = web_app().server
    body = {"output": "home-job.data", "inputs": [], "changedPropIds": ["run-button.n_clicks"]}
    for headers in FOREIGN:
        assert server.test_client().post("/_dash-update-component", json=body, headers=headers).status_code == 403
    assert sum(server.config[SERVER_KEY].jobs.counts().values()) == 0


HOSTS = ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "localhost@evil.example", "127.0.0.1, evil.example", "127.0.0.2", "localhost.", "evil.example:8050")


@pytest.mark.parametrize("host", HOSTS)
def test_a_foreign_host_name_is_refused_on_every_route(host):
    for address in addresses():
        assert web_app().server.test_client().get(address, headers={"Host": host}).status_code == 400, address


@pytest.mark.parametrize("host", ["127.0.0.1:8050", "localhost:8050", "[::1]:8050", "localhost", "LOCALHOST:8050", "lab.example"])
def test_this_machines_names_and_the_allowed_ones_are_answered(host):
    assert web_app().server.test_client().get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("site", ["none", "same-origin"])
def test_a_typed_or_own_address_is_answered(site):
    assert web_app().server.test_client().get("/trace?trace=abc", headers={"Sec-Fetch-Site": site}).status_code == 200


def test_a_link_on_another_site_opens_pages_and_nothing_else():
    client = web_app().server.test_client()
    assert client.get("/trace?trace=abcdefgh", headers=LINK).status_code == 200
    for address in ("/download/abcdefgh.h5", "/thumbs/abcdefgh/light.png", "/_dash-layout", "/healthz", "/assets/theme.js"):
        assert client.get(address, headers=LINK).status_code == 403, address
    assert client.post("/trace", headers=LINK).status_code in (403, 405)
    assert client.get("/trace", headers={**LINK, "Sec-Fetch-Dest": "iframe"}).status_code == 403


def test_every_answer_carries_the_policy():
    client = web_app().server.test_client()
    for address in ("/", "/healthz", "/nothing/here.png", "/download/abcdefgh.h5"):
        headers = client.get(address).headers
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in policy["script-src"] and "sha256-" in policy["script-src"]
        assert policy["frame-ancestors"] == policy["object-src"] == "'none'"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers


def test_every_inline_script_of_the_page_is_in_the_policy():
    """Dash writes its renderer and the inline callbacks into the page: each must be named by its hash, or nothing would run."""
    import base64
    import hashlib

    answer = web_app().server.test_client().get("/")
    inline = re.findall(r"<script>(.*?)</script>", answer.text, re.S) + re.findall(r'<script id="_dash-renderer"[^>]*>(.*?)</script>', answer.text, re.S)
    assert inline
    for script in inline:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in answer.headers["Content-Security-Policy"]


def test_nothing_is_loaded_from_elsewhere():
    page = web_app().server.test_client().get("/").text
    assert not re.findall(r"(?:src|href)=[\"'](?:https?:)?//", page)


def test_a_large_body_is_refused_in_a_sentence():
    answer = web_app().server.test_client().post("/_dash-update-component", data=b"x" * (2 << 20), content_type="application/json")
    assert answer.status_code == 413
    assert answer.text == "The request is larger than the limit of 1 MiB.\n"


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"output": "no.such"}', b'{"output": 3, "inputs": "x"}', b"null"])
def test_a_malformed_callback_gives_no_traceback(body):
    answer = web_app().server.test_client().post("/_dash-update-component", data=body, content_type="application/json")
    assert answer.status_code >= 400
    assert "Traceback" not in answer.text and "File " not in answer.text and len(answer.text) < 300


HOSTILE_IDS = ("..%2f..%2fetc%2fpasswd", "%252e%252e%252f", "..", "abc;../def", "abcdefgh%00", "ABCDEFGH", "a" * 65, "short", "..\\..\\x", "abcdefgh")


@pytest.mark.parametrize("trace_id", HOSTILE_IDS)
def test_no_id_leads_outside_the_library(trace_id):
    for address in (f"/download/{trace_id}.h5", f"/thumbs/{trace_id}/light.png"):
        answer = web_app().server.test_client().get(address)
        assert answer.status_code == 404 or "layerscope" in answer.text.lower(), address  # else Dash's page for an unknown path
        assert "root:" not in answer.text and answer.mimetype in ("text/plain", "text/html")


def test_developer_tools_and_the_agent_endpoint_are_off():
    config = web_app()._dev_tools
    assert not config.ui and not config.serve_dev_bundles and not config.props_check
    assert not any("mcp" in rule.rule for rule in web_app().server.url_map.iter_rules())


def test_an_address_that_others_can_reach_needs_allowed_names():
    with pytest.raises(LayerscopeError, match=r"0\.0\.0\.0 .* LAYERSCOPE_ALLOWED_HOSTS"):
        check_address(load_settings(host="0.0.0.0"))
    check_address(load_settings(host="0.0.0.0", allowed_hosts=["localhost"]))
    check_address(load_settings(host="127.0.0.1"))


def test_a_taken_port_is_said_in_one_sentence(tmp_path, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--port", str(port), "--data-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"Port {port} of 127.0.0.1 is taken; stop what uses it or choose another with --port.\n"

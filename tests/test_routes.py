"""What the browser may keep: assets by the address of their version, and nothing that may change under its address."""

from __future__ import annotations

import re

from tests.web_app import web_app


def test_assets_are_kept_by_their_version_and_asked_for_again_without_one():
    client = web_app().server.test_client()
    page = client.get("/").text
    versioned = re.findall(r"/assets/[\w./-]+\?m=[\d.]+", page)
    assert len(versioned) > 20  # the search sees them
    for address in versioned:
        assert "immutable" in client.get(address).headers["Cache-Control"], address
        assert "immutable" not in client.get(address.partition("?")[0]).headers["Cache-Control"]
    for address in ("/", "/assets/no-such-file.js?m=1", "/healthz", "/trace?m=1"):
        assert "immutable" not in client.get(address).headers.get("Cache-Control", ""), address

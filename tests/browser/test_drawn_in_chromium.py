"""Stills: content that Dash knows as one component is made in the browser from an attribute, and goes with the attribute."""

from __future__ import annotations

import json

import pytest

from tests.browser.test_trace_pages import server  # noqa: F401  fixture

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def host(server, page):  # noqa: F811
    """Puts a div with a still on a page; `change(content)` gives the div another, None takes it away. Returns its text and how many elements it has."""
    page.goto(server[0])
    page.evaluate("() => { const host = document.createElement('div'); host.id = 'host'; document.body.append(host); }")

    def change(content):
        script = "(still) => { const host = document.getElementById('host'); if (still === null) host.removeAttribute('data-still'); else host.setAttribute('data-still', still); }"
        page.evaluate(script, None if content is None else json.dumps(content))
        return page.evaluate("() => { const host = document.getElementById('host'); return [host.textContent, host.querySelectorAll('*').length]; }")

    return change


def test_a_still_follows_its_attribute(host):
    assert host([["b", {"class": "x"}, ["one"]], "two"]) == ["onetwo", 1]
    assert host([["p", {}, ["three"]]]) == ["three", 1]
    assert host(None) == ["", 0]  # React has given the element to something else


def test_text_in_a_still_stays_text(host):
    assert host([["p", {}, [HOSTILE]]]) == [HOSTILE, 1]

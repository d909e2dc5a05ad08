"""What is drawn in the browser instead of by Dash: every element, attribute and text is kept, and nothing else can be drawn."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dash import dcc, html

from components.drawn import elements, is_still, still

HOSTILE = "<img src=x onerror=alert(1)>"


def test_components_become_tags_attributes_and_texts():
    place: dict = {"data-pos": 3, "aria-label": "a"}
    made = elements([html.Tr([html.Td(HOSTILE, className="num"), html.Td(None), html.Td([html.B("x"), "y"], colSpan=2)], **place), "end"])
    assert made == [
        ["tr", {"data-pos": 3, "aria-label": "a"}, [["td", {"class": "num"}, [HOSTILE]], ["td", {}, []], ["td", {"colspan": 2}, [["b", {}, ["x"]], "y"]]]],
        "end",
    ]


def test_a_component_that_is_no_element_is_refused():
    with pytest.raises(TypeError, match="Store cannot be drawn"):
        elements(html.Div(dcc.Store(id="x")))


def test_empty_attributes_are_left_out_and_numbers_become_text():
    assert elements([html.Span(7, className="", title=None), None]) == [["span", {}, ["7"]]]


def test_a_still_is_one_component_with_everything_in_an_attribute():
    table = html.Table(html.Tbody(html.Tr([html.Td("a<b", className="num"), html.Td(3)])), className="ls-table")
    made = still(table)
    assert json.loads(made.to_plotly_json()["props"]["data-still"]) == elements(table)
    assert getattr(made, "children", None) is None and made.content is table


@pytest.mark.parametrize(
    "content",
    [
        html.Span("", id="written-by-a-callback"),
        html.Button("x", n_clicks=0),
        html.A("link", href="/"),
        html.Script("x"),
        dcc.Store(id="x"),
        html.Div([html.B("deep"), html.Div(html.Span("", id="x"))]),
    ],
    ids=lambda content: type(content).__name__,
)
def test_what_a_callback_could_use_or_an_address_is_no_still(content: Any):
    assert not is_still(content)


def test_tools_and_texts_are_still():
    assert is_still([html.Button("PNG", className="tool", title="Save", **{"data-tool": "png"}), html.Details([html.Summary("About"), html.Div(html.P("It is."))]), "x", 3, None])

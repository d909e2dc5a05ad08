"""What is drawn in the browser instead of by Dash: every element, attribute and text is kept, and nothing else can be drawn."""

from __future__ import annotations

import pytest
from dash import dcc, html

from components.drawn import Drawn, elements

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


def test_what_is_drawn_already_is_passed_on_as_it_is():
    made = [["span", {"class": "tok"}, ["a"]], ["span", {}, ["b"]]]
    assert elements(Drawn(made)) == made and elements([Drawn(made), "end"]) == [*made, "end"]

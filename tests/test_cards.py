"""Every card says what it shows: a title, an About text, and the tools of the graph that it holds, in the code of all pages and in what layouts return."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dash
import pytest
from dash import dcc, html
from dash.development.base_component import Component

from backend.engines import OpenOptions, open_engine
from backend.experiments.capture import CaptureSpec, capture
from components.card import card
from components.services import services
from tests.tiny_models import TinyModel
from tests.web_app import web_app

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("pages/*.py"), *ROOT.glob("components/*.py")])
TOOLS = {"png", "svg", "csv", "table"}


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """(where, call) of every call of the function in pages and components."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def argument(call: ast.Call, position: int, name: str) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == name), call.args[position] if len(call.args) > position else None)


def empty_text(value: ast.expr | None) -> bool:
    return value is None or isinstance(value, ast.Constant) and not value.value


def first_texts(name: str) -> dict[str, str]:
    """The ids that a function is called with -> where."""
    return {call.args[0].value: where for where, call in calls(name) if call.args and isinstance(call.args[0], ast.Constant)}


def test_every_card_has_a_title_and_an_about_text():
    found = list(calls("card"))
    assert len(found) > 60  # the search sees the calls
    without = [f"{where} {ast.unparse(call.args[0])}" for where, call in found if empty_text(argument(call, 0, "title")) or empty_text(argument(call, 4, "about"))]
    assert without == []


def test_every_graph_has_its_tools_and_no_tool_is_without_a_graph():
    graphs, tools = first_texts("graph") | first_texts("_graph"), first_texts("graph_tools")  # _graph: two panes of one kind
    assert len(graphs) > 20
    assert {name: graphs[name] for name in graphs.keys() - tools.keys()} == {}
    assert {name: tools[name] for name in tools.keys() - graphs.keys()} == {}


def test_graphs_are_made_by_one_function():
    """dcc.Graph anywhere else would come without its tools, or with plotly's own button that sends figures away."""
    users = [str(path.relative_to(ROOT)) for path in FILES if "dcc.Graph(" in path.read_text()]
    assert users == ["components/graph.py"]


def parts(component: Any) -> Iterator[Component]:
    """A component and everything in it."""
    if isinstance(component, (list, tuple)):
        for each in component:
            yield from parts(each)
    elif isinstance(component, Component):
        yield component
        yield from parts(getattr(component, "children", None))
        yield from parts(getattr(component, "content", None))  # of a still


def text_of(component: Any) -> str:
    if isinstance(component, (list, tuple)):
        return "".join(map(text_of, component))
    if not isinstance(component, Component):
        return "" if component is None else str(component)
    return text_of(getattr(component, "children", None)) + text_of(getattr(component, "content", None))


def problems(section: Component) -> list[str]:
    """What a card lacks."""
    inside = list(parts(section))
    heads = [each for each in inside if isinstance(each, html.H2) and getattr(each, "className", "") == "card-title"]
    title = heads[0] if heads else None
    named_later = title is not None and any(getattr(each, "id", None) for each in parts(title.children))  # a callback writes it
    about = [each for each in inside if isinstance(each, html.Details) and text_of(each.children[0]) == "About"]
    found = [] if title is not None and (text_of(title).strip() or named_later) else ["no title"]
    found += [] if about and len(text_of(about[0].children[1]).strip()) > 30 else ["no About"]
    for graph in (each for each in inside if isinstance(each, dcc.Graph)):
        kinds = {each.to_plotly_json()["props"]["data-tool"] for each in inside if isinstance(each, html.Button) and each.to_plotly_json()["props"].get("data-graph") == graph.id}
        full = any(each.to_plotly_json()["props"].get("data-tool") == "full-screen" for each in inside if isinstance(each, html.Button))
        found += [f"{graph.id} lacks {tool}" for tool in sorted(TOOLS - kinds)] + ([] if full else [f"{graph.id} lacks full screen"])
    return found


def unnamed(page: Component) -> list[str]:
    """Buttons and links without words, title or label."""
    found = []
    for each in parts(page):
        if isinstance(each, (html.Button, html.A, html.Summary)):
            words = each.to_plotly_json()["props"]
            if not (text_of(each).strip() or words.get("aria-label") or words.get("title") or any(getattr(part, "id", None) for part in parts(each.children))):
                found.append(str(words.get("id") or words))
    return found


@pytest.fixture(scope="module")
def trace_id(tiny_mistral: TinyModel) -> Iterator[str]:
    """The last of three traces of one category, everything captured."""
    with web_app().server.test_request_context("/"):
        engine = open_engine(tiny_mistral.hf, OpenOptions())
        for prompt in ("The capital of France", "Mary gave the book", "Mary gave Mary"):
            path = capture(engine, CaptureSpec(prompt=prompt, category="cards"), services().library.traces_dir)
            services().library.add(path)
        engine.close()
        yield path.stem


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("pages/*.py") if path.stem != "not_found_404"))
def test_the_cards_of_a_page(name: str, trace_id: str):
    page = next(page for page in dash.page_registry.values() if page["module"] == f"pages.{name}")
    for query in ({}, {"trace": trace_id}):
        shown = page["layout"](**query)
        sections = [each for each in parts(shown) if isinstance(each, html.Section) and "ls-card" in each.className]
        assert {text_of(section)[:40]: problems(section) for section in sections if problems(section)} == {}
        assert unnamed(shown) == []


def test_the_audit_sees_what_is_missing():
    assert problems(card("", html.Div(), about="Short.")) == ["no title", "no About"]
    assert problems(card("Title", dcc.Graph(id="bare"), about="What is shown, and how it is computed."))[-1] == "bare lacks full screen"
    assert len(unnamed(html.Div([html.Button(html.I()), html.Button("Run")]))) == 1

"""Library: every trace that was made here, searched and filtered; open one, delete one."""

from __future__ import annotations

from typing import Any

import dash
from dash import Input, Output, callback, dcc, html

from components.card import card
from components.controls import field, set_button
from components.services import services
from components.states import empty
from components.trace_list import trace_table
from components.url_state import as_int, keep_url

dash.register_page(__name__, path="/library", name="Library", order=1, group="Run", icon="library", description="Every trace that was made here")

PAGE_SIZE = 50
ABOUT = "One row a run. Search looks into prompt, answer, model and tags; a category is what a run or a batch was given. Deleting a trace deletes its file."


def layout(search: str = "", model: str | None = None, category: str | None = None, page: str | None = None, **_: str) -> html.Div:
    library = services().library
    filters = html.Div(
        [
            field("Search", _search_box(search), id="library-search"),
            field("Model", dcc.Dropdown(library.trace_models(), model, id="library-model", placeholder="all"), id="library-model"),
            field("Category", dcc.Dropdown(library.categories(), category, id="library-category", placeholder="all"), id="library-category"),
        ],
        className="fields library-filters",
    )
    stores = [dcc.Store(id="delete-trace"), dcc.Store(id="library-page", data={"value": page or "0"})]
    body = [filters, *stores, html.Div(id="library-list"), html.Div(id="library-pages", className="form-foot")]
    title = html.Div([html.H1("Library"), html.Span(id="library-count", className="page-subtitle")], className="page-title")
    return html.Div([title, card("Traces", body, "Newest first.", about=ABOUT)], className="page")


def _search_box(search: str) -> dcc.Input:
    return dcc.Input(id="library-search", value=search, placeholder="prompt, answer, model, tag", debounce=0.25, className="text-input", maxLength=200)


@callback(Input("delete-trace", "data"), prevent_initial_call=True)
def delete(request: dict[str, Any] | None) -> None:
    if request:
        services().library.delete(str(request["value"]))


@callback(
    Output("library-list", "children"), Output("library-count", "children"), Output("library-pages", "children"),
    Input("library-search", "value"), Input("library-model", "value"), Input("library-category", "value"), Input("library-page", "data"), Input("counts", "data"),
)  # fmt: skip
def show(search: str | None, model: str | None, category: str | None, page: dict[str, Any], _: Any) -> tuple[Any, str, Any]:
    """The list again whenever a filter or the number of traces changes."""
    library, wanted = services().library, (search or "", model or "", category or "")
    count = library.count_traces(*wanted)
    last = max(count - 1, 0) // PAGE_SIZE
    at = as_int(str(page.get("value")), 0, 0, last)
    said = f"{count:,} traces" if count != 1 else "1 trace"
    if not count:
        nothing = empty("Nothing found", "No trace matches; clear a filter.") if any(wanted) else empty("No traces yet", "Run a prompt on Home; its trace appears here.")
        return nothing, said, None
    return trace_table(library.traces(*wanted, limit=PAGE_SIZE, offset=at * PAGE_SIZE), deletable=True), said, _pages(at, last)


def _pages(at: int, last: int) -> Any:
    if not last:
        return None
    back = set_button("Newer", "library-page", str(at - 1), disabled=at == 0)
    on = set_button("Older", "library-page", str(at + 1), disabled=at == last)
    return [back, on, html.Span(f"Page {at + 1} of {last + 1}", className="muted small")]


keep_url({"search": ("library-search", "value"), "model": ("library-model", "value"), "category": ("library-category", "value"), "page": ("library-page", "data", "value")})

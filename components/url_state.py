"""The URL holds the whole view: controls write themselves into the query, and a pasted link gives the same view.

Writing `dcc.Location.search` would run the page's layout again, so the address is replaced on the client
(`history.replaceState`, assets/url_state.js) and read by the server only when a page is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from dash import Input, Output, clientside_callback

Source = tuple[str, str] | tuple[str, str, str]


def keep_url(mapping: Mapping[str, Source]) -> None:
    """Keep query keys in step with component properties. Call it once, at the top level of a page's module.

    mapping: query key -> (component id, property) or (component id, property, field of the property's dict).
    None, "" and [] take the key out of the query; lists are joined with commas.
    """
    fields = [[key, source[2] if len(source) == 3 else None] for key, source in mapping.items()]
    first = next(iter(mapping.values()))[0]
    clientside_callback(
        f"function() {{ return window.layerscope.keepUrl({json.dumps(fields)}, Array.from(arguments)); }}",
        Output(first, "id"),  # never written: Dash runs a callback when a page opens only if it has an output there
        *[Input(source[0], source[1]) for source in mapping.values()],
    )


def as_int(value: str | None, default: int, low: int, high: int) -> int:
    """A whole number out of a query, cut to low..high; `default` for anything that is not one."""
    try:
        number = int(value) if value is not None else default
    except ValueError:
        number = default
    return min(max(number, low), high)


def as_choice(value: str | None, choices: tuple[str, ...] | list[str], default: str) -> str:
    """One of `choices` out of a query, or the default."""
    return value if value is not None and value in choices else default

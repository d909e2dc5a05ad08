"""The exceptions that carry a sentence for the user.

`LayerscopeError` is the one type whose text is shown as it is, on the page and on the command line (exit code 2): one clear
sentence that names the value and the limit. Anything else that escapes is a bug and becomes a traceback in the log.
"""

from __future__ import annotations

from collections.abc import Iterable


class LayerscopeError(Exception):
    """Raised with one sentence that is shown to the user unchanged."""


class SiteNotCaptured(LayerscopeError):
    """A trace was asked for a site (or a layer of it) that it does not hold."""

    def __init__(self, site: str, layer: int | None, captured: Iterable[str], layers: Iterable[int] = ()) -> None:
        self.site, self.layer = site, layer
        self.captured, self.layers = sorted(captured), sorted(layers)
        if self.layers and layer is not None:
            where = f"layer {layer} of {site!r}; it holds layers {ranges(self.layers)}"
        else:
            where = f"{site!r}; it holds {', '.join(self.captured) or 'no activations'}"
        super().__init__(f"This trace did not capture {where}.")


class Cancelled(Exception):
    """Raised inside a run when its job was cancelled; never shown as an error."""


def ranges(values: list[int]) -> str:
    """Write sorted integers as ranges: [0, 1, 2, 5] -> "0-2, 5"."""
    parts: list[list[int]] = []
    for value in values:
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)

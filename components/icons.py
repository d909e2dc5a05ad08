"""Icons: one set (Lucide), vendored as SVG files and drawn as CSS masks, so that they take the colour of their text."""

from __future__ import annotations

from dash import html

ICONS = (
    "house", "library", "activity", "scan-text", "grid-3x3", "audio-waveform", "layers", "sun-moon", "download", "link", "check",
    "triangle-alert", "info", "expand", "x", "play", "trash-2", "search", "cpu", "circle-dashed", "arrow-right", "file-question-mark", "sparkles",
    "workflow", "blocks", "weight", "scale", "crosshair",
)  # fmt: skip


def icon(name: str, className: str = "") -> html.Span:
    """An icon of the vendored set, hidden from screen readers: the words beside it carry the meaning."""
    if name not in ICONS:
        raise ValueError(f"no icon {name!r}; scripts/vendor_assets.sh vendors those of components.icons.ICONS")
    return html.Span(className=f"icon icon-{name} {className}".strip(), **{"aria-hidden": "true"})

"""The picture of a model's parts: boxes from embedding to unembedding along the residual stream, blocks that are alike drawn once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

import dash
from dash import dcc, html

from backend.estimate import in_bytes
from backend.reports.graph_formats import plain
from backend.reports.model_parts import Anatomy, BlockGroup, Part, Stored, layer_ranges, type_layers
from components.controls import set_button
from components.model_facts import Facts

_MOST_ROWS = 60
_ADDED = ("attention", "ssm", "mlp", "experts")  # parts whose output is added to the residual stream
_SHOWN_TYPES = 3


def part_keys(anatomy: Anatomy) -> dict[str, tuple[BlockGroup | None, Part]]:
    """Keys of the parts in the address and on the buttons: "embedding", "block0.attention"."""
    number = {id(group): i for i, group in enumerate(anatomy.groups)}
    return {f"block{number[id(group)]}.{part.key}" if group else part.key: (group, part) for group, part in anatomy.parts}


def diagram(anatomy: Anatomy, facts: Facts, chosen: str) -> html.Div:
    """From the tokens at the top to the logits at the bottom."""
    keys = {id(part): key for key, (_, part) in part_keys(anatomy).items()}

    def box(part: Part, group: BlockGroup | None) -> Any:
        return _box(keys[id(part)], part, facts.of(part.key, group), chosen)

    rows: list[Any] = [html.Div("tokens", className="arch-end")]
    for part in anatomy.before:
        rows += [box(part, None), _line()]
    for group in anatomy.groups:
        rows += [_block(group, [(part, box(part, group)) for part in group.parts], facts), _line()]
    for part in anatomy.after:
        rows += [box(part, None), _line()]
    if anatomy.tied:
        words = [html.Div(text, className="arch-fact") for text in facts.of("unembedding", None)]
        rows += [html.Div([html.Div("Unembedding", className="arch-title"), *words], className="arch-box arch-tied"), _line()]
    return html.Div([*rows, html.Div("logits", className="arch-end")], className="arch")


def _line() -> html.Div:
    return html.Div(className="arch-line")


def _box(key: str, part: Part, facts: Sequence[str], chosen: str) -> html.Button:
    types = [html.Span(plain(kind), className="badge badge-plain") for kind in list(part.types)[:_SHOWN_TYPES]]
    more = [html.Span(f"+{len(part.types) - _SHOWN_TYPES}", className="muted small")] if len(part.types) > _SHOWN_TYPES else []
    left = html.Div([html.Div(part.title, className="arch-title"), *[html.Div(text, className="arch-fact") for text in facts]])
    size = html.Div(f"{count(part.n_params)}, {in_bytes(part.n_bytes)}", className="arch-size")
    right = html.Div([size, html.Div([*types, *more], className="arch-types")], className="arch-right")
    return set_button([left, right], "arch-part", key, f"arch-box arch-{part.key}{' chosen' if key == chosen else ''}", **{"aria-pressed": "true" if key == chosen else "false"})


def _block(group: BlockGroup, boxes: Sequence[tuple[Part, Any]], facts: Facts) -> html.Div:
    n = len(group.layers)
    which = html.Span(f"layer{'s' if n > 1 else ''} {layer_ranges(group.layers)}", className="muted small")
    head = html.Div([html.Span(f"Block × {n}" if n > 1 else "Block", className="arch-times"), which], className="arch-head")
    present, parallel = [part.key for part, _ in boxes], group.is_parallel or facts.says_parallel
    inside: list[Any] = []
    for i, (part, box) in enumerate(boxes):
        last_of_sum = part.key in _ADDED and not (i + 1 < len(present) and (present[i + 1].endswith("_post") or present[i + 1] == "shared"))
        ends = last_of_sum or part.key.endswith("_post") or part.key == "shared"
        inside.append(box)
        if ends and not (parallel and part.key == "attention"):
            inside.append(html.Div(html.Span("+", title="added to the residual stream"), className="arch-add"))
    note = html.Div("Attention and MLP both start from the block's input; what they give is added together.", className="arch-fact") if parallel else None
    differing = [html.Div(text, className="arch-fact") for text in differences(group.parts)]
    return html.Div([head, *inside, note, *differing], className="arch-block")


def differences(parts: Sequence[Part], most: int = 4) -> list[str]:
    """Where the blocks of a group store the same tensor of these parts differently: "ffn_down.weight: Q4_K in 0-1; Q6_K in 2-3", by layer."""
    by_suffix: dict[str, list[str]] = {}
    for part in parts:
        for suffix, kind, layers in type_layers(part):
            by_suffix.setdefault(plain(suffix), []).append(f"{plain(kind)} in {layer_ranges(layers)}")
    found = [f"{suffix}: {'; '.join(kinds)}" for suffix, kinds in by_suffix.items()]
    return found if len(found) <= most else [*found[:most], f"and {len(found) - most} more differences of storage"]


def size_table(anatomy: Anatomy) -> html.Table:
    """Parameters and bytes of each part, all its blocks together, with its share of the bytes."""
    total = sum(part.n_bytes for _, part in anatomy.parts) or 1
    head = html.Tr([html.Th("Part"), *(html.Th(name, className="num") for name in ("Parameters", "Bytes", "Bits / value")), html.Th("Share of bytes")])
    rows = [_size_row(group, part, total, len(anatomy.groups)) for group, part in anatomy.parts]
    return html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact")


def _size_row(group: BlockGroup | None, part: Part, total: int, n_groups: int) -> html.Tr:
    where = f" (layers {layer_ranges(group.layers)})" if group and n_groups > 1 else f" × {len(group.layers)}" if group else ""
    bits = f"{8 * part.n_bytes / part.n_params:.2f}" if part.n_params else ""
    share = part.n_bytes / total
    bar = html.Td([html.Span(className="bar", style={"width": f"{max(1, round(70 * share))}%"}), html.Span(f" {share:.1%}", className="muted small")], className="bar-cell nowrap")
    numbers = [html.Td(text, className="num nowrap") for text in (count(part.n_params), in_bytes(part.n_bytes), bits)]
    return html.Tr([html.Td([part.title, html.Span(where, className="muted")]), *numbers, bar])


def tensor_table(model: str, tensors: Sequence[Stored]) -> html.Div:
    """Name, shape, type and size of each tensor; the name leads to the weight's own page where there is one."""
    linked = any(page["path"] == "/weights" for page in dash.page_registry.values())
    head = html.Tr([html.Th("Tensor"), html.Th("Shape"), html.Th("Type"), html.Th("Parameters", className="num"), html.Th("Bytes", className="num")])
    rows = []
    for tensor in tensors[:_MOST_ROWS]:
        name: Any = html.Span(plain(tensor.name), className="mono wrap")
        name = dcc.Link(name, href=f"/weights?{urlencode({'model': model, 'tensor': tensor.name})}") if linked else name
        shape = " × ".join(f"{n:,}" for n in tensor.shape)
        numbers = [html.Td(text, className="num nowrap") for text in (count(tensor.n_params), in_bytes(tensor.n_bytes))]
        rows.append(html.Tr([html.Td(name), html.Td(shape, className="nowrap"), html.Td(plain(tensor.type)), *numbers]))
    more = html.P(f"and {len(tensors) - _MOST_ROWS:,} more", className="muted small") if len(tensors) > _MOST_ROWS else None
    return html.Div([html.Table([html.Thead(head), html.Tbody(rows)], className="ls-table compact"), more])


def count(n: int) -> str:
    """1,234; 12.3 K; 4.56 M; 7.89 B."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if n >= limit:
            return f"{n / (1e3 if letter == 'K' else limit):,.3g} {letter}"
    return f"{n:,}"

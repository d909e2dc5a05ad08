"""The form of a new batch: model, prompts pasted or from a file, what to capture; and the preview of what was read."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dash import dcc, html

from backend.errors import LayerscopeError
from backend.estimate import in_bytes, rough_tokens
from backend.prompt_lists import MAX_BYTES, MAX_LABEL, MAX_PROMPTS, BatchPrompt, PromptList, parse_file, parse_lines
from backend.prompt_text import check_label
from components.controls import field
from components.icons import icon
from components.run_form import STORED_SITES, RunRequest, cost
from components.services import services
from components.states import error
from components.trace_view import one_line

FIELDS = ("model", "name", "text", "sites", "new")
DEFAULT_SITES = ["resid_post", "attn_pattern"]
MAX_NEW = 64
PREVIEWED = 8


@dataclass(frozen=True)
class BatchRequest:
    """What the form asks for, read and found to be possible."""

    name: str
    model: str
    settings: dict[str, Any]
    prompts: PromptList
    trace_bytes: int  # of all traces together, about

    @classmethod
    def read(cls, values: Mapping[str, Any], upload: str | None, filename: str | None) -> BatchRequest:
        """From the form's fields and the upload. Raises LayerscopeError in one sentence."""
        prompts = read_prompts(values.get("text"), upload, filename)
        name = (values.get("name") or "").strip()[:MAX_LABEL]
        check_label(name, "The name")
        longest = _longest_that_fits(prompts, values.get("model"))
        form = {"model": values.get("model"), "new": values.get("new"), "preset": "choose", "sites": values.get("sites"), "temperature": 0, "seed": 0}
        request = RunRequest.read({**form, "prompt": longest.text})
        if request.max_new_tokens > MAX_NEW:
            raise LayerscopeError(f"New tokens must be a number from 0 to {MAX_NEW}.")
        found = cost(request)
        if not found.fits:
            raise LayerscopeError(f"For the longest prompt: {found.sentence}")
        total = sum(_share(prompt, longest, found.trace_bytes) for prompt in prompts.prompts)
        return cls(name, request.model, {"sites": list(request.sites or ()), "max_new_tokens": request.max_new_tokens}, prompts, total)


def _longest_that_fits(prompts: PromptList, model: str | None) -> BatchPrompt:
    """What the cost is taken from. A prompt that cannot fit the context is left to fail by itself, unless all are such."""
    info = services().library.resolve_model(model).info if model else None
    by_size = sorted(prompts.prompts, key=lambda prompt: rough_tokens(prompt.text))
    fitting = [prompt for prompt in by_size if info is None or rough_tokens(prompt.text) <= info.n_ctx]
    return (fitting or by_size[:1])[-1]


def _share(prompt: BatchPrompt, longest: BatchPrompt, most: int) -> int:
    """About the bytes of a prompt's trace, from those of the longest: linear, an upper bound as attention maps grow faster."""
    return int(most * min(1.0, len(prompt.text) / len(longest.text)))


def read_prompts(text: str | None, upload: str | None, filename: str | None) -> PromptList:
    """The file where one was given, else the pasted lines."""
    if not upload:
        return parse_lines(text or "", "The text")
    try:
        data = base64.b64decode(upload.partition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise LayerscopeError(f"{(filename or 'The file')[-80:]} did not arrive whole; choose it again.") from None
    return parse_file(filename or "", data)


def batch_form(model: str | None) -> html.Div:
    usable = [entry for entry in services().library.models() if entry.error is None]
    names: Any = [{"label": entry.name, "value": entry.name} for entry in usable]
    first = model if any(entry.name == model for entry in usable) else (usable[0].name if usable else None)
    upload = dcc.Upload(html.Div([icon("download", "turned"), html.Span("Drop a .csv, .jsonl or .txt file here, or click to choose one", id="batch-file-name")]),
                        id="batch-upload", className="upload", accept=".csv,.jsonl,.ndjson,.txt", max_size=4 * MAX_BYTES)  # fmt: skip
    hint = f"One prompt a line, blank lines left out; prompts with line breaks, categories and tags come from a file. At most {MAX_PROMPTS:,} prompts, {in_bytes(MAX_BYTES)}."
    return html.Div(
        [
            html.Div(
                [
                    field("Model", dcc.Dropdown(names, first, id="batch-model", clearable=False, placeholder="no model found"), id="batch-model"),
                    field("Name", dcc.Input(id="batch-name", value="", maxLength=MAX_LABEL, placeholder="none", className="text-input"), id="batch-name"),
                ],
                className="fields",
            ),
            html.Div(
                [
                    html.Label("Prompts", htmlFor="batch-text", className="field-label"),
                    dcc.Textarea(id="batch-text", value="", className="text-input batch-text", maxLength=MAX_BYTES, spellCheck=False, placeholder="The capital of France is"),
                    html.Div(hint, className="field-hint"),
                    html.Div([upload, html.Button("Remove", id="batch-remove", className="btn btn-outline-secondary", type="button", hidden=True)], className="upload-row"),
                ],
                className="field",
            ),
            html.Div(
                [
                    field("Sites to capture", dcc.Dropdown([name for name in STORED_SITES if name != "logits"], DEFAULT_SITES, id="batch-sites", multi=True),
                          "these two give head scores, norms and the lens", id="batch-sites"),
                    field("New tokens", dcc.Input(id="batch-new", type="number", min=0, max=MAX_NEW, step=1, value=0, className="text-input"), "after each prompt, greedily",
                          id="batch-new"),
                ],
                className="fields fields-sites",
            ),
            html.Div(
                [html.Button([icon("play"), "Run"], id="batch-run", className="btn btn-primary", type="button", disabled=not usable), html.Div(id="batch-refused")],
                className="form-foot",
            ),
        ],
        className="form",
    )  # fmt: skip


def preview(prompts: PromptList) -> list[Any]:
    """What was read: counts by category, the first prompts, what was ignored."""
    counts = [html.Span(f"{name or 'no category'} {n:,}", className="badge badge-plain") for name, n in list(prompts.categories.items())[:12]]
    more_categories = len(prompts.categories) - 12
    head = html.Thead(html.Tr([html.Th("", className="num"), html.Th("Prompt"), html.Th("Category"), html.Th("Tags")]))
    rows = [
        html.Tr([html.Td(at + 1, className="num muted"), html.Td(one_line(prompt.text, 120), className="mono cut"), html.Td(prompt.category), html.Td(", ".join(prompt.tags))])
        for at, prompt in enumerate(prompts.prompts[:PREVIEWED])
    ]
    n = len(prompts.prompts)
    rest = html.P(f"and {n - PREVIEWED:,} more", className="muted small") if n > PREVIEWED else None
    ignored = html.P(f"Ignored: {', '.join(name[:40] for name in prompts.ignored[:8])}", className="muted small") if prompts.ignored else None
    badges = html.Div([*counts, html.Span(f"and {more_categories} more", className="muted small") if more_categories > 0 else None], className="badges")
    return [badges, html.Div(html.Table([head, html.Tbody(rows)], className="ls-table compact"), className="table-scroll"), rest, ignored]


def preview_or_error(text: str | None, upload: str | None, filename: str | None) -> tuple[Any, str]:
    """The preview and its count; the sentence that says what is wrong."""
    try:
        prompts = read_prompts(text, upload, filename)
    except LayerscopeError as problem:
        return error(str(problem)), ""
    n = len(prompts.prompts)
    return preview(prompts), f"{n:,} prompts" if n != 1 else "1 prompt"

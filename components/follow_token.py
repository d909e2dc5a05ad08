"""Follow a token: the card of the logit lens page that draws one token's probability and rank through the layers.

Until a token is written it is the one that really follows, which the capture already knows. Any other needs the final norm and
the unembedding once more, so it is a job; what it found stays in the derived cache, under the text that was written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dash import Input, Output, State, callback, ctx, dcc, html, no_update
from numpy.typing import NDArray

from backend.reports.lens_results import LensChoice
from backend.trace import Trace
from components.card import card
from components.figures.lens import target_curves
from components.figures.theme import no_figure
from components.graph import graph, graph_tools
from components.lens_values import opened_lens
from components.services import services
from components.states import error
from components.token_label import token_label

ABOUT_TARGET = (
    "The probability and rank that each row of the chosen lens gives to one token, at the chosen position; the table above can be coloured by either. Write the token as it "
    "stands in the text, with its leading space; of a longer text the first token is taken. Following a new token runs the final norm and the unembedding once more, as a job; "
    "the last row is then the stored stream's.",
)  # fmt: skip


def follow_card(target: str) -> html.Section:
    """The card; `target` is the text to begin with. Its callbacks need the stores `position`, `lens-choice` and `page-state`."""
    form = html.Div(
        [
            dcc.Input(id="target-text", value=target, placeholder="token, with its leading space", debounce=True, maxLength=200, className="text-input"),
            html.Button("Follow", id="target-go", className="btn btn-primary"),
        ],
        className="target-form",
    )
    stores = [dcc.Store(id="target-token"), dcc.Store(id="target-job"), dcc.Interval(id="target-poll", interval=500, disabled=True)]
    body = [*stores, form, html.Div(id="target-state", className="target-state", role="status"), graph("target-curves", height=230)]
    return card("Follow a token", body, html.Span("", id="target-subtitle"), graph_tools("target-curves", "target"), list(ABOUT_TARGET), className="wide")


@callback(
    Output("target-token", "data"), Output("target-job", "data"), Output("target-poll", "disabled"), Output("target-state", "children"), Output("target-go", "disabled"),
    Input("target-go", "n_clicks"), Input("target-text", "n_submit"), Input("target-poll", "n_intervals"),
    State("target-text", "value"), State("target-job", "data"), State("lens-choice", "data"), State("page-state", "data"),
)  # fmt: skip
def follow_target(clicks: int | None, submitted: int | None, polls: int | None, text: str | None, job: dict[str, str] | None, chosen: dict[str, Any], page: dict[str, Any]):
    """Submit the job, watch it, and hand its token to the curves. A target that was followed before is there at once."""
    if ctx.triggered_id == "target-poll" and job:
        return _watch(page["trace"], job, LensChoice.from_json(chosen))
    if not text:
        return None, None, True, "", False
    choice = LensChoice.from_json(chosen)
    known = services().derived.get_json((*choice.key("lens_target_token", page["trace"]), text))
    if known is not None and target_values(page["trace"], known, choice) is not None:
        return known, None, True, "", False
    if ctx.triggered_id is None:
        return None, None, True, "Not followed yet in this trace: press Follow.", False
    submitted_job = services().jobs.submit("lens_target", {"trace_id": page["trace"], "target": text, **chosen}, f"Follow {token_label(text, max_length=24)}")
    return None, {"id": submitted_job.id, "text": text}, False, "Waiting for the model.", True


def target_values(trace_id: str, token: dict[str, Any], choice: LensChoice) -> NDArray[np.float32] | None:
    """Log-prob and rank of a followed token, (2, row, pos); None where the chosen lens has not followed it."""
    values: NDArray[np.float32] | None = services().derived.get_array(choice.key("lens_target", trace_id, token["token_id"]))
    return values


def _watch(trace_id: str, job: dict[str, str], choice: LensChoice) -> tuple[Any, ...]:
    record = services().jobs.get(job["id"])
    if record.state in ("queued", "running"):
        return no_update, no_update, False, f"{record.stage or 'waiting'}: {record.done} of {record.total}", True
    if record.state != "done":
        return None, None, True, error(record.error or f"The job was {record.state.replace('_', ' ')}."), False
    services().derived.put_json((*choice.key("lens_target_token", trace_id), job["text"]), record.result)
    return record.result, None, True, "", False


@callback(
    Output("target-curves", "figure"), Output("target-subtitle", "children"),
    Input("target-token", "data"), Input("position", "data"), Input("theme", "data"), State("lens-choice", "data"), State("page-state", "data"),
)  # fmt: skip
def show_target(token: dict[str, Any] | None, position: int | None, theme: str, chosen: dict[str, Any], page: dict[str, Any]):
    """Curves of the target, or of the token that really follows (known from the capture) while there is none."""
    trace, lens = opened_lens(page["trace"], chosen)
    at, rows = position_in(trace, position), lens.rows
    values = target_values(trace.id, token, lens.choice) if token else None
    here = f"at {token_label(trace.token_texts[at], at in trace.special, 12)} (position {at})"
    if token and values is not None:
        label = token_label(token["token"], max_length=20)
        figure = target_curves(values[0, :, at], values[1, :, at].astype(np.int64), rows[: values.shape[1]], label, theme)
        n_tokens = token.get("n_tokens_of_target", 1)
        more = f" The text has {n_tokens} tokens; this is the first." if n_tokens > 1 else ""
        return figure, f"Probability and rank of {label} {here}.{more}"
    if at + 1 == trace.n_tokens:
        return no_figure(theme, "Nothing follows the last token: write a token to follow."), f"Probability and rank of a token {here}."
    label = token_label(trace.token_texts[at + 1], at + 1 in trace.special, 20)
    figure = target_curves(lens.result("lens_next_logprob")[:, at], lens.result("lens_next_rank")[:, at], rows, label, theme)
    return figure, f"Probability and rank of {label}, which follows {here}. Write another token to follow that one."


def position_in(trace: Trace, position: int | None) -> int:
    """The chosen position, kept inside this trace; the last of the prompt while none is chosen."""
    return trace.n_prompt - 1 if position is None else min(max(position, 0), trace.n_tokens - 1)

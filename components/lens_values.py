"""The lens of a trace: in the trace where it was cheap to compute, else made by a job when somebody looks, and kept.

`lens_values(trace, choice)` gives it or None; `lens_missing(trace, choice)` is what the page shows instead: the job that makes it, started at
once where it takes seconds, behind a button with its price where it takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dash import Input, Output, State, callback, dcc, html, no_update
from dash.exceptions import PreventUpdate
from numpy.typing import NDArray

from backend.reports.lens_results import ARRAYS, LensChoice, lens_row_names
from backend.trace import Trace
from components.jobs_tray import job_or_none, job_panel
from components.services import services
from components.states import empty, error

# Multiply-adds of a lens that is made without asking: some ten seconds on two cores.
_AT_ONCE = 5e11
_PER_SECOND = 5e10  # multiply-adds of two cores, roughly: only ever shown as "about"


@dataclass(frozen=True)
class LensValues:
    """The results lens_* of FORMAT.md, (row, pos[, k]), and the names of their rows."""

    trace: Trace
    rows: list[str]
    texts: dict[str, str] | None = None  # None: the results lie in the trace
    choice: LensChoice = LensChoice()

    def result(self, name: str) -> NDArray[Any]:
        if self.texts is None:
            return self.trace.result(name)
        values = services().derived.get_array(self.choice.key(name, self.trace.id))
        assert values is not None, f"{name} is written before the rows are"
        return values

    def token_text(self, token_id: int) -> str:
        known = (self.texts or {}).get(str(int(token_id)))
        return self.trace.token_text(token_id) if known is None else known


def lens_values(trace: Trace, choice: LensChoice = LensChoice()) -> LensValues | None:
    """The chosen lens of this trace, or None while nobody has computed it."""
    if choice == LensChoice() and "lens_top_ids" in trace.results:
        return LensValues(trace, trace.result_attrs("lens_top_ids")["rows"])
    derived = services().derived
    rows = derived.get_json(choice.key("lens_rows", trace.id))
    complete = rows and all(derived.get_array(choice.key(f"lens_{name}", trace.id)) is not None for name in ARRAYS)
    return LensValues(trace, rows, derived.get_json(choice.key("lens_texts", trace.id)) or {}, choice) if complete else None


def opened_lens(trace_id: str, choice: dict[str, Any]) -> tuple[Trace, LensValues]:
    """A trace whose page shows the chosen lens. The cache may have dropped it since: then the page, loaded again, makes it anew."""
    trace = services().library.open(trace_id)
    lens = lens_values(trace, LensChoice.from_json(choice))
    if lens is None:
        raise PreventUpdate
    return trace, lens


def lens_missing(trace: Trace, choice: LensChoice) -> html.Div:
    """The state of the page while there is no lens. Its callbacks need the stores `page-state`, `jobs-now`, `lens-choice` and the page's own
    `lens-ready`, which changes when the lens is there."""
    info = trace.info
    cost = float(len(lens_row_names(trace, choice))) * trace.n_tokens * info.d_model * info.d_vocab
    at_once = cost <= _AT_ONCE
    seconds = max(1, round(cost / _PER_SECOND))
    price = "about a second" if seconds == 1 else f"about {seconds:,} seconds" if seconds < 120 else f"about {seconds // 60:,} minutes"
    each = "Every head of the layer" if choice.site == "result" else "Every layer"
    words = f"{each} goes through the final norm and the unembedding once: {price} on two cores. It is kept afterwards."
    button = html.Button("Compute it", id="lens-compute", className="btn btn-primary", n_clicks=1 if at_once else 0)
    return html.Div(
        [
            empty(f"{choice.words()}: not computed yet for this trace", words, button, "layers"),
            dcc.Store(id="lens-job"),
            html.Div(id="lens-progress", className="home-progress"),
        ]
    )


@callback(Output("lens-job", "data"), Output("lens-compute", "disabled"), Input("lens-compute", "n_clicks"), State("page-state", "data"), State("lens-choice", "data"))
def compute(clicks: int, page: dict[str, Any], chosen: dict[str, Any]):
    """Queue the job, at once where the page was made with the button pressed."""
    if not clicks:
        return no_update, no_update
    trace = services().library.open(page["trace"])
    return services().jobs.submit("lens", {"trace_id": trace.id, **chosen}, f"{LensChoice.from_json(chosen).words()}, {trace.info.name}").id, True


@callback(
    Output("lens-progress", "children"), Output("lens-ready", "data"), Output("lens-compute", "disabled", allow_duplicate=True),
    Input("lens-job", "data"), Input("jobs-now", "data"), prevent_initial_call=True,
)  # fmt: skip
def follow(job_id: str | None, _: Any):
    """The job's progress; when it is done the page draws its cards; when it failed, why."""
    job = job_or_none(job_id)
    if job is None:
        return no_update, no_update, no_update
    if job.state == "done":
        return no_update, job.id, no_update
    return (job_panel(job), no_update, True) if job.is_active else (error(job.error or f"The job was {job.state.replace('_', ' ')}."), no_update, False)

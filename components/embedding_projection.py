"""What the controls of the Embeddings page ask for, and the job that projects it where the projection is not kept yet.

The callbacks write the stores `emb-spec` (what is asked for) and `emb-ready` (the same, once it is there).
"""

from __future__ import annotations

from typing import Any

from dash import Input, Output, State, callback, ctx, dcc, html, no_update

from backend.errors import LayerscopeError
from backend.reports.projection import METHODS, SCALES, ProjectionSpec
from backend.reports.vectors import MATRICES, Choice
from components.embedding_source import Place, missing, place, trace_options, view
from components.jobs_tray import job_or_none, job_panel
from components.services import services
from components.states import error
from components.url_state import as_choice, as_int


def pickers(found: Place, sources: list[str], what: str, trace: str | None, asked: dict[str, str]) -> html.Div:
    """The row of controls: vectors, layer, method, axes, length, traces; asked: the page's query."""
    def menu(label: str, id: str, options: Any, value: Any, className: str = "picker-metric", **more: Any) -> html.Label:
        return html.Label([html.Span(label), dcc.Dropdown(options, value, id=id, className=className, **{"clearable": False, "searchable": False, **more})])

    names: Any = [{"label": MATRICES.get(name, name), "value": name} for name in sources]
    layer = asked.get("layer", "all")
    layers = found.layers(what)
    value = int(layer) if layer.isdecimal() and int(layer) in layers else "all"
    scale = as_choice(asked.get("scale"), list(SCALES), "raw" if what in MATRICES else "unit")
    options: Any = [option for option in trace_options(found) if option["value"] != trace]
    others = [one for one in found.traces if one != trace]
    traces = menu("More traces" if trace else "Traces", "emb-traces", options, others, "picker-traces", multi=True, searchable=True, clearable=True, placeholder="none")
    methods: Any = [{"label": words, "value": name} for name, words in METHODS.items()]
    return html.Div(
        [
            menu("Show", "emb-what", names, what, "picker-site"),
            html.Div(menu("Layer", "emb-layer", _layer_options(layers), value, "picker-narrow"), id="emb-layer-field", hidden=not layers),
            menu("Method", "emb-method", methods, as_choice(asked.get("method"), list(METHODS), "pca"), "picker-narrow"),
            menu("Axes", "emb-dims", [{"label": "2-D", "value": 2}, {"label": "3-D", "value": 3}], as_int(asked.get("dims"), 2, 2, 3), "picker-narrow"),
            menu("Vectors", "emb-scale", [{"label": words, "value": name} for name, words in SCALES.items()], scale),
            traces if options or others else html.Div(dcc.Dropdown([], [], id="emb-traces", multi=True), hidden=True),
        ],
        className="controls embedding-controls",
    )  # fmt: skip


def _layer_options(layers: list[int]) -> Any:
    return [{"label": "all", "value": "all"}, *({"label": str(layer), "value": layer} for layer in layers)]


@callback(
    Output("emb-spec", "data"), Output("emb-layer", "options"), Output("emb-layer", "value"), Output("emb-layer-field", "hidden"),
    Input("emb-what", "value"), Input("emb-layer", "value"), Input("emb-method", "value"), Input("emb-dims", "value"), Input("emb-scale", "value"), Input("emb-include", "data"),
    State("emb-page", "data"),
)  # fmt: skip
def specify(what: str, layer: Any, method: str, dims: int, scale: str, include: list[int] | None, page: dict[str, Any]):
    """What the controls ask for, as one value."""
    found = place(page["model"], tuple(page["traces"]))
    layers = found.layers(what)
    layer = layer if layer in layers else "all"
    traces = () if what in MATRICES else found.traces
    choice = Choice(found.model, what, traces, None if layer == "all" else int(layer))
    spec = ProjectionSpec(choice, method, int(dims), scale, include=tuple(include or ()) if ctx.triggered_id == "emb-include" else ()).checked()
    return spec.to_json(), _layer_options(layers), layer, not layers


@callback(
    Output("emb-ready", "data"), Output("emb-missing", "children"), Output("emb-compute", "hidden"), Output("emb-cloud-place", "hidden"), Output("emb-job", "data"),
    Output("emb-progress", "children"),
    Input("emb-spec", "data"), Input("emb-done", "data"), Input("emb-compute", "n_clicks"), State("emb-page", "data"), State("emb-job", "data"),
)  # fmt: skip
def prepare(spec: dict[str, Any] | None, _: str | None, clicks: int | None, page: dict[str, Any], job_id: str | None):
    """The projection if it is there; else what it costs and its job, which begins at once where that is seconds. A job that nobody waits for any more is cancelled."""
    if spec is None:
        return (no_update,) * 6
    if ctx.triggered_id == "emb-spec" and (job := job_or_none(job_id)) is not None and job.is_active:
        services().jobs.cancel(job.id)
    wanted = ProjectionSpec.from_json(spec)
    try:
        found = place(page["model"], tuple(page["traces"]))
        if view(found, wanted) is not None:
            return spec, None, True, False, None, None
        words, at_once = missing(found, wanted)
        if not at_once and ctx.triggered_id != "emb-compute":
            return None, words, False, True, None, None
        title = f"{METHODS[wanted.method]} of {MATRICES.get(wanted.choice.what, wanted.choice.what)}, {wanted.choice.model}"
        return None, words, True, True, services().jobs.submit("embeddings", spec, title).id, None
    except LayerscopeError as problem:
        return None, error(str(problem)), True, True, None, None


@callback(
    Output("emb-progress", "children", allow_duplicate=True), Output("emb-done", "data"), Output("emb-compute", "hidden", allow_duplicate=True),
    Input("emb-job", "data"), Input("jobs-now", "data"), prevent_initial_call=True,
)  # fmt: skip
def follow(job_id: str | None, _: Any):
    """The job's progress; when it failed, why, with the button to try again.

    That it is done is said until `prepare` has taken the job away: Dash drops a callback whose cause ran again and changed nothing.
    """
    job = job_or_none(job_id)
    if job is None:
        return no_update, no_update, no_update
    if job.state == "done":
        return no_update, job.id, no_update
    return (job_panel(job), no_update, True) if job.is_active else (error(job.error or f"The job was {job.state.replace('_', ' ')}."), no_update, False)

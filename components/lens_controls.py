"""The controls of the lens page: which site is looked at, of which layer's heads, with which translators, and what colours the cells."""

from __future__ import annotations

from typing import Any

from dash import Input, Output, callback, dcc, html

from backend.reports.lens_results import SITES, LensChoice, lens_sites
from backend.trace import Trace
from backend.tuned_lens import FOLDER, TunedLens, tuned_lenses
from components.services import services
from components.url_state import as_int

MODE_TITLES = {"probability": "Probability", "entropy": "Entropy", "kl": "KL to the model", "rank": "Rank of the token", "chosen": "Its probability"}
LOGIT = "logit"


def lenses_of(trace: Trace) -> list[TunedLens]:
    """The tuned lenses of this server that fit the trace's model."""
    return tuned_lenses(services().settings.data_dir / FOLDER, trace.info)


def choice_in(trace: Trace, site: str | None, layer: Any, kind: str | None) -> LensChoice:
    """The lens that controls or a link ask for, as far as this trace has it; else the logit lens of resid_post."""
    if site not in lens_sites(trace):
        site = "resid_post"
    if site == "result":
        layers = trace.layers("result")
        asked = as_int(None if layer is None else str(layer), layers[-1], 0, trace.info.n_layers - 1)
        return LensChoice("result", asked if asked in layers else layers[-1])
    if site == "resid_post" and kind not in (None, LOGIT) and kind in [lens.tag for lens in lenses_of(trace)]:
        return LensChoice(tuned=str(kind))
    return LensChoice(str(site))


def lens_picker(trace: Trace, choice: LensChoice, mode: str) -> html.Div:
    """The controls; their callbacks are this module's and the page's."""
    sites: Any = [{"label": f"{name}: {SITES[name]}", "value": name} for name in lens_sites(trace) or ["resid_post"]]
    layers: Any = [{"label": str(layer), "value": layer} for layer in (trace.layers("result") if "result" in lens_sites(trace) else [])]
    kinds: Any = [{"label": "logit lens", "value": LOGIT}, *({"label": _tuned_label(lens, trace), "value": lens.tag} for lens in lenses_of(trace))]
    modes: Any = [{"label": title, "value": name} for name, title in MODE_TITLES.items()]
    layer = choice.layer if choice.layer is not None else layers[-1]["value"] if layers else None
    fixed = {"clearable": False, "searchable": False}
    return html.Div(
        [
            html.Label([html.Span("Site"), dcc.Dropdown(sites, choice.site, id="lens-site", className="picker-site", **fixed)]),
            html.Label([html.Span("Layer"), dcc.Dropdown(layers, layer, id="lens-layer", className="picker-narrow", **fixed)], id="lens-layer-field",
                       hidden=choice.site != "result"),
            html.Label([html.Span("Lens"), dcc.Dropdown(kinds, choice.tuned or LOGIT, id="lens-kind", className="picker-metric", disabled=choice.site != "resid_post", **fixed)]),
            html.Label([html.Span("Colour"), dcc.Dropdown(modes, mode, id="lens-mode", className="picker-metric", **fixed)]),
        ],
        className="controls",
    )  # fmt: skip


def _tuned_label(lens: TunedLens, trace: Trace) -> str:
    return f"tuned: {lens.name}" if lens.made["model"] == trace.info.name else f"tuned: {lens.name} (on {lens.made['model'][:40]})"


@callback(Output("lens-layer-field", "hidden"), Output("lens-kind", "disabled"), Input("lens-site", "value"))
def fit_to_site(site: str):
    """Heads lie in a layer; tuned lenses are of resid_post."""
    return site != "result", site != "resid_post"

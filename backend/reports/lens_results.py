"""Which lens: the site that is looked at, and with which translators; and where its results lie in the derived cache.

The results of a logit lens of resid_post have had their keys longer than there are other lenses, and keep them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from backend.errors import LayerscopeError
from backend.trace import Trace

# Site -> what its lens reads. A stream is what the model could say by then; an output is what one component writes, alone.
STREAMS = {"resid_pre": "stream before a layer", "resid_mid": "stream after attention", "resid_post": "stream after a layer"}
OUTPUTS = {"attn_out": "what attention writes", "mlp_out": "what the MLP writes", "result": "what each head writes"}
SITES = {**STREAMS, **OUTPUTS}
# The arrays of one lens, as FORMAT.md names them after "lens_".
ARRAYS = ("top_ids", "top_logprobs", "entropy", "kl", "next_logprob", "next_rank")
MODEL_ROW = "model"  # the model's own output, the last row where no layer's stream is it


@dataclass(frozen=True)
class LensChoice:
    """site: one of SITES; layer: whose heads, for `result` alone; tuned: the name of a tuned lens, "" for the logit lens."""

    site: str = "resid_post"
    layer: int | None = None
    tuned: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LensChoice:
        """Raises LayerscopeError for a site that no lens can look at, or a tuned lens where there is none."""
        layer = value.get("layer")
        choice = cls(str(value.get("site", "resid_post")), None if layer is None else int(layer), str(value.get("tuned") or ""))
        if choice.site not in SITES:
            raise LayerscopeError(f"There is no lens of the site {choice.site[:40]!r}; there is one of {', '.join(SITES)}.")
        if (choice.site == "result") != (choice.layer is not None):
            raise LayerscopeError(f"A lens of {choice.site} takes {'the layer whose heads it shows' if choice.site == 'result' else 'no layer'}.")
        if choice.tuned and choice.site != "resid_post":
            raise LayerscopeError(f"A tuned lens is trained on resid_post; of {choice.site} there is the logit lens alone.")
        return choice

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def key(self, name: str, trace_id: str, *more: int) -> tuple[str | int | None, ...]:
        """The key of one result in the derived cache."""
        place = () if self == LensChoice() else (self.site, self.layer, self.tuned)
        return (name, trace_id, *more, *place)

    def words(self) -> str:
        """ "Logit lens of resid_mid", for the title of a job."""
        where = "" if self.site == "resid_post" else f" of {self.site}{'' if self.layer is None else f' in layer {self.layer}'}"
        return f"{f'Tuned lens {self.tuned}' if self.tuned else 'Logit lens'}{where}"


def lens_sites(trace: Trace) -> list[str]:
    """The sites of this trace that a lens can look at; none without the last layer's stream, which gives the model's own distribution."""
    return [site for site in SITES if trace.layers(site)] if trace.has("resid_post", trace.info.n_layers - 1) else []


def lens_row_names(trace: Trace, choice: LensChoice) -> list[str]:
    """Names of the rows of a lens, from the input up; the last is the model's own output."""
    last = trace.info.n_layers - 1
    if choice.site == "result":
        return [*(f"{choice.layer}.{head}" for head in range(trace.info.n_heads)), MODEL_ROW]
    if choice.site != "resid_post":
        return [*map(str, trace.layers(choice.site)), MODEL_ROW]
    return [*(["embed"] if trace.has("embed") else []), *(str(layer) for layer in range(last) if trace.has("resid_post", layer)), str(last)]

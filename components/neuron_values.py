"""What the Neurons page shows comes from here: the largest neurons of a position, the tokens they write, the search over all traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backend.analysis.neurons import Neuron, top_neurons
from backend.errors import LayerscopeError
from backend.reports.neurons import Examples, promoted, weights_read
from backend.trace import Trace
from components.attribution_values import model_of, readout_of
from components.services import services
from components.weight_source import READ_AT_ONCE

SHOWN = 20  # neurons of a position
LISTED_AT_ONCE = 2 << 30  # bytes of a model that is loaded to list its vocabulary without being asked
MOST_TRACES = 2000  # that a search goes through, the newest

Place = tuple[int, int]  # layer, number


def largest(trace: Trace, position: int, layer: int | None) -> tuple[list[Neuron], int]:
    """The largest neurons at a position, of one layer or of all, and how many values are not finite."""
    layers = [each for each in trace.layers("mlp_post") if layer in (None, each)]
    return top_neurons(((each, trace.position("mlp_post", each, position)) for each in layers), SHOWN)


def written(trace: Trace, neurons: Sequence[Place]) -> tuple[dict[Place, dict[str, list[Any]]], str]:
    """Tokens for and against of those neurons that are known, and why the rest is not: "" if all are, JOB if a job must read the weights."""
    try:
        model = model_of(trace)
        readout = readout_of(model)
    except LayerscopeError as problem:
        return {}, str(problem)
    derived = services().derived
    known = {place: derived.get_json(("neuron_tokens", model.identity, *place)) for place in neurons}
    lacking = [place for place, tokens in known.items() if tokens is None]
    if lacking and weights_read(readout, lacking) <= READ_AT_ONCE:
        found = promoted(readout, lacking)
        for i, place in enumerate(lacking):
            known[place] = {name: part[i].tolist() for name, part in found.parts().items()}
            derived.put_json(("neuron_tokens", model.identity, *place), known[place])
        lacking = []
    return {place: tokens for place, tokens in known.items() if tokens is not None}, JOB if lacking else ""


JOB = "job"


def submit_tokens(trace: Trace, neurons: Sequence[Place]) -> str:
    """Queue the job that reads W_out and W_U for these neurons; its id."""
    return services().jobs.submit("neuron_tokens", {"model": trace.info.name, "neurons": [list(place) for place in neurons]}, f"Tokens of neurons of {trace.info.name}").id


def searched_traces(trace: Trace) -> list[str]:
    """Ids of the traces of the same model that hold mlp_post, newest first."""
    found = services().library.traces(model=trace.info.name, limit=MOST_TRACES)
    return [each.id for each in found if "mlp_post" in each.sites]


def examples(trace: Trace, layer: int) -> Examples | None:
    """Where each neuron of a layer is largest over all traces of the model; None while nobody has searched them as they are now."""
    return Examples.load(services().derived, Examples.key(trace.info.name, layer, searched_traces(trace)))


def submit_search(trace: Trace, layer: int) -> str:
    """Queue the search of a layer; its id."""
    params = {"model": trace.info.name, "layer": layer, "traces": searched_traces(trace)}
    return services().jobs.submit("neuron_examples", params, f"Neurons of layer {layer} over {len(params['traces']):,} traces").id

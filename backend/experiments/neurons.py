"""Jobs behind the Neurons page: what neurons of a large model write into the vocabulary, and a search over all traces of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from backend.errors import Cancelled
from backend.experiments import Context
from backend.model_files import identity as identity_of
from backend.readout import open_readout
from backend.reports.neurons import Examples, find_examples, promoted
from backend.trace import Trace


def neuron_tokens_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {"model": name, "neurons": [[layer, number], ...]} -> {"identity"}; one JSON for each neuron lies in the cache under
    ("neuron_tokens", identity, layer, number)."""
    shelf = context.library.shelf
    path = shelf.ready(shelf.resolve(params["model"]))
    identity, neurons = identity_of(path), [(int(layer), int(neuron)) for layer, neuron in params["neurons"]]
    found = promoted(open_readout(path), neurons, context.progress, context.should_stop)
    for i, (layer, neuron) in enumerate(neurons):
        context.derived.put_json(("neuron_tokens", identity, layer, neuron), {name: part[i].tolist() for name, part in found.parts().items()})
    return {"identity": identity}


def neuron_examples_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {"model": name, "layer": number, "traces": [ids]} -> {"layer", "n_traces"}; the places lie in the cache under Examples.key.

    A trace that was deleted meanwhile is left out.
    """
    layer, ids = int(params["layer"]), [str(trace_id) for trace_id in params["traces"]]

    def opened() -> Iterator[Trace]:
        for number, trace_id in enumerate(ids):
            if context.should_stop():
                raise Cancelled
            context.progress("traces", number, len(ids))
            path = context.library.path_of(trace_id)
            if path.is_file():
                with Trace(path) as trace:
                    yield trace

    found = find_examples(opened(), layer)
    found.save(context.derived, Examples.key(params["model"], layer, ids))
    return {"layer": layer, "n_traces": len(found.trace_ids)}

"""The computation graph of a model, recorded by a job and kept by the identity of the model's file."""

from __future__ import annotations

from typing import Any

from backend.experiments import Context
from backend.model_files import identity
from backend.reports.model_graph import graph_key


def graph_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {model} -> {n_nodes}; the graph goes to the derived cache under `graph_key(identity of the file)`."""
    name = str(params["model"])
    context.progress("loading model", 0, 2)
    engine = context.engine(name, {})
    context.progress("recording the graph", 1, 2)
    graph = engine.graph()
    entry = context.library.shelf.resolve(name, confined=True)  # now that a variant's file is made
    context.derived.put_json(graph_key(identity(entry.path)), graph.to_json())
    return {"n_nodes": len(graph.nodes)}

"""Jobs behind the Attribution page: an attribution whose W_O are too many to read while somebody waits, and a model's vocabulary as text."""

from __future__ import annotations

from typing import Any

from backend.experiments import Context
from backend.model_files import identity as identity_of
from backend.readout import open_readout
from backend.reports.attribution import attribute
from backend.trace import Trace


def attribution_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {trace_id, position, token, against or None} -> {"identity": of the model's files}; the attribution lies in the cache under
    ("attribution", trace id, identity, position, token, against)."""
    with Trace(context.library.path_of(params["trace_id"])) as trace:
        shelf = context.library.shelf
        path = shelf.ready(shelf.resolve(trace.info.name))
        position, token, against = int(params["position"]), int(params["token"]), params.get("against")
        found = attribute(trace, open_readout(path), position, token, None if against is None else int(against), context.progress, context.should_stop)
        identity = identity_of(path)
        context.derived.put_json(("attribution", trace.id, identity, found.position, found.token, found.against), found.to_json())
    return {"identity": identity}


def vocabulary_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: {"model": name} -> {"identity", "n_tokens"}; the texts, by id, lie in the cache under ("vocabulary", identity)."""
    shelf = context.library.shelf
    path = shelf.ready(shelf.resolve(params["model"]))
    identity = identity_of(path)
    context.progress("loading model", 0, 1)
    engine = context.engine(params["model"], {})
    texts = engine.token_texts(list(range(engine.info.d_vocab)))
    context.derived.put_json(("vocabulary", identity), texts)
    return {"identity": identity, "n_tokens": len(texts)}

"""The job of the Sensitivity page: a run whose folder lies in the data folder under its id."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from backend.errors import LayerscopeError
from backend.experiments import Context
from backend.experiments.sensitivity import Spec
from backend.experiments.sensitivity.checks import check_spec
from backend.experiments.sensitivity.protocol import new_run_id, run
from backend.experiments.sensitivity.run_folder import remove_parts
from backend.reports.sensitivity_run import FOLDER

TEXTS = "texts"  # the folder of the data folder whose texts a job may name

_LISTS: dict[str, type] = {"controls": str, "seeds": int, "prune": float, "layers": int, "components": str}


def sensitivity_job(context: Context, params: dict[str, Any]) -> dict[str, Any]:
    """Job: the fields of Spec -> {run: id}; the folder is `<data>/sensitivity/<id>`. `text` names a file of `<data>/texts`."""
    data = context.traces_dir.parent
    spec = spec_of(params)
    check_spec(spec)
    text = _text(data, spec.text) if spec.text else None
    runs = data / FOLDER
    remove_parts(runs)
    context.progress("loading model", 0, 1)
    # Only what differs from how other jobs open the model, which would load it again.
    options: dict[str, Any] = {"device": spec.device} if spec.device != "auto" else {}
    if context.library.resolve_model(spec.model).kind == "gguf":
        options["editable_weights"] = True
    engine = context.engine(spec.model, options)
    run_id = new_run_id()
    run(engine, spec, runs / run_id, run_id=run_id, text_file=text, progress=context.progress, should_stop=context.should_stop)
    return {"run": run_id}


def spec_of(params: dict[str, Any]) -> Spec:
    """A Spec from JSON. Raises LayerscopeError for a field that Spec does not have, or a value of another type."""
    fields = {each.name: each for each in dataclasses.fields(Spec)}
    if unknown := [name for name in params if name not in fields]:
        raise LayerscopeError(f"A sensitivity run has no setting {unknown[0][:40]!r}; it has {', '.join(fields)}.")
    if not isinstance(params.get("model"), str):
        raise LayerscopeError("A sensitivity run needs the name of a model.")
    return Spec(**{name: _typed(name, value, fields[name].default) for name, value in params.items()})


def _typed(name: str, value: Any, default: Any) -> Any:
    if name in _LISTS:
        if value is None and default is None:
            return None
        if isinstance(value, list | tuple):
            return tuple(_one(name, each, _LISTS[name]) for each in value)
        raise LayerscopeError(f"The setting {name} of a sensitivity run is {str(value)[:40]!r}, not a list.")
    if name == "bit":
        return None if value is None else _one(name, value, int)
    return _one(name, value, str if name == "model" else type(default))


def _one(name: str, value: Any, kind: type) -> Any:
    """The value if it is of this kind; a whole number where one with a point is wanted becomes one."""
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise LayerscopeError(f"The setting {name} of a sensitivity run is {str(value)[:40]!r}, not {'text' if kind is str else f'of type {kind.__name__}'}.")
    return value


def _text(data: Path, name: str) -> Path:
    folder = (data / TEXTS).resolve()
    found = (folder / name.replace("\0", "")).resolve()
    if "\0" in name or not found.is_relative_to(folder):
        raise LayerscopeError(f"The text {name[:80]!r} does not lie in the folder {TEXTS} of the data folder.")
    return found

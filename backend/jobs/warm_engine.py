"""WarmEngine: the one model a worker keeps in memory between jobs."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend.engines import Engine, OpenOptions, open_engine
from backend.errors import LayerscopeError
from backend.estimate import check_model_fits
from backend.model_files import ModelEntry, Shelf, fingerprint
from backend.settings import Settings

log = logging.getLogger(__name__)


class WarmEngine:
    """Opens a model by its name on the shelf and keeps it until another one, other options or a changed file are asked for."""

    def __init__(self, settings: Settings, shelf: Shelf, opener: Callable[[Path, OpenOptions], Engine] = open_engine) -> None:
        self._settings, self._shelf, self._opener = settings, shelf, opener
        self._engine: Engine | None = None
        self._key: tuple[Any, ...] = ()

    def __call__(self, model: str, options: dict[str, Any]) -> Engine:
        """The engine for `model`, with the settings' options replaced by those in `options`.

        Raises LayerscopeError if the model is not within the configured folders, cannot be read, or would not fit in memory.
        """
        entry = self._shelf.resolve(model, confined=True)
        path = self._shelf.ready(entry)
        chosen = self._options(options)
        key = (str(path), fingerprint(path), chosen)
        if self._engine is not None and key == self._key:
            return self._engine
        # The old model goes before the new one is measured and opened: the two need not fit together.
        self.close()
        entry = self._shelf.resolve(model, confined=True)  # again: a variant made just now has a header to be read
        if entry.info is not None:
            check_model_fits(entry.info, chosen.device)
        self._engine, self._key = _named(self._opener(path, chosen), entry), key
        log.info("opened %s", entry.name)
        return self._engine

    def close(self) -> None:
        """Free the model that is kept, if any."""
        engine, self._engine, self._key = self._engine, None, ()
        if engine is not None:
            engine.close()
            del engine
            gc.collect()

    def _options(self, options: dict[str, Any]) -> OpenOptions:
        settings = self._settings
        default = OpenOptions(settings.device, settings.n_gpu_layers, settings.n_ctx, settings.n_threads, settings.kv_cache)
        try:
            return dataclasses.replace(default, **options)
        except TypeError:
            names = ", ".join(field.name for field in dataclasses.fields(OpenOptions))
            raise LayerscopeError(f"The options {', '.join(options)} are not all among {names}.") from None


def _named(engine: Engine, entry: ModelEntry) -> Engine:
    """Give the engine the shelf's name of its model, so that a trace names a model that can be opened by that name."""
    engine.info = dataclasses.replace(engine.info, name=entry.name)
    return engine

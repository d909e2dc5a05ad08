"""A case: a projection of a vocabulary of a GGUF file, or (what "view") what the server does to show one that is there."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from backend.experiments.embeddings import project
from backend.reports.projection import Projection, ProjectionSpec
from backend.reports.vectors import Choice, MatrixRows
from backend.weights import open_weights
from bench.measure import serve


def main(path: str, n_threads: int, what: str, warm_rows: int = 2000) -> None:
    if what == "view":
        return serve(*_view(Path(path)), lambda sent: {"sent_bytes": sent})
    rows = MatrixRows(open_weights(path), "W_E")
    spec = ProjectionSpec(Choice("bench", "W_E"), what)
    stages: dict[str, int] = {}

    def warm_up() -> None:
        project(rows, spec, limit=warm_rows)  # compiles what numba compiles

    serve(lambda: project(rows, spec, lambda stage, done, total: stages.update({stage: done})), warm_up, lambda found: {"n": found.facts["n"], "d": found.facts["d"]})


def _view(path: Path) -> tuple[Callable[[], Any], Callable[[], object]]:
    """The callbacks of the Embeddings page that answer when a finished projection is opened, in the server's own process."""
    from app import create_app
    from backend.analysis.token_classes import token_classes
    from backend.model_files import identity
    from backend.reports.projection import VocabularyTexts
    from components.embedding_cloud import coloured, overlay, points
    from components.embedding_source import place, view
    from components.figures.embeddings import explained_variance, norm_histogram
    from config import load_settings

    folder = Path(tempfile.mkdtemp(prefix="layerscope-bench-"))
    server = create_app(load_settings(data_dir=folder, models_dirs=[path.parent], use_hf_cache=False)).server
    derived, spec = server.config["LAYERSCOPE"].derived, ProjectionSpec(Choice(path.name, "W_E"))

    def prepare() -> None:
        n, d = MatrixRows(open_weights(path), "W_E").shape
        random, texts = np.random.default_rng(0), [f" token{i}" for i in range(n)]
        facts = {"n": n, "d": d, "n_left_out": 0, "n_zero": 0, "n_sampled_from": 0, "seconds": 0.0}
        coords, norms = random.normal(size=(n, 3)).astype(np.float32), random.random(n, np.float32)
        Projection(np.arange(n, dtype=np.int32), coords, norms, np.full(50, 0.01), facts).save(derived, spec.key(identity(path)))
        VocabularyTexts(texts, token_classes(texts), frozenset()).save(derived, identity(path))

    def show() -> int:
        with server.app_context():
            found = view(place(path.name, ()), spec)
            assert found is not None, "the projection was put into the cache"
            shown = found.shown(True, ())
            sent = [points(found, shown), coloured(found, shown, "class", "light")[0], overlay(found, shown, 7, (), "chosen", None)]
            sent += [json.loads(norm_histogram(found.projection.norms, [found.token(i) for i in range(found.vectors.shape[0])]).to_json())]
            sent += [json.loads(explained_variance(found.projection.ratio).to_json())]
            return sum(len(json.dumps(part)) for part in sent)

    return show, prepare


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

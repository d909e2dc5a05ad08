"""Fixtures that several test files share: the tiny random models, built once a session, and bounded threads."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.tiny_models import TinyModel, save_tiny

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Llama with grouped queries (4 heads, 2 kv heads) and attention biases."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Mistral whose heads together are wider than its residual stream (4 x 24 against 64)."""
    return save_tiny("mistral", tmp_path_factory.mktemp("models") / "tiny-mistral")


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Mixtral with 5 experts of which 2 answer."""
    return save_tiny("mixtral", tmp_path_factory.mktemp("models") / "tiny-mixtral")


@pytest.fixture(scope="session")
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """The tiny model of a kind, made once a session."""
    made: dict[str, TinyModel] = {}

    def of(kind: str) -> TinyModel:
        if kind in ("llama", "mistral", "mixtral"):
            model: TinyModel = request.getfixturevalue(f"tiny_{kind}")
            return model
        if kind not in made:
            made[kind] = save_tiny(kind, tmp_path_factory.mktemp("models") / f"tiny-{kind}")
        return made[kind]

    return of

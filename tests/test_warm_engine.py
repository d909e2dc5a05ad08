"""One model at a time stays in memory, and it is always the one that was asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from backend.engines import OpenOptions
from backend.errors import LayerscopeError
from backend.jobs.warm_engine import WarmEngine
from backend.model_files import Shelf, describe
from config import load_settings
from tests.test_library import save_header_only


class FakeEngine:
    """Records when it was opened and closed."""

    def __init__(self, path: Path, options: OpenOptions, events: list[tuple[str, str]]) -> None:
        self.info, self.options, self._events = describe(path), options, events
        events.append(("open", path.name))

    def close(self) -> None:
        self._events.append(("close", self.info.name))


@pytest.fixture
def events() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def warm(tmp_path: Path, events: list[tuple[str, str]]) -> WarmEngine:
    for name in ("alpha", "beta"):
        save_header_only(tmp_path / "models" / "group" / name)
    settings = load_settings(data_dir=tmp_path / "data", models_dirs=[tmp_path / "models"], kv_cache="f32", use_hf_cache=False)
    opener: Any = lambda path, options: FakeEngine(path, options, events)  # noqa: E731
    return WarmEngine(settings, Shelf([tmp_path / "models"], tmp_path / "v", None, ()), opener)


def test_the_same_model_is_opened_once(warm: WarmEngine, events: list[tuple[str, str]]):
    assert warm("group/alpha", {}) is warm("group/alpha", {})
    assert events == [("open", "alpha")]


def test_the_old_model_is_closed_before_the_next_is_opened(warm: WarmEngine, events: list[tuple[str, str]]):
    warm("group/alpha", {})
    warm("group/beta", {})
    assert events == [("open", "alpha"), ("close", "group/alpha"), ("open", "beta")]


def test_other_options_or_a_changed_file_open_it_anew(warm: WarmEngine, events: list[tuple[str, str]], tmp_path: Path):
    first = warm("group/alpha", {})
    assert first.options.kv_cache == "f32", "the settings' choice"
    assert warm("group/alpha", {"kv_cache": "f16"}).options.kv_cache == "f16"
    assert warm("group/alpha", {"editable_weights": True}).options.editable_weights
    second = warm("group/alpha", {})
    assert not second.options.editable_weights
    os.utime(tmp_path / "models" / "group" / "alpha" / "model.safetensors", ns=(1, 1))
    assert warm("group/alpha", {}) is not second
    assert [event for event, _ in events].count("open") == 5


def test_the_engine_carries_the_name_by_which_it_can_be_asked_for_again(warm: WarmEngine):
    assert warm("group/alpha", {}).info.name == "group/alpha"


def test_what_cannot_be_opened_leaves_no_model_half_loaded(warm: WarmEngine, events: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch):
    warm("group/alpha", {})
    monkeypatch.setattr("backend.estimate.available_memory", lambda: 1000)
    with pytest.raises(LayerscopeError, match=r"group/beta needs about .* of memory, and 1\.0 kB are free"):
        warm("group/beta", {})
    assert events[-1] == ("close", "group/alpha")
    for name, sentence in (("nothing", "lies outside"), ("group/alpha", "are not all among")):
        with pytest.raises(LayerscopeError, match=sentence):
            warm(name, {"colour": "red"} if name != "nothing" else {})

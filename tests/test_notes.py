"""A capture beyond a sliding window that llama.cpp ignores says so, in both engines; and what it says is true."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backend.engines import OpenOptions, open_engine
from backend.experiments.capture import CaptureSpec, capture
from backend.files.hf_config import model_info
from backend.notes import notes
from backend.trace import Trace, open_trace
from tests.small_traces import INFO
from tests.test_engines_agree import nmse
from tests.tiny_models import TinyModel, save_tiny

IDS = (0, 290, 284, 280, 306, 275, 31, 290, 284, 77, 255, 12)
WINDOW = 8


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_tiny("phi3", tmp_path_factory.mktemp("models") / "phi3", sliding_window=WINDOW)


def captured(path: Path, folder: Path, ids: tuple[int, ...]) -> Trace:
    engine = open_engine(path, OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32"))
    trace = open_trace(capture(engine, CaptureSpec(token_ids=ids, precision="float32"), folder))
    engine.close()
    return trace


def test_beyond_the_window_the_engines_differ_and_both_captures_say_so(phi3: TinyModel, tmp_path: Path) -> None:
    with captured(phi3.hf, tmp_path, IDS) as hf, captured(phi3.gguf, tmp_path, IDS) as gguf:
        here, there = hf["attn_pattern", 0], gguf["attn_pattern", 0]
        assert nmse(there[:, :WINDOW], here[:, :WINDOW]) < 1e-6
        assert np.array_equal(here[:, WINDOW:, 0], np.zeros_like(here[:, WINDOW:, 0])) and (there[:, WINDOW:, 0] > 0).all()
        assert hf.metadata["notes"] == [
            f"The sliding window of 8 tokens of {hf.info.name} is applied here; llama.cpp ignores it, so a GGUF file of the model differs from position 8 on."
        ]
        assert gguf.metadata["notes"] == [
            f"llama.cpp does not apply the sliding window of 8 tokens of {gguf.info.name}: from position 8 on, queries look farther back than the model was made to."
        ]


def test_within_the_window_there_is_nothing_to_say(phi3: TinyModel, tmp_path: Path) -> None:
    for path in (phi3.hf, phi3.gguf):
        with captured(path, tmp_path, IDS[:WINDOW]) as trace:
            assert trace.metadata["notes"] == []


def test_a_window_that_llama_cpp_applies_needs_no_note(tmp_path: Path) -> None:
    gemma = save_tiny("gemma2", tmp_path / "gemma2")
    assert model_info(gemma.hf).sliding_window == WINDOW
    for path in (gemma.hf, gemma.gguf):
        with captured(path, tmp_path, IDS) as trace:
            assert trace.metadata["notes"] == []


def test_a_window_that_the_config_switches_off_is_none(tmp_path: Path) -> None:
    on = {"use_sliding_window": True, "max_window_layers": 1}
    assert model_info(save_tiny("qwen2", tmp_path / "on", sliding_window=WINDOW, **on).hf).sliding_window == WINDOW
    assert model_info(save_tiny("qwen2", tmp_path / "off", sliding_window=WINDOW, use_sliding_window=False).hf).sliding_window == 0


@pytest.mark.parametrize(("engine", "architecture", "words"), [
    ("gguf", "gpt-oss", ["YaRN"]), ("hf", "gpt_oss", []), ("gguf", "phimoe", ["RMS norms"]), ("hf", "phimoe", []), ("gguf", "llama", []), ("hf", "llama", []),
])  # fmt: skip
def test_llama_cpp_says_where_it_runs_another_model(engine, architecture, words):
    found = notes(replace(INFO, engine=engine, architecture=architecture), 5)
    assert len(found) == len(words) and all(word in note and INFO.name in note for word, note in zip(words, found, strict=True))

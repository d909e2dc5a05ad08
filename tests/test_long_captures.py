"""Long prompts and many captures: a context of 8,192 tokens goes to disk piece by piece, and nothing stays behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from backend.engines import Engine, OpenOptions, Piece, Request, Sampling, open_engine
from backend.experiments.capture import CaptureSpec, capture
from backend.trace import Trace
from tests.tiny_models import save_tiny

LONG = 8192
OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1)  # one thread: no waiting for the other on a busy machine


@pytest.fixture(scope="module", params=["gguf", "hf"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    tiny = save_tiny("llama", tmp_path_factory.mktemp("long") / "long-llama", max_position_embeddings=LONG, num_hidden_layers=2)
    opened = open_engine(getattr(tiny, request.param), OPTIONS)
    yield opened
    opened.close()


def rss() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def test_eight_thousand_tokens_in_pieces_keep_only_what_was_asked_for(engine: Engine, tmp_path: Path):
    ids = tuple(int(i) for i in np.random.default_rng(0).integers(2, 300, LONG))
    told: list[tuple[str, int, int]] = []
    spec = CaptureSpec(token_ids=ids, sites=("embed", "resid_post", "attn_pattern"), heads=((1, 2),), rows=(8000, 8010), lens=False)
    before = rss()
    path = capture(engine, spec, tmp_path, progress=lambda *step: told.append(step))
    with Trace(path) as trace:
        assert trace.n_tokens == LONG and all(entry["ok"] for entry in trace.integrity.values())
        assert trace["resid_post", 1].shape == (LONG, 64)
        rows = trace.head("attn_pattern", 1, 2, q=slice(8000, 8010))
        np.testing.assert_allclose(rows.sum(axis=-1), 1.0, atol=5e-3)
        assert np.all(rows[np.arange(10), 8001 + np.arange(10)] == 0) and np.all(rows[:, :8000].max(axis=-1) > 0)
        # The last rows of the last piece are those of a run that was asked for nothing else.
        assert np.isfinite(trace.next_logprobs[:-1]).all()
    assert [done for stage, done, _ in told if stage == "running"] == list(range(1, 2 * LONG // 512 + 1))
    one_map = 4 * LONG * LONG  # of one head, in float32: never in memory whole
    assert rss() - before < 8 * one_map
    assert path.stat().st_size < one_map / 16


def test_a_generation_of_512_tokens_is_one_square_trace(engine: Engine, tmp_path: Path):
    spec = CaptureSpec("Mary gave", max_new_tokens=512, sampling=Sampling(temperature=1.0, seed=3), sites=("resid_post", "attn_pattern"), lens=False)
    with Trace(capture(engine, spec, tmp_path)) as trace:
        ended = trace.token_ids[-1] == trace.info.eos_id
        assert trace.n_tokens == trace.n_prompt + 512 or ended
        assert trace.n_tokens - trace.n_prompt > 20, "the seed is one that does not end at once"
        assert trace["attn_pattern", 1].shape == (4, trace.n_tokens, trace.n_tokens)
        again = [int(token) for token in engine.generate(trace.token_ids[: trace.n_prompt], 512, Sampling(temperature=1.0, seed=3))]
        assert trace.token_ids[trace.n_prompt :] == again


def test_ten_captures_in_a_row_leave_no_memory_and_no_files_behind(engine: Engine, tmp_path: Path):
    spec = CaptureSpec(token_ids=tuple(i * 13 % 300 for i in range(700)), lens=True)
    process = psutil.Process()
    sizes: list[int] = []
    for _ in range(10):
        capture(engine, spec, tmp_path)
        sizes.append(rss())
    one_capture = 4 * 2 * (4 * 700 * 700 + 700 * 64 * 12)  # the float32 values of both layers
    assert sizes[9] - sizes[2] < one_capture, [size >> 20 for size in sizes]
    assert len(list(tmp_path.glob("*.h5"))) == 10 and not list(tmp_path.glob("*.part"))
    assert not [file for file in process.open_files() if str(tmp_path) in file.path]


def test_pieces_of_a_long_prompt_are_those_of_a_short_one(engine: Engine):
    """The same first 500 tokens, alone and at the head of a prompt of several pieces: causality, across the cut."""
    ids = [int(i) for i in np.random.default_rng(1).integers(2, 300, 1500)]
    short, long = _stream(engine, ids[:500]), _stream(engine, ids)
    np.testing.assert_allclose(long[:500], short, rtol=1e-3, atol=1e-4)
    assert long.shape == (1500, 64)


def _stream(engine: Engine, ids: list[int]) -> np.ndarray:
    pieces: list[np.ndarray] = []

    def sink(piece: Piece) -> None:
        pieces.append(np.array(piece.values))

    engine.run(ids, Request(("resid_post",), (1,)), sink)
    return np.concatenate(pieces)

"""Ranges, means and rollout of stored attention maps against the same things computed from the whole arrays at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from backend.analysis.attention_views import THRESHOLDS
from backend.derived import Derived
from backend.errors import Cancelled, LayerscopeError
from backend.reports import attention_maps
from backend.reports.attention_maps import Shown, Summary, looks_at, n_cells, summarise, tile
from backend.trace import Trace
from tests.small_traces import causal_maps, write_maps

N = 60
MAPS = causal_maps(np.random.default_rng(3), 3, 4, N)
WHOLE = range(N)


@pytest.fixture(autouse=True)
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips, none of them even, also of a short prompt."""
    monkeypatch.setattr(attention_maps, "STRIP", 17)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory):
    with Trace(write_maps(tmp_path_factory.mktemp("maps"), MAPS)) as opened:
        yield opened


def lower(values: np.ndarray) -> np.ndarray:
    """What the mask leaves, NaN elsewhere."""
    return np.where(np.tril(np.ones(values.shape, bool)), values, np.nan)


def test_a_whole_map_is_the_stored_one_with_what_is_masked_blank(trace: Trace):
    shown = tile(trace, Shown("head", 1, 2), WHOLE, WHOLE, 256)
    np.testing.assert_array_equal(shown.values, lower(MAPS[1, 2]))
    assert shown.is_exact and shown.n_broken == 0


@pytest.mark.parametrize(("rows", "columns"), [(range(20, 50), range(10, 33)), (range(0, 5), range(0, 60)), (range(58, 60), range(57, 60)), (range(3, 9), range(30, 40))])
def test_a_range_is_exact_and_only_that_range_is_read(trace: Trace, rows: range, columns: range, monkeypatch: pytest.MonkeyPatch):
    read: list[tuple[slice, slice]] = []
    head = Trace.head
    monkeypatch.setattr(Trace, "head", lambda self, site, layer, at, q, k: (read.append((q, k)), head(self, site, layer, at, q, k))[1])
    shown = tile(trace, Shown("head", 0, 3), rows, columns, 256)
    np.testing.assert_array_equal(shown.values, lower(MAPS[0, 3])[rows.start : rows.stop, columns.start : columns.stop])
    assert all(rows.start <= q.start and q.stop <= rows.stop and columns.start <= k.start and k.stop <= columns.stop for q, k in read)


def test_a_small_picture_keeps_the_largest_value_of_every_cell(trace: Trace):
    shown = tile(trace, Shown("head", 2, 0), WHOLE, WHOLE, 13)
    assert shown.values.shape == (13, 13) and not shown.is_exact
    for a in range(13):
        for b in range(13):
            cell = lower(MAPS[2, 0])[shown.rows[a] : shown.rows[a + 1], shown.columns[b] : shown.columns[b + 1]]
            expected = np.nanmax(cell) if np.isfinite(cell).any() else np.nan
            np.testing.assert_array_equal(shown.values[a, b], expected)


def test_hiding_the_first_token_divides_by_the_whole_row_also_where_a_range_is_shown(trace: Trace):
    rest = MAPS[0, 1].astype(np.float64)
    rest[:, 0] = 0
    expected = lower(np.divide(rest, rest.sum(-1, keepdims=True), out=np.full_like(rest, np.nan), where=rest.sum(-1, keepdims=True) > 0))
    expected[:, 0] = np.nan
    shown = tile(trace, Shown("head", 0, 1, hide_first=True), range(30, 45), range(0, 20), 256)
    np.testing.assert_allclose(shown.values, expected[30:45, :20], rtol=1e-5)
    shown = tile(trace, Shown("head", 0, 1, hide_first=True), range(30, 45), range(12, 20), 256)
    np.testing.assert_allclose(shown.values, expected[30:45, 12:20], rtol=1e-5)


def test_weighted_values_take_the_length_of_the_key_they_belong_to(trace: Trace):
    norms = np.arange(1, N + 1, dtype=np.float32)
    shown = tile(trace, Shown("head", 0, 1, "weighted"), range(30, 45), range(12, 20), 256, norms)
    np.testing.assert_allclose(shown.values, (MAPS[0, 1] * norms)[30:45, 12:20], rtol=1e-6)


def test_masked_scores_are_blank_and_not_minus_infinity(tmp_path: Path):
    scores = np.where(np.tril(np.ones((9, 9), bool)), np.random.default_rng(0).normal(size=(1, 2, 9, 9)), -np.inf).astype(np.float32)
    with Trace(write_maps(tmp_path, scores, "attn_scores")) as opened:
        shown = tile(opened, Shown("head", 0, 1, "scores"), range(9), range(9), 256)
        np.testing.assert_array_equal(shown.values, lower(scores[0, 1]))
        assert shown.n_broken == 0


def test_broken_values_are_counted_and_rows_that_were_not_captured_are_not_broken(tmp_path: Path):
    maps = MAPS[:1].copy()
    maps[0, 1, 20, 3:5], maps[0, 1, 40, 2] = np.nan, np.inf
    with Trace(write_maps(tmp_path, maps, kept={0: (1, 3)}, rows=(10, 50))) as opened:
        shown = tile(opened, Shown("head", 0, 1), WHOLE, WHOLE, 256)
        assert shown.n_broken == 3
        assert np.isnan(shown.values[:10]).all() and np.isnan(shown.values[50:]).all()
        np.testing.assert_array_equal(shown.values[10:50], lower(maps[0, 1])[10:50])
        mean = tile(opened, Shown("mean", 0), range(12, 18), range(0, 18), 256)
        np.testing.assert_allclose(mean.values, lower(maps[0, [1, 3]].mean(0))[12:18, :18], rtol=1e-6)
        with pytest.raises(LayerscopeError, match=r"Head 0\.2 was not captured"):
            tile(opened, Shown("head", 0, 2), WHOLE, WHOLE, 256)
        assert n_cells(opened) == 2 * 40 * N


@pytest.mark.parametrize("position", [0, 1, 30, N - 1])
def test_a_token_looks_along_its_row_and_is_looked_at_along_its_column(trace: Trace, position: int):
    for shown, whole in ((Shown("head", 2, 1), MAPS[2, 1]), (Shown("mean", 1), MAPS[1].mean(0)), (Shown("all", 0), MAPS.mean((0, 1)))):
        row, column = looks_at(trace, shown, position)
        np.testing.assert_allclose(row, whole[position, : position + 1], rtol=1e-5)
        np.testing.assert_allclose(column, whole[position:, position], rtol=1e-5)


@pytest.mark.parametrize("in_memory", [True, False])
def test_one_reading_of_every_head_leaves_means_rollout_and_counts(trace: Trace, tmp_path: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_maps, "_MEMORY", 1 << 30 if in_memory else 0)
    derived, told = Derived(tmp_path / "cache"), []
    assert Summary.load(derived, trace) is None
    summarise(trace, derived, lambda *step: told.append(step))
    found = Summary.load(derived, trace)
    assert found is not None and found.side == N and told[-1] == ("reading heads, layers", 3, 3)
    rolled = np.eye(N)
    for layer in range(3):
        rolled = (0.5 * MAPS[layer].mean(0) + 0.5 * np.eye(N)) @ rolled
        np.testing.assert_allclose(found.map("mean", layer), MAPS[layer].mean(0), atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(found.map("rollout", layer), rolled, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(found.map("all", None), MAPS.mean((0, 1)), atol=1e-3, rtol=1e-3)
    below = MAPS[:, :, *np.tril_indices(N)]
    for number, threshold in enumerate(THRESHOLDS):
        np.testing.assert_allclose(found.below(number), (below < threshold).mean(-1))
    np.testing.assert_allclose(found.mean, 2 / (N + 1), rtol=1e-5)
    shown = tile(trace, Shown("rollout", 2), range(10, 30), range(5, 20), 256, summary=found)
    np.testing.assert_allclose(shown.values, lower(rolled)[10:30, 5:20], atol=1e-3, rtol=1e-3)
    row, column = looks_at(trace, Shown("all", 0), 25, found)
    np.testing.assert_allclose(row, MAPS.mean((0, 1))[25, :26], atol=1e-3)
    np.testing.assert_allclose(column, MAPS.mean((0, 1))[25:, 25], atol=1e-3)


def test_maps_of_a_long_prompt_are_kept_small_and_keep_their_strongest_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_maps, "_KEPT_BYTES", 2 * 1 * 16 * 16)
    maps = np.tril(np.full((1, 2, N, N), 1e-4, np.float32))
    maps[0, :, 41, 7] = 0.9
    with Trace(write_maps(tmp_path, maps)) as opened:
        derived = Derived(tmp_path / "cache")
        summarise(opened, derived)
        found = Summary.load(derived, opened)
        assert found is not None and found.side == 16
        assert found.map("mean", 0).max() == pytest.approx(0.9, rel=1e-3)
        shown = tile(opened, Shown("rollout", 0), WHOLE, WHOLE, 256, summary=found)
        assert shown.values.shape == (16, 16) and not shown.is_exact
        part = tile(opened, Shown("rollout", 0), range(38, 44), range(5, 9), 256, summary=found)
        assert part.rows[0] <= 38 and part.rows[-1] >= 44 and part.columns[0] <= 5 and part.columns[-1] >= 9
        assert np.nanmax(part.values) == pytest.approx(0.45 / (0.5 + 0.5 * maps[0, 0, 41].sum()), rel=2e-3)
        with pytest.raises(LayerscopeError, match="16 cells a side"):
            tile(opened, Shown("rollout", 0, hide_first=True), WHOLE, WHOLE, 256, summary=found)


def test_rollout_of_a_trace_that_lacks_a_layer_or_rows_says_which(tmp_path: Path):
    for kept, rows, words in (({0: (0, 1), 2: (0, 1)}, None, "layer 1 was not captured"), (None, (3, 40), "every row")):
        with Trace(write_maps(tmp_path, MAPS, kept=kept, rows=rows)) as opened:
            derived = Derived(tmp_path / f"cache{words[:5]}")
            summarise(opened, derived)
            found = Summary.load(derived, opened)
            assert found is not None and words in found.rollout_lacks and found.map("rollout", 0) is None
            assert np.isfinite(found.mean).sum() == len(opened.layers("attn_pattern")) * (2 if kept else 4)


def test_a_reading_that_is_cancelled_stops_and_leaves_nothing_that_looks_finished(trace: Trace, tmp_path: Path):
    derived = Derived(tmp_path / "cache")
    with pytest.raises(Cancelled):
        summarise(trace, derived, should_stop=lambda: True)
    assert Summary.load(derived, trace) is None


def test_the_job_reads_a_trace_once_and_leaves_its_summary(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from backend.experiments import KINDS, Context
    from backend.experiments import attention_maps as job

    def no_engine(model: str, options: dict) -> None:
        raise AssertionError("what is stored is enough")

    context = Context(no_engine, tmp_path, SimpleNamespace(path_of=lambda _: trace.path), Derived(tmp_path / "cache"))  # type: ignore[arg-type]
    assert KINDS["attention_maps"](context, {"trace_id": trace.id}) == {"layers": [0, 1, 2], "side": N}
    found = Summary.load(context.derived, trace)
    assert found is not None and found.map("rollout", 2) is not None
    monkeypatch.setattr(job, "summarise", lambda *_: pytest.fail("it is there already"))
    assert KINDS["attention_maps"](context, {"trace_id": trace.id})["side"] == N

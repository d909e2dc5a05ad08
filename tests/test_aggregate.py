"""Aggregates against NumPy's own formulas, hand-computed numbers, and the traces themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from backend.aggregates import Aggregates, row_of
from backend.analysis.aggregate import Moments, difference, mean_or_nan
from backend.derived import Derived
from backend.engines import OpenOptions, open_engine
from backend.errors import LayerscopeError
from backend.experiments.capture import CaptureSpec, capture
from backend.trace import Trace, open_trace
from tests.tiny_models import TinyModel

RNG = np.random.default_rng(2)


def moments_of(samples: np.ndarray) -> Moments:
    found = Moments(samples.shape[1:])
    for sample in samples:
        found.add(sample)
    return found


def test_moments_are_numpy_s_with_holes_left_out_cell_by_cell() -> None:
    samples = RNG.normal(1e6, 1.0, (30, 4, 3))  # a large mean: sums of squares would lose the variance
    samples[RNG.random(samples.shape) < 0.3] = np.nan
    samples[:, 0, 0] = np.nan
    samples[1:, 0, 1] = np.inf
    samples[0, 0, 1] = 5.0
    finite = np.where(np.isfinite(samples), samples, np.nan)
    found = moments_of(samples)
    np.testing.assert_array_equal(found.count, np.isfinite(samples).sum(0))
    with np.errstate(invalid="ignore"), pytest.warns(RuntimeWarning):
        np.testing.assert_allclose(found.mean, np.nanmean(finite, axis=0), rtol=1e-12)
        np.testing.assert_allclose(found.std, np.nanstd(finite, axis=0, ddof=1), rtol=1e-9)
    assert np.isnan(found.mean[0, 0]) and found.mean[0, 1] == 5 and np.isnan(found.std[0, 1])


def test_moments_go_on_from_their_state_and_refuse_another_shape() -> None:
    samples = RNG.normal(size=(11, 5))
    again = Moments.restored(moments_of(samples[:6]).state)
    for sample in samples[6:]:
        again.add(sample)
    np.testing.assert_allclose(again.state, moments_of(samples).state, rtol=1e-13)
    with pytest.raises(ValueError, match=r"shape \(3,\) among samples of shape \(5,\)"):
        again.add(np.zeros(3))


def test_the_difference_and_its_error_are_welch_s() -> None:
    a, b = RNG.normal(2, 1, (9, 4)), RNG.normal(0, 3, (14, 4))
    gap, error = difference(moments_of(a), moments_of(b))
    expected = stats.ttest_ind(a, b, equal_var=False)
    np.testing.assert_allclose(gap, a.mean(0) - b.mean(0))
    np.testing.assert_allclose(gap / error, expected.statistic)
    gap, error = difference(moments_of(a[:1]), moments_of(b))
    assert np.isfinite(gap).all() and np.isnan(error).all()


def test_the_mean_leaves_out_what_is_not_finite() -> None:
    assert mean_or_nan([1, np.nan, 3, np.inf]) == 2 and np.isnan(mean_or_nan([np.nan])) and np.isnan(mean_or_nan([]))


@pytest.fixture(scope="module")
def traces(tiny_mistral: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    folder = tmp_path_factory.mktemp("traces")
    engine = open_engine(tiny_mistral.hf, OpenOptions())
    prompts = ("The capital of France", "Mary gave the book to John, Mary gave", "x")
    paths = [capture(engine, CaptureSpec(prompt, max_new_tokens=2 * (prompt == "x")), folder) for prompt in prompts]
    engine.close()
    return [open_trace(path) for path in paths]


def test_a_trace_s_row_is_what_the_trace_says(traces: list[Trace]) -> None:
    trace = traces[1]
    row = row_of(trace)
    np.testing.assert_array_equal(row["head_induction"], trace.result("attn_induction"))
    norms = np.linalg.norm(trace["resid_post", 2].astype(np.float64), axis=-1)
    assert row["norm_resid_post"][2] == pytest.approx(norms[1:].mean(), rel=1e-6)
    kl = trace.result("lens_kl")[trace.result_attrs("lens_kl")["rows"].index("1"), 1:]
    assert row["lens_kl"][1] == pytest.approx(kl.mean(), rel=1e-5) and row["lens_kl"][-1] == 0
    assert row["logprob"] == pytest.approx(trace.next_logprobs[:-1].mean(), rel=1e-6)
    assert row["top1"] == pytest.approx((trace.next_ranks[:-1] == 0).mean())


def test_generated_tokens_do_not_count_as_predicted(traces: list[Trace]) -> None:
    trace = traces[2]  # <s> and x, then two tokens of the model's own
    assert trace.n_prompt == 2 and row_of(trace)["logprob"] == pytest.approx(trace.next_logprobs[0])


def test_an_aggregate_is_that_of_its_rows_and_goes_on_where_it_was_left(traces: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aggregates, ids = Aggregates(Derived(tmp_path)), [trace.id for trace in traces]
    assert aggregates.missing(ids) == ids
    rows = [aggregates.put_row(trace) for trace in traces]
    assert aggregates.missing(ids) == []
    aggregates.over(ids[:2], "batch")
    read: list[str] = []
    real = Aggregates.row
    monkeypatch.setattr(Aggregates, "row", lambda self, trace_id: read.append(trace_id) or real(self, trace_id))
    grown = aggregates.over(ids, "batch")
    assert read == ids[2:], "only the new one is read"
    fresh = Aggregates(Derived(tmp_path / "b"))
    for trace in traces:
        fresh.put_row(trace)
    for name, moments in fresh.over(ids, "other").items():
        np.testing.assert_allclose(grown[name].state, moments.state, rtol=1e-12)
        stacked = np.stack([np.asarray(row[name], np.float64) for row in rows if name in row])
        counted = np.isfinite(stacked).sum(0)
        np.testing.assert_array_equal(moments.count, counted)
        sums = np.where(np.isfinite(stacked), stacked, 0).sum(0)
        np.testing.assert_allclose(moments.mean, np.where(counted > 0, sums / np.maximum(counted, 1), np.nan), rtol=1e-6)
    read.clear()
    aggregates.over([ids[1]], "batch")
    assert read == [ids[1]], "another set under the same name starts anew"


def test_a_missing_row_and_another_shape_are_named(traces: list[Trace], tmp_path: Path) -> None:
    aggregates = Aggregates(Derived(tmp_path))
    with pytest.raises(LayerscopeError, match="statistics of trace .* are not in the cache"):
        aggregates.over([traces[0].id], "batch")
    aggregates.put_row(traces[0])
    aggregates._put(("aggregate_row", "other_model"), {"norm_resid_post": np.zeros(99)})
    with pytest.raises(LayerscopeError, match="Trace other_model is of a model of another shape"):
        aggregates.over([traces[0].id, "other_model"], "batch")

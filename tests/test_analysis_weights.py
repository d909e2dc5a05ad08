"""Claims about the formulas of backend.analysis.weights and spectrum: each held against NumPy, SciPy or scikit-learn on the whole array."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.utils.extmath import randomized_svd

from backend.analysis import spectrum as spectrum_module
from backend.analysis.activations import reduce_signed
from backend.analysis.spectrum import Spectrum, randomized, spectrum
from backend.analysis.weights import (
    N_BINS,
    N_LARGEST,
    Counts,
    Moments,
    Norms,
    SignedMap,
    bin_edges,
    by_component,
    counts,
    histogram_exponent,
    joint,
    largest_floor,
    moments,
    place,
    rebinned,
    statistics,
    super_weight_candidates,
)  # fmt: skip

Array = NDArray[np.float32]


def pieces(values: Array, size: int = 1000) -> Iterator[Array]:
    return (values[i : i + size] for i in range(0, len(values), size))


def measured(values: Array, size: int = 1000) -> tuple[dict[str, float], Moments, Counts]:
    found, peaks = moments(pieces(values, size))
    counted = counts(pieces(values, size), found, largest_floor(peaks))
    return statistics(found, counted), found, counted


def expected(values: Array) -> dict[str, float]:
    x = values[np.isfinite(values)].astype(np.float64)
    mean, std = x.mean(), x.std()
    return {
        "mean": mean, "std": std, "min": x.min(), "max": x.max(), "abs_max": np.abs(x).max(), "kurtosis": stats.kurtosis(x, fisher=False) if std else math.nan,
        "near_zero": np.mean(np.abs(x) <= 0.01 * std), "l2": np.linalg.norm(x), "outliers": np.sum(np.abs(x - mean) > 6 * std),
        "n_nan": np.isnan(values).sum(), "n_inf": np.isinf(values).sum(),
    }  # fmt: skip


def draw(kind: str, n: int = 50_123) -> Array:
    rng = np.random.default_rng(7)
    values = {
        "normal": lambda: rng.normal(0, 0.02, n), "shifted": lambda: rng.normal(1000, 0.3, n), "heavy": lambda: rng.standard_t(2.5, n), "skewed": lambda: rng.exponential(3, n),
        "levels": lambda: rng.integers(-8, 8, n) * 0.25, "tiny": lambda: rng.normal(0, 1e-30, n), "large": lambda: rng.normal(0, 1e30, n),
        "constant": lambda: np.full(n, -0.75), "zero": lambda: np.zeros(n), "mostly zero": lambda: rng.normal(0, 1, n) * (rng.random(n) < 0.01),
    }[kind]()  # fmt: skip
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", ["normal", "shifted", "heavy", "skewed", "levels", "tiny", "large", "constant", "zero", "mostly zero"])
def test_statistics_of_pieces_are_numpys_of_the_whole(kind: str) -> None:
    values = draw(kind)
    got, want = measured(values)[0], expected(values)
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-6, abs=1e-12 * max(abs(want["mean"]), 1e-30), nan_ok=True), name


def test_nan_and_infinite_values_are_counted_and_left_out_of_everything_else() -> None:
    values = draw("heavy")
    values[[3, 999, 1000]], values[[5, 40_000]], values[2000:3000] = np.nan, (np.inf, -np.inf), np.nan
    got, want = measured(values)[0], expected(values)
    assert (got["n_nan"], got["n_inf"]) == (1003, 2)
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-6), name
    nothing, _, counted = measured(np.full(10, np.nan, np.float32))
    assert nothing["n_nan"] == 10 and math.isnan(nothing["mean"]) and math.isnan(nothing["abs_max"]) and not counted.bins.any() and counted.largest == ()
    assert measured(np.zeros(0, np.float32))[0]["n_nan"] == 0


def test_merged_moments_do_not_depend_on_how_the_values_were_cut() -> None:
    values = draw("skewed")
    whole, _ = moments(iter([values]))
    for size in (1, 17, 5000):
        few = values[:3000] if size == 1 else values
        cut, _ = moments(pieces(few, size))
        want = whole if size > 1 else moments(iter([few]))[0]
        np.testing.assert_allclose(cut.to_json(), want.to_json(), rtol=1e-9)
    halves = moments(iter([values[:20_000]]))[0].merged(moments(iter([values[20_000:]]))[0])
    np.testing.assert_allclose(halves.to_json(), whole.to_json(), rtol=1e-12)
    assert Moments().merged(whole) == whole == whole.merged(Moments())


@pytest.mark.parametrize("kind", ["normal", "shifted", "heavy", "levels", "tiny", "large", "zero"])
def test_the_histogram_is_numpys_and_stays_so_in_a_wider_range(kind: str) -> None:
    values = draw(kind)
    _, found, counted = measured(values)
    exponent = histogram_exponent(found.abs_max)
    assert np.array_equal(counted.bins, np.histogram(values.astype(np.float64), bin_edges(exponent))[0]) and counted.bins.sum() == len(values)
    if kind not in ("zero",):
        assert 2.0 ** (exponent - 1) <= found.abs_max < 2.0**exponent or exponent == -100
    for wider in (exponent, exponent + 1, exponent + 3, exponent + 20):
        assert np.array_equal(rebinned(counted.bins, exponent, wider), np.histogram(values.astype(np.float64), bin_edges(wider))[0]), wider


def test_a_value_on_an_edge_lies_in_the_bin_above_it() -> None:
    values = np.array([-1.0, -0.5, 0.0, 0.5, 1.0 - 2**-24, 2**-8, -(2**-8)], np.float32)
    _, found, counted = measured(values)
    assert np.array_equal(counted.bins, np.histogram(values.astype(np.float64), bin_edges(histogram_exponent(found.abs_max)))[0])
    assert histogram_exponent(1.0) == 1 and histogram_exponent(0.0) == 0 == histogram_exponent(math.nan)


@pytest.mark.parametrize(("n", "size"), [(5, 1000), (3000, 1000), (50_123, 1000), (50_123, 64), (20, 1)])
def test_the_largest_weights_are_those_of_a_sort_whatever_the_pieces(n: int, size: int) -> None:
    values = draw("heavy", n)
    values[n // 2] = np.nan
    got = measured(values, size)[2].largest
    size_of = np.where(np.isfinite(values), np.abs(values), -1)
    order = np.argsort(-size_of, kind="stable")[: min(N_LARGEST, n - 1)]
    assert [at for at, _ in got] == order.tolist() and [w for _, w in got] == values[order].tolist()


def test_ties_among_the_largest_go_to_the_first_places() -> None:
    values = np.tile(np.array([0.5, -1.0, 1.0], np.float32), 4000)
    assert [at for at, _ in measured(values)[2].largest] == [1, 2, 4, 5, 7, 8, 10, 11]


# -- one matrix ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (300, 40), (33, 900), (513, 257)])
def test_norms_and_map_of_blocks_are_those_of_the_whole(shape: tuple[int, int]) -> None:
    matrix = draw("heavy", shape[0] * shape[1]).reshape(shape)
    norms, seen = Norms(shape), SignedMap(shape, 64, 32)
    for first in reversed(range(0, shape[0], 13)):
        norms.add(first, matrix[first : first + 13])
        seen.add(first, matrix[first : first + 13])
    np.testing.assert_allclose(norms.rows, np.linalg.norm(matrix, axis=1), rtol=1e-6)
    np.testing.assert_allclose(norms.columns, np.linalg.norm(matrix.astype(float), axis=0), rtol=1e-6)
    cells, rows, columns = reduce_signed(matrix, 64, 32)
    assert np.array_equal(seen.cells, cells) and np.array_equal(seen.row_edges, rows) and np.array_equal(seen.column_edges, columns)


def blocks_of(matrix: Array, step: int = 50) -> Any:
    return lambda: ((i, matrix[i : i + step]) for i in range(0, len(matrix), step))


@pytest.mark.parametrize("shape", [(300, 120), (120, 300), (64, 64), (1, 40), (5000, 3)])
def test_a_matrix_with_a_short_side_gets_every_singular_value(shape: tuple[int, int]) -> None:
    matrix = draw("heavy", shape[0] * shape[1]).reshape(shape)
    want = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    found = spectrum(blocks_of(matrix), shape)
    assert found.is_full and found.n == min(shape)
    np.testing.assert_allclose(found.values, want, rtol=1e-6, atol=1e-6 * want[0])
    p = want / want.sum()
    assert found.effective_rank == pytest.approx(np.exp(stats.entropy(p)), rel=1e-5)
    assert found.stable_rank == pytest.approx(np.linalg.norm(matrix.astype(float)) ** 2 / np.linalg.norm(matrix.astype(float), 2) ** 2, rel=1e-5)


def test_a_larger_matrix_gets_its_leading_values_as_scikit_learn_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    left, right = np.linalg.qr(rng.normal(size=(700, 400)))[0], np.linalg.qr(rng.normal(size=(400, 400)))[0]
    true = 3.0 * np.arange(1, 401) ** -0.6
    matrix = ((left * true) @ right).astype(np.float32)
    monkeypatch.setattr(spectrum_module, "FULL_SIDE", 100)
    monkeypatch.setattr(spectrum_module, "N_LEADING", 40)
    found = spectrum(blocks_of(matrix), matrix.shape)
    assert not found.is_full and len(found.values) == 40 and found.n == 400
    assert found.energy == pytest.approx(np.sum(matrix.astype(float) ** 2), rel=1e-9)
    np.testing.assert_allclose(found.values, true[:40], rtol=1e-3)
    np.testing.assert_allclose(found.values, randomized_svd(matrix, 40, n_oversamples=64, n_iter=4, random_state=0)[1], rtol=1e-3)
    assert np.array_equal(found.values, spectrum(blocks_of(matrix), matrix.shape).values)  # the same seed gives the same values
    full = Spectrum(true, 400, float(np.sum(true**2)))
    assert full.effective_rank < found.effective_rank < 400  # an estimate from above
    assert found.stable_rank == pytest.approx(full.stable_rank, rel=1e-3)


def test_ranks_of_known_matrices() -> None:
    equal = Spectrum(np.ones(12), 12, 12.0)
    assert equal.stable_rank == pytest.approx(12) and equal.effective_rank == pytest.approx(12)
    one = Spectrum(np.array([5.0, 0.0, 0.0]), 3, 25.0)
    assert one.stable_rank == pytest.approx(1) and one.effective_rank == pytest.approx(1)
    assert math.isnan(Spectrum(np.zeros(3), 3, 0.0).stable_rank) and math.isnan(Spectrum(np.zeros(3), 3, 0.0).effective_rank)
    rank_two = np.outer(np.arange(30), np.ones(20)) + np.outer(np.ones(30), np.arange(20))
    assert (randomized(blocks_of(rank_two.astype(np.float32)), (30, 20), 6).values[2:] < 1e-3).all()


# -- names and candidates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("native", "canonical", "want"),
    [
        ("blk.3.ffn_down.weight", ["blocks.3.mlp.W_out"], (3, "mlp.W_out")),
        ("blk.12.attn_qkv.weight", ["blocks.12.attn.W_Q", "blocks.12.attn.W_K", "blocks.12.attn.W_V"], (12, "attn.W_Q + W_K + W_V")),
        ("token_embd.weight", ["embed.W_E", "unembed.W_U"], (None, "embed.W_E")),
        ("blk.7.ssm_in.weight", [], (7, "ssm_in.weight")),
        ("model.layers.2.block_sparse_moe.experts.41.w2.weight", [], (2, "block_sparse_moe.experts.w2.weight")),
        ("transformer.h.5.attn.bias", [], (5, "attn.bias")),
        ("rope_freqs.weight", [], (None, "rope_freqs.weight")),
    ],
)
def test_the_place_of_a_tensor_is_read_from_its_names(native: str, canonical: list[str], want: tuple[int | None, str]) -> None:
    assert place(native, canonical) == want


def row_of(name: str, layer: int | None, component: str, values: Array) -> dict[str, Any]:
    numbers, found, counted = measured(values)
    return {"name": name, "layer": layer, "component": component, "note": "", "largest": [[[at], w] for at, w in counted.largest], "moments": found.to_json(), **numbers}


def test_a_planted_super_weight_comes_first_and_other_components_are_no_candidates() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for layer in range(4):
        out, gate = rng.normal(0, 0.02, 9000).astype(np.float32), rng.normal(0, 0.02, 9000).astype(np.float32)
        gate[5] = 50.0
        if layer == 1:
            out[4321] = -3.0
        rows += [row_of(f"out{layer}", layer, "mlp.W_out", out), row_of(f"gate{layer}", layer, "mlp.W_gate", gate)]
    found = super_weight_candidates(rows)
    assert len(found) == 4 * 3 and (found[0]["tensor"], found[0]["index"], found[0]["value"], found[0]["rank"]) == ("out1", [4321], -3.0, 1)
    assert found[0]["sigmas"] == pytest.approx(3.0 / rows[2]["std"]) and found[0]["sigmas"] > 5 * found[1]["sigmas"]
    assert {item["component"] for item in found} == {"mlp.W_out"}
    assert [item["sigmas"] for item in found] == sorted((item["sigmas"] for item in found), reverse=True)


def test_experts_that_are_stored_one_by_one_count_together() -> None:
    parts = [draw("skewed", 4000), draw("normal", 3000), draw("heavy", 5000)]
    rows = [row_of(f"e{i}", 2, "mlp.experts.W_out", values) for i, values in enumerate(parts)]
    assert list(by_component([*rows, row_of("n", 2, "ln1.w", parts[0])])) == ["ln1.w", "mlp.experts.W_out"]  # the order of a forward pass
    together, want = joint(by_component(rows)["mlp.experts.W_out"][2]), expected(np.concatenate(parts))
    for name in ("mean", "std", "min", "max", "abs_max", "kurtosis", "l2"):
        assert together[name] == pytest.approx(want[name], rel=1e-6), name
    assert len(super_weight_candidates(rows)) == 3 and N_BINS % 2 == 0

"""Massive activations, outlier dimensions, quantiles and channel statistics, counted by hand and by a plain second way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from backend.analysis import distributions
from backend.analysis.outliers import Limits, find_outliers, follow

RNG = np.random.default_rng(0)


def stream() -> list[tuple[int, np.ndarray]]:
    """Four layers of 10 tokens x 20 dimensions, |x| around 0.1, with a massive activation at (0, 7) from layer 1 to 2 and a broad dimension 3."""
    layers = [(layer, (RNG.normal(size=(10, 20)) * 0.1).astype(np.float32)) for layer in range(4)]
    for layer in (1, 2):
        layers[layer][1][0, 7] = -500 - layer
    layers[3][1][4, 9] = 90  # large, but not beyond 100
    for layer in (0, 2, 3):
        layers[layer][1][:5, 3] = 6.5
    return layers


def test_a_massive_activation_is_found_once_at_its_peak_and_counted_in_its_layers():
    layers = stream()
    found = find_outliers(layers)
    assert (found.n_massive, found.n_bad) == (2, 0)
    first = found.peaks[0]
    assert (first.position, first.dimension, first.layer, first.value, first.massive_in) == (0, 7, 2, -502, 2)
    assert first.median == pytest.approx(np.median(np.abs(layers[2][1]))) and first.ratio == pytest.approx(502 / first.median)
    assert [peak.massive_in for peak in found.peaks].count(0) == len(found.peaks) - 1
    assert (found.peaks[1].position, found.peaks[1].dimension, found.peaks[1].value) == (4, 9, 90)


def test_both_conditions_are_needed():
    assert find_outliers(stream(), Limits(size=600)).n_massive == 0
    assert find_outliers(stream(), Limits(ratio=1e5)).n_massive == 0
    assert find_outliers(stream(), Limits(size=80, ratio=100)).n_massive == 3


def test_outlier_dimensions_by_hand():
    """Dimension 3: in 3 of 4 layers and 15 of 40 tokens. Dimension 7: 2 of 4 layers but 2 of 40 tokens, 5 %. Dimension 9: 1 of 4, 1 of 40."""
    found = find_outliers(stream()).dimensions
    assert [(d.dimension, d.layer_share, d.token_share, d.abs_max) for d in found] == [(3, 0.75, 0.375, 6.5)]
    assert [d.dimension for d in find_outliers(stream(), Limits(token_share=0.05)).dimensions] == [7, 3]
    assert [d.dimension for d in find_outliers(stream(), Limits(token_share=0.0)).dimensions] == [7, 9, 3]


def test_a_pair_is_followed_through_every_layer():
    layers = stream()
    values = follow(layers, [(0, 7), (4, 9)])
    np.testing.assert_array_equal(values, [[v[0, 7] for _, v in layers], [v[4, 9] for _, v in layers]])
    assert follow(layers, []).shape == (0, 0)


def test_values_that_are_not_finite_are_counted_and_hide_nothing():
    layers = stream()
    layers[1][1][2, 2], layers[1][1][3, 3] = np.nan, np.inf
    found = find_outliers(layers)
    assert (found.n_bad, found.n_massive, found.peaks[0].dimension) == (2, 2, 7)


def test_quantiles_are_numpy_s_over_the_finite_values():
    values = RNG.normal(size=(30, 40)).astype(np.float32)
    np.testing.assert_allclose(distributions.quantile_bands(values), np.quantile(values.ravel(), [0, 0.01, 0.25, 0.5, 0.75, 0.99, 1]), rtol=1e-5)
    values[0, 0] = np.nan
    assert np.isfinite(distributions.quantile_bands(values)).all()
    assert np.isnan(distributions.quantile_bands(np.full((2, 2), np.nan))).all()


def test_channel_statistics_by_hand():
    """Two tokens, four channels: squares 1 and 9, 0 and 0, 4 and 4, 16 and 0: means 5, 0, 4, 8; sum 17."""
    energy, bad = distributions.channel_energy(np.array([[1, 0, 2, 4], [-3, 0, -2, 0]], np.float32))
    np.testing.assert_array_equal(energy, [5, 0, 4, 8])
    assert bad == 0
    found = distributions.channel_statistics(energy, np.array([0.0, 0, 1, 0]))
    std = math.sqrt(((5 - 4.25) ** 2 + 4.25**2 + 0.25**2 + 3.75**2) / 4)
    entropy = -sum(p * math.log2(p) for p in (5 / 17, 4 / 17, 8 / 17))
    expected = {"sum": 17, "min": 0, "max": 8, "mean": 4.25, "std": std, "active": 0.75, "n": 4, "entropy": entropy, "entropy_norm": entropy / 2,
                "zd": 0.25, "cossim": 4 / math.sqrt(25 + 16 + 64)}  # fmt: skip
    assert found == pytest.approx(expected)
    assert (8 - 4.25) / std > 1 > (5 - 4.25) / std  # one channel in four has z > 1


def test_channels_of_heads_are_laid_side_by_side_and_bad_values_are_left_out():
    values = RNG.normal(size=(6, 3, 4)).astype(np.float32)
    values[2, 1, 0] = np.inf
    energy, bad = distributions.channel_energy(values)
    assert bad == 1 and energy.shape == (12,)
    assert energy[4] == pytest.approx(np.mean(values[[0, 1, 3, 4, 5], 1, 0].astype(np.float64) ** 2))
    assert math.isnan(distributions.channel_statistics(energy)["cossim"])
    assert distributions.channel_statistics(np.full(3, np.nan))["n"] == 0


def test_the_energies_of_a_capture_are_those_that_an_importance_matrix_holds(tiny_llama, tmp_path):
    """An importance matrix of the same text, made the way llama-imatrix makes it: squared inputs of the product, summed over rows, in a
    GGUF of in_sum2 and counts, read back by what the quantizer reads."""
    import gguf

    from backend.engines import OpenOptions, open_engine
    from backend.experiments.capture import CaptureSpec, capture
    from backend.files.imatrix import read_imatrix
    from backend.trace import open_trace

    engine = open_engine(tiny_llama.gguf, OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32"))
    prompt = "The capital of France is Paris and"
    trace = open_trace(capture(engine, CaptureSpec(prompt, precision="float32", sites=("z", "native:kqv_out-1", "native:ffn_swiglu-1", "mlp_post")), tmp_path))
    engine.close()
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "")
    writer.add_type("imatrix")
    for weight, native in (("blk.1.attn_output.weight", "kqv_out-1"), ("blk.1.ffn_down.weight", "ffn_swiglu-1")):
        rows = trace[f"native:{native}"].reshape(trace.n_tokens, -1).astype(np.float32)
        writer.add_tensor(f"{weight}.in_sum2", np.square(rows).sum(axis=0, keepdims=True))
        writer.add_tensor(f"{weight}.counts", np.full((1, 1), trace.n_tokens, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = read_imatrix(tmp_path / "imatrix.gguf")
    for weight, site in (("blk.1.attn_output.weight", "z"), ("blk.1.ffn_down.weight", "mlp_post")):
        np.testing.assert_allclose(distributions.channel_energy(trace[site, 1])[0], stored[weight], rtol=1e-5)

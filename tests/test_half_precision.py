"""Half precision is IEEE's, whoever rounds: the fast conversion gives NumPy's bits."""

import numpy as np

from backend.tracefile import half_precision
from backend.tracefile.half_precision import from_float16, overflowed, to_float16


def every_kind_of_value() -> np.ndarray:
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    edges = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.9, 65520, -65520, 6.1e-5, 5.96e-8, 2.98e-8, 2.99e-8, 1e-45, 1.0009765, 1.00048828125], np.float32)
    return np.concatenate([patterns, edges, rng.standard_normal(10_001).astype(np.float32)])


def test_the_fast_conversion_rounds_as_numpy_does():
    values = every_kind_of_value()
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    got = to_float16(values)
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(got.view(np.uint16)[number], expected.view(np.uint16)[number])


def test_without_ggmls_library_numpy_converts(monkeypatch):
    monkeypatch.setattr(half_precision, "_ggml_convert", lambda: None)
    np.testing.assert_array_equal(to_float16(np.array([1.5, -2.25, 1e9], np.float32)), np.array([1.5, -2.25, np.inf], np.float16))


def test_views_are_converted_as_they_look_and_not_as_they_lie():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2].T
    np.testing.assert_array_equal(to_float16(values), values.astype(np.float16))


def test_only_a_finite_value_that_became_infinite_overflowed():
    for values, expected in (([1.0, np.inf], False), ([np.nan, 2.0], False), ([65504.0], False), ([70_000.0, np.inf], True), ([], False)):
        array = np.array(values, np.float32)
        assert overflowed(to_float16(array), array) is expected


def test_every_half_there_is_widens_to_the_same_number():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(from_float16(every), every.astype(np.float32))
    np.testing.assert_array_equal(from_float16(every.reshape(256, 256)[::3, 5:].T), every.reshape(256, 256)[::3, 5:].T.astype(np.float32))


def test_without_ggmls_library_numpy_widens(monkeypatch):
    monkeypatch.setattr(half_precision, "_ggml_widen", lambda: None)
    np.testing.assert_array_equal(from_float16(np.array([1.5, -2.25, np.inf], np.float16)), np.array([1.5, -2.25, np.inf], np.float32))

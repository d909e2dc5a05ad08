"""Norms and moments against numpy and scipy; reductions that may not lose an outlier."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from backend.analysis import activations


def test_norms_are_taken_over_all_axes_after_the_position():
    values = np.random.default_rng(0).normal(size=(5, 4, 8)).astype(np.float32)
    np.testing.assert_allclose(activations.l2_norms(values), np.linalg.norm(values.reshape(5, -1), axis=1), rtol=1e-6)


def test_norms_of_float16_values_do_not_overflow():
    assert activations.l2_norms(np.full((1, 100), 60000, np.float16))[0] == pytest.approx(600000, rel=1e-3)


def test_moments_agree_with_scipy():
    values = np.random.default_rng(1).standard_t(5, size=(30, 20)).astype(np.float32)
    found = activations.site_statistics(values)
    assert found["std"] == pytest.approx(values.astype(np.float64).std())
    assert found["kurtosis"] == pytest.approx(stats.kurtosis(values.astype(np.float64), axis=None, fisher=False))
    assert found["abs_max"] == pytest.approx(np.abs(values).max())


def test_sparsity_is_the_share_below_the_stated_limit():
    assert activations.site_statistics(np.array([[0, 9e-6, -1e-4, 1]]))["sparsity"] == 0.5


def test_bad_values_are_counted_and_kept_out_of_the_moments():
    found = activations.site_statistics(np.array([[1, 3, np.nan, np.inf, -np.inf]]))
    assert (found["n_nan"], found["n_inf"], found["mean"], found["max"]) == (1, 2, 2, 3)


def test_all_bad_values_have_no_mean():
    found = activations.site_statistics(np.full((2, 2), np.nan))
    assert np.isnan(found["mean"]) and found["n_nan"] == 4


def test_the_colour_range_ignores_one_huge_outlier_but_not_a_sparse_map():
    values = np.append(np.linspace(-1, 1, 9999), 1e6)
    assert activations.robust_range(values) < 1.01
    lonely = np.zeros(10000)
    lonely[3] = 5
    assert activations.robust_range(lonely) == 5
    assert activations.robust_range(np.zeros(4)) == 1


def test_a_reduced_map_keeps_the_sign_and_size_of_the_largest_value():
    values = np.zeros((7, 4096), np.float32)
    values[3, 1234], values[3, 1235] = 2, -9
    reduced, rows, columns = activations.reduce_signed(values, 7, 512)
    assert reduced.shape == (7, 512)
    assert reduced[3, 1234 * 512 // 4096] == -9
    assert np.count_nonzero(reduced) == 1
    assert (rows[-1], columns[-1]) == (7, 4096)


def test_the_top_dimension_is_the_one_with_the_outlier():
    values = np.random.default_rng(2).normal(size=(6, 50))
    values[4, 17] = -80
    assert activations.top_dimensions(values, 3)[0] == 17

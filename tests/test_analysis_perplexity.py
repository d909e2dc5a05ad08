"""Claims about perplexity and its intervals, against numbers worked out by hand and against what a 95 % interval promises."""

import math

import numpy as np
import pytest

from backend.analysis.perplexity import interval, perplexity, ratio_interval


def test_perplexity_is_what_a_uniform_guess_among_so_many_has():
    assert perplexity(math.log(4)) == pytest.approx(4)
    assert perplexity(0.0) == 1 and perplexity(1000.0) == math.inf and perplexity(math.inf) == math.inf and math.isnan(perplexity(math.nan))


def test_two_windows_give_the_three_means_that_can_be_drawn():
    # Means of two draws of {0, ln 4} are 0, ln 2, ln 4 with probability 1/4, 1/2, 1/4: the outer ones are more than 2.5 % each.
    assert interval(np.array([0.0, math.log(4)]), np.array([0, 1])) == pytest.approx((1, 4))


def test_a_window_weighs_as_much_as_it_has_tokens():
    # Drawn: both (3 x 1 + 5) / 4 = 2 nats, the long one twice 1, the short one twice 5.
    nll, window = np.array([1.0, 1.0, 1.0, 5.0]), np.array([7, 7, 7, 9])
    assert interval(nll, window) == pytest.approx((math.e, math.exp(5)))
    assert perplexity(float(nll.mean())) == pytest.approx(math.exp(2))


def test_a_ratio_is_paired_so_that_what_windows_differ_by_does_not_widen_it():
    reference = np.random.default_rng(0).normal(3, 2, 400)
    window = np.repeat(np.arange(20), 20)
    assert ratio_interval(reference, reference, window) == (1, 1)
    assert ratio_interval(reference + math.log(2), reference, window) == pytest.approx((2, 2))
    low, high = interval(reference, window)
    assert high / low > 1.2


def test_no_interval_where_nothing_can_be_said():
    one = np.zeros(3, np.int64)
    assert interval(np.ones(3), one) is None and ratio_interval(np.ones(3), np.ones(3), one) is None
    for broken in (np.nan, np.inf):
        assert interval(np.array([1.0, broken]), np.array([0, 1])) is None
        assert ratio_interval(np.array([1.0, broken]), np.array([1.0, broken]), np.array([0, 1])) is None


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(1)
    nll, window = rng.normal(2, 1, 200), np.repeat(np.arange(20), 10)
    assert interval(nll, window, seed=3) == interval(nll, window, seed=3) != interval(nll, window, seed=4)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    # Windows that differ (standard deviation 0.5 between them, 1 within): over 200 texts of 40 windows the mean loss of 2 nats is inside 95 % of the time.
    rng, window, inside = np.random.default_rng(2), np.repeat(np.arange(40), 10), 0
    for _ in range(200):
        nll = 2 + np.repeat(rng.normal(0, 0.5, 40), 10) + rng.normal(0, 1, 400)
        low, high = interval(nll, window, resamples=500) or (0, 0)
        inside += low <= math.exp(2) <= high
    assert 0.89 <= inside / 200 <= 0.99

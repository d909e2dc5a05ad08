"""The numbers of the token strip as the browser gets them."""

from __future__ import annotations

import json

import numpy as np
from dash._utils import to_json

from components.token_strip import _rounded


def test_a_surprise_without_bound_is_not_taken_for_one_that_nothing_predicts():
    sent = json.loads(to_json(_rounded(np.array([np.nan, np.inf, 1.23456], np.float32))))
    assert sent == [None, "Infinity", 1.235]

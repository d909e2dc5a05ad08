"""Over a batch: which groups a trace belongs to, and its numbers beside those of the group, against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from backend.aggregates import Row
from backend.analysis.aggregate import Moments
from components.figures.aggregate import Group, depth_bands, head_aggregate, with_trace
from components.over_batch import groups_of, trace_ids
from components.over_batch_views import predictions_table
from components.services import services
from tests.small_traces import write_trace
from tests.web_app import web_app


@pytest.fixture(scope="module")
def shelf() -> Iterator[dict[str, list[str]]]:
    """Traces on the app's shelf: name of a set -> ids, oldest first."""
    with web_app().server.test_request_context("/"):
        library = services().library

        def add(n: int, **about: Any) -> list[str]:
            paths = [write_trace(library.traces_dir, **about) for _ in range(n)]
            for path in paths:
                library.add(path)
            return [path.stem for path in paths]

        made = {
            "pair": add(2, category="over pair", name="over"),
            "three": add(3, category="over three", tags=("batch:0123456789abcdef",), name="over"),
            "stranger": add(1, category="over three", tags=("batch:0123456789abcdef",), name="over-other"),
        }
        yield made
        for trace_id in sum(made.values(), []):
            library.delete(trace_id)


def groups(trace_id: str) -> dict[str, str]:
    return groups_of(services().library.open(trace_id))


def test_a_group_needs_three_traces_of_the_same_model(shelf: dict[str, list[str]]):
    assert groups(shelf["pair"][0]) == {}
    assert groups(shelf["three"][1]) == {"batch:0123456789abcdef": "this batch, 3 traces", "category:over three": "category over three, 3 traces"}
    assert groups(shelf["stranger"][0]) == {}


def test_a_group_is_its_traces_oldest_first(shelf: dict[str, list[str]]):
    trace = services().library.open(shelf["three"][2])
    for group in groups_of(trace):
        assert trace_ids(trace, group) == shelf["three"]


def moments(*values: float) -> Moments:
    found = Moments(())
    for value in values:
        found.add(value)
    return found


def test_predictions_beside_the_group():
    row: Row = {name: np.asarray(value) for name, value in {"logprob": -1.0, "entropy": 2.0, "top1": math.nan}.items()}
    table = predictions_table(row, {"logprob": moments(-1.0, -3.0, -5.0), "entropy": moments(2.0, 2.0, 2.0), "top1": moments(math.nan)})
    said = [[cell.children for cell in line.children] for line in table.content.children[1].children]
    assert said == [
        ["Log-prob, nats", "-1.000", "-3.000 ± 2.000", "+1.00"],  # (-1 - -3) / 2
        ["Perplexity", "2.72", "20.09", ""],
        ["Entropy, nats", "2.000", "2.000 ± 0.000", "–"],  # a group without spread has no unit to be away in
        ["Most probable token right", "–", "– ± –", "–"],
        ["Prompts", "1", "3", ""],
    ]


def test_the_hover_of_a_difference_names_the_spread_of_the_group():
    values = np.array([[0.25, -0.5]])
    figure = head_aggregate(Group("this trace − mean", values, np.full((1, 2), 0.1), np.full((1, 2), 3)), "Induction", signed=True, spread_is="standard deviation of the group")
    assert figure.data[0].zmin == -0.5 and figure.data[0].zmax == 0.5
    assert figure.data[0].customdata[0][1] == "head 0.1<br>Induction -0.5000<br>standard deviation of the group 0.1000<br>3 prompts"


def test_the_trace_is_a_line_over_the_band_of_its_group():
    group = Group("mean of 3 traces", np.array([1.0, 2.0]), np.array([0.5, 0.25]), np.array([3, 3]))
    figure = with_trace(depth_bands([group], "L2 norm of resid_post"), np.array([1.25, 1.5]), "this trace")
    band, mean, mine = figure.data
    np.testing.assert_allclose(band.y, [1.5, 2.25, 1.75, 0.5])
    np.testing.assert_allclose(mean.y, [1.0, 2.0])
    np.testing.assert_allclose(mine.y, [1.25, 1.5])
    assert mine.name == "this trace" and list(mine.x) == [0, 1]

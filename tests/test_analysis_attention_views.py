"""Views of attention against hand-computed maps, plain torch and plain matrix products."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backend.analysis import attention_views as views
from backend.analysis.attention import duplicate_token_score, induction_score, previous_token_score
from backend.engines import OpenOptions, open_engine
from backend.experiments.capture import CaptureSpec, capture
from backend.trace import Trace
from backend.weights import open_weights
from tests.tiny_models import TinyModel

RNG = np.random.default_rng(7)


def causal(heads: int, n: int) -> np.ndarray:
    scores = np.where(np.tril(np.ones((n, n), bool)), RNG.normal(size=(heads, n, n)), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def test_without_the_first_token_by_hand():
    rows = np.array([[1, 0, 0], [0.5, 0.5, 0], [0.6, 0.1, 0.3]], np.float32)
    shown = views.without_first(rows)
    assert np.isnan(shown[:, 0]).all() and np.isnan(shown[0]).all(), "row 0 has nothing but the first token"
    np.testing.assert_allclose(shown[1:, 1:], [[1, 0], [0.25, 0.75]], rtol=1e-6)


def test_without_the_first_token_every_other_row_is_the_softmax_of_the_remaining_scores():
    scores = torch.randn(6, 6, dtype=torch.float64).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    rest = scores.clone()
    rest[:, 0] = float("-inf")
    np.testing.assert_allclose(views.without_first(scores.softmax(-1).numpy())[1:, 1:], rest.softmax(-1)[1:, 1:].numpy(), rtol=1e-5)


def test_a_row_that_looks_at_the_first_token_alone_is_blank_and_not_divided_by_zero():
    assert np.isnan(views.without_first(np.array([[1.0, 0.0]]))).all()


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_value_norms_are_those_of_the_vectors_that_each_head_writes(n_kv_heads: int):
    n_heads, d_head, d_model, n = 4, 3, 10, 5
    v, w_o = RNG.normal(size=(n, n_kv_heads, d_head)), RNG.normal(size=(d_model, n_heads * d_head))
    found = views.value_norms(v, views.output_gram([w_o[:4], w_o[4:]], n_heads))
    for head in range(n_heads):
        of_head = torch.from_numpy(w_o[:, head * d_head : (head + 1) * d_head])
        written = torch.from_numpy(v[:, head // (n_heads // n_kv_heads)]) @ of_head.T
        np.testing.assert_allclose(found[head], written.norm(dim=-1).numpy(), rtol=1e-5)


def test_value_weighted_rows_add_up_to_at_least_the_length_of_what_the_head_writes():
    """The triangle inequality, with equality where a row looks at one token."""
    pattern, v, w_o = causal(1, 6)[0], RNG.normal(size=(6, 1, 3)), RNG.normal(size=(8, 3))
    pattern[3] = np.eye(6)[2]
    weighted = views.value_weighted(pattern, views.value_norms(v, views.output_gram([w_o], 1))[0])
    written = np.linalg.norm(pattern @ v[:, 0] @ w_o.T, axis=-1)
    assert (weighted.sum(-1) >= written * (1 - 1e-5)).all()
    assert weighted[3].sum() == pytest.approx(written[3], rel=1e-5)
    np.testing.assert_allclose(views.value_weighted(pattern[:, 2:5], np.arange(6.0), 2), pattern[:, 2:5] * [2, 3, 4], rtol=1e-6)


def test_rollout_over_three_layers_is_the_product_of_the_mixed_maps():
    means = causal(3, 9)
    expected = np.eye(9)
    for mean in means.astype(np.float64):
        expected = (0.5 * mean + 0.5 * np.eye(9)) @ expected
    rolled = np.eye(9, dtype=np.float32)
    for mean in means:  # in place, strips of 4 rows from the last ones up
        for start in (8, 4, 0):
            stop = min(start + 4, 9)
            rolled[start:stop, :stop] = views.rollout_rows(mean[start:stop, :stop], rolled[:stop, :stop], start)
    np.testing.assert_allclose(rolled, expected, atol=1e-6)
    np.testing.assert_allclose(rolled.sum(-1), 1, atol=1e-5)


def test_rollout_makes_rows_with_an_attention_sink_sum_to_one():
    mean = np.array([[0.2, 0.0], [0.1, 0.2]], np.float32)  # the rest went to a learned sink
    rolled = views.rollout_rows(mean, np.eye(2, dtype=np.float32), 0)
    np.testing.assert_allclose(rolled, [[1, 0], [0.05 / 0.65, 0.6 / 0.65]], rtol=1e-6)


def test_cells_below_a_threshold_are_counted_on_and_under_the_diagonal_only():
    rows = np.array([[0.005, 0.995, 0], [0.0, 0.5, 0.5]], np.float32)  # rows 1 and 2 of a prompt
    assert views.causal_cells(2, 1) == 5 and views.causal_cells(3) == 6
    assert views.count_below(rows, 1, (0.6, 0.01, 0.001)).tolist() == [4, 2, 1]
    pieces = causal(1, 40)[0]
    whole = views.count_below(pieces, 0)
    split = views.count_below(pieces[:25, :25], 0) + views.count_below(pieces[25:], 25)
    np.testing.assert_array_equal(whole, split)
    lower = pieces[np.tril_indices(40)]
    np.testing.assert_array_equal(whole, [(lower < t).sum() for t in views.THRESHOLDS])


def test_the_strongest_places_leave_out_what_is_nothing():
    assert views.strongest(np.array([0.1, np.nan, 0.5, 0.0]), 4).tolist() == [2, 0]


@pytest.mark.parametrize(("repeats", "bos"), [(2, 1), (3, 1), (2, 0)])
def test_scores_on_repeated_tokens_are_those_of_the_general_definitions(repeats: int, bos: int):
    block = list(range(10, 17))
    ids = [1] * bos + block * repeats
    pattern = causal(3, len(ids))
    found = views.repeat_scores(pattern, 7)
    np.testing.assert_allclose(found["duplicate"], duplicate_token_score(pattern, ids), rtol=1e-5)
    np.testing.assert_allclose(found["induction"], induction_score(pattern, ids), rtol=1e-5)
    np.testing.assert_allclose(found["previous"], previous_token_score(pattern), rtol=1e-5)


def test_with_two_blocks_the_scores_are_the_diagonals_of_transformer_lens():
    pattern = causal(2, 15)  # BOS and 7 tokens twice
    found = views.repeat_scores(pattern, 7)
    tensor = torch.from_numpy(pattern)
    np.testing.assert_allclose(found["induction"], tensor.diagonal(offset=1 - 7, dim1=-2, dim2=-1)[:, 2:].mean(-1), rtol=1e-5)
    np.testing.assert_allclose(found["duplicate"], tensor.diagonal(offset=-7, dim1=-2, dim2=-1)[:, 1:].mean(-1), rtol=1e-5)


@pytest.mark.parametrize("engine", ["hf", "gguf"])
def test_value_norms_of_a_model_are_the_lengths_of_its_heads_outputs(engine: str, tiny_mistral: TinyModel, tmp_path: Path):
    """The first token can only look at itself, so what a head writes there is its value through W_O; and no row writes more than its norms allow."""
    path = tiny_mistral.hf if engine == "hf" else tiny_mistral.gguf
    opened = open_engine(path, OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32"))
    file = capture(opened, CaptureSpec("Mary gave the book to John", sites=("v", "z", "attn_pattern"), precision="float32", lens=False), tmp_path)
    opened.close()
    with Trace(file) as trace:
        w_o = open_weights(path).lazy("blocks.1.attn.W_O")
        norms = views.value_norms(trace["v", 1], views.output_gram((w_o[first : first + 7] for first in range(0, w_o.shape[0], 7)), trace.info.n_heads))
        lengths = np.linalg.norm(trace["result", 1], axis=-1).T  # (head, pos)
        np.testing.assert_allclose(norms[:, 0], lengths[:, 0], rtol=1e-4)
        most = np.stack([views.value_weighted(trace.head("attn_pattern", 1, head), norms[head]).sum(-1) for head in range(trace.info.n_heads)])
        assert (lengths <= most * (1 + 1e-3)).all()

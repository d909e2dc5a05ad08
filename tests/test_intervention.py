"""Edits mean one thing, wherever they are applied."""

import numpy as np
import pytest

from backend.errors import LayerscopeError
from backend.intervention import Intervention, apply, edits_by_place
from backend.model_info import ModelInfo

INFO = ModelInfo("tiny", "tiny", "hf", "llama", n_layers=2, n_heads=4, n_kv_heads=2, d_model=8, d_head=2, d_mlp=6, d_vocab=11, n_ctx=64)
Z = np.arange(5 * 4 * 2, dtype=np.float32).reshape(5, 4, 2) + 1  # (pos, head, d_head)


def test_zero_touches_only_the_chosen_head_and_positions():
    out = apply(Intervention("z", 1, "zero", head=2, pos=(0, -1)), Z)
    assert np.all(out[[0, 4], 2] == 0)
    out[[0, 4], 2] = Z[[0, 4], 2]
    np.testing.assert_array_equal(out, Z)


def test_mean_replaces_by_the_mean_over_positions_of_each_head():
    out = apply(Intervention("z", 0, "mean", head=1), Z)
    np.testing.assert_allclose(out[:, 1], np.broadcast_to(Z[:, 1].mean(0), (5, 2)))
    np.testing.assert_array_equal(out[:, 0], Z[:, 0])


def test_set_add_and_scale_by_hand():
    vector = np.array([10.0, 20.0], np.float32)
    np.testing.assert_array_equal(apply(Intervention("z", 0, "set", vector, head=0), Z)[:, 0], np.tile(vector, (5, 1)))
    np.testing.assert_array_equal(apply(Intervention("z", 0, "add", vector, head=0), Z)[:, 0], Z[:, 0] + vector)
    np.testing.assert_array_equal(apply(Intervention("z", 0, "scale", 3.0, dim=1), Z)[..., 1], Z[..., 1] * 3)
    np.testing.assert_array_equal(apply(Intervention("resid_post", 0, "scale", 1.0), Z[:, 0]), Z[:, 0])


def test_noise_repeats_with_its_seed_and_has_its_size():
    zeros = np.zeros((2000, 8), np.float32)
    a = apply(Intervention("resid_post", 0, "noise", 0.5, seed=3), zeros)
    np.testing.assert_array_equal(a, apply(Intervention("resid_post", 0, "noise", 0.5, seed=3), zeros))
    assert abs(a.std() - 0.5) < 0.02
    assert not np.array_equal(a, apply(Intervention("resid_post", 0, "noise", 0.5, seed=4), zeros))


def test_noise_does_not_depend_on_how_the_prompt_is_cut():
    edit = Intervention("resid_post", 0, "noise", 1.0, seed=5)
    whole = apply(edit, np.zeros((6, 8), np.float32))
    pieces = [apply(edit, np.zeros((2, 8), np.float32), start, 6) for start in (0, 2, 4)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert not np.array_equal(whole[0], whole[1])


def test_negative_positions_stay_with_the_prompt_when_tokens_are_generated():
    edit = Intervention("resid_post", 0, "zero", pos=(-1, 2)).from_prompt_end(4)
    assert edit.pos == (3, 2)
    assert not apply(edit, np.ones((6, 8), np.float32), n_tokens=6)[3].any()


def test_attention_maps_are_edited_along_query_positions():
    pattern = np.ones((4, 3, 5), np.float32)  # queries 2, 3, 4 of a prompt of 5
    out = apply(Intervention("attn_pattern", 0, "zero", head=3, pos=4), pattern, start=2, n_tokens=5)
    assert np.all(out[3, 2] == 0) and out.sum() == pattern.sum() - 5


def test_a_position_in_another_piece_of_the_prompt_is_left_to_that_piece():
    edit = Intervention("resid_post", 0, "zero", pos=-1)
    piece = np.ones((2, 8), np.float32)
    np.testing.assert_array_equal(apply(edit, piece, start=0, n_tokens=4), piece)
    assert np.all(apply(edit, piece, start=2, n_tokens=4)[1] == 0)
    with pytest.raises(LayerscopeError, match="whole prompt in one pass"):
        apply(Intervention("resid_post", 0, "mean"), piece, start=0, n_tokens=4)


def test_editing_resid_pre_is_editing_what_the_block_receives():
    places = edits_by_place([Intervention("resid_pre", 2, "zero"), Intervention("resid_pre", 0, "zero"), Intervention("blocks.1.attn.hook_z", None, "zero")])
    assert set(places) == {("resid_post", 1), ("embed", None), ("z", 1)}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(site="z", layer=0, op="drop"), "edits are zero, mean"),
        (dict(site="z", layer=0, op="add"), "needs a value"),
        (dict(site="z", layer=None, op="zero"), "name the layer"),
        (dict(site="expert_indices", layer=0, op="zero"), "cannot be edited"),
        (dict(site="nonsense", layer=0, op="zero"), "no site 'nonsense'"),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused(kwargs, message):
    with pytest.raises(LayerscopeError, match=message):
        Intervention(**kwargs)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Intervention("z", 2, "zero"), "Layer 2 of an edit is outside 0-1"),
        (Intervention("z", 0, "zero", head=4), "Head 4 of an edit is outside 0-3"),
        (Intervention("k", 0, "zero", head=2), "Head 2 of an edit is outside 0-1"),
        (Intervention("z", 0, "zero", pos=7), "Position 7 of an edit is outside 0-6"),
        (Intervention("resid_post", 0, "zero", dim=8), "Dimension 8 of an edit is outside 0-7"),
        (Intervention("resid_post", 0, "zero", head=0), "has no heads"),
    ],
)
def test_an_edit_outside_the_model_names_the_value_and_the_limit(edit, message):
    with pytest.raises(LayerscopeError, match=message):
        edit.check(INFO, 7)


def test_a_value_of_the_wrong_shape_is_refused():
    with pytest.raises(LayerscopeError, match=r"shape \(3,\), which does not fit \(5, 1, 2\)"):
        apply(Intervention("z", 0, "set", np.zeros(3), head=0), Z)

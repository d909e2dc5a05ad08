"""Maps without the half that the mask hides: nothing is lost, and what cannot be packed without loss is not."""

import h5py
import numpy as np
import pytest
from test_trace_format import INFO, N, array, write

from backend.engines import Piece
from backend.trace import Trace
from backend.tracefile import trace_layout, trace_writer
from backend.tracefile.packed_maps import n_cells, pack, unpack
from backend.tracefile.trace_layout import PACKED, site_path

LATER = np.triu(np.ones((N, N), bool), 1)


def causal(site: str) -> np.ndarray:
    return np.where(LATER, -np.inf if site == "attn_scores" else 0.0, array(site)).astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("fill", [0.0, -np.inf])
def test_what_is_packed_comes_back_as_it_was(n, fill):
    maps = np.where(np.triu(np.ones((n, n), bool), 1), fill, np.random.default_rng(n).normal(size=(3, n, n))).astype(np.float32)
    cells = pack(maps, fill)
    assert cells is not None and cells.shape == (3, n_cells(n))
    np.testing.assert_array_equal(unpack(cells, n, fill), maps)
    np.testing.assert_array_equal(unpack(cells[1], n, fill), maps[1])


def test_the_rows_of_a_packed_map_lie_one_after_the_other():
    np.testing.assert_array_equal(pack(np.array([[[1, 0, 0], [2, 3, 0], [4, 5, 6]]], np.float32), 0.0), [[1, 2, 3, 4, 5, 6]])


def test_maps_that_lie_with_gaps_in_memory_are_packed_where_they_lie():
    """llama.cpp pads the keys; a view of some heads skips the others."""
    padded = np.random.default_rng(0).normal(size=(6, 5, 8)).astype(np.float32)
    maps = np.tril(padded[:, :, :5])
    for view in (padded[:, :, :5], padded[1::2, :, :5], padded[:, :, 3:]):
        np.testing.assert_array_equal(unpack(pack(view, 0.0, causal=True), 5, 0.0), np.tril(view))
    np.testing.assert_array_equal(pack(maps.astype(np.float64), 0.0), pack(maps, 0.0))


@pytest.mark.parametrize("later", [1e-30, np.nan, -np.inf])
def test_a_map_that_looks_ahead_is_not_packed(later):
    maps = np.zeros((2, 3, 3), np.float32)
    maps[1, 0, 2] = later
    assert pack(maps, 0.0) is None


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("site", ["attn_pattern", "attn_scores"])
def test_a_causal_map_is_stored_packed_and_read_whole(tmp_path, site, precision):
    values = causal(site)
    path = write(tmp_path, [Piece(site, 0, 0, values, "kq-0")], precision)
    with h5py.File(path) as file:
        dataset = file[site_path(site, 0)]
        assert dataset.attrs[PACKED] and dataset.shape == (INFO.n_heads, n_cells(N)) and list(dataset.attrs["dims"]) == [b"head", b"cell"]
    with Trace(path) as trace:
        np.testing.assert_allclose(trace[site, 0], values, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(trace.head(site, 0, 1, slice(2, 4), slice(1, 5)), trace[site, 0][1, 2:4, 1:5])
        assert trace.source(site, 0) == "kq-0"


def test_a_map_with_attention_to_later_tokens_is_stored_as_it_is(tmp_path):
    values = array("attn_pattern")
    with Trace(write(tmp_path, [Piece("attn_pattern", 0, 0, values, "")])) as trace:
        np.testing.assert_array_equal(trace["attn_pattern", 0], values)


def test_single_heads_are_packed_each_on_its_own_and_the_others_are_not_there(tmp_path):
    values = causal("attn_pattern")[[0, 3]]
    with Trace(write(tmp_path, [Piece("attn_pattern", 1, 0, values, "", heads=(0, 3))])) as trace:
        assert trace.kept("attn_pattern", 1) == ([0, 3], (0, N))
        np.testing.assert_array_equal(trace.head("attn_pattern", 1, 3), values[1])
        assert np.isnan(trace["attn_pattern", 1][[1, 2]]).all()


def test_a_trace_of_version_1_whose_maps_are_whole_is_still_read(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_writer, "VERSION", 1)
    monkeypatch.setattr(trace_writer, "PACKED_TOKENS", 0)
    values = causal("attn_pattern")
    path = write(tmp_path, [Piece("attn_pattern", 0, 0, values, "")])
    with h5py.File(path, "r+") as file:
        assert file[site_path("attn_pattern", 0)].shape == (INFO.n_heads, N, N) and PACKED not in file[site_path("attn_pattern", 0)].attrs
        del file[site_path("attn_pattern", 0)].attrs["source"]
        file[site_path("attn_pattern", 0)].attrs["source"] = "kq-0"  # text of any length, as it was
    with Trace(path) as trace:
        np.testing.assert_array_equal(trace["attn_pattern", 0], values)
        assert trace.source("attn_pattern", 0) == "kq-0"


def test_a_trace_of_a_later_version_is_refused_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_writer, "VERSION", trace_layout.VERSION + 1)
    path = write(tmp_path, [Piece("resid_post", 0, 0, array("resid_post"), "")])
    with pytest.raises(Exception, match=f"has trace format {trace_layout.VERSION + 1}; this Layerscope reads up to {trace_layout.VERSION}"):
        Trace(path)

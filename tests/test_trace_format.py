"""The trace file: what is written is what is read, and FORMAT.md says the truth about it."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from backend.engines import Piece
from backend.errors import LayerscopeError, SiteNotCaptured
from backend.model_info import ModelInfo
from backend.sites import SITES, resolve_site, resolve_sites
from backend.trace import Trace
from backend.tracefile.trace_layout import site_path
from backend.tracefile.trace_writer import TraceWriter

INFO = ModelInfo("tiny", "tiny.gguf", "gguf", "llama", n_layers=2, n_heads=4, n_kv_heads=2, d_model=8, d_head=2, d_mlp=6, d_vocab=11, n_ctx=64)
RNG = np.random.default_rng(0)
N = 5


def array(site: str, n: int = N, start: int = 0) -> np.ndarray:
    sizes = {**INFO.dims, "pos": n, "q_pos": n, "k_pos": start + n}
    return RNG.standard_normal([sizes[d] for d in SITES[site].dims]).astype(np.float32)


def write(folder: Path, pieces: list[Piece], precision: str = "float32", texts: list[str] | None = None, **meta: object) -> Path:
    with TraceWriter(folder, INFO, N, precision) as writer:
        for piece in pieces:
            writer.write(piece)
        writer.tokens(list(range(N)), texts or [f"t{i}" for i in range(N)], n_prompt=3, special=[0])
        writer.vocabulary({i: f"v{i}" for i in range(N)})
        writer.logits({"top_ids": np.zeros((N, 2), np.int32), "top_logprobs": np.zeros((N, 2), np.float32)})
        return writer.publish(engine_version="test", prompt="p", response="r", **meta)


def test_every_site_is_read_back_bit_equal_in_float32(tmp_path):
    sites = [s for s in SITES if not SITES[s].derived and not SITES[s].moe]
    values = {(site, layer): array(site) for site in sites for layer in ((0, 1) if SITES[site].per_layer else (None,))}
    path = write(tmp_path, [Piece(site, layer, 0, v, f"native.{site}") for (site, layer), v in values.items()])
    with Trace(path) as trace:
        for (site, layer), expected in values.items():
            np.testing.assert_array_equal(trace[site if layer is None else (site, layer)], expected)
            assert trace.source(site, layer) == f"native.{site}"
        np.testing.assert_array_equal(trace.head("attn_pattern", 1, 2), values["attn_pattern", 1][2])
        np.testing.assert_array_equal(trace["blocks.1.attn.hook_pattern"], trace["kq_soft_max-1"])


def test_pieces_of_a_long_prompt_join_and_keys_after_the_query_are_empty(tmp_path):
    first, second = array("attn_pattern", 2), array("attn_pattern", 3, start=2)
    scores = array("attn_scores", 2)
    path = write(tmp_path, [Piece("attn_pattern", 0, 0, first, ""), Piece("attn_pattern", 0, 2, second, ""), Piece("attn_scores", 0, 0, scores, "")])
    with Trace(path) as trace:
        whole = trace["attn_pattern", 0]
        np.testing.assert_array_equal(whole[:, :2, :2], first)
        np.testing.assert_array_equal(whole[:, 2:], second)
        assert np.all(whole[:, :2, 2:] == 0)
        assert np.all(np.isneginf(trace["attn_scores", 0][:, :, 2:]))


def test_float16_is_widened_when_a_later_piece_overflows_it(tmp_path):
    small, large = array("resid_post", 2), array("resid_post", 3)
    large[0, 0] = 70_000.0
    path = write(tmp_path, [Piece("resid_post", 0, 0, small, ""), Piece("resid_post", 0, 2, large, ""), Piece("resid_post", 1, 0, array("resid_post"), "")], precision="float16")
    with Trace(path) as trace:
        assert trace["resid_post", 0][2, 0] == 70_000.0
        np.testing.assert_allclose(trace["resid_post", 0][:2], small, rtol=1e-3, atol=1e-4)
    with h5py.File(path) as file:
        assert file[site_path("resid_post", 0)].dtype == np.float32
        assert file[site_path("resid_post", 1)].dtype == np.float16


def test_infinite_and_nan_values_survive_half_precision(tmp_path):
    values = array("resid_post")
    values[0, 0], values[1, 1], values[2, 2] = np.nan, np.inf, -np.inf
    with Trace(write(tmp_path, [Piece("resid_post", 0, 0, values, "")], precision="float16")) as trace:
        got = trace["resid_post", 0]
        assert np.isnan(got[0, 0]) and got[1, 1] == np.inf and got[2, 2] == -np.inf


def test_derived_sites_follow_the_identities_of_the_block(tmp_path):
    embed, post0, mid1, post1 = (array("embed") for _ in range(4))
    pieces = [Piece("embed", None, 0, embed, ""), Piece("resid_post", 0, 0, post0, ""), Piece("resid_mid", 1, 0, mid1, ""), Piece("resid_post", 1, 0, post1, "")]
    with Trace(write(tmp_path, pieces)) as trace:
        np.testing.assert_array_equal(trace["resid_pre", 0], embed)
        np.testing.assert_array_equal(trace["resid_pre", 1], post0)
        np.testing.assert_array_equal(trace["attn_out", 1], mid1 - post0)
        np.testing.assert_array_equal(trace["mlp_out", 1], post1 - mid1)
        assert trace.layers("attn_out") == [1] and trace.layers("resid_pre") == [0, 1]
        with pytest.raises(SiteNotCaptured, match="'mlp_post'"):
            trace["mlp_post", 0]
        with pytest.raises(SiteNotCaptured):
            trace["attn_out", 0]


def test_token_texts_may_hold_any_character(tmp_path):
    texts = ["<s>", "\x00", "\n", "‮", "<0xE2>"]
    with Trace(write(tmp_path, [], texts=texts)) as trace:
        assert trace.token_texts == texts and trace.n_prompt == 3 and trace.special == {0}
        assert trace.token_text(4) == "v4" and trace.token_text(9) == "‹id 9›"


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece("resid_post", 0, 0, np.zeros((N, 9), np.float32), ""), "d_model=8"),
        (Piece("attn_pattern", 0, 0, np.zeros((4, N, N - 1), np.float32), ""), "k_pos=5"),
        (Piece("z", 0, 0, np.zeros((N, 2, 4), np.float32), ""), "head=4, d_head_v=2"),
        (Piece("resid_post", 0, 3, np.zeros((N, 8), np.float32), ""), "expected"),
        (Piece("resid_post", None, 0, np.zeros((N, 8), np.float32), ""), "needs layer"),
    ],
)
def test_an_array_that_contradicts_the_vocabulary_is_refused(tmp_path, piece, message):
    with TraceWriter(tmp_path, INFO, N) as writer, pytest.raises(LayerscopeError, match=message):
        writer.write(piece)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_visible_before_publishing_and_nothing_is_left_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError), TraceWriter(tmp_path, INFO, N) as writer:
        writer.write(Piece("resid_post", 0, 0, array("resid_post"), ""))
        assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_in_a_stored_array_is_noticed(tmp_path):
    path = write(tmp_path, [Piece("resid_post", 0, 0, array("resid_post"), "")])
    with h5py.File(path) as file:
        offset = file[site_path("resid_post", 0)].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[offset + 12] ^= 1
    path.write_bytes(data)
    with Trace(path) as trace, pytest.raises(OSError):
        trace["resid_post", 0]


def test_what_is_no_trace_is_refused_in_one_sentence(tmp_path):
    text = tmp_path / "a.h5"
    text.write_text("hello")
    with pytest.raises(LayerscopeError, match="a.h5 is not a readable HDF5 file"):
        Trace(text)
    other = tmp_path / "b.h5"
    with h5py.File(other, "w") as file:
        file["x"] = 1
    with pytest.raises(LayerscopeError, match="not a finished Layerscope trace"):
        Trace(other)
    with pytest.raises(LayerscopeError, match="There is no trace at"):
        Trace(tmp_path / "c.h5")


def test_the_format_page_lists_exactly_the_sites_of_the_vocabulary():
    page = (Path(__file__).parent.parent / "backend" / "FORMAT.md").read_text()
    for site in SITES.values():
        derived = " *derived*" if site.derived else ""
        assert f"| `{site.name}`{derived} | {', '.join(site.dims)} | {site.doc} |" in page, site.name
    table = page.split("| site | dims |")[1].split("\n\n")[0]
    assert table.count("\n| `") == len(SITES)


def test_names_of_sites_accept_the_aliases_of_the_field():
    assert resolve_site("blocks.3.attn.hook_pattern") == ("attn_pattern", 3)
    assert resolve_site("blocks.0.hook_resid_pre") == ("resid_pre", 0)
    assert resolve_site("kq_soft_max-3") == ("attn_pattern", 3)
    assert resolve_site("l_out-11") == ("resid_post", 11)
    assert resolve_site("hook_embed") == ("embed", None)
    assert resolve_sites(["resid_post", "z", "l_out-1"]) == ("z", "resid_post")
    with pytest.raises(LayerscopeError, match="Did you mean attn_pattern"):
        resolve_site("attn_patern")


def test_a_flipped_bit_anywhere_in_a_stored_chunk_is_an_error_and_never_another_value(tmp_path):
    values = array("resid_post")
    path = write(tmp_path, [Piece("resid_post", 0, 0, values, "")])
    with h5py.File(path) as file:
        chunks: list[tuple[int, int]] = []
        file[site_path("resid_post", 0)].id.chunk_iter(lambda chunk: chunks.append((chunk.byte_offset, chunk.size)))
    (offset, n_bytes), original = chunks[0], path.read_bytes()
    unnoticed = []
    for at in range(offset, offset + n_bytes):
        for bit in range(8):
            path.write_bytes(original[:at] + bytes([original[at] ^ 1 << bit]) + original[at + 1 :])
            try:
                with Trace(path) as trace:
                    np.testing.assert_array_equal(trace["resid_post", 0], values)
                unnoticed.append((at - offset, bit))
            except OSError:
                continue
    assert unnoticed == [(4, 4)]  # the bit of a Zstandard frame's header that means nothing (RFC 8878, 3.1.1.1.1.3)


def test_a_chunk_that_the_disk_changed_is_noticed_before_the_trace_is_published(tmp_path, monkeypatch):
    from backend.tracefile import trace_writer

    real = trace_writer.verify

    def spoil_then_verify(path: Path, written, others) -> None:
        with h5py.File(path, locking=False) as file:
            chunks: list[int] = []
            file[site_path("resid_post", 1)].id.chunk_iter(lambda chunk: chunks.append(chunk.byte_offset))
        data = bytearray(path.read_bytes())
        data[chunks[0] + 20] ^= 1
        path.write_bytes(data)
        real(path, written, others)

    monkeypatch.setattr(trace_writer, "verify", spoil_then_verify)
    with pytest.raises(LayerscopeError, match="does not read as it was written"):
        write(tmp_path, [Piece("resid_post", 1, 0, array("resid_post"), "")])
    assert list(tmp_path.iterdir()) == []


def test_chunks_encoded_here_are_what_hdf5s_own_filters_would_make_readable(tmp_path):
    """Every dtype that is stored, odd sizes, and pieces that end inside a chunk: read by plain h5py with the registered filters."""
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 4, (N, 2)).astype(np.int32)
    moe = ModelInfo("moe", "", "gguf", "llama", 1, 4, 2, 8, 2, 6, 11, 64, n_experts=4, n_experts_used=2)
    stream = rng.standard_normal((N, 8)).astype(np.float32)
    with TraceWriter(tmp_path, moe, N, "float16") as writer:
        writer.write(Piece("expert_indices", 0, 0, ids, ""))
        writer.write(Piece("resid_post", 0, 0, stream[:2], ""))
        writer.write(Piece("resid_post", 0, 2, stream[2:], ""))
        writer.tokens(list(range(N)), ["t"] * N, N, [])
        path = writer.publish(engine_version="test")
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file[site_path("expert_indices", 0)][...], ids)
        np.testing.assert_array_equal(file[site_path("resid_post", 0)][...], stream.astype(np.float16))

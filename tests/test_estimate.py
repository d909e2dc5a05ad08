"""The estimate, held against numbers worked out by hand and against a trace that was really written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from backend.engines import Piece
from backend.errors import LayerscopeError
from backend.estimate import (
    ENGINE_BYTES,
    activation_bytes,
    available_memory,
    check_model_fits,
    estimate,
    in_bytes,
    kv_bytes,
    model_bytes,
    rough_tokens,
    trace_bytes,
)
from backend.model_info import ModelInfo
from backend.tracefile.trace_writer import TraceWriter

# A model of round numbers: 4 layers, 8 heads of 32, 4 kv heads, width 256, hidden 768, 1000 tokens; 5 M parameters in 10 MB.
DENSE = ModelInfo(name="round", source="", engine="gguf", architecture="llama", n_layers=4, n_heads=8, n_kv_heads=4, d_model=256, d_head=32, d_mlp=768,
                  d_vocab=1000, n_ctx=2048, n_params=5_000_000, n_bytes=10_000_000)  # fmt: skip
AS_HF = ModelInfo.from_json({**DENSE.to_json(), "engine": "hf"})
MOE = ModelInfo.from_json({**DENSE.to_json(), "n_experts": 8, "n_experts_used": 2})


def test_gguf_weights_stay_as_they_are_and_pytorch_takes_four_bytes_a_parameter():
    assert model_bytes(DENSE) == 10_000_000
    assert model_bytes(AS_HF) == 20_000_000


def test_the_key_value_cache_by_hand():
    # keys and values * 4 layers * 4 kv heads * 32 * 256 positions (100 rounded up) * 2 bytes
    assert kv_bytes(DENSE, 100) == 2 * 4 * 4 * 32 * 256 * 2 == 524_288
    assert kv_bytes(DENSE, 257, "f32") == 2 * 4 * 4 * 32 * 512 * 4


def test_a_site_costs_its_cells_in_each_layer_captured():
    def cost(site: str, **more: object) -> int:
        return trace_bytes(DENSE, 10, [site], **more) - trace_bytes(DENSE, 10, [])  # type: ignore[arg-type]

    assert cost("resid_post") == 4 * 10 * 256 * 2
    assert cost("resid_post", precision="float32") == 4 * 10 * 256 * 4
    assert cost("resid_post", layers=[1, 1, 3]) == 2 * 10 * 256 * 2
    assert cost("k") == 4 * 10 * 4 * 32 * 2
    assert cost("embed") == cost("embed", layers=[0]) == 10 * 256 * 2
    assert cost("logits") == 10 * 1000 * 2
    # 8 heads of 10 x 10, half of them above the diagonal, and a thumbnail of 10 x 10 bytes of each head
    assert cost("attn_pattern") == 4 * (8 * 10 * 10 * 2 // 2 + 8 * 10 * 10)
    assert cost("resid_pre") == cost("router_logits") == 0, "derived, and not in a dense model"


def test_experts_are_counted_where_there_are_any():
    base = trace_bytes(MOE, 10, [])
    assert trace_bytes(MOE, 10, ["expert_indices"]) - base == 4 * 10 * 2 * 4
    assert trace_bytes(MOE, 10, ["router_probs"]) - base == 4 * 10 * 8 * 2
    assert trace_bytes(MOE, 10, ["mlp_post"]) == base


def test_memory_does_not_grow_with_the_layers_captured():
    some, all_of_them = (estimate(DENSE, 100, ["resid_post"], layers, available_bytes=1 << 40) for layers in ([0], None))
    assert some.peak_memory_bytes == all_of_them.peak_memory_bytes and some.trace_bytes < all_of_them.trace_bytes


def test_the_parts_add_up_and_decide():
    need = ENGINE_BYTES["gguf"] + 10_000_000 + kv_bytes(DENSE, 20) + activation_bytes(DENSE, 20, ["z"])
    fits, tight = (estimate(DENSE, 20, ["z"], available_bytes=free) for free in (need, need - 1))
    assert fits.fits and fits.peak_memory_bytes == need
    assert not tight.fits and re.fullmatch(r"This needs about 27\d\.\d MB of memory, and 27\d\.\d MB are free\.", tight.sentence)


def test_time_is_the_median_of_earlier_runs_by_token():
    assert estimate(DENSE, 10).seconds is None
    found = estimate(DENSE, 10, past=[(10, 20.0), (100, 100.0), (5, 500.0), (0, 1.0)], available_bytes=1 << 40)
    assert found.seconds == pytest.approx(20.0)  # rates 2, 1 and 100 s a token
    assert found.sentence.startswith("About 20 s, ")


def test_tokens_of_a_text_without_a_tokenizer():
    assert rough_tokens("") == 0
    assert rough_tokens("x" * 35) == 11
    assert rough_tokens("é" * 35) == 21, "bytes count, not characters"


def test_a_model_that_does_not_fit_is_refused_with_both_numbers():
    huge = ModelInfo.from_json({**DENSE.to_json(), "name": "huge", "n_bytes": 31_000_000_000})
    with pytest.raises(LayerscopeError, match=r"^huge needs about 31\.3 GB of memory, and 22\.1 GB are free\.$"):
        check_model_fits(huge, available_bytes=22_100_000_000)
    check_model_fits(huge, device="cuda", available_bytes=0)
    check_model_fits(DENSE, available_bytes=1 << 30)


def test_free_memory_is_less_than_the_machine_has():
    total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) << 10  # type: ignore[index]
    assert 0 < available_memory() < total


def test_sizes_are_written_as_people_read_them():
    assert [in_bytes(n) for n in (0, 999, 1000, 4_249_000, 31_000_000_000)] == ["0 bytes", "999 bytes", "1.0 kB", "4.2 MB", "31.0 GB"]


def test_a_real_trace_of_incompressible_values_is_not_larger_than_estimated(tmp_path: Path):
    rng = np.random.default_rng(0)
    with TraceWriter(tmp_path, DENSE, 64) as writer:
        for layer in range(4):
            writer.write(Piece("z", layer, 0, rng.normal(size=(64, 8, 32)).astype(np.float32), "test"))
            writer.write(Piece("attn_pattern", layer, 0, np.tril(rng.uniform(size=(8, 64, 64))).astype(np.float32), "test"))
        path = writer.publish(engine_version="test")
    size, guess = path.stat().st_size, trace_bytes(DENSE, 64, ["z", "attn_pattern"])
    assert size <= guess <= 3 * size

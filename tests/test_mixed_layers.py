"""A model whose first layer has one MLP and whose others have experts: every site in the layers that have it, in both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from backend.engines import Engine, OpenOptions, Request, no_sink, open_engine
from backend.errors import LayerscopeError
from backend.estimate import kv_bytes, trace_bytes
from backend.experiments.capture import CaptureSpec, capture
from backend.files.gguf_header import model_info, read_header
from backend.intervention import Intervention
from backend.trace import open_trace
from tests.tiny_models import TinyModel

IDS = (0, 290, 284, 280, 306, 275, 31)
MLP, ROUTER = {"mlp_pre", "mlp_pre_linear", "mlp_post"}, {"router_logits", "router_probs", "expert_indices", "expert_weights"}


@pytest.fixture(scope="module", params=["hf", "gguf"])
def engine(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> Iterator[Engine]:
    engine = open_engine(getattr(tiny_model("deepseek_v3"), request.param), OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32"))
    yield engine
    engine.close()


def test_the_dense_layer_has_the_mlps_sites_and_the_others_the_routers(engine: Engine) -> None:
    by_layer = [{site for site, at in engine.places if at == layer} for layer in range(3)]
    assert by_layer[0] & (MLP | ROUTER) == MLP
    assert by_layer[1] & (MLP | ROUTER) == by_layer[2] & (MLP | ROUTER) == ROUTER
    assert [layer & {"expert_out", "shared_expert_out"} for layer in by_layer] == [set(), *2 * [{"expert_out", "shared_expert_out"}]]
    assert {"k", "v", "rot_q", "rot_k"} & engine.sites == set()


def test_sizes_of_latent_attention_are_those_of_the_heads(engine: Engine) -> None:
    info = engine.info
    assert (info.n_dense_layers, info.d_head, info.d_head_v, info.n_kv_heads, info.d_kv_latent, info.d_mlp) == (1, 20 + 12, 28, 4, 32 + 12, 96)
    assert kv_bytes(info, 256, "f32") == 3 * 44 * 256 * 4


def test_a_standard_capture_takes_every_site_where_it_is(engine: Engine, tmp_path: Path) -> None:
    with open_trace(capture(engine, CaptureSpec(token_ids=IDS, precision="float32"), tmp_path)) as trace:
        assert trace.layers("mlp_post") == [0] and trace.layers("router_probs") == [1, 2] and trace.layers("z") == [0, 1, 2]
        assert trace["z", 2].shape == (7, 4, 28) and trace["q", 0].shape == (7, 4, 32) and trace["mlp_post", 0].shape == (7, 96)
        assert {name for name, entry in trace.integrity.items() if not entry["ok"]} == set()
        assert trace.integrity["attn_projection"]["checked"] == trace.integrity["mlp_sum"]["checked"] == 3
        assert np.abs(trace["result", 1].sum(axis=1) - trace["attn_out", 1]).max() < 1e-5
        assert trace.path.stat().st_size <= trace_bytes(engine.info, 7, precision="float32")


@pytest.mark.parametrize("layers, there", [((0,), MLP - {"mlp_pre", "mlp_pre_linear"}), ((1,), ROUTER), ((0, 2), {"mlp_post"} | ROUTER)])
def test_a_standard_capture_of_some_layers_leaves_out_what_they_lack(engine: Engine, tmp_path: Path, layers: tuple[int, ...], there: set[str]) -> None:
    with open_trace(capture(engine, CaptureSpec(token_ids=IDS, layers=layers), tmp_path)) as trace:
        assert set(trace.stored) & (MLP | ROUTER) == there


@pytest.mark.parametrize(
    "sites, layers, says",
    [
        (("router_probs",), (0,), "has no site 'router_probs' in layer 0; it has it in 1-2."),
        (("mlp_post", "z"), (0, 1), "has no site 'mlp_post' in layer 1; it has it in 0."),
        (("rot_q",), None, "has no site 'rot_q'; it has attn_out"),
    ],
)
def test_a_named_site_that_a_named_layer_lacks_is_refused_in_one_sentence(
    engine: Engine, tmp_path: Path, sites: tuple[str, ...], layers: tuple[int, ...] | None, says: str
) -> None:
    with pytest.raises(LayerscopeError, match=says.replace(".", r"\.")):
        capture(engine, CaptureSpec(token_ids=IDS, sites=sites, layers=layers), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_request_for_no_layer_that_has_the_site_and_an_edit_there_are_refused(engine: Engine) -> None:
    with pytest.raises(LayerscopeError, match="no site 'mlp_post' in layer 2; it has it in 0"):
        engine.run(list(IDS), Request(("mlp_post",), (2,)), no_sink)
    with pytest.raises(LayerscopeError, match="no site 'expert_weights' in layer 0; it has it in 1-2"):
        engine.run(list(IDS), Request(()), no_sink, (Intervention("expert_weights", 0, "zero"),))


@pytest.mark.parametrize("groups, used", [(3, 1), (4, 4), (4, 0), (8, 2)])
def test_groups_of_experts_on_which_llama_cpp_would_abort_are_refused(tiny_model: Callable[[str], TinyModel], groups: int, used: int) -> None:
    path = tiny_model("deepseek_v3").gguf
    header = read_header(path)
    header.metadata.update({"deepseek2.expert_group_count": groups, "deepseek2.expert_group_used_count": used})
    with pytest.raises(LayerscopeError, match=r"cannot be divided among|expert_group_used_count is \d, outside|expert_group_count is 8, outside 0 to 7"):
        model_info(path, header)

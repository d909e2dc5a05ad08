"""Claims about Phi-3.5-MoE: what its router does, and that llama.cpp computes another model than its makers', in two ways that are said."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from backend.engines import OpenOptions, open_engine
from backend.errors import LayerscopeError
from backend.files.hf_config import model_info
from backend.notes import notes
from backend.readout import open_readout
from tests.phimoe import as_in_llama_cpp
from tests.test_engines_agree import IDS, NMSE, nmse
from tests.test_hf_engine import capture
from tests.tiny_models import TinyModel, save_tiny

OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1)


def test_its_two_experts_have_a_softmax_each_by_hand(tiny_model: Callable[[str], TinyModel]) -> None:
    """The best expert's weight is its share among the experts within 2 jitter of it, the second's likewise among those that are left."""
    engine = open_engine(tiny_model("phimoe").hf, OPTIONS)
    values = capture(engine, IDS, ("router_logits", "expert_indices", "expert_weights"))
    for layer in range(engine.info.n_layers):
        for logits, indices, weights in zip(*(values[site, layer] for site in ("router_logits", "expert_indices", "expert_weights")), strict=True):
            assert indices.tolist() == np.argsort(-logits)[:2].tolist()
            left = set(range(len(logits)))
            for chosen, weight in zip(indices.tolist(), weights, strict=True):
                best = max(logits[e] for e in left)
                close = [e for e in left if (best - logits[e]) / max(abs(logits[e]), best) <= 2 * 0.2]
                assert np.isclose(weight, np.exp(logits[chosen]) / np.exp(logits[close]).sum(), rtol=1e-5)
                left.remove(chosen)
    engine.close()


def test_llama_cpp_computes_another_model_by_its_norms_and_by_its_weights(tiny_model: Callable[[str], TinyModel]) -> None:
    tiny = tiny_model("phimoe")
    hf, gguf = open_engine(tiny.hf, OPTIONS), open_engine(tiny.gguf, OPTIONS)
    theirs, makers = capture(gguf, IDS), capture(hf, IDS)
    assert nmse(theirs["embed", None], makers["embed", None]) == 0
    assert nmse(theirs["ln1_out", 0], makers["ln1_out", 0]) > 1e-3
    assert nmse(theirs["logits", None], makers["logits", None]) > 1e-2
    as_in_llama_cpp(hf, router=False)  # of the two, the weights alone are left
    makers = capture(hf, IDS)
    assert nmse(theirs["router_logits", 0], makers["router_logits", 0]) < NMSE
    assert np.array_equal(theirs["expert_indices", 0], makers["expert_indices", 0])
    assert np.allclose(theirs["expert_weights", 0].sum(-1), 1, atol=1e-6)
    assert makers["expert_weights", 0].sum(-1).mean() > 1.2 and nmse(theirs["expert_weights", 0], makers["expert_weights", 0]) > 0.1
    assert [notes(engine.info, 5) for engine in (hf, gguf)][0] == [] and "RMS norms" in notes(gguf.info, 5)[0]
    for engine in (hf, gguf):
        engine.close()


def test_another_number_of_experts_than_its_router_picks_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_tiny("phimoe", tmp_path_factory.mktemp("three") / "phimoe", num_experts_per_tok=3).hf
    with pytest.raises(LayerscopeError, match="num_experts_per_tok = 3; phimoe models run with 2 only"):
        model_info(folder)


def test_its_logits_have_a_bias_in_both_engines_and_no_attribution(tiny_model: Callable[[str], TinyModel]) -> None:
    """W_U times the norm alone would be another model; a sum over the parts of the stream leaves the bias out, so that it is refused."""
    tiny = tiny_model("phimoe")
    for path in (tiny.hf, tiny.gguf):
        engine = open_engine(path, OPTIONS)
        values = capture(engine, IDS, ("resid_post", "ln_final_out", "logits"))
        logits = values["ln_final_out", None] @ engine.weight("unembed.W_U").T
        assert nmse(logits + engine.weight("unembed.b_U"), values["logits", None]) < NMSE < 1e-3 < nmse(logits, values["logits", None])
        some = np.array([3, 200, 77])
        resid = values["resid_post", engine.info.n_layers - 1]
        assert nmse(engine.unembed(resid), values["logits", None]) < NMSE and nmse(engine.unembed(resid, some), values["logits", None][:, some]) < NMSE
        engine.close()
        with pytest.raises(LayerscopeError, match="adds a bias to its logits"):
            open_readout(path)

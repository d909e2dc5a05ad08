"""Masking experts in both engines: exactly the tokens that were routed to them change, and nobody is routed to them any more."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax

from backend.derived import Derived
from backend.engines import OpenOptions, Request, never_stop, open_engine
from backend.errors import LayerscopeError
from backend.experiments import Context
from backend.experiments.capture import CaptureSpec, capture
from backend.experiments.experts import expert_sweep_job, sweep, sweep_over
from backend.intervention import Intervention, ablate_experts

PROMPT = "Mary gave the book to John, and John gave the key to Mary."
KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3")
SITES = ("router_logits", "router_probs", "expert_indices", "expert_weights", "mlp_out", "logits")


def run(engine, ids, edits=()):
    found = {}

    def sink(piece):
        found[piece.site, piece.layer] = np.array(piece.values)

    sites = tuple(site for site in SITES if any(site == name for name, _ in engine.places))
    engine.run(ids, Request(sites), sink, tuple(edits), should_stop=never_stop)
    return found


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize("kind", KINDS)
def test_ablating_an_expert_changes_mlp_out_on_exactly_the_tokens_routed_to_it(tiny_model, kind, form):
    engine = open_engine(getattr(tiny_model(kind), form), OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1))
    try:
        ids = engine.tokenize(PROMPT)
        clean = run(engine, ids)
        layer = min(at for site, at in clean if site == "expert_indices")  # later ones also see what the first one changed
        chosen = clean["expert_indices", layer]
        experts = [e for e in range(engine.info.n_experts) if 0 < (chosen == e).any(axis=1).sum() < len(ids)][:3]
        assert experts
        for expert in experts:
            cut = run(engine, ids, [ablate_experts(engine.places, layer, expert)])
            routed = (chosen == expert).any(axis=1)
            # another number of tokens in an expert's product rounds differently, by less than this
            changed = np.abs(cut["mlp_out", layer] - clean["mlp_out", layer]).max(axis=1) > 1e-5 * np.abs(clean["mlp_out", layer]).max()
            others = (np.sort(cut["expert_indices", layer]) != np.sort(chosen)).any(axis=1)
            if (kind, form) == ("phimoe", "hf"):  # there an expert that was close to a chosen one had a share in its weight
                others |= (np.abs(cut["expert_weights", layer] - clean["expert_weights", layer]) > 1e-6).any(axis=1)
            np.testing.assert_array_equal(changed, others)
            # groups of experts are chosen by their best two: a group may lose its place with an expert that the token had not chosen
            assert (others >= routed).all() if kind == "deepseek_v3" or (kind, form) == ("phimoe", "hf") else np.array_equal(others, routed)
            assert not (cut["expert_indices", layer] == expert).any()
            site = "router_probs" if ("router_probs", layer) in engine.places else "router_logits"
            assert np.isneginf(cut[site, layer][:, expert]).all()
            assert np.abs(cut["logits", None] - clean["logits", None]).max() > 0
    finally:
        engine.close()


def test_the_weights_of_the_rest_are_those_of_a_softmax_without_the_expert(tiny_model):
    engine = open_engine(tiny_model("mixtral").hf, OpenOptions())
    try:
        ids = engine.tokenize(PROMPT)
        clean = run(engine, ids)
        cut = run(engine, ids, [ablate_experts(engine.places, 0, 2)])
    finally:
        engine.close()
    logits = np.where(np.arange(5) == 2, -np.inf, clean["router_logits", 0])
    best = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(cut["expert_indices", 0], best)
    weights = np.exp(np.take_along_axis(logits, best, 1))
    np.testing.assert_allclose(cut["expert_weights", 0], weights / weights.sum(1, keepdims=True), rtol=1e-5)


def test_a_mask_that_makes_no_sense_is_refused(tiny_mixtral):
    with pytest.raises(LayerscopeError, match="for router_logits and router_probs"):
        Intervention("resid_post", 0, "mask", dim=1)
    engine = open_engine(tiny_mixtral.hf, OpenOptions())
    try:
        with pytest.raises(LayerscopeError, match="1 of 5 experts are left in layer 0, and each token needs 2: mask 3 at most"):
            ablate_experts(engine.places, 0, (0, 1, 2, 3)).check(engine.info, 4)
        ablate_experts(engine.places, 0, (0, 1, 2)).check(engine.info, 4)
        with pytest.raises(LayerscopeError, match="Layer 9 has no router"):
            ablate_experts(engine.places, 9, 0)
    finally:
        engine.close()


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_sweep_measures_every_expert_and_unused_ones_do_nothing(tiny_mixtral, form):
    engine = open_engine(getattr(tiny_mixtral, form), OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=1))
    try:
        ids = engine.tokenize(PROMPT)[:5]  # few tokens, so that some expert serves none
        clean = run(engine, ids)
        layers, found = sweep(engine, ids)
        assert layers == [0, 1, 2] and found.shape == (3, 3, 5)
        by_hand = run(engine, ids, [ablate_experts(engine.places, 1, 3)])["logits", None]
    finally:
        engine.close()
    used = np.stack([np.isin(np.arange(5), clean["expert_indices", layer]) for layer in layers])
    assert not used.all()
    assert (found[1][used] > 1e-6).all() and (np.abs(found[:, ~used]) < 1e-6).all()
    p, q = log_softmax(clean["logits", None], axis=-1), log_softmax(by_hand, axis=-1)
    following = np.array(ids[1:])
    expected = (p - q)[np.arange(len(following)), following].mean(), (np.exp(p) * (p - q)).sum(-1).mean(), (p.argmax(-1) != q.argmax(-1)).mean()
    np.testing.assert_allclose(found[:, 1, 3], expected, rtol=1e-4, atol=1e-6)


def test_a_sweep_of_a_dense_model_or_one_token_is_refused(tiny_llama, tiny_mixtral):
    for tiny, ids, message in ((tiny_llama, [5, 6], "has no experts"), (tiny_mixtral, [5], "needs two tokens")):
        engine = open_engine(tiny.hf, OpenOptions())
        try:
            with pytest.raises(LayerscopeError, match=message):
                sweep(engine, ids)
        finally:
            engine.close()


def test_the_job_sweeps_over_several_traces_of_one_model(tiny_mixtral, tiny_llama, tmp_path):
    engine = open_engine(tiny_mixtral.hf, OpenOptions())
    dense = open_engine(tiny_llama.hf, OpenOptions())
    paths = {name: capture(each, CaptureSpec(prompt=text, sites=("resid_post",)), tmp_path)
             for name, each, text in (("a", engine, "Mary gave"), ("b", engine, "the book to John"), ("c", dense, "Mary"))}  # fmt: skip
    derived = Derived(tmp_path / "cache")
    context = Context(engine=lambda *_: engine, traces_dir=tmp_path, library=SimpleNamespace(path_of=paths.get), derived=derived)
    try:
        assert expert_sweep_job(context, {"trace_ids": ["a", "b"], "key": "two"}) == {"layers": [0, 1, 2]}
        expected = sweep_over(engine, [engine.tokenize("Mary gave"), engine.tokenize("the book to John")])[1]
        np.testing.assert_allclose(derived.get_array(("expert_sweep", "two")), expected, rtol=1e-5, atol=1e-7)
        with pytest.raises(LayerscopeError, match="prompts of one model"):
            expert_sweep_job(context, {"trace_ids": ["a", "c"], "key": "mixed"})
        with pytest.raises(LayerscopeError, match="1 to 200 prompts, and 0"):
            sweep_over(engine, [])
    finally:
        engine.close()
        dense.close()
        derived.close()

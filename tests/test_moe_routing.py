"""Routing of real runs: what a trace gives of it, what quantization and categories of prompts do to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backend.analysis.moe import expert_counts
from backend.analysis.moe_compare import similarity, within_between
from backend.engines import OpenOptions, Request, never_stop, open_engine
from backend.errors import LayerscopeError, SiteNotCaptured
from backend.experiments.capture import CaptureSpec, capture
from backend.intervention import ablate_experts
from backend.reports.expert_usage import Usage, find_usage, frequent_tokens
from backend.reports.routing import compare, comparison_report, overall, routing_report
from backend.trace import open_trace

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo-moe"
PROMPT = "The capital of Italy is Rome."
CATEGORIES = {
    "capitals": ("The capital of France is", "The capital of Italy is", "The capital of Spain is"),
    "sums": ("7 plus 5 equals", "3 plus 4 equals", "9 plus 2 equals"),
    "code": ("def add(a, b):\n    return a", "def sub(a, b):\n    return a", "def mul(x, y):\n    return x"),
    "stories": ("When Mary and John went to the store, John gave", "When Tom and Anna went to the park, Anna gave", "When John and Mary went to the school, Mary gave"),
}


@pytest.fixture(scope="module")
def traces(tiny_mixtral, tiny_llama, tmp_path_factory):
    """By name: the run as it is, with an expert masked, of another prompt, without its experts, of a dense model."""
    folder = tmp_path_factory.mktemp("traces")
    engine = open_engine(tiny_mixtral.hf, OpenOptions())
    specs = {
        "plain": CaptureSpec(prompt=PROMPT), "cut": CaptureSpec(prompt=PROMPT, interventions=(ablate_experts(engine.places, 0, 1),)),
        "other": CaptureSpec(prompt="Two words"), "narrow": CaptureSpec(prompt=PROMPT, sites=("resid_post",)),
    }  # fmt: skip
    found = {name: open_trace(capture(engine, spec, folder)) for name, spec in specs.items()}
    engine.close()
    engine = open_engine(tiny_llama.hf, OpenOptions())
    found["dense"] = open_trace(capture(engine, CaptureSpec(prompt=PROMPT), folder))
    engine.close()
    yield found
    for trace in found.values():
        trace.close()


def test_a_trace_gives_the_routing_of_a_layer(traces):
    routing = traces["plain"].routing(1)
    assert routing.indices.shape == (traces["plain"].n_tokens, 2) and routing.probs.shape == (traces["plain"].n_tokens, 5)
    assert routing.counts.sum() == 2 * traces["plain"].n_tokens
    np.testing.assert_allclose(routing.probs.sum(axis=1), 1, atol=2e-3)
    np.testing.assert_array_equal(np.argsort(-routing.logits, axis=1, kind="stable")[:, 0], routing.indices[:, 0])


def test_a_masked_expert_counts_as_zero(traces):
    routing = traces["cut"].routing(0)
    assert routing.counts[1] == 0 and len(routing.counts) == 5 and (routing.probs[:, 1] == 0).all()
    assert traces["cut"].metadata["interventions"] == [{"site": "router_probs", "layer": 0, "op": "mask", "dim": [1], "seed": 0}]
    assert not [name for name, entry in traces["cut"].integrity.items() if entry.get("checked") and not entry["ok"]]
    report = routing_report(traces["cut"])
    assert report["layers"][0]["counts"]["1"] == 0 and report["layers"][0]["switch_loss"] is not None


def test_two_runs_of_the_same_tokens_are_compared_token_by_token(traces):
    found = compare(traces["plain"], traces["cut"])
    routed = (traces["plain"].routing(0).indices == 1).any(axis=1)
    assert found[0].change.sets.tolist() == routed.tolist() and 0 < overall(found) < 1
    assert comparison_report(traces["plain"], traces["plain"])["overall"]["changed"] == 0
    different = comparison_report(traces["plain"], traces["other"])
    assert different["overall"]["changed"] is None and different["layers"][0]["changed"] is None and 0 < different["overall"]["cosine"] <= 1


def test_what_has_no_routing_says_why(traces):
    with pytest.raises(LayerscopeError, match="is dense: it has no experts"):
        traces["dense"].routing(0)
    with pytest.raises(LayerscopeError, match="is dense"):
        routing_report(traces["dense"])
    with pytest.raises(SiteNotCaptured):
        traces["narrow"].routing(0)
    with pytest.raises(LayerscopeError, match="holds no expert_indices"):
        routing_report(traces["narrow"])
    with pytest.raises(LayerscopeError, match="has 5 experts and"):
        compare(traces["plain"], traces["dense"])


def test_usage_over_traces_adds_up_by_category_and_stays_apart_by_trace(traces, tmp_path):
    from backend.derived import Derived

    asked = [traces[name] for name in ("other", "plain", "narrow", "cut")]
    found = find_usage(asked, frequent_tokens(asked))
    assert found.trace_ids == [each.id for each in sorted((traces["other"], traces["plain"], traces["cut"]), key=lambda each: each.created_at)]
    at = found.trace_ids.index(traces["plain"].id)
    for layer in range(3):
        np.testing.assert_array_equal(found.counts[at, layer], traces["plain"].routing(layer).counts)
    names, together = found.by_category(1)
    assert names == [""] and together.sum() == 2 * sum(found.n_tokens)
    held = [traces["other"], traces["plain"], traces["cut"]]
    for row, (text, n) in enumerate(found.tokens[:5]):
        where = [np.array(each.token_texts) == text for each in held]
        assert n == sum(each.sum() for each in where)
        by_hand = sum(expert_counts(each.routing(2).indices[rows], 5) for each, rows in zip(held, where, strict=True))
        np.testing.assert_array_equal(found.token_counts[row, 2], by_hand)
    derived = Derived(tmp_path)
    key = found.key("tiny", found.trace_ids)
    assert found.load(derived, key) is None
    found.save(derived, key)
    again = found.load(derived, key)
    np.testing.assert_array_equal(again.counts, found.counts)
    np.testing.assert_array_equal(again.token_counts, found.token_counts)
    assert again.tokens == found.tokens
    assert (again.trace_ids, again.categories, again.prompts, again.created_at, again.n_tokens) == (
        found.trace_ids, found.categories, found.prompts, found.created_at, found.n_tokens)  # fmt: skip
    derived.close()
    with pytest.raises(LayerscopeError, match="No trace of this model"):
        find_usage([traces["narrow"]])


def test_categories_are_compared_in_one_layer_and_over_all():
    counts = np.array([[[4, 0], [1, 1]], [[0, 4], [1, 1]], [[0, 0], [0, 4]]])  # (trace, layer, expert)
    found = Usage(["1", "2", "3"], ["a", "b", "a"], [""] * 3, [""] * 3, [4] * 3, counts, [], np.zeros((0, 2, 2), np.int64))
    names, first = found.alike(0)
    assert names == ["a", "b"] and first["cosine"].tolist() == [[1, 0], [0, 1]] and first["jensen_shannon"][0, 1] == pytest.approx(np.log(2))
    second = similarity([1, 5], [1, 1]).cosine
    assert found.alike(None)[1]["cosine"][0, 1] == pytest.approx((0 + second) / 2)


def test_categories_of_prompts_differ_in_routing_more_between_than_within():
    engine = open_engine(DEMO, OpenOptions(device="cpu"))
    loads: list[tuple[str, np.ndarray]] = []
    try:
        for category, prompts in CATEGORIES.items():
            for prompt in prompts:
                found: dict[int, np.ndarray] = {}

                def sink(piece, found=found):
                    found[piece.layer] = expert_counts(piece.values, engine.info.n_experts)

                engine.run(engine.tokenize(prompt), Request(("expert_indices",)), sink, should_stop=never_stop)
                loads.append((category, np.concatenate([found[layer] for layer in sorted(found)])))
    finally:
        engine.close()
    within, between = within_between([load for _, load in loads], [category for category, _ in loads])
    assert between > 2 * within

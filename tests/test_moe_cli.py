"""The commands moe query, moe analyze, moe presets and memory-info, and what they say of bad input."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from backend.analysis import moe
from backend.run_presets import read_run_presets
from backend.trace import open_trace
from tests.test_cli import run  # noqa: F401  a fixture

DEMO_MOE = Path(__file__).resolve().parents[1] / "models" / "demo-moe"


@pytest.fixture
def moe_run(run, tiny_mixtral, monkeypatch):  # noqa: F811
    monkeypatch.setenv("LAYERSCOPE_MODELS_DIRS", json.dumps([str(tiny_mixtral.hf.parent)]))
    return run


def test_query_prints_the_routing_of_the_trace_it_keeps(moe_run, tiny_mixtral):
    code, out, _ = moe_run("moe", "query", "--preset", tiny_mixtral.hf.name, "--prompt", "The capital", "-n", "2", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["schema"] == "layerscope.moe/1" and (data["n_experts"], data["k"]) == (5, 2)
    with open_trace(data["path"]) as trace:
        for row in data["layers"]:
            routing = trace.routing(row["layer"])
            assert list(row["counts"].values()) == routing.counts.tolist()
            assert [token["experts"][str(row["layer"])] for token in data["tokens"]] == routing.indices.tolist()
    text = moe_run("moe", "query", "--preset", tiny_mixtral.hf.name, "--prompt", "The capital", "--verbose")[1]
    assert "first choice kept (random)" in text and "every token: layer: experts (weights)" in text


def test_analyze_takes_prompts_in_a_row_and_compares_every_two(moe_run, tiny_mixtral, tmp_path):
    output = tmp_path / "results.json"
    code, out, _ = moe_run("moe", "analyze", "--preset", tiny_mixtral.hf.name, "--prompts", "One", "Two words", "Three", "--compare", "--output", str(output))
    assert code == 0 and "3 prompts written" in out
    data = json.loads(output.read_text())
    assert [row["prompt"] for row in data["prompts"]] == ["One", "Two words", "Three"]
    assert [pair["prompts"] for pair in data["comparisons"]] == [[0, 1], [0, 2], [1, 2]]
    pair = data["comparisons"][0]
    a, b = (np.array(list(data["prompts"][i]["layers"][0]["counts"].values()), float) for i in (0, 1))
    assert pair["layers"][0]["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert pair["layers"][0]["changed"] is None  # other tokens
    assert "NaN" not in output.read_text()


def test_full_analysis_and_usage_over_traces_are_json(moe_run, tiny_mixtral, tmp_path):
    output, name = tmp_path / "full.json", tiny_mixtral.hf.name
    assert moe_run("moe", "analyze", "--preset", name, "--prompts", "One and one", "The capital of Italy", "--full", "--output", str(output))[0] == 0
    reports = json.loads(output.read_text())["prompts"]
    with open_trace(reports[0]["path"]) as trace:
        routing, after = trace.routing(1), trace.routing(2)
        row = reports[0]["layers"][1]
        assert row["co_activation"] == moe.co_activation(routing.indices, 5).tolist()
        assert row["transitions"] == {"to": 2, "counts": moe.transitions(routing.indices, after.indices, 5).tolist()}
        assert row["margins"] == pytest.approx(moe.margins(routing.logits, routing.indices).tolist())
        assert sum(each["n"] for each in row["specialisation"]) == len(row["token_entropy"]) == trace.n_tokens
        expert = str(routing.indices[0, 0])
        assert row["specialisation"][[each["token"] for each in row["specialisation"]].index(trace.token_texts[0])]["experts"][expert] == 1.0
        assert reports[0]["layers"][2]["transitions"] is None
    data = json.loads(moe_run("moe", "usage", "--model", name)[1])
    assert [each["trace_id"] for each in data["traces"]] == [report["trace_id"] for report in reports]
    assert data["traces"][0]["counts"][1] == routing.counts.tolist() and data["layers"] == [0, 1, 2]
    both = np.sum([each["counts"] for each in data["traces"]], axis=0)
    assert data["categories"] == {"": both.tolist()} and data["within_between"]["0"][1] is None
    assert data["similarity"]["overall"]["cosine"][0][0] == pytest.approx(1)
    documented = (DEMO_MOE.parents[1] / "docs" / "moe.md").read_text()
    assert all(f"`{key}`" in documented for key in {**row, **data, **data["traces"][0], **data["similarity"]})


def test_ablate_ranks_every_expert_or_compares_with_and_without_some(moe_run, tiny_mixtral):
    name = tiny_mixtral.hf.name
    every = json.loads(moe_run("moe", "ablate", "--preset", name, "--prompt", "The capital of Italy", "--json")[1])
    assert len(every["ranking"]) == 3 * 5 and every["ranking"][0]["kl"] == max(row["kl"] for row in every["ranking"])
    best = every["ranking"][0]
    words = ("--layer", str(best["layer"]), "--experts", str(best["expert"]))
    one = json.loads(moe_run("moe", "ablate", "--preset", name, "--prompt", "The capital of Italy", *words, "-n", "3", "--json")[1])
    assert [one[key] for key in ("nll", "kl", "changed")] == pytest.approx([best[key] for key in ("nll", "kl", "changed")], rel=1e-4)
    assert one["response"] and one["response_without"]
    both = json.loads(moe_run("moe", "ablate", "--preset", name, "--prompt", "The capital of Italy", "One and one", "--json")[1])
    alone = json.loads(moe_run("moe", "ablate", "--preset", name, "--prompt", "One and one", "--json")[1])
    assert both["prompts"] == ["The capital of Italy", "One and one"] and both["n_tokens"] == every["n_tokens"] + alone["n_tokens"]
    kl = {(row["layer"], row["expert"]): (row["kl"], part["n_tokens"]) for part in (alone,) for row in part["ranking"]}
    for row in every["ranking"]:
        other, n = kl[row["layer"], row["expert"]]
        mixed = next(each["kl"] for each in both["ranking"] if (each["layer"], each["expert"]) == (row["layer"], row["expert"]))
        assert mixed == pytest.approx((row["kl"] * every["n_tokens"] + other * n) / both["n_tokens"], rel=1e-3, abs=1e-6)
    assert "every expert taken out in turn" in moe_run("moe", "ablate", "--preset", name, "--prompt", "The capital of Italy")[1]
    assert "without expert 0, 1 of layer 2" in moe_run("moe", "ablate", "--preset", name, "--prompt", "Italy", "--layer", "2", "--experts", "1,0")[1]


def test_variants_of_a_model_are_compared_over_the_same_prompts(moe_run, tiny_mixtral):
    names = ("--preset", tiny_mixtral.hf.name, "--preset", tiny_mixtral.gguf.name)
    code, out, err = moe_run("moe", "compare", *names, "--prompts", "The capital of Italy", "One and one", "--json")
    assert code == 0, err
    data = json.loads(out)
    pair = data["comparisons"][0]
    assert pair["presets"] == [0, 1] and [report["prompt"] for report in pair["reports"]] == [0, 1]
    with open_trace(trace_path(data, pair, 0, "a")) as a, open_trace(trace_path(data, pair, 0, "b")) as b:
        assert (a.engine, b.engine) == ("hf", "gguf") and a.token_ids == b.token_ids
        differs = [np.sort(a.routing(layer).indices) != np.sort(b.routing(layer).indices) for layer in range(3)]
    assert pair["reports"][0]["overall"]["changed"] == pytest.approx(np.mean([rows.any(axis=1) for rows in differs]))
    weights = [a.n_tokens, pair["n_tokens"] - a.n_tokens]
    expected = np.average([report["overall"]["cosine"] for report in pair["reports"]], weights=weights)
    assert pair["overall"]["cosine"] == pytest.approx(expected)
    assert "The other engine (hf to gguf) changed the routing of" in moe_run("moe", "compare", *names, "--prompts", "Italy")[1]


def trace_path(data, pair, prompt, which):
    from backend.library import Library
    from config import load_settings

    return Library.from_settings(load_settings()).traces_dir / f"{pair['reports'][prompt][which]}.h5"


def test_presets_are_listed_and_can_be_added(moe_run, tmp_path, monkeypatch):
    names = [row["name"] for row in json.loads(moe_run("moe", "presets", "--json")[1])["presets"]]
    assert {"demo-moe", "mixtral-8x7b-instruct", "mixtral-8x7b-instruct-4bit", "mixtral-8x7b-instruct-8bit", "mixtral-8x7b-creative", "mixtral-8x7b-precise"} <= set(names)
    own = tmp_path / "config" / "own.toml"
    own.parent.mkdir()
    own.write_text('[[run]]\nname = "mine"\nmodel = "somewhere"\ntemperature = 0.3\n')
    monkeypatch.setenv("LAYERSCOPE_PRESETS_FILE", str(own))
    assert [row["name"] for row in json.loads(moe_run("moe", "presets", "--json")[1])["presets"]] == ["mine"]
    assert read_run_presets(own)[0].sampling.temperature == 0.3
    own.write_text('[[run]]\nname = "mine"\nmodel = "somewhere"\nquantize = "int3"\n')
    code, _, err = moe_run("moe", "presets")
    assert code == 2 and "'mine' has quantize 'int3'" in err


def test_nf4_of_the_demo_model_without_bitsandbytes_or_a_gpu_is_one_sentence(moe_run, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in ("bitsandbytes", "accelerate") else real(name, *rest))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    sentence = "nf4 weights of demo-moe need bitsandbytes, accelerate and a CUDA device; missing here: bitsandbytes and accelerate and a CUDA device."
    code, out, err = moe_run("trace", "--model", "demo-moe", "--prompt", "x", "--quantize", "nf4")
    assert code == 2 and err.strip() == sentence and not out
    own = tmp_path / "own.toml"
    own.write_text(f'[[preset]]\nname = "demo-moe"\npath = {str(DEMO_MOE)!r}\n[[run]]\nname = "small"\nmodel = "demo-moe"\nquantize = "nf4"\n')
    monkeypatch.setenv("LAYERSCOPE_PRESETS_FILE", str(own))
    for words in (("moe", "query", "--prompt", "x"), ("moe", "analyze", "--prompts", "x"), ("moe", "ablate", "--prompt", "x y")):
        code, out, err = moe_run(*words, "--preset", "small")
        assert code == 2 and err.strip().endswith(sentence) and not out and "Traceback" not in err


def test_memory_info_by_hand(moe_run):
    data = json.loads(moe_run("memory-info", "--preset", "mixtral-8x7b-instruct", "--tokens", "1000", "--json")[1])
    assert (data["parameters"], data["precision"], data["on_this_disk"]) == (46_702_792_704, "bfloat16", False)
    assert data["weight_bytes"] == 2 * 46_702_792_704
    assert data["cache_bytes"] == 32 * 8 * (128 + 128) * 1024 * 4  # the context in steps of 256, float32
    assert data["total_bytes"] > data["weight_bytes"] + data["cache_bytes"]
    four = json.loads(moe_run("memory-info", "--preset", "mixtral-8x7b-instruct-4bit", "--json")[1])
    assert four["weight_bytes"] == int(46_702_792_704 * 0.5625) and "GPU" in four["recommendation"]
    assert "fits" in moe_run("memory-info", "--preset", "demo-moe")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("memory-info", "--preset", "nope"), "There is no preset 'nope'; there are demo-moe"),
        (("moe", "query", "--preset", "demo-dense", "--prompt", "x"), "demo-dense is dense: it has no experts"),
        (("moe", "query", "--preset", "mixtral-8x7b-instruct", "--prompt", "x"), "is not on this disk"),
        (("moe", "usage", "--model", "nope"), "No trace of this model holds expert_indices"),
        (("moe", "compare", "--preset", "demo-moe", "--prompts", "x"), "needs two presets at least"),
        (("moe", "ablate", "--preset", "demo-moe", "--prompt", "x", "--layer", "0"), "Name both --layer and --experts"),
        (("moe", "ablate", "--preset", "demo-moe", "--prompt", "x", "--layer", "0", "--experts", "1-3"), "are not numbers separated by commas"),
        (("moe", "ablate", "--preset", "demo-moe", "--prompt", "x", "--layer", "0", "--experts", "8"), "Expert 8 of an edit is outside 0-7"),
        (("moe", "ablate", "--preset", "demo-moe", "--prompt", "x", "y", "--layer", "0", "--experts", "1"), "taken out of one prompt, and 2 are given"),
        (("moe", "analyze", "--preset", "demo-moe", "--prompts", "x", "--output", "/no/such/folder/x.json"), "There is no folder /no/such/folder"),
    ],
)
def test_bad_input_is_one_sentence(moe_run, words, message):
    code, out, err = moe_run(*words)
    assert code == 2 and message in err and not out and "Traceback" not in err

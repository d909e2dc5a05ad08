"""What the Quantization page draws is what was found, in the slot where it belongs; what its form refuses, it refuses in a sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend.errors import LayerscopeError
from backend.model_files import ModelEntry
from backend.model_info import ModelInfo
from backend.reports.quantization_report import PromptResult, QuantizationReport, percent
from components.figures.quantization import ACTIVATION_METRICS, WEIGHT_METRICS, depth_map, error_path, kl_bars, position_map, written
from components.quantization_form import MAX_PROMPTS, job_params, references_for, split_prompts
from components.quantization_tables import prediction_table, summary_facts, tensor_table

HOSTILE = '<a href="javascript:alert(1)">x</a><br>%{z}'
COMPONENTS = {"attn.W_Q": "q", "attn.W_O": "attn_out", "mlp.W_out": "mlp_out"}


def weight(name: str, layer: int | None, component: str, off: float, **more: Any) -> dict[str, Any]:
    stored = {"shape": [4, 4], "dtype": "Q4_K", "reference_dtype": "F16", "bits": 4.5}
    metrics = {"rmse": off / 10, "relative_rmse": off, "sqnr_db": -20 * np.log10(off) if off else np.inf, "max_error": off, "cosine": 1 - off**2 / 2}
    return {"name": name, "layer": layer, "component": component, **stored, **metrics, **more}


def report(n_layers: int = 3, n_pos: int = 4, **changes: Any) -> QuantizationReport:
    rows = [weight("embed.W_E", None, "embed.W_E", 0.01)]
    rows += [weight(f"blocks.{layer}.{name}", layer, name, 0.02 + 0.01 * layer) for layer in range(n_layers) for name in COMPONENTS]
    places: list[Any] = [("embed", None), *((site, layer) for layer in range(n_layers) for site in ("q", "attn_out", "resid_mid", "mlp_out", "resid_post")), ("ln_final_out", None)]
    values = np.linspace(0.01, 0.2, len(places))
    shift = {"kl": np.array([0.5, 0, 0.01, 0.02])[:n_pos], "reference_top": np.array([1, 2, 3, 4])[:n_pos], "top": np.array([1, 2, 9, 4])[:n_pos],
             "reference_prob": np.full(n_pos, 0.9), "prob": np.full(n_pos, 0.8), "next_logprob_change": np.array([-0.1, 0.1, -0.3, np.nan])[:n_pos]}  # fmt: skip
    by_position = np.repeat(values[:, None], n_pos, 1).astype(np.float32)
    prompt = PromptResult("a b", [0, 5, 6, 7][:n_pos], ["<s>", " a", HOSTILE, "\n"][:n_pos], [0], shift, by_position, 1 - by_position)
    model = {"name": "m-q4", "quantization": "Q4_K_M", "n_layers": n_layers, "bits": 5.0, "n_bytes": 50}
    reference = {"name": "m", "quantization": "F16", "n_layers": n_layers, "bits": 16.0, "n_bytes": 160}
    total = {"relative_rmse": 0.0612, "sqnr_db": 24.26, "rmse": 0.1, "max_error": 1.0, "cosine": 0.998}
    texts = {1: "one", 2: "two", 3: HOSTILE, 4: "four", 9: "nine"}
    return dataclasses.replace(QuantizationReport(model, reference, rows, total, places, values, 1 - values, 1 - values**2, [prompt], texts), **changes)


def path_of(found: QuantizationReport, **more: Any) -> Any:
    predictions = {"kl": found.prompts[0].shift["kl"], "changed": found.prompts[0].changed}
    return error_path(found.weights, found.places, found.relative_l2, found.n_layers, predictions, found.prompts[0].tokens, **more)


def test_the_sentence_says_what_the_task_of_the_page_is():
    assert report().sentence() == "Q4_K_M against F16: weights 6.1 % off, the residual stream diverges to 18.8 % by layer 2, KL 0.133 nats, 75.0 % of next tokens agree."
    same = report(model={**report().model, "quantization": "F16"})
    assert same.sentence().startswith("m-q4 against m: ")


def drawn_at(figure: Any, axis: str) -> dict[str, tuple[float, float]]:
    """First line of the hover -> (x, y) of everything drawn on an axis."""
    traces = [trace for trace in figure.data if trace.yaxis == axis]
    return {text.split("<br>")[0]: (float(x), float(y)) for trace in traces for x, y, text in zip(trace.x, trace.y, trace.customdata, strict=True) if not np.isnan(y)}


def test_every_bar_stands_over_the_activation_that_its_matrix_makes():
    found = report()
    figure = path_of(found)
    bars, points = drawn_at(figure, "y"), drawn_at(figure, "y3")
    assert len(bars) == len(found.weights) and len(points) == len(found.places)
    for layer in range(3):
        for component, site in COMPONENTS.items():
            bar, point = bars[f"blocks.{layer}.{component}"], points[f"{site} at layer {layer}"]
            assert bar[0] == point[0] and bar[1] == pytest.approx(2 + layer)
            assert point[1] == pytest.approx(100 * found.by_layer("relative_l2", site)[layer])
    assert bars["embed.W_E"][0] == points["embed"][0]
    xs = [points[name][0] for name in ("embed", "q at layer 0", "resid_post at layer 0", "q at layer 1", "resid_post at layer 2", "ln_final_out")]
    assert xs == sorted(xs) and len(set(xs)) == len(xs)


def test_a_line_of_a_branch_ends_with_its_layer_and_the_stream_does_not():
    lines = {trace.name: np.asarray(trace.y) for trace in path_of(report()).data if trace.type == "scatter" and trace.yaxis == "y3"}
    assert np.isnan(lines["attention"]).sum() == np.isnan(lines["MLP"]).sum() == 3 and not np.isnan(lines["residual stream"]).any()


def test_predictions_that_changed_are_points_of_their_own_and_a_kl_of_zero_is_drawn():
    points = {trace.name: trace for trace in path_of(report(), agreement="75 %").data if trace.name in ("same best token", "best token changed")}
    assert np.asarray(points["best token changed"].y).tolist() == pytest.approx([0.01])
    assert sorted(np.asarray(points["same best token"].y).tolist()) == pytest.approx([0.01, 0.02, 0.5])  # 0 stands at the smallest that is not
    prompt = report().prompts[0]
    still = report(prompts=[dataclasses.replace(prompt, shift={**prompt.shift, "kl": np.zeros(4), "top": prompt.shift["reference_top"]})])
    assert all(np.asarray(trace.y).tolist() == pytest.approx([1e-9] * len(trace.y)) for trace in path_of(still).data if trace.yaxis == "y2")


def test_deep_models_name_layers_only_and_long_texts_are_thinned_but_keep_the_worst():
    deep = report(40)
    figure = path_of(deep)
    assert not figure.layout.xaxis3.ticktext and len(figure.layout.annotations) < 50
    kl = np.random.default_rng(0).exponential(size=9000)
    figure = error_path(deep.weights, deep.places, deep.relative_l2, 40, {"kl": kl, "changed": kl > 3}, ["t"] * 9000)
    drawn = np.concatenate([trace.y for trace in figure.data if trace.yaxis == "y2"])
    assert len(drawn) <= 2000 and drawn.max() == pytest.approx(kl.max())


def test_hostile_names_and_tokens_are_text_in_every_figure():
    bad = report(weights=[weight(HOSTILE, 0, "attn.W_Q", 0.1)])
    hovers = np.full((1, 1), "x", object)
    figures = [
        path_of(bad),
        position_map(np.ones((1, 4)), ["L0"], bad.prompts[0].tokens, "relative_l2", "q"),
        depth_map(np.ones((1, 1)), [HOSTILE], [HOSTILE], "rmse", WEIGHT_METRICS, hovers),
        kl_bars(np.ones(4), np.zeros(4, bool), bad.prompts[0].tokens, ["a"] * 4),
    ]
    for figure in figures:
        assert "<a href" not in figure.to_json() and "\\u003ca href" not in figure.to_json()


@pytest.mark.parametrize(("metric", "stored", "shown"), [("relative_rmse", 0.061, 6.1), ("cosine", 0.75, 0.25), ("sqnr_db", 24.0, 24.0), ("rmse", 0.1, 0.1)])
def test_a_map_draws_percent_and_distances_and_keeps_gaps(metric, stored, shown):
    values = np.array([[stored, np.nan], [np.inf, stored]])
    cells = depth_map(values, ["a", "b"], ["L0", "L1"], metric, WEIGHT_METRICS, np.full((2, 2), "", object)).data[0]
    assert cells.z[0, 0] == pytest.approx(shown) and np.isnan(cells.z[0, 1])
    assert written(stored, metric, WEIGHT_METRICS).startswith(WEIGHT_METRICS[metric][0].split(",")[0])


def test_the_worst_sqnr_is_the_darkest_and_exact_tensors_have_no_colour():
    cells = depth_map(np.array([[10.0, 40.0, np.inf]]), ["a"], ["L0", "L1", "L2"], "sqnr_db", WEIGHT_METRICS, np.full((1, 3), "", object)).data[0]
    plain = depth_map(np.array([[10.0, 40.0, 20.0]]), ["a"], ["L0", "L1", "L2"], "rmse", WEIGHT_METRICS, np.full((1, 3), "", object)).data[0]
    assert (cells.zmin, cells.zmax) == (10, 40) and np.isnan(cells.z[0, 2])
    assert [colour for _, colour in cells.colorscale] == [colour for _, colour in plain.colorscale][::-1]
    assert written(1.0, "cka", ACTIVATION_METRICS) == "1 − linear CKA 0"


def words(component: Any) -> str:
    """All text of a component, in order."""
    if isinstance(component, (list, tuple)):
        return " ".join(words(part) for part in component)
    children = getattr(component, "content", getattr(component, "children", component))  # of a still its content
    return "" if children is None else str(children) if isinstance(children, (str, int, float)) else words(children)


def test_the_tables_put_the_worst_first_and_mark_what_changed():
    found = report()
    rows = tensor_table(found, "relative_rmse").children[1].children
    assert words(rows[0]).startswith("blocks.2.") and words(rows[-1]).startswith("embed.W_E") and "4.0 %" in words(rows[0])
    assert words(tensor_table(found, "sqnr_db").children[1].children[0]).startswith("blocks.2.")
    nan = report(weights=[*found.weights, weight("bad", None, "bad", float("nan"))])
    assert words(tensor_table(nan, "rmse").children[1].children[0]).startswith("bad")
    body = prediction_table(found, 0).children[1].children
    assert body[0].className == "chosen" and "nine" in words(body[0]) and "-0.300" in words(body[0])
    assert [words(row).split()[0] for row in body] == ["2", "0", "3", "1"]
    assert "3.2 times as large" in words(summary_facts(found)) and "75.0 %" in words(summary_facts(found))


def test_prompts_are_apart_where_a_line_holds_three_dashes():
    assert split_prompts("def f():\n    return 1\n---\nHello\n --- \n\n") == ["def f():\n    return 1", "Hello"]
    assert split_prompts(" leading space") == [" leading space"]
    for text, message in (("", "empty"), ("---\n \n---", "empty"), ("x" * 100_001, "the limit is 100,000"), ("\n---\n".join("x" * (MAX_PROMPTS + 1)), "command line takes more")):
        with pytest.raises(LayerscopeError, match=message):
            split_prompts(text)


def entry(name: str, kind: str, quantization: str, **sizes: int) -> ModelEntry:
    base = {"n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_model": 8, "d_head": 4, "d_mlp": 16, "d_vocab": 32, "n_ctx": 64}
    return ModelEntry(name, kind, Path(name), "models folder", ModelInfo(name=name, source=name, engine=kind, architecture="llama", quantization=quantization, **{**base, **sizes}))


def test_references_are_unquantized_models_of_the_same_sizes_gguf_first():
    models = [entry("m-hf", "hf", "F16"), entry("m-q4", "gguf", "Q4_K_M"), entry("m-f16", "gguf", "F16"), entry("m-q8", "gguf", "Q8_0"), entry("other", "gguf", "F16", d_mlp=24),
              ModelEntry("broken", "gguf", Path("x"), "models folder", error="no")]  # fmt: skip
    assert references_for("m-q4", models) == ["m-f16", "m-hf"]
    assert references_for("m-f16", models) == ["m-hf"]
    assert references_for("other", models) == references_for("broken", models) == references_for("nope", models) == []


def test_a_form_without_model_or_reference_is_refused():
    assert job_params("a", "b", "x\n---\ny") == {"model": "a", "reference": "b", "prompts": ["x", "y"]}
    for values, message in (((None, "b", "x"), "No model"), (("a", None, "x"), "no reference for a"), (("a", "b", None), "empty"), (("a", ["b"], "x"), "no reference")):
        with pytest.raises(LayerscopeError, match=message):
            job_params(*values)


def test_shares_are_written_with_the_digits_that_matter():
    assert [percent(share) for share in (0, 0.000416, 0.0042, 0.061, 0.9789, 1)] == ["0 %", "0.042 %", "0.42 %", "6.1 %", "97.9 %", "100 %"]

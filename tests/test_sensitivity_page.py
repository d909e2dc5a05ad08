"""The Sensitivity page's pure parts: what the form comes to, what a run's pictures are drawn from, where a weight lies in its file, what a damaged run says."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
from dash import html

from backend.errors import LayerscopeError
from backend.model_files import ModelEntry
from backend.model_info import ModelInfo
from backend.reports.sensitivity_check import checked
from backend.reports.sensitivity_compare import compare_runs
from backend.reports.sensitivity_run import FOLDER, SensitivityRun, delete_run, manifests, open_run, run_folder
from backend.sensitivity_spec import GRADIENT_METRICS, METRICS, Spec
from backend.weight_places import place_in_file
from backend.weights import open_weights
from components import sensitivity_cards, sensitivity_request
from components.figures import sensitivity as figures
from components.sensitivity_comparison import overlaps, profiles
from components.sensitivity_known import known_line
from components.sensitivity_request import FIELDS, cost_words, form_values, metric_options, presets, read_spec
from components.sensitivity_tables import MOST_ROWS, compared_table, super_table, to_csv, top_csv, top_grid
from components.sensitivity_values import distribution, not_measured, sentence, statistic_map, weight_link
from components.weight_source import read_place
from tests.sensitivity_runs import write_run
from tests.test_cards import parts, problems, text_of, unnamed
from tests.tiny_models import TinyModel
from tests.web_app import web_app

HOSTILE = '<a href="javascript:alert(1)">x</a><br>%{z}'


def entry(kind: str = "hf", name: str = "m") -> ModelEntry:
    info = ModelInfo(name, name, kind, "mistral", n_layers=4, n_heads=2, n_kv_heads=2, d_model=8, d_head=4, d_mlp=16, d_vocab=10, n_ctx=64)
    return ModelEntry(name, kind, Path(name), "models folder", info)


@pytest.fixture
def run(tmp_path: Path) -> SensitivityRun:
    return checked(open_run(write_run(tmp_path / "run", n_layers=3)))


# -- the form ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(presets(False)))
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_preset_fills_the_form_with_what_reads_back_as_itself(name: str, kind: str):
    spec = presets(kind == "gguf")[name]
    values = form_values(spec)
    assert set(values) == set(FIELDS)
    read = read_spec(entry(kind), values)
    assert read == Spec(**{**spec.to_json(), "model": "m"})


def test_everything_that_the_form_can_say_is_in_the_spec():
    values = form_values(presets(False)["Quick look"]) | {
        "metric": "hutchinson", "mode": "global", "topk": 7, "perturb": "bit_flip", "bit": 30, "controls": ["bottom_k"], "seeds": "3, 1, 3", "layers": "1-2", "probes": 4,
        "components": ["mlp.W_out"], "samples": 5, "length": 64, "prune": "0.5,0.1", "extras": ["stability_check", "gradient_flow"],
    }  # fmt: skip
    wanted = Spec("m", "hutchinson", topk=7, mode="global", perturb="bit_flip", bit=30, controls=("bottom_k",), seeds=(3, 1), stability_check=True, prune=(0.1, 0.5),
                  gradient_flow=True, layers=(1, 2), components=("mlp.W_out",), max_samples=5, max_length=64, probes=4)  # fmt: skip
    assert read_spec(entry(), values) == wanted


def test_a_bit_that_is_not_flipped_is_no_part_of_the_spec():
    assert read_spec(entry(), form_values(presets(False)["Quick look"]) | {"bit": 3}).bit is None


@pytest.mark.parametrize(("field", "value", "said"), [
    ("metric", "vibes", "'vibes' is not one of magnitude"), ("topk", 0, "Top-k must be a whole number from 1 to 1,000,000, not '0'"), ("topk", None, "not 'None'"),
    ("seeds", "0, x", "Seeds '0, x'"), ("seeds", "", "Seeds ''"), ("prune", "0.1, 1.5", "Sparsities '0.1, 1.5' are not numbers between 0 and 1"), ("prune", "half", "Sparsities"),
    ("layers", "9", "There is no layer 9: the model has layers 0 to 3"), ("length", 4, "from 8 to 8,192"), ("samples", 1.5, "Windows"), ("perturb", "hit", "perturbation 'hit'"),
    ("seeds", ",".join(map(str, range(30))), "30 seeds, and the limit is 20"), ("scale", "big", "The scale must be a number"),
])  # fmt: skip
def test_a_field_that_is_wrong_is_one_sentence_with_the_value_and_the_limit(field: str, value: Any, said: str):
    with pytest.raises(LayerscopeError) as problem:
        read_spec(entry(), form_values(presets(False)["Quick look"]) | {field: value})
    assert said in str(problem.value)


def test_gradients_are_offered_where_the_engine_has_them_and_refused_with_the_metrics_that_there_are():
    disabled = {option["value"] for option in metric_options("gguf") if option["disabled"]}
    assert disabled == set(GRADIENT_METRICS) and not any(option["disabled"] for option in metric_options("hf"))
    assert {option["value"] for option in metric_options("hf")} == set(METRICS)
    with pytest.raises(LayerscopeError, match="can be ranked by magnitude, wanda, obs"):
        read_spec(entry("gguf"), form_values(presets(False)["Quick look"]))
    with pytest.raises(LayerscopeError, match="Gradient flow needs gradients"):
        read_spec(entry("gguf"), form_values(presets(True)["Quick look"]) | {"extras": ["gradient_flow"]})


def test_the_text_is_a_file_of_the_folder_of_texts_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sensitivity_request, "texts", lambda: ["mine.txt"])
    values = form_values(presets(False)["Quick look"])
    assert read_spec(entry(), values | {"text": "mine.txt"}).text == "mine.txt"
    for name in ("../secret.key", "other.txt", "/etc/passwd"):
        with pytest.raises(LayerscopeError, match="no file"):
            read_spec(entry(), values | {"text": name})


def test_a_model_that_publications_name_says_its_super_weights():
    llama = dataclasses.replace(entry("gguf").info, name="Meta-Llama-3-8B-Instruct-Q4_K_M", n_layers=32, d_model=4096, d_mlp=14336, d_vocab=128256, n_kv_heads=8)
    with web_app().server.test_request_context("/"):
        line = known_line(dataclasses.replace(entry("gguf", "llama.gguf"), info=llama))
        assert text_of(line).startswith("Published super weights of Llama 3 8B: layer 1 [788, 2427], layer 1 [1384, 2427], layer 1 [4062, 2427].")
        assert [each.href for each in parts(line) if getattr(each, "href", "")][0] == "/weights?model=llama.gguf&tensor=blocks.1.mlp.W_out"  # no such file here
        assert "of which only the shape fits" in text_of(known_line(dataclasses.replace(entry(), info=dataclasses.replace(llama, name="mine"))))
        assert known_line(entry()) is None and known_line(None) is None


def test_the_cost_counts_the_runs_over_the_text():
    spec = Spec("m", "wanda", seeds=(0, 1, 2), prune=(0.5,), max_samples=10, max_length=100, super_weights=True)
    words = cost_words(spec, [{"spec": {"metric": "obs"}, "seconds": {"a": 30.0, "b": 12.0}, "text": {"n_tokens": 900}}])
    assert "At most 10 windows of 100 tokens, 1,000 in all. Ranking: one pass over the text." in words
    assert "Perplexity: 7 runs over the text, more for super weights." in words  # baseline, top, three random, bottom, one sparsity
    assert words.endswith("The last run of this model (obs, 900 tokens) took 42 s.")
    assert "took" not in cost_words(spec, [{"spec": {"metric": "obs"}, "seconds": {"a": "long"}, "text": {"n_tokens": 900}}])


# -- where weights lie -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "gpt2", "phi3", "gpt_oss"])
@pytest.mark.parametrize("engine", ["hf", "gguf"])
def test_every_entry_is_found_in_the_stored_tensor(kind: str, engine: str, tiny_model: Callable[[str], TinyModel]):
    weights = open_weights(getattr(tiny_model(kind), engine))
    rng, seen = np.random.default_rng(0), 0
    for name in weights:
        if not name.startswith("blocks.") or weights.lazy(name).ndim < 2:
            continue
        values = weights[name]
        for flat in rng.integers(values.size, size=5):
            index = [int(i) for i in np.unravel_index(flat, values.shape)]
            place = place_in_file(weights, name, index[-2], index[-1], index[0] if len(index) == 3 else None)
            stored = weights.stored(place.tensor)
            matrices = stored[...].reshape(-1, *stored.shape[-2:])
            assert matrices[place.matrix, place.row, place.column] == values[tuple(index)], (name, index)
            seen += 1
    assert seen > 50


def test_a_place_outside_a_weight_is_named(tiny_mistral: TinyModel):
    weights = open_weights(tiny_mistral.hf)
    for row, column, expert in ((10**6, 0, None), (0, -1, None), (0, 0, 0)):
        with pytest.raises(LayerscopeError, match="has no entry"):
            place_in_file(weights, "blocks.0.mlp.W_out", row, column, expert)


def test_a_weights_link_leads_to_the_stored_place_and_without_the_model_to_its_name(run: SensitivityRun, tiny_mistral: TinyModel, monkeypatch: pytest.MonkeyPatch):
    row = {**run.top[0], "name": "blocks.1.attn.W_Q", "row": 3, "column": 5, "expert": None}
    run.manifest["model"]["name"] = "nowhere"
    with web_app().server.test_request_context("/"):
        query = parse_qs(urlparse(weight_link(run, row)).query)
        assert query == {"model": ["nowhere"], "tensor": ["blocks.1.attn.W_Q"]}
    weights = open_weights(tiny_mistral.gguf)
    monkeypatch.setattr("components.sensitivity_values.source", lambda _: type("Found", (), {"weights": weights}))
    place = place_in_file(weights, row["name"], 3, 5)
    query = parse_qs(urlparse(weight_link(run, row)).query)
    assert query["tensor"] == ["blk.1.attn_q.weight"] and query["mark"] == [f"{place.row},{place.column}"] and place.row != 3  # the converter reordered W_Q
    assert query["zoom"] == [f"{max(place.row - 24, 0)}-{place.row + 25},0-30"]


@pytest.mark.parametrize(("text", "place"), [("3,5", [3, 5]), ("3", None), ("3,x", None), ("-1,2", None), (None, None), ("9" * 30 + ",1", None)])
def test_a_place_in_an_address_is_read_or_left_out(text: str | None, place: list[int] | None):
    assert read_place(text) == place


# -- what is drawn -----------------------------------------------------------------------------------------------------------------------


def test_the_distribution_keeps_every_count_and_marks_where_each_layers_top_weights_begin(run: SensitivityRun):
    total = sum(sum(row["histogram"]["counts"]) for row in run.stats["tensors"])
    for group, n in (("component", 7), ("layer", 3)):
        edges, counts, names, cuts = distribution(run, group)
        assert len(names) == n and counts.sum() == pytest.approx(total)
        figure = figures.score_distribution(edges, counts, names, cuts)
        np.testing.assert_allclose(np.nansum(figure.data[1].z, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.sum(figure.data[0].y), 1, rtol=1e-5)
    assert cuts == [math.log10(min(row["score"] for row in run.top if row["layer"] == layer)) for layer in range(3)]
    np.testing.assert_allclose(figure.data[2].x, cuts, rtol=1e-6)
    run.stats["mode"] = "global"
    assert distribution(run, "component")[3] == [math.log10(min(row["score"] for row in run.top))]


def test_the_map_holds_the_statistic_of_its_tensor_and_gaps_where_there_is_none(run: SensitivityRun):
    run.stats["tensors"] = [row for row in run.stats["tensors"] if row["name"] != "blocks.1.attn.W_K"]
    values, layers, components = statistic_map(run, "p99")
    assert math.isnan(values[1, components.index("attn.W_K")]) and np.isnan(values).sum() == 1
    assert values[layers.index(2), components.index("mlp.W_out")] == next(row["p99"] for row in run.stats["tensors"] if row["name"] == "blocks.2.mlp.W_out")


def test_effects_have_their_ratio_and_interval_and_what_is_not_finite_is_left_out(run: SensitivityRun):
    found = run.stats["perturbation"]["runs"]
    figure = figures.effect_points(found)
    x = {trace.name: np.asarray(trace.x) for trace in figure.data}
    assert x["top"].tolist() == pytest.approx([3.2]) and len(x["random"]) == 3 and x["bottom"].tolist() == [1]
    bars = figure.data[0].error_x
    assert (bars.array[0], bars.arrayminus[0]) == pytest.approx((0.05 * 3.2, 0.05 * 3.2), rel=1e-5)
    infinite = figures.effect_points([{**found[0], "ratio": None, "ci": None}, *found[1:]])
    assert "top" not in {trace.name for trace in infinite.data}
    assert figures.effect_points([{**found[0], "ratio": None}]).layout.annotations[0].text == "No perplexity is finite."


def test_curves_of_overlap_and_pruning_are_those_of_the_run(run: SensitivityRun):
    overlap = figures.overlap_lines(run.stats["stability"]["ks"], run.stats["stability"]["pairs"])
    for line, pair in zip(overlap.data, run.stats["stability"]["pairs"], strict=True):
        np.testing.assert_allclose(line.y, list(pair["jaccard"].values()), rtol=1e-6)
    assert [line.name for line in overlap.data if line.showlegend] == list(figures.KINDS.values())
    band, line = figures.pruning_curve(run.stats["pruning"]["rows"]).data
    np.testing.assert_allclose(line.y, [1.3, 2.5], rtol=1e-6)
    np.testing.assert_allclose(band.y, [1.32, 2.6, 2.4, 1.28], rtol=1e-6)
    assert figures.pruning_curve([{"sparsity": 0.5, "zeros": 0.5, "ratio": None, "ci": None}]).layout.annotations[0].text.startswith("No perplexity")


def test_the_sentence_says_what_the_top_weights_did_and_what_is_missing(run: SensitivityRun):
    assert sentence(run) == ("Flipping the sign of the 20 top weights of demo-dense by grad_x_weight: perplexity × 3.2; as many at random × 1.012, at the bottom × 1.")
    assert not_measured(run) == []
    run.stats["perturbation"] = None
    assert sentence(run) == "60 weights of demo-dense ranked by grad_x_weight." and not_measured(run) == ["perturbation"]


def test_runs_are_compared_by_what_the_comparison_says(run: SensitivityRun, tmp_path: Path):
    other, deeper = (checked(open_run(write_run(tmp_path / str(n), metric=metric, n_layers=n))) for metric, n in (("wanda", 3), ("obs", 5)))
    found = compare_runs([run, other, deeper])
    values = overlaps(found)
    sets = [{(row["name"], row["row"], row["column"]) for row in each.top} for each in (run, other)]
    assert values[0, 1] == values[1, 0] == pytest.approx(len(sets[0] & sets[1]) / len(sets[0] | sets[1])) and np.isnan(values[2, :2]).all() and values[2, 2] == 1
    places, shares = profiles(found, "layer")
    totals = np.array([sum(row["mean"] * row["n"] for row in run.stats["tensors"] if row["layer"] == layer) for layer in range(3)])
    assert places == ["L0", "L1", "L2", "L3", "L4"] and np.isnan(shares[0, 3:]).all()
    np.testing.assert_allclose(shares[0, :3], totals / totals.sum())
    places, shares = profiles(found, "component")
    assert shares[1, places.index("mlp.W_out")] == sum(row["component"] == "mlp.W_out" for row in other.top) / len(other.top)
    table = compared_table(found, ["a", "b", "c"])
    rows = [[text_of(cell) for cell in row.children] for row in table.children.children[1].children]
    assert [row[0] for row in rows] == ["1 and 2", "1 and 3", "2 and 3"] and rows[0][4] == f"{values[0, 1]:.3f}" and rows[1][1] == "–" and rows[0][8].startswith("× 1 [")


def test_the_table_has_the_best_of_every_layer_first_and_the_file_has_all(run: SensitivityRun):
    rows = top_grid(run).rowData
    assert [row["rank"] for row in rows[:4]] == [1, 1, 1, 2] and rows[0]["score"] == max(row["score"] for row in run.top)
    assert len(rows) == len(run.top) < MOST_ROWS and run.top[int(rows[5]["id"])]["score"] == rows[5]["score"]
    read = list(csv.DictReader(io.StringIO(top_csv(run))))
    assert len(read) == len(run.top) and float(read[7]["score"]) == run.top[7]["score"]
    assert to_csv(["a"], [["=1+1"]]) == "a\n'=1+1\n"


# -- cards, and hostile or damaged runs ---------------------------------------------------------------------------------------------------


def cards_of(run: SensitivityRun) -> html.Div:
    with web_app().server.test_request_context("/"):
        return html.Div(sensitivity_cards.run_cards(run, "run", {}))


def test_every_card_has_what_a_card_needs_and_a_row_is_never_half_empty(run: SensitivityRun):
    shown = cards_of(run)
    sections = [each for each in parts(shown) if isinstance(each, html.Section)]
    assert len(sections) == 11
    assert {text_of(section)[:40]: problems(section) for section in sections if problems(section)} == {}
    assert unnamed(shown) == []
    for absent in ("stability", "gradient_flow", "pruning"):
        run.stats[absent] = None
        grid = [each for each in parts(cards_of(run)) if getattr(each, "className", "") == "cards"][0]
        assert sum("wide" not in section.className for section in grid.children) % 2 == 0
        assert absent.replace("_", " ") in text_of(cards_of(run))  # under "Not measured"


def test_the_command_repeats_the_run(run: SensitivityRun):
    assert sensitivity_cards.command_line(run) == "python -m backend sensitivity"
    run.manifest["command"] = []
    words = sensitivity_cards.command_line(run)
    assert words.startswith("python -m backend sensitivity --model demo-dense --metric grad_x_weight --topk 20 --mode per_layer --perturb sign_flip")
    assert "--controls random_k,bottom_k --seeds 0,1,2 --stability-check" in words and "--layers" not in words and "--bit" not in words
    run.manifest["spec"]["model"] = "a b; rm"
    run.manifest["spec"]["controls"] = []
    assert "--model 'a b; rm'" in sensitivity_cards.command_line(run) and "--controls none" in sensitivity_cards.command_line(run)


def test_names_of_a_hostile_run_are_text_everywhere(tmp_path: Path):
    folder = write_run(tmp_path / "run", n_layers=2)
    stats = json.loads((folder / "sensitivity_stats.json").read_text())
    for row in stats["tensors"]:
        row["component"] = HOSTILE
    stats["stability"]["pairs"][0]["a"] = HOSTILE
    stats["gradient_flow"]["components"] = [HOSTILE] * 7
    stats["super_weights"]["candidates"][0]["name"] = HOSTILE
    (folder / "sensitivity_stats.json").write_text(json.dumps(stats))
    run = checked(open_run(folder))
    edges, counts, names, cuts = distribution(run, "component")
    places, shares = [HOSTILE], np.ones((2, 1))
    for figure in (figures.score_distribution(edges, counts, names, cuts), figures.overlap_lines([5], stats["stability"]["pairs"]),
                   figures.profile_lines(shares, places, [HOSTILE, "b"], "component", "share"),
                   figures.depth_cells(np.ones((1, 1)), [HOSTILE], [HOSTILE], "u", np.full((1, 1), ""))):  # fmt: skip
        said = figure.to_json()
        assert "<a href" not in said and "\\u003ca href" not in said
        assert not any("javascript" in (getattr(trace, "hovertemplate", "") or "") for trace in figure.data)
    with web_app().server.test_request_context("/"):
        link = next(each for each in parts(super_table(run)) if getattr(each, "href", ""))
    assert link.href.startswith("/weights?model=demo-dense&tensor=%3Ca+href")


@pytest.mark.parametrize(("path", "value", "said"), [
    (("stats", "tensors", 0, "p99"), "x", "statistics.tensors[0].p99 is not a finite number"), (("manifest", "spec", "topk"), None, "manifest.spec.topk is not a whole number"),
    (("stats", "perturbation", "runs", 0, "selection"), "all", "selection is 'all', not one of top_k"), (("stats", "stability", "pairs", 0, "kind"), "x", "not one of seed"),
    (("stats", "pruning", "rows", 0, "divergence"), [], "not of as many layers each"), (("stats", "super_weights", "candidates", 0, "status"), "maybe", "not one of published"),
    (("stats", "super_weights", "published"), [{"layer": 1}], "published[0] has no 'row'"), (("stats", "perturbation", "bit"), -1, "perturbation.bit is not a whole number"),
])  # fmt: skip
def test_a_run_that_is_not_what_it_should_be_is_one_sentence(run: SensitivityRun, path: tuple[Any, ...], value: Any, said: str):
    at: Any = {"manifest": run.manifest, "stats": run.stats}
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(LayerscopeError) as problem:
        checked(run)
    assert said in str(problem.value) and "is damaged: " in str(problem.value)


def test_a_run_is_found_and_deleted_by_its_id_and_nothing_else_is(tmp_path: Path):
    data, outside = tmp_path / "data", tmp_path / "outside"
    write_run(data / FOLDER / "one")
    write_run(data / FOLDER / "two", metric="wanda")
    write_run(outside)
    (data / FOLDER / "link").symlink_to(outside)
    assert [each["folder"] for each in manifests(data)] == ["two", "one", "link"] or {each["folder"] for each in manifests(data)} == {"one", "two", "link"}
    for bad in ("../outside", "..", ".", "", "one/../two", "a" * 65, "link", "three", "one\0"):
        with pytest.raises(LayerscopeError):
            delete_run(data, bad)
    delete_run(data, "one")
    assert [path.name for path in (data / FOLDER).iterdir() if path.name != "link"] == ["two"] and (outside / "manifest.json").is_file()
    with pytest.raises(LayerscopeError, match="There is no sensitivity run 'one'; it may have been deleted"):
        run_folder(data, "one")


def test_a_list_leaves_out_what_says_nothing_readable(tmp_path: Path):
    write_run(tmp_path / FOLDER / "good")
    for name, text in (("broken", "{"), ("strange", json.dumps({"spec": 5, "model": {}, "created": ""})), ("names", json.dumps({"spec": {"metric": 1}, "model": {"name": 2}}))):
        (tmp_path / FOLDER / name).mkdir()
        (tmp_path / FOLDER / name / "manifest.json").write_text(text)
    assert [each["folder"] for each in manifests(tmp_path)] == ["good"]

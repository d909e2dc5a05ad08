"""The comparison of sensitivity runs and its document: numbers by hand, text of a stranger as text, and bad input in a sentence."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from backend.analysis.significance import overlap
from backend.commands.sensitivity_compare import register
from backend.errors import LayerscopeError
from backend.reports.sensitivity_compare import FAMILIES, SCHEMA, compare_runs, open_runs
from backend.reports.sensitivity_report import report_bytes, write_report
from backend.reports.sensitivity_run import SensitivityRun, open_run
from backend.reports.sensitivity_text import summary
from tests.sensitivity_runs import write_run


def three_runs(folder: Path) -> list[SensitivityRun]:
    """Two metrics of one model, and another model of another depth."""
    for name, metric, model, n_layers in (("a", "grad_x_weight", "demo-dense", 4), ("b", "wanda", "demo-dense", 4), ("c", "magnitude", "other", 12)):
        write_run(folder / name, metric=metric, model=model, n_layers=n_layers)
    return open_runs([folder])


def edit(run: SensitivityRun, file: str, change: Callable[[dict[str, Any]], Any]) -> SensitivityRun:
    path = run.folder / file
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return open_run(run.folder)


def pdf_text(data: bytes) -> str:
    """The text that the pages show: strings of the content streams. The type keeps ASCII letters as they are; others become a dot."""
    shown = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", data, re.S):
        try:
            content = zlib.decompress(base64.a85decode(b"<~" + stream.strip().removeprefix(b"<~"), adobe=True))
        except (ValueError, zlib.error):
            continue  # fonts and pictures
        if b" Tf" not in content:
            continue
        for line in re.findall(rb"((?:\((?:\\.|[^\\()])*\) Tj[^(]*?)+)T\*", content, re.S):
            parts = re.findall(rb"\(((?:\\.|[^\\()])*)\) Tj", line)
            shown.append(re.sub(rb"\\(\d{3})", b".", b"".join(parts)).replace(b"\\(", b"(").replace(b"\\)", b")").decode("latin-1"))
    return " ".join(" ".join(shown).split())


# -- comparison ----------------------------------------------------------------------------------------------------------------


def test_a_comparison_is_what_its_schema_says(tmp_path: Path) -> None:
    found = compare_runs(three_runs(tmp_path))
    json.dumps(found, allow_nan=False)
    assert found["schema"] == SCHEMA and found["correction"]["method"] == "Holm"
    assert [pair["runs"] for pair in found["agreement"]] == [[0, 1], [0, 2], [1, 2]]
    for name, family in found["correction"]["families"].items():
        mine = [test for test in found["tests"] if test["family"] == name]
        assert len(mine) == family["n_tests"] and all(test["p"] <= test["p_adjusted"] <= 1 for test in mine)
    assert {test["family"] for test in found["tests"]} <= set(FAMILIES)
    assert max(test["p_adjusted"] for test in found["tests"] if test["significant"]) < 0.05 <= min(test["p_adjusted"] for test in found["tests"] if not test["significant"])


def test_correction_is_over_the_family(tmp_path: Path) -> None:
    found = compare_runs(three_runs(tmp_path))
    p = sorted((test["p"], test["p_adjusted"]) for test in found["tests"] if test["family"] == "components")
    assert [adjusted for _, adjusted in p] == pytest.approx([min(3 * p[0][0], 1), max(2 * p[1][0], 3 * p[0][0]), max(p[2][0], 2 * p[1][0], 3 * p[0][0])])
    other = compare_runs(open_runs([tmp_path]), "benjamini-hochberg")
    assert other["correction"]["method"] == "Benjamini-Hochberg"


def test_overlap_of_two_runs_by_hand(tmp_path: Path) -> None:
    a = open_run(write_run(tmp_path / "a", k=20))
    b = open_run(write_run(tmp_path / "b", metric="wanda", k=20))
    lines, other = (run.folder.joinpath("top_weights.csv").read_text().splitlines() for run in (a, b))
    place = lambda line: [line.split(",")[at] for at in (2, 3, 4, 5, 6, 7)]  # noqa: E731 (name, layer, component, expert, row, column)
    for at in (1, 2, 3, 25):  # ranks 1, 2, 3 of layer 0 and 5 of layer 1 become the other's, whose rank they keep
        cells = other[at].split(",")
        cells[2:8] = place(lines[at])
        other[at] = ",".join(cells)
    b.folder.joinpath("top_weights.csv").write_text("\n".join(other) + "\n")
    rows = {row["k"]: row for row in compare_runs([a, open_run(b.folder)])["agreement"][0]["weights"]["overlap"]}
    assert [(k, row["both"], row["n_a"]) for k, row in rows.items()] == [(1, 1, 4), (3, 3, 12), (10, 4, 40), (20, 4, 80)]
    assert rows[20]["jaccard"] == pytest.approx(4 / (80 + 80 - 4))
    assert rows[20]["expected"] == pytest.approx(4 * 20 * 20 / (7 * 4096))
    found = compare_runs([a, open_run(b.folder)])
    assert found["tests"][rows[20]["test"]]["p"] == pytest.approx(overlap([7 * 4096] * 4, [20] * 4, [20] * 4, 4).p)
    assert found["agreement"][0]["weights"]["scores"]["n"] == 4


def test_models_that_differ_are_compared_by_profile_alone(tmp_path: Path) -> None:
    found = compare_runs(three_runs(tmp_path))
    one, other = found["agreement"][0], found["agreement"][1]
    assert one["one_model"] and one["weights"]["n_tensors"] == 28 and one["profile"] == {**one["profile"], "over": "tensors", "n": 28}
    assert not other["one_model"] and other["weights"] is None and other["profile"]["over"] == "7 components at 4 relative depths"
    assert any("are not compared one by one" in note for note in found["notes"])
    assert one["profile"]["spearman"] > 0.8, "scores of the drawn runs rise with the layer"


def test_shares_and_controls_by_hand(tmp_path: Path) -> None:
    runs = three_runs(tmp_path)
    found = compare_runs(runs)
    listed = found["components"][0]["components"]
    assert sum(each["n_top"] for each in listed) == 80 and all(each["share_of_weights"] == pytest.approx(1 / 7) for each in listed)
    out = next(each for each in listed if each["component"] == "mlp.W_out")
    assert out["n_top"] == sum(row["component"] == "mlp.W_out" for row in runs[0].top) and out["enrichment"] == pytest.approx(7 * out["n_top"] / 80)
    bottom = next(each for each in found["controls"] if each["run"] == 0 and each["control"] == "bottom_k")
    error = math.log(1.05 / 0.95) / (2 * 1.959963984540054)
    assert bottom["ratio_of_ratios"] == pytest.approx(3.2) and bottom["z"] == pytest.approx(math.log(3.2) / (error * math.sqrt(2)))
    random = next(each for each in found["controls"] if each["run"] == 0 and each["control"] == "random_k")
    assert found["tests"][random["rank_test"]]["p"] == 0.25 and random["n_control"] == 3


def test_a_null_part_makes_no_test(tmp_path: Path) -> None:
    runs = [edit(run, "sensitivity_stats.json", lambda stats: stats.update(perturbation=None, stability=None)) for run in three_runs(tmp_path)]
    found = compare_runs(runs)
    assert not found["controls"] and not found["between"] and "top against controls" not in found["correction"]["families"]


def test_bad_comparisons_are_one_sentence(tmp_path: Path) -> None:
    runs = three_runs(tmp_path)
    with pytest.raises(LayerscopeError, match="there is only one"):
        compare_runs(runs[:1])
    with pytest.raises(LayerscopeError, match="is there twice"):
        compare_runs([runs[0], runs[0]])
    with pytest.raises(LayerscopeError, match="'sidak' is not one of holm, benjamini-hochberg"):
        compare_runs(runs, "sidak")
    text = runs[0].folder.joinpath("top_weights.csv").read_text().replace("blocks.0.", "blocks.9.")
    runs[0].folder.joinpath("top_weights.csv").write_text(text)
    with pytest.raises(LayerscopeError, match="is damaged: a top weight of"):
        compare_runs([open_run(runs[0].folder), runs[1]])


# -- document ------------------------------------------------------------------------------------------------------------------


def test_the_document_holds_the_numbers(tmp_path: Path) -> None:
    runs = three_runs(tmp_path)
    write_report(runs, tmp_path / "report.pdf")
    said = pdf_text((tmp_path / "report.pdf").read_bytes())
    assert "Sensitivity report" in said and "3 runs: demo-dense, other" in said
    for run in runs:
        assert run.id in said
        assert f"{max(row['score'] for row in run.top):.4g}" in said, "the largest score"
    assert "multiply perplexity: top k by 3.20 (95 % CI 3.04 to 3.36)" in said
    assert "python -m backend sensitivity" in said and "corrected by Holm within each family of tests" in said
    assert said.count("perplexity / baseline (4.48)") == 3 and "80 top weights" in said, "figures are text, too"
    assert "3. other, magnitude" in said and "7 components at 4 relative depths" in said
    pages = re.findall(r"Page (\d+) of (\d+)", said)
    assert [int(page) for page, _ in pages] == list(range(1, int(pages[0][1]) + 1))


def test_equal_runs_give_an_equal_document(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run"))
    assert report_bytes([run]) == report_bytes([run])


def test_one_run_has_no_comparison_and_a_bare_one_says_what_it_lacks(tmp_path: Path) -> None:
    def bare(stats: dict[str, Any]) -> None:
        stats.update(dict.fromkeys(("perturbation", "stability", "pruning", "gradient_flow", "super_weights")))

    run = edit(open_run(write_run(tmp_path / "run")), "sensitivity_stats.json", bare)
    said = pdf_text(report_bytes([run]))
    assert "Comparison of the runs" not in said
    assert "There is no figure perturbation_effects: perturbation was not measured in this run." in said


def test_text_of_a_stranger_is_text(tmp_path: Path) -> None:
    hostile = "<b>x</i>&lt; <img src='/etc/passwd'/> $\\frac{"

    def named(stats: dict[str, Any]) -> None:
        for row in stats["tensors"]:
            row["component"] = hostile + row["component"]

    run = open_run(write_run(tmp_path / "run", model=hostile))
    edit(run, "sensitivity_stats.json", named)
    edit(run, "manifest.json", lambda manifest: manifest.update(notes=["<para>note & note", "a" * 5000], command=["python", "--model", hostile]))
    said = pdf_text(report_bytes([open_run(run.folder)]))
    assert "1. <b>x</i>&lt; <img src='/etc/passwd'/> $" in said and "<para>note & note" in said
    assert summary(open_run(run.folder)).count(hostile) == 2


# -- commands ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def call() -> Callable[..., Any]:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    register(app)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_compare_writes_its_file_once(tmp_path: Path, call: Callable[..., Any]) -> None:
    three_runs(tmp_path / "runs")
    output = tmp_path / "statistical_analysis.json"
    found = call("compare", "--result-dirs", tmp_path / "runs" / "a", tmp_path / "runs" / "b", "--output", output)
    assert found.exit_code == 0 and found.output.startswith("2 runs compared:") and "Holm's correction" in found.output
    first = output.read_bytes()
    assert json.loads(first)["schema"] == SCHEMA
    again = call("compare", "--result-dirs", tmp_path / "runs", "--output", output)
    assert isinstance(again.exception, LayerscopeError) and "exists and is not replaced" in str(again.exception) and output.read_bytes() == first
    assert call("compare", "--result-dirs", tmp_path / "runs", "--output", output, "--force").exit_code == 0
    assert len(json.loads(output.read_bytes())["runs"]) == 3


def test_report_writes_a_document(tmp_path: Path, call: Callable[..., Any]) -> None:
    write_run(tmp_path / "runs" / "a")
    found = call("report", "--input-dirs", tmp_path / "runs", "--output", tmp_path / "report.pdf")
    assert found.exit_code == 0 and found.output == f"1 run written to {tmp_path / 'report.pdf'}\n"
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF-")


@pytest.mark.parametrize("words, sentence", [
    (("compare", "--result-dirs", "{}/runs/a", "--output", "{}/x.json"), "there is only one"),
    (("compare", "--result-dirs", "{}/none", "--output", "{}/x.json"), "There is no folder"),
    (("compare", "--result-dirs", "{}/empty", "--output", "{}/x.json"), "holds no sensitivity run, nor does a folder in it"),
    (("compare", "--result-dirs", "{}/runs", "{}/damaged", "--output", "{}/x.json"), "no valid JSON"),
    (("compare", "--result-dirs", "{}/runs", "--output", "{}/none/x.json"), "There is no folder"),
    (("report", "--input-dirs", "{}/runs", "--output", "{}/empty"), "is a folder; name a file"),
    (("report", "--input-dirs", "{}/runs", "--output", "{}/x.pdf", "--correction", "none"), "'none' is not one of"),
])  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path: Path, call: Callable[..., Any], words: tuple[str, ...], sentence: str) -> None:
    write_run(tmp_path / "runs" / "a")
    (write_run(tmp_path / "damaged" / "b", metric="wanda") / "sensitivity_stats.json").write_text("{")
    (tmp_path / "empty").mkdir()
    if "--correction" in words:
        write_run(tmp_path / "runs" / "b", metric="wanda")
    found = call(*(word.format(tmp_path) for word in words))
    assert isinstance(found.exception, LayerscopeError) and sentence in str(found.exception)
    assert not (tmp_path / "x.json").exists() and not (tmp_path / "x.pdf").exists()

"""A sensitivity run's folder is read back as it was written, and a damaged one is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backend.errors import LayerscopeError
from backend.reports.sensitivity_run import FOLDER, open_run, runs
from tests.sensitivity_runs import write_run


def test_a_run_is_read_with_numbers_as_numbers(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", k=3))
    assert run.label == "demo-dense, grad_x_weight"
    first = run.top[0]
    assert (first["rank"], first["layer"], first["expert"]) == (1, 0, None)
    assert first["score"] > run.top[1]["score"] > 0


def test_runs_of_the_page_are_listed_newest_first_and_damaged_ones_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / FOLDER / "a", metric="wanda")
    write_run(tmp_path / FOLDER / "b", metric="magnitude")
    (write_run(tmp_path / FOLDER / "c") / "sensitivity_stats.json").write_text("{")
    assert [run.stats["metric"] for run in runs(tmp_path)] == ["magnitude", "wanda"]


@pytest.mark.parametrize("file, text, sentence", [
    ("manifest.json", json.dumps({"schema": "other/9"}), "schema"),
    ("sensitivity_stats.json", "[1]", "not an object"),
    ("top_weights.csv", "rank,name\n1,x\n", "no column"),
    ("top_weights.csv", "scope,rank,name,layer,component,expert,row,column,value,score,percentile\n0,one,x,0,c,,1,1,1,1,1\n", "damaged"),
])  # fmt: skip
def test_a_damaged_run_is_refused_in_a_sentence(tmp_path: Path, file: str, text: str, sentence: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / file).write_text(text)
    with pytest.raises(LayerscopeError, match=sentence):
        open_run(folder)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(LayerscopeError, match="no sensitivity run"):
        open_run(tmp_path)

"""Printed figures of a sensitivity run: what they say is what the run says, equal runs give equal bytes, and what is missing is said, not drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from backend.analysis.sensitivity_profiles import pooled, profile, resampled
from backend.errors import LayerscopeError
from backend.reports.plot_style import drawing, label, printable
from backend.reports.sensitivity_check import checked
from backend.reports.sensitivity_plots import PLOTS, figures, left_out, save_plots
from backend.reports.sensitivity_run import SensitivityRun, open_run
from tests.sensitivity_runs import write_run


def changed(folder: Path, change: Callable[[dict[str, Any]], None], file: str = "sensitivity_stats.json") -> SensitivityRun:
    path = folder / file
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return open_run(folder)


# -- tables --------------------------------------------------------------------------------------------------------------------


def test_a_profile_by_hand() -> None:
    table = profile(["a", "a", "b", "a"], [0, 1, 0, 0], [10, 5, 2, 30], [1.0, 4.0, np.nan, 2.0], [3.0, 9.0, np.nan, 8.0], [1, 2, 0, 3])
    assert (table.components, table.layers) == (("a", "b"), (0, 1))
    np.testing.assert_allclose(table.n, [[40, 5], [2, 0]])
    np.testing.assert_allclose(table.mean, [[(10 * 1 + 30 * 2) / 40, 4], [np.nan, np.nan]])
    np.testing.assert_allclose(table.maximum, [[8, 9], [np.nan, np.nan]])
    np.testing.assert_allclose(table.top, [[4, 2], [0, 0]])
    np.testing.assert_allclose(table.layer_mean, [1.75, 4])  # b has no mean, and no weight in the layer's
    np.testing.assert_allclose(table.layer_total, [70, 20])


def test_pooled_histograms_keep_every_entry_and_split_bins_evenly() -> None:
    onto = np.array([0.0, 1.0, 2.0, 3.0])
    found = pooled([[0.0, 2.0], [0.5, 1.5, 2.5], []], [[10], [4, 8], []], onto)
    np.testing.assert_allclose(found, [5 + 2, 5 + 2 + 4, 4])
    assert found.sum() == 22


def test_a_resampled_profile_is_linear_between_relative_depths() -> None:
    four = np.array([[0.125, 0.375, 0.625, 0.875], [1.0, np.nan, 1.0, 1.0]])  # the relative depths of four layers themselves
    np.testing.assert_allclose(resampled(four, 2), [[0.25, 0.75], [np.nan, np.nan]])
    np.testing.assert_allclose(resampled(four[:1], 4), four[:1])


# -- figures -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layers", [1, 80])
def test_every_figure_is_drawn_at_300_dpi(tmp_path: Path, n_layers: int) -> None:
    paths = save_plots(open_run(write_run(tmp_path / "run", n_layers=n_layers)), tmp_path)
    assert [path.stem for path in paths] == list(PLOTS)
    for path in paths:
        with Image.open(path) as picture:
            assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.1)
            assert picture.width in (1020, 2100), "one or two columns"
            assert len(picture.getcolors(1 << 24) or ()) > 20


def test_equal_runs_give_equal_bytes_whatever_the_settings_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(write_run(tmp_path / "run"))
    kinds = ("png", "pdf", "svg")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    before = save_plots(run, tmp_path / "a", kinds)
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "text.color": "red"}):
        after = save_plots(run, tmp_path / "b", kinds)
        assert matplotlib.rcParams["font.size"] == 20, "the process has its settings back"
    assert len(before) == 3 * len(PLOTS)
    assert [path.read_bytes() for path in before] == [path.read_bytes() for path in after]
    assert not any(re.search(rb"CreationDate|dc:date|Matplotlib v", path.read_bytes()) for path in before)


def test_vectors_hold_text_as_text(tmp_path: Path) -> None:
    paths = {path.name: path for path in save_plots(open_run(write_run(tmp_path / "run")), tmp_path, ("pdf", "svg"))}
    assert "random k" in paths["perturbation_effects.svg"].read_text() and "mlp.W_out" in paths["gradient_flow.svg"].read_text()
    assert b"/FontFile2" in paths["perturbation_effects.pdf"].read_bytes() and b"/Type3" not in paths["perturbation_effects.pdf"].read_bytes()


def test_the_figures_say_what_the_run_says(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", k=20))
    with drawing():
        made = figures(run)
        axes = made["perturbation_effects"].axes[0]
        said = {text.get_text() for text in axes.texts}
        points = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
        heat = made["sensitivity_heatmap"].axes[1].images[0].get_array()
        bars = made["layer_comparison"].axes[2].get_title("left")
    assert "\u00d73.20\n[3.04, 3.36]" in said and "\u00d71.010 to 1.014" in said
    assert axes.get_title("left") == "sign flip, k = 20" and axes.get_xlabel() == "perplexity / baseline (4.48)"
    assert 3.2 in points and 1.0 in points
    assert int(heat.sum()) == len(run.top) == 80 and bars == "80 top weights"
    layer, component = 2, list(dict.fromkeys(row["component"] for row in run.stats["tensors"])).index("mlp.W_out")
    assert heat[component, layer] == sum(row["name"] == "blocks.2.mlp.W_out" for row in run.top)


def test_an_axis_is_logarithmic_only_where_ratios_span_decades(tmp_path: Path) -> None:
    def catastrophic(stats: dict[str, Any]) -> None:
        stats["perturbation"]["runs"][0].update(ratio=763.0, ci=[500.0, 1200.0])

    with drawing():
        assert figures(open_run(write_run(tmp_path / "a")))["perturbation_effects"].axes[0].get_xscale() == "linear"
        assert figures(changed(write_run(tmp_path / "b"), catastrophic))["perturbation_effects"].axes[0].get_xscale() == "log"


@pytest.mark.parametrize("part, figure", [("perturbation", "perturbation_effects"), ("stability", "stability_analysis"), ("pruning", "pruning"), ("gradient_flow", "gradient_flow"),
                                          ("super_weights", "super_weights")])  # fmt: skip
def test_what_a_run_lacks_is_said_and_not_drawn(tmp_path: Path, part: str, figure: str) -> None:
    run = changed(write_run(tmp_path / "run"), lambda stats: stats.update({part: None}))
    assert list(left_out(run)) == [figure] and "not measured" in left_out(run)[figure]
    assert [path.stem for path in save_plots(run, tmp_path)] == [name for name in PLOTS if name != figure]
    assert not (tmp_path / f"{figure}.png").exists()


def test_numbers_that_are_null_leave_gaps_and_no_figure_without_any(tmp_path: Path) -> None:
    def some(stats: dict[str, Any]) -> None:
        stats["perturbation"]["runs"][1].update(nll=None, perplexity=None, ratio=None, ci=None)
        stats["perturbation"]["runs"][2].update(ci=None)
        stats["stability"]["pairs"][0].update(spearman=None, jaccard={"5": None, "10": 0.5})
        stats["tensors"][3].update(mean=None, max=None, histogram={"log10_edges": [], "counts": []})
        stats["pruning"]["rows"][0].update(ratio=None, ci=None, divergence=[None] * 4)
        stats["gradient_flow"]["norm"][0] = [None] * 4
        stats["super_weights"]["candidates"][0].update(ratio=None, ci=None, input_spike=None)
        stats["super_weights"]["random"] = None

    run = changed(write_run(tmp_path / "run"), some)
    assert len(save_plots(run, tmp_path)) == len(PLOTS)
    none = changed(write_run(tmp_path / "none"), lambda stats: [row.update(ratio=None) for row in stats["perturbation"]["runs"]] and None)
    assert "no finite number" in left_out(none)["perturbation_effects"]


def test_names_of_a_stranger_are_shown_as_they_are(tmp_path: Path) -> None:
    def hostile(stats: dict[str, Any]) -> None:
        for row in stats["tensors"]:
            row["component"] = "$\\frac{x$<b>\n" + row["component"]
        stats["metric"], stats["perturbation"]["op"] = "$x^{$", "$\\bad$"

    run = changed(write_run(tmp_path / "run"), hostile)
    assert len(save_plots(run, tmp_path, ("png", "svg"))) == 2 * len(PLOTS)
    assert "$\\frac{x$&lt;b&gt;" in (tmp_path / "layer_comparison.svg").read_text()
    assert label("a$b$") == r"a\$b\$" and printable("x" * 70, 10) == "x" * 9 + "\u2026" and printable("a\nb\x00\u4f60") == "a b\ufffd\ufffd"


# -- bad input -----------------------------------------------------------------------------------------------------------------


def _fewer_edges(stats: dict[str, Any]) -> None:
    stats["tensors"][0]["histogram"]["log10_edges"].pop()


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s["tensors"][0].update(layer="0"), r"tensors\[0\].layer is not a whole number from 0 or null"),
    (lambda s: s["tensors"][0].update(mean=float("inf")), "mean is not a finite number"),
    (lambda s: s["tensors"][0].pop("n_top"), "has no 'n_top'"),
    (_fewer_edges, "40 counts and 40 edges"),
    (lambda s: s["perturbation"]["runs"][0].update(ci=[2.0, 1.0]), "ci is not"),
    (lambda s: s["gradient_flow"]["norm"].pop(), "not 7 components x 4 layers"),
    (lambda s: s["stability"]["pairs"][0]["jaccard"].update(x=1), "whole k"),
    (lambda s: s.update(tensors=[{}] * 100_001), "at most 100,000"),
    (lambda s: s["tensors"][0].update(layer=10**9), "layers are the limit"),
])  # fmt: skip
def test_a_damaged_run_is_one_sentence(tmp_path: Path, change: Callable[[dict[str, Any]], None], sentence: str) -> None:
    run = changed(write_run(tmp_path / "run"), change)
    with pytest.raises(LayerscopeError, match=sentence):
        save_plots(run, tmp_path)
    with pytest.raises(LayerscopeError, match="is damaged"):
        checked(run)


def test_formats_and_folders_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run"))
    with pytest.raises(LayerscopeError, match="'gif'; they can as png, pdf, svg"):
        save_plots(run, tmp_path, ("gif",))
    with pytest.raises(LayerscopeError, match="cannot be written"):
        save_plots(run, tmp_path / "none")

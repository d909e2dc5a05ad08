"""Claims about the weight report: NumPy's numbers for every type that can be stored, in little memory, kept by file, and bad files in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy import stats

from backend.analysis.weights import bin_edges
from backend.derived import Derived
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import KINDS, Context, weight_report
from backend.experiments.weight_report import tensor_detail
from backend.files.gguf_header import read_header
from backend.library import Library
from backend.model_files import identity
from backend.reports.weight_matrix import Matrix, n_matrices
from backend.reports.weight_results import TensorDetail, WeightReport
from backend.weights import PIECE, open_weights
from tests.tiny_models import TinyModel
from tests.web_app import web_app

Types = gguf.GGMLQuantizationType
WIDTH = 512  # two blocks of the longest types


def quantized_types() -> list[Types]:
    """Every type that gguf.quants.quantize can write."""
    found = []
    for kind in Types:
        try:
            gguf.quants.quantize(np.zeros((1, WIDTH), np.float32), kind)
        except (NotImplementedError, ValueError):
            continue
        found.append(kind)
    return found


WRITABLE = quantized_types()


def write(path: Path, tensors: dict[str, tuple[NDArray[Any], Types]]) -> Path:
    """A GGUF file with one layer, its embedding and these tensors, stored as they are."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64), (writer.add_embedding_length, WIDTH), (writer.add_block_count, 1), (writer.add_feed_forward_length, WIDTH),
        (writer.add_head_count, 4), (writer.add_head_count_kv, 4),
    ):  # fmt: skip
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.random.default_rng(1).normal(size=(9, WIDTH)).astype(np.float32))
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def heavy(rows: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_t(3, (rows, WIDTH)) * 0.03 + 0.001).astype(np.float32)


def check(row: dict[str, Any], bins: NDArray[Any], values: NDArray[Any]) -> None:
    """A row of the report against NumPy on the whole dequantized tensor, in float64."""
    x = values[np.isfinite(values)].astype(np.float64)
    mean, std = x.mean(), x.std()
    want = {
        "mean": mean, "std": std, "min": x.min(), "max": x.max(), "abs_max": np.abs(x).max(), "kurtosis": stats.kurtosis(x, fisher=False), "l2": np.linalg.norm(x),
        "near_zero": np.mean(np.abs(x) <= 0.01 * std), "outliers": np.sum(np.abs(x - mean) > 6 * std), "n_nan": np.isnan(values).sum(), "n_inf": np.isinf(values).sum(),
    }  # fmt: skip
    for name, number in want.items():
        assert row[name] == pytest.approx(number, rel=1e-6, abs=1e-12), (row["name"], name)
    assert np.array_equal(bins, np.histogram(x, bin_edges(row["exponent"]))[0]), row["name"]
    at, largest = row["largest"][0]
    assert abs(largest) == row["abs_max"] and values[tuple(at)] == np.float32(largest)


def test_gguf_can_write_the_types_that_matter() -> None:
    assert {"F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0"} <= {kind.name for kind in WRITABLE}


@pytest.mark.parametrize("kind", WRITABLE, ids=lambda kind: kind.name)
def test_statistics_are_numpys_on_what_gguf_dequantizes_and_the_weights_are_equal_to_the_bit(kind: Types, tmp_path: Path) -> None:
    stored = gguf.quants.quantize(heavy(300), kind)
    want = gguf.quants.dequantize(stored, kind)
    opened = open_weights(write(tmp_path / "model.gguf", {"blk.0.ffn_down.weight": (stored, kind)}))
    tensor = opened.stored("blocks.0.mlp.W_out")
    assert np.array_equal(np.concatenate([piece.copy() for piece in tensor.pieces()]).reshape(want.shape), want)
    assert np.array_equal(tensor[3:5, 7:300], want[3:5, 7:300])
    report = weight_report.weight_report(opened, n_threads=2)
    number, row = report.row("blk.0.ffn_down.weight")
    assert (row["dtype"], row["shape"], row["layer"], row["component"], row["canonical"]) == (kind.name, [300, WIDTH], 0, "mlp.W_out", ["blocks.0.mlp.W_out"])
    assert row["nbytes"] == stored.nbytes and row["bits"] == pytest.approx(8 * stored.nbytes / want.size)
    check(row, report.bins[number], want)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S", "MXFP4"])
def test_types_that_only_llama_cpp_writes_are_read_as_gguf_reads_them(kind: str, tmp_path: Path) -> None:
    """Blocks of random bytes; where a scale comes out NaN or infinite it is counted."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[Types[kind]]
    stored = np.random.default_rng(5).integers(0, 256, (700, WIDTH // block * n_bytes), np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(stored, Types[kind])
    opened = open_weights(write(tmp_path / "model.gguf", {"blk.0.ffn_down.weight": (stored, Types[kind])}))
    got = np.concatenate([piece.copy() for piece in opened.stored("blk.0.ffn_down.weight").pieces()]).reshape(want.shape)
    assert np.array_equal(got, want, equal_nan=True)
    report = weight_report.weight_report(opened)
    row = report.row("blk.0.ffn_down.weight")[1]
    assert row["n_nan"] == np.isnan(want).sum() and row["n_inf"] == np.isinf(want).sum()
    assert report.bins[report.row("blk.0.ffn_down.weight")[0]].sum() == np.isfinite(want).sum()


def test_a_tensor_that_is_shared_out_gives_the_same_as_one_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = heavy(2600)
    values[1234, 77], values[2222, 5] = -9.0, np.inf
    opened = open_weights(write(tmp_path / "model.gguf", {"blk.0.ffn_down.weight": (values, Types.F32)}))
    whole = weight_report.weight_report(opened, n_threads=2)
    monkeypatch.setattr(weight_report, "SHARE", 2 * PIECE)
    parts = weight_report.weight_report(opened, n_threads=2)
    number, row = parts.row("blk.0.ffn_down.weight")
    check(row, parts.bins[number], values)
    assert row["largest"] == whole.rows[number]["largest"] and row["largest"][0] == [[1234, 77], -9.0] and row["n_inf"] == 1
    assert np.array_equal(parts.bins, whole.bins)


def test_the_report_of_a_checkpoint_is_that_of_its_gguf(tiny_mixtral: TinyModel) -> None:
    """The converter permutes rows and stacks experts; what does not depend on places is the same."""
    theirs, ours = (weight_report.weight_report(open_weights(path)) for path in (tiny_mixtral.hf, tiny_mixtral.gguf))
    check(*_row_and_bins(theirs, "blocks.1.ln1.w"), open_weights(tiny_mixtral.hf)["blocks.1.ln1.w"])
    for name in ("embed.W_E", "blocks.1.attn.W_Q", "blocks.2.mlp.W_router"):
        one, other = theirs.row(name)[1], ours.row(name)[1]
        assert one["std"] == pytest.approx(other["std"], rel=1e-12) and one["component"] == other["component"]
    with pytest.raises(LayerscopeError, match="pieces are those of model"):
        open_weights(tiny_mixtral.hf).lazy("blocks.1.mlp.experts.W_out").pieces()
    assert len([row for row in theirs.rows if row["component"] == "mlp.experts.W_out" and row["layer"] == 1]) == 5
    assert ours.row("blocks.1.mlp.experts.W_out")[1]["shape"] == [5, 64, 48]


def _row_and_bins(report: WeightReport, name: str) -> tuple[dict[str, Any], NDArray[Any]]:
    number, row = report.row(name)
    return row, report.bins[number]


# -- bad input ------------------------------------------------------------------------------------------------------------------------


def test_nan_and_infinite_weights_are_counted_in_halves_too(tmp_path: Path, tiny_llama: TinyModel) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(tiny_llama.hf, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    values = tensors[name].astype(np.float16)
    values[3, 4], values[5, 6], values[7, 8] = np.nan, np.inf, -np.inf
    save_file(tensors | {name: values}, folder / "model.safetensors")
    row, bins = _row_and_bins(weight_report.weight_report(open_weights(folder)), name)
    assert (row["n_nan"], row["n_inf"], row["dtype"]) == (1, 2, "F16")
    check(row, bins, values)
    detail = tensor_detail(Matrix(open_weights(folder).stored(name)))
    assert detail.spectrum is None and np.isnan(detail.row_norms[3]) and np.isinf(detail.row_norms[5]) and np.isfinite(detail.row_norms[0])


def test_a_tensor_of_integers_says_why_it_has_no_numbers_and_the_others_have_theirs(tmp_path: Path, tiny_llama: TinyModel) -> None:
    path = write(tmp_path / "model.gguf", {"blk.0.ids": (np.arange(WIDTH, dtype=np.int32), Types.I32), "blk.0.ffn_down.weight": (heavy(8), Types.F32)})
    report = weight_report.weight_report(open_weights(path))
    row = report.row("blk.0.ids")[1]
    assert "I32" in row["note"] and "ggml cannot convert" in row["note"] and not report.bins[report.row("blk.0.ids")[0]].any()
    assert report.row("blk.0.ffn_down.weight")[1]["note"] == ""
    with pytest.raises(LayerscopeError, match="I32"):
        Matrix(open_weights(path).stored("blk.0.ids"))
    folder = tmp_path / "ints"
    shutil.copytree(tiny_llama.hf, folder)
    save_file(load_file(folder / "model.safetensors") | {"extra.mask": np.zeros((3, 4), np.int8)}, folder / "model.safetensors")
    assert "I8" in weight_report.weight_report(open_weights(folder)).row("extra.mask")[1]["note"]


def test_a_file_that_shrinks_while_it_is_read_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", {"blk.0.ffn_down.weight": (heavy(600), Types.F32)})
    opened = open_weights(path)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(LayerscopeError, match=r"model\.gguf became shorter while it was read"):
        weight_report.weight_report(opened)
    with pytest.raises(LayerscopeError, match="truncated"):
        open_weights(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: (header["offset"], (1 << 40).to_bytes(8, "little")), "offset"),
        (lambda header: (header["type"], (77).to_bytes(4, "little")), "type 77, which is not known"),
        (lambda header: (header["ne0"], (WIDTH + 8).to_bytes(8, "little")), "not a multiple of the 32"),
        (lambda header: (header["ne0"], (0).to_bytes(8, "little")), "must be at least 1"),
        (lambda header: (header["ne0"], (1 << 62).to_bytes(8, "little")), "values"),
    ],
)
def test_a_header_that_cannot_be_true_is_one_sentence(change: Any, words: str, tmp_path: Path) -> None:
    stored = gguf.quants.quantize(heavy(4), Types.Q8_0)
    path = write(tmp_path / "model.gguf", {"blk.0.ffn_down.weight": (stored, Types.Q8_0)})
    data = bytearray(path.read_bytes())
    after = data.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4  # then ne0, ne1, type, offset
    at, new = change({"ne0": after, "type": after + 16, "offset": after + 20})
    data[at : at + len(new)] = new
    path.write_bytes(data)
    with pytest.raises(LayerscopeError, match=words) as problem:
        open_weights(path)
    assert str(problem.value).count("\n") == 0
    with pytest.raises(LayerscopeError):
        read_header(path)


def test_what_is_no_matrix_or_not_there_is_refused(tmp_path: Path) -> None:
    stack = np.stack([heavy(4, seed) for seed in range(3)])
    opened = open_weights(write(tmp_path / "model.gguf", {"blk.0.ffn_down_exps.weight": (stack, Types.F32), "blk.0.ffn_norm.weight": (heavy(1)[0], Types.F32)}))
    experts = opened.stored("blk.0.ffn_down_exps.weight")
    assert n_matrices(experts) == 3 and n_matrices(opened.stored("blk.0.ffn_norm.weight")) == 0
    assert np.array_equal(np.concatenate([block for _, block in Matrix(experts, 2).blocks()]), stack[2])
    assert np.array_equal(next(iter(Matrix(experts, 1).blocks((1, 3), (5, 9))))[1], stack[1][1:3, 5:9])
    with pytest.raises(LayerscopeError, match="3 matrices; there is no number 3"):
        Matrix(experts, 3)
    with pytest.raises(LayerscopeError, match="no matrix"):
        Matrix(opened.stored("blk.0.ffn_norm.weight"))


# -- progress, cancel, jobs -------------------------------------------------------------------------------------------------------------


def test_progress_counts_megabytes_and_a_cancelled_report_stops(tiny_llama: TinyModel) -> None:
    told: list[tuple[str, int, int]] = []
    opened = open_weights(tiny_llama.gguf)
    weight_report.weight_report(opened, lambda *step: told.append(step))
    assert told[-1][1] == sum(opened.stored(name).nbytes for name in opened.native_names) // 1_000_000 and len(told) == len(opened.native_names)
    with pytest.raises(Cancelled):
        weight_report.weight_report(opened, should_stop=lambda: True)
    with pytest.raises(Cancelled):
        tensor_detail(Matrix(opened.stored("blocks.0.mlp.W_out")), should_stop=lambda: True)


@pytest.fixture
def context(tmp_path: Path, tiny_llama: TinyModel) -> Context:
    from config import load_settings

    settings = load_settings(data_dir=tmp_path / "data", models_dirs=[tiny_llama.hf.parent], use_hf_cache=False)
    return Context(engine=lambda *_: None, traces_dir=tmp_path, library=Library.from_settings(settings), derived=Derived(tmp_path / "cache"))  # type: ignore[arg-type, return-value]


def test_the_jobs_keep_their_results_by_what_the_files_are(context: Context, tiny_llama: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    name = tiny_llama.hf.name
    result = KINDS["weight_report"](context, {"model": name})
    report = WeightReport.load(context.derived, result["identity"])
    assert report is not None and result["identity"] == identity(tiny_llama.hf)
    fresh = weight_report.weight_report(open_weights(tiny_llama.hf))
    assert report.rows == json.loads(json.dumps(fresh.rows)) and np.array_equal(report.bins, fresh.bins)
    native = report.row("blocks.1.mlp.W_out")[1]["name"]
    KINDS["weight_tensor"](context, {"model": name, "tensor": native, "index": 0})
    detail = TensorDetail.load(context.derived, result["identity"], native, 0)
    values = open_weights(tiny_llama.hf)[native]
    assert detail is not None and detail.spectrum is not None
    np.testing.assert_allclose(detail.spectrum.values, np.linalg.svd(values.astype(float), compute_uv=False), rtol=1e-6, atol=1e-6)
    assert np.array_equal(detail.map, values)
    monkeypatch.setattr(weight_report, "weight_report", lambda *_: pytest.fail("it was read again"))
    KINDS["weight_report"](context, {"model": name})
    before, file = identity(tiny_llama.hf), tiny_llama.hf / "model.safetensors"
    times = file.stat()
    os.utime(file, ns=(1, 1))
    assert identity(tiny_llama.hf) != before and WeightReport.load(context.derived, identity(tiny_llama.hf)) is None
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_the_page_is_registered_in_its_group_and_says_what_is_wrong_in_one_sentence() -> None:
    import dash

    app = web_app()
    page = next(page for page in dash.page_registry.values() if page["path"] == "/weights")
    assert page["group"] == "This model"
    with app.server.test_request_context("/weights"):
        shown = json.dumps(page["layout"](model="no-such-model"), default=lambda part: part.to_plotly_json())
    assert "There is no model" in shown or "lies outside" in shown

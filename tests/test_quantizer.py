"""Variants made by llama.cpp's own quantizer, and that fewer bits cost more: Q8_0 < Q6_K < Q4_K_M < Q2_K."""

from __future__ import annotations

import shutil
import sys
from itertools import islice
from pathlib import Path

import gguf
import numpy as np
import pytest

import backend
from backend.errors import LayerscopeError
from backend.experiments.quantization import compare
from backend.files.gguf_header import read_header
from backend.files.gguf_writer import write_gguf
from backend.files.imatrix import read_imatrix
from backend.files.quantizer import NEED_IMATRIX, TYPES, check_type, default_output, quantize
from backend.model_files import describe
from backend.reports.quantization_report import QuantizationReport
from backend.weights import open_weights
from tests.test_quantization import side
from tests.tiny_models import TinyModel, save_tiny

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from demo_text import documents  # noqa: E402

LADDER = ("Q8_0", "Q6_K", "Q4_K_M", "Q2_K")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A small model whose rows fill whole blocks of 256 values, so that every type can be written as it is meant."""
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "blocks", hidden_size=256, intermediate_size=256, num_hidden_layers=2, attention_bias=False)


def write_imatrix(model: Path, out: Path, count: float = 4.0) -> dict[str, np.ndarray]:
    """An importance matrix for every matrix of `model`: random sums over `count` rows. Returns the mean squares."""
    writer, rng, means = gguf.GGUFWriter(out, "imatrix"), np.random.default_rng(0), {}
    writer.add_type("imatrix")
    for name, tensor in read_header(model).tensors.items():
        if len(tensor.shape) >= 2:
            sums = rng.uniform(0.5, 8, tensor.shape[-1]).astype(np.float32)
            means[name] = sums / np.float32(count)
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", np.full(1, count, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return means


@pytest.mark.parametrize("model", ["demo-dense", "demo-moe"])
def test_the_fewer_bits_the_further_everything_is_from_the_reference(tmp_path: Path, model: str) -> None:
    """The order of the table in llama.cpp's tools/perplexity/README.md (Llama 3 8B: 0.0014, 0.0055, 0.031, 0.445 nats)."""
    reference = tmp_path / f"{model}-f16.gguf"
    write_gguf(ROOT / "models" / model, reference)
    prompts = [text for _, text in islice(documents(11), 24)]
    reports: list[QuantizationReport] = []
    for name in LADDER:
        quantize(reference, tmp_path / f"{name}.gguf", name)
        reports.append(compare(side(tmp_path / f"{name}.gguf"), side(reference), prompts, tmp_path, sites=["resid_post"]))
    kl = [report.predictions["kl_mean"] for report in reports]
    error = [report.total["relative_rmse"] for report in reports]
    stream = [float(report.by_layer("relative_l2", "resid_post")[-1]) for report in reports]
    for values in (kl, error, stream):
        assert values == sorted(values) and len(set(values)) == len(LADDER), values
    assert [report.model["bits"] for report in reports] == sorted((report.model["bits"] for report in reports), reverse=True)
    assert kl[0] < 1e-3 < 0.02 < kl[-1] and reports[0].predictions["top1_agreement"] > 0.98 > 0.9 > reports[-1].predictions["top1_agreement"]


def test_every_type_is_written_or_refused_beforehand_and_its_file_says_what_it_is(blocks: TinyModel, tmp_path: Path) -> None:
    for name in TYPES:
        out = tmp_path / f"{name}.gguf"
        if name in NEED_IMATRIX:
            with pytest.raises(LayerscopeError, match=f"{name} needs an importance matrix"):
                quantize(blocks.gguf, out, name)
            continue
        quantize(blocks.gguf, out, name)
        assert describe(out).quantization == name
        assert open_weights(out)["blocks.1.mlp.W_in"].shape == (256, 256)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.gguf" for name in TYPES if name not in NEED_IMATRIX}


def test_types_that_need_an_importance_matrix_fail_in_llama_cpp_without_one_and_work_with_it(blocks: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_imatrix(blocks.gguf, tmp_path / "imatrix.gguf")
    for name in sorted(NEED_IMATRIX):
        quantize(blocks.gguf, tmp_path / f"{name}.gguf", name, tmp_path / "imatrix.gguf")
        assert describe(tmp_path / f"{name}.gguf").quantization == name
    monkeypatch.setattr("backend.files.quantizer.NEED_IMATRIX", frozenset())
    for name in sorted(NEED_IMATRIX):
        with pytest.raises(LayerscopeError, match=f"could not quantize blocks-f32.gguf to {name}"):
            quantize(blocks.gguf, tmp_path / f"{name}-without.gguf", name)
    assert not [path for path in tmp_path.iterdir() if "without" in path.name or path.suffix == ".part"]


def test_an_importance_matrix_is_read_as_mean_squares_and_moves_the_error_to_where_it_matters_less(blocks: TinyModel, tmp_path: Path) -> None:
    means = write_imatrix(blocks.gguf, tmp_path / "imatrix.gguf")
    read = read_imatrix(tmp_path / "imatrix.gguf")
    assert set(read) == set(means) and all(np.array_equal(read[name], means[name]) for name in means)
    errors = []
    for imatrix in (None, tmp_path / "imatrix.gguf"):
        out = tmp_path / f"{imatrix is None}.gguf"
        quantize(blocks.gguf, out, "Q4_K_S", imatrix)
        name = "blk.1.ffn_up.weight"
        squared = (open_weights(out)[name] - open_weights(blocks.gguf)[name]) ** 2
        errors.append(float((squared * means[name]).sum()))
    assert errors[1] < errors[0]


def test_an_expert_that_no_text_went_through_counts_one_a_column(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "moe.gguf", "imatrix")
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", np.array([[2, 4, 8], [0, 0, 0]], np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight.counts", np.array([[2], [0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_imatrix(tmp_path / "moe.gguf")["blk.0.ffn_up_exps.weight"].tolist() == [1, 2, 4, 1, 1, 1]


def test_a_folder_becomes_the_same_variant_as_its_own_f32_file(blocks: TinyModel, tmp_path: Path) -> None:
    for source in ("hf", "gguf"):
        quantize(getattr(blocks, source), tmp_path / source / "q.gguf", "q4_k_m")
    ours, theirs = (open_weights(tmp_path / source / "q.gguf") for source in ("hf", "gguf"))
    assert len(list(ours)) > 20 and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("type_name", "message"),
    [
        ("Q4_X", "There is no quantization 'Q4_X'; there are F32, F16, Q4_0"),
        ("NVFP4", "quantizer cannot write NVFP4"),
        ("iq2_xxs", "IQ2_XXS needs an importance matrix"),
    ],
)
def test_a_type_that_cannot_be_made_is_refused_with_the_ones_that_can(type_name: str, message: str) -> None:
    with pytest.raises(LayerscopeError, match=message):
        check_type(type_name, False)


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing_behind(blocks: TinyModel, tmp_path: Path) -> None:
    quantize(blocks.gguf, tmp_path / "q8.gguf", "Q8_0")
    before = (tmp_path / "q8.gguf").read_bytes()
    with pytest.raises(LayerscopeError, match="q8.gguf exists already"):
        quantize(blocks.gguf, tmp_path / "q8.gguf", "Q4_0")
    assert (tmp_path / "q8.gguf").read_bytes() == before
    with pytest.raises(LayerscopeError, match=r"q8.gguf is quantized already \(Q8_0\)"):
        quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0")
    (tmp_path / "cut.gguf").write_bytes(blocks.gguf.read_bytes()[:200_000])
    with pytest.raises(LayerscopeError, match="cut.gguf is truncated"):
        quantize(tmp_path / "cut.gguf", tmp_path / "q4.gguf", "Q4_0")
    other = save_tiny("qwen2", tmp_path / "qwen2")
    with pytest.raises(LayerscopeError, match="the GGUF writer knows LlamaForCausalLM"):
        quantize(other.hf, tmp_path / "q4.gguf", "Q4_0")
    (tmp_path / "old.dat").write_bytes(b"\x01\x00\x00\x00abcdef")
    refused = {tmp_path / "old.dat": "llama-imatrix --in-file", blocks.gguf: "holds no importance matrix", tmp_path / "no.gguf": "There is no importance matrix"}
    for imatrix, message in refused.items():
        with pytest.raises(LayerscopeError, match=message):
            quantize(blocks.gguf, tmp_path / "q4.gguf", "Q4_0", imatrix)
    assert {path.name for path in tmp_path.iterdir()} == {"q8.gguf", "cut.gguf", "qwen2", "old.dat"}


def test_the_python_api_writes_beside_the_source_by_default(blocks: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERSCOPE_DATA_DIR", str(tmp_path / "data"))
    shutil.copy(blocks.gguf, tmp_path / "model-f32.gguf")
    made = backend.quantize(tmp_path / "model-f32.gguf", "Q8_0")
    assert made == tmp_path / "model-q8_0.gguf" and describe(made).quantization == "Q8_0"
    assert default_output(Path("a/some-model"), "Q2_K") == Path("a/some-model-q2_k.gguf")
    report = backend.compare_quantization(made, tmp_path / "model-f32.gguf", "The capital", sites=["resid_post"])
    assert report.labels == ("Q8_0", "F32") and 0 < report.total["relative_rmse"] < 0.01

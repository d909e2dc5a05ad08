"""Projections of real files and traces: NumPy's and scikit-learn's numbers for both formats, quantized and damaged matrices, kept by every parameter, bounded."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from backend import open_model
from backend.__main__ import app
from backend.derived import Derived
from backend.engines.vocabulary import token_texts
from backend.errors import Cancelled, LayerscopeError
from backend.experiments import KINDS, Context
from backend.experiments.embeddings import project
from backend.library import Library
from backend.model_files import Shelf, identity
from backend.reports.embedding_neighbours import matrices, neighbours_key
from backend.reports.projection import LIMITS, Projection, ProjectionSpec, VocabularyTexts
from backend.reports.vectors import Choice, MatrixRows, TraceRows
from backend.trace import Trace, open_trace
from backend.weights import open_weights
from tests.small_traces import write_trace
from tests.tiny_models import TinyModel


def spec(what: str = "W_E", **how) -> ProjectionSpec:
    return ProjectionSpec(Choice("m", what), **how)


class Rows:
    """An array as vectors."""

    def __init__(self, values: NDArray[np.float32], step: int = 50) -> None:
        self.values, self.step, self.shape = values, step, values.shape
        self.groups = np.arange(len(values), dtype=np.int64)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for first in range(0, len(self.values), self.step):
            yield first, self.values[first : first + self.step]

    def row(self, number: int) -> NDArray[np.float32]:
        return self.values[number]


def oracle(values: NDArray[np.float32], dims: int = 3) -> NDArray[np.float64]:
    return PCA(dims, svd_solver="full").fit_transform(values.astype(np.float64))


# -- matrices ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["W_E", "W_U"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_both_formats_give_scikit_learns_projection(what, kind, tiny_model):
    tiny: TinyModel = tiny_model(kind)
    for path in (tiny.hf, tiny.gguf):
        rows = MatrixRows(open_weights(path), what)
        found = project(rows, spec(what))
        np.testing.assert_allclose(found.coords, oracle(rows.weight[...]), atol=2e-3 * np.abs(found.coords).max())
        np.testing.assert_allclose(found.norms, np.linalg.norm(rows.weight[...], axis=1), rtol=1e-5)
        assert np.array_equal(found.rows, np.arange(320)) and found.facts["n_sampled_from"] == 0
        assert rows.tied == (what == "W_U" and kind != "llama")
        assert set(matrices(open_weights(path))) == ({"W_E", "W_U"} if kind == "llama" else {"W_E"})


def write_vocabulary(path: Path, matrix: NDArray[np.float32], kind: gguf.GGMLQuantizationType, texts: list[str] | None = None) -> Path:
    """A GGUF file that is nothing but a vocabulary and its matrix, with the sizes of one layer."""
    writer = gguf.GGUFWriter(path, "llama")
    width = matrix.shape[1]
    for add, value in ((writer.add_context_length, 64), (writer.add_embedding_length, width), (writer.add_block_count, 1), (writer.add_feed_forward_length, width),
                       (writer.add_head_count, 4), (writer.add_head_count_kv, 4)):  # fmt: skip
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    if texts is not None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(texts)
        writer.add_token_scores([0.0] * len(texts))
        writer.add_token_types([3 if text.startswith("<s") else 1 for text in texts])
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K"])
def test_a_quantized_matrix_is_projected_as_its_dequantized_values(kind, tmp_path):
    types = gguf.GGMLQuantizationType
    matrix = np.random.default_rng(0).normal(size=(500, 256)).astype(np.float32) * np.linspace(3, 1, 256, dtype=np.float32)
    if kind == "Q4_K":
        raw = np.random.default_rng(1).integers(0, 256, (500, 144), np.uint8)
        raw[:, :4] = np.frombuffer(np.array([1e-2, 2e-2], np.float16).tobytes(), np.uint8)
        path = write_vocabulary(tmp_path / "v.gguf", matrix, types.F32)
        writer_path = tmp_path / "q.gguf"
        _with_raw(path, writer_path, raw)
        path, wanted = writer_path, gguf.quants.dequantize(raw, types.Q4_K)
    else:
        path = write_vocabulary(tmp_path / "v.gguf", matrix, types[kind])
        wanted = gguf.quants.dequantize(gguf.quants.quantize(matrix, types[kind]), types[kind])
    rows = MatrixRows(open_weights(path), "W_E")
    assert np.array_equal(np.concatenate([block for _, block in rows.blocks()]), wanted)
    np.testing.assert_allclose(project(rows, spec()).ratio[:3], PCA(3, svd_solver="full").fit(wanted.astype(np.float64)).explained_variance_ratio_, rtol=1e-4)


def _with_raw(source: Path, out: Path, raw: NDArray[np.uint8]) -> None:
    writer = gguf.GGUFWriter(out, "llama")
    for add, value in ((writer.add_context_length, 64), (writer.add_embedding_length, 256), (writer.add_block_count, 1), (writer.add_feed_forward_length, 256),
                       (writer.add_head_count, 4), (writer.add_head_count_kv, 4)):  # fmt: skip
        add(value)
    writer.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_of_an_unknown_architecture_is_found_by_its_own_names(tiny_llama, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(tiny_llama.hf, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "helium", "architectures": ["HeliumForCausalLM"]}))
    weights = open_weights(folder)
    assert "embed.W_E" not in weights
    assert np.array_equal(MatrixRows(weights, "W_U").weight[...], open_weights(tiny_llama.hf)["unembed.W_U"])


def test_rows_that_are_not_finite_are_counted_and_left_out(tiny_llama, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(tiny_llama.hf, folder)
    tensors = load_file(folder / "model.safetensors")
    matrix = tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
    matrix[7, 3], matrix[9, 0], matrix[11], matrix[12] = np.nan, np.inf, 0, 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = MatrixRows(open_weights(folder), "W_E")
    found = project(rows, spec())
    kept = np.delete(np.arange(320), [7, 9])
    assert np.array_equal(found.rows, kept) and (found.facts["n_left_out"], found.facts["n_zero"]) == (2, 2)
    np.testing.assert_allclose(found.coords, oracle(matrix[kept]), atol=5e-3)
    unit = project(rows, spec(scale="unit"))
    kept = np.delete(np.arange(320), [7, 9, 11, 12])
    assert np.array_equal(unit.rows, kept) and np.isnan(unit.norms[[7, 9]]).all() and not unit.norms[[11, 12]].any()
    np.testing.assert_allclose(unit.coords, oracle(matrix[kept] / np.linalg.norm(matrix[kept], axis=1, keepdims=True)), atol=1e-3)


def test_too_few_vectors_are_one_sentence():
    values = np.full((8, 4), np.nan, np.float32)
    values[:4] = np.eye(4)
    with pytest.raises(LayerscopeError, match="4 of 8 vectors can be projected, and at least 5 are needed"):
        project(Rows(values), spec())


def test_a_sample_is_seeded_holds_what_it_must_and_says_of_how_many():
    rows = Rows(np.random.default_rng(0).normal(size=(400, 12)).astype(np.float32))
    found = project(rows, spec(method="tsne", include=(399, 5)), limit=60)
    assert len(found.rows) == 60 and {5, 399} <= set(found.rows.tolist()) and found.facts["n_sampled_from"] == 400 and found.coords.shape == (60, 2)
    assert np.array_equal(found.rows, project(rows, spec(method="pca", include=(399, 5)), limit=60).rows)
    assert len(found.norms) == 400


def test_a_projection_is_cancelled_while_it_reads():
    with pytest.raises(Cancelled):
        project(Rows(np.ones((100, 4), np.float32)), spec(), should_stop=lambda: True)


# -- the vocabulary -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_texts_are_those_of_the_engine_without_its_weights(kind, tiny_model):
    tiny: TinyModel = tiny_model(kind)
    for path in (tiny.hf, tiny.gguf):
        found = token_texts(path, 320)
        with open_model(path) as model:
            assert found.texts == model.engine.token_texts(list(range(320)))
        assert found.special == [0, 1] and all(found.texts[i] == f"[{i}]" for i in found.unused if path == tiny.hf)


def test_rows_beyond_the_tokenizer_are_unused(tiny_llama):
    n_tokens = max(json.loads((tiny_llama.hf / "tokenizer.json").read_text())["model"]["vocab"].values()) + 1
    found = token_texts(tiny_llama.hf, 330)
    assert found.unused == list(range(n_tokens, 330)) and found.texts[325] == "[325]" and n_tokens < 320


def test_search_puts_the_token_itself_first():
    texts = ["Parisian", " paris", "Paris", " Paris", "comparison", "x", " Part", "the Paris"]
    words = VocabularyTexts(texts, np.zeros(len(texts), np.uint8), frozenset())
    assert [texts[i] for i in words.find(" Paris", 10)] == [" Paris", " paris", "the Paris"]
    assert [texts[i] for i in words.find("Paris", 10)] == ["Paris", " Paris", " paris", "Parisian", "the Paris", "comparison"]
    assert words.find("Paris", 2) == [2, 3] and words.find("#5", 9) == [5] and words.find("#99", 9) == [] and words.find("", 9) == []


# -- traces ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traces(tiny_llama: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    folder = tmp_path_factory.mktemp("embedding-traces")
    with open_model(tiny_llama.hf) as model:
        return [model.trace(text, out=folder, precision="float32", category=kind) for text, kind in (("The cat sat on", "pets"), ("a dog ran away from it", "pets"))]


def test_states_lie_trace_after_trace_layer_after_layer(traces):
    rows = TraceRows(traces, "resid_post")
    wanted = np.concatenate([part for trace in traces for part in (trace["embed"], *(trace["resid_post", layer] for layer in range(3)))])
    assert np.array_equal(np.concatenate([block for _, block in rows.blocks()]), wanted)
    for number in (0, 17, len(wanted) - 1):
        assert np.array_equal(rows.row(number), wanted[number])
        assert rows.row_at(int(rows.trace[number]), int(rows.layer[number]), int(rows.position[number])) == number
    counts = np.unique(rows.groups, return_counts=True)[1]
    assert len(counts) == sum(trace.n_tokens for trace in traces) and set(counts.tolist()) == {4}
    assert rows.row_at(0, 5, 0) is None and rows.row_at(0, 1, 10_000) is None


def test_heads_are_laid_side_by_side_and_one_layer_can_be_alone(traces):
    rows = TraceRows(traces, "z", layer=1)
    assert np.array_equal(np.concatenate([block for _, block in rows.blocks()]), np.concatenate([trace["z", 1].reshape(trace.n_tokens, -1) for trace in traces]))
    assert TraceRows(traces[:1], "ln_final_out").shape == (traces[0].n_tokens, 64)


def test_layers_share_one_projection(traces):
    rows = TraceRows(traces, "resid_post")
    found = project(rows, ProjectionSpec(Choice("m", "resid_post", ("a", "b"))))
    np.testing.assert_allclose(found.coords, oracle(np.concatenate([block for _, block in rows.blocks()])), atol=1e-3)


@pytest.mark.parametrize(
    ("what", "layer", "words"),
    [
        ("attn_pattern", None, "is no site with one vector a position"), ("resid_post", 9, "does not hold resid_post at layer 9"),
        ("router_probs", None, "does not hold router_probs"),
    ],
)  # fmt: skip
def test_what_a_trace_cannot_give_is_one_sentence(what, layer, words, traces):
    with pytest.raises(LayerscopeError, match=words):
        TraceRows(traces, what, layer)


# -- jobs ------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def context(tiny_llama: TinyModel, tmp_path: Path) -> Context:
    models = tmp_path / "models"
    models.mkdir()
    shutil.copytree(tiny_llama.hf, models / "tiny")
    library = Library(tmp_path / "data", Shelf([models], tmp_path / "variants", presets=()), b"k" * 32)
    with open_model(models / "tiny") as model:
        for text in ("The cat sat on", "a dog ran"):
            library.add(model.trace(text, out=library.traces_dir, precision="float32").path)
    said: list[str] = []
    return Context(engine=None, traces_dir=library.traces_dir, library=library, derived=Derived(tmp_path / "cache"), progress=lambda stage, done, total: said.append(stage),
                   extra={"said": said})  # type: ignore[arg-type]  # fmt: skip


def run(context: Context, choice: Choice, **how) -> tuple[Projection, str, list[str]]:
    said = context.extra["said"]
    said.clear()
    key = KINDS["embeddings"](context, ProjectionSpec(choice, **how).to_json())["key"]
    found = Projection.load(context.derived, key)
    assert found is not None
    return found, key, list(said)


def test_the_job_keeps_its_projection_and_the_vocabulary(context):
    found, key, said = run(context, Choice("tiny", "W_E"))
    path = context.library.shelf.resolve("tiny").path
    np.testing.assert_allclose(found.coords, oracle(open_weights(path)["embed.W_E"]), atol=2e-3)
    assert key == ProjectionSpec(Choice("tiny", "W_E")).key(identity(path)) and "principal components, rows" in said
    words = VocabularyTexts.load(context.derived, identity(path))
    assert words is not None and len(words.texts) == 320 and words.special == {0, 1}
    again, same, said = run(context, Choice("tiny", "W_E"), dims=3)
    assert same == key and said == ["opening"] and np.array_equal(again.coords, found.coords)


def test_every_parameter_that_matters_is_another_entry():
    base = Choice("m", "W_E")
    specs = [
        ProjectionSpec(base), ProjectionSpec(Choice("m", "W_U")), ProjectionSpec(base, scale="unit"), ProjectionSpec(base, "umap"), ProjectionSpec(base, "umap", 3),
        ProjectionSpec(base, "umap", seed=1), ProjectionSpec(base, "umap", include=(3,)), ProjectionSpec(base, "tsne"), ProjectionSpec(Choice("m", "resid_post", ("a",))),
        ProjectionSpec(Choice("m", "resid_post", ("a",), 1)), ProjectionSpec(Choice("m", "resid_post", ("a", "b"))),
    ]  # fmt: skip
    keys = [one.key("file") for one in specs]
    assert len(set(keys)) == len(keys)
    assert specs[0].key("another file") not in keys and specs[8].key("another file") == keys[8]  # a trace never changes, a file may
    assert [ProjectionSpec.from_json(json.loads(json.dumps(one.to_json()))) for one in specs] == specs


@pytest.mark.parametrize(("change", "words"), [({"method": "som"}, "no method 'som'"), ({"dims": 4}, "2 or 3 dimensions, not 4"), ({"scale": "log"}, "no scale 'log'")])
def test_parameters_that_do_not_exist_are_one_sentence(change, words):
    with pytest.raises(LayerscopeError, match=words):
        ProjectionSpec.from_json({**spec().to_json(), **change})


def test_the_job_of_neighbours_finds_those_of_brute_force(context):
    ids = tuple(trace.id for trace in context.library.traces())
    rows = TraceRows([context.library.open(one) for one in ids], "resid_post")
    everything = np.concatenate([block for _, block in rows.blocks()]).astype(np.float64)
    choice = Choice("tiny", "resid_post", ids)
    key = KINDS["neighbours"](context, {"spec": ProjectionSpec(choice).to_json(), "row": 5, "k": 4})["key"]
    found = context.derived.get_json(neighbours_key(key, 5, 4))
    weights = open_weights(context.library.shelf.resolve("tiny").path)
    for name, matrix in (("here", everything), ("W_E", weights["embed.W_E"]), ("W_U", weights["unembed.W_U"])):
        cosines = matrix @ everything[5] / np.linalg.norm(matrix, axis=1) / np.linalg.norm(everything[5])
        order = [i for i in np.argsort(-cosines) if name != "here" or i != 5][:4]
        assert [int(i) for i, _ in found[name]] == order
        np.testing.assert_allclose([c for _, c in found[name]], cosines[order], atol=1e-5)
    assert found["norm"] == pytest.approx(np.linalg.norm(everything[5]), rel=1e-5) and found["note"] == ""


def test_a_trace_whose_model_is_gone_still_has_neighbours_and_says_why_no_tokens(context, tmp_path):
    shutil.rmtree(tmp_path / "models" / "tiny")
    ids = tuple(trace.id for trace in context.library.traces())
    _, _, said = run(context, Choice("tiny", "resid_post", ids))
    assert "principal components, rows" in said
    key = KINDS["neighbours"](context, {"spec": ProjectionSpec(Choice("tiny", "resid_post", ids)).to_json(), "row": 0, "k": 3})["key"]
    found = context.derived.get_json(neighbours_key(key, 0, 3))
    assert len(found["here"]) == 3 and "W_E" not in found and "tiny" in found["note"]


def test_limits_are_those_that_the_page_names():
    assert LIMITS["tsne"] == 10_000 and LIMITS["umap"] >= 150_000 <= LIMITS["pca"]


# -- command line ----------------------------------------------------------------------------------------------------------------------------


def test_embed_writes_every_token_and_no_formula(tiny_llama, tmp_path):
    out = tmp_path / "points.csv"
    assert CliRunner().invoke(app, ["embed", "--model", str(tiny_llama.hf), "--what", "W_U", "--dims", "3", "--out", str(out)]).exit_code == 0
    with open(out, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    wanted = oracle(open_weights(tiny_llama.hf)["unembed.W_U"])
    np.testing.assert_allclose([[float(line[f"x{i}"]) for i in (1, 2, 3)] for line in lines], wanted, atol=5e-3)
    texts = token_texts(tiny_llama.hf, 320).texts
    assert [int(line["id"]) for line in lines] == list(range(320))
    assert all(line["token"] == (f"'{text}" if text[:1] in tuple("=+-@\t\r") and text else text) for line, text in zip(lines, texts, strict=True))
    assert lines[0]["class"] == "special"


def test_embed_projects_traces_to_arrays_that_are_no_pickle(traces, tmp_path):
    out = tmp_path / "points.npz"
    words = ["embed", "--what", "resid_post", "--unit", "--out", str(out), *(part for trace in traces for part in ("--trace", str(trace.path)))]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    with np.load(out, allow_pickle=False) as found:
        rows = TraceRows(traces, "resid_post")
        values = np.concatenate([block for _, block in rows.blocks()])
        np.testing.assert_allclose(found["coords"], oracle(values / np.linalg.norm(values, axis=1, keepdims=True), 2), atol=1e-3)
        assert found["layer"][0] == "embed" and found["position"].tolist() == rows.position.tolist()


def test_embed_names_neighbours(tiny_llama):
    answer = CliRunner().invoke(app, ["embed", "--model", str(tiny_llama.gguf), "--neighbours", "#40", "-k", "3", "--json"])
    found = json.loads(answer.stdout)
    matrix = open_weights(tiny_llama.gguf)["embed.W_E"].astype(np.float64)
    cosines = matrix @ matrix[40] / np.linalg.norm(matrix, axis=1) / np.linalg.norm(matrix[40])
    assert [item["id"] for item in found["neighbours"]] == [i for i in np.argsort(-cosines) if i != 40][:3]
    assert found["id"] == 40 and found["tied"] is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "X", "--out", "a.txt"], "ends in .csv or .npz, not 'a.txt'"), (["--model", "X"], "or --neighbours with a token"),
        (["--what", "resid_post", "--out", "a.csv"], "--trace"), (["--model", "X", "--neighbours", "no such token"], "No token of"),
        (["--model", "X", "--neighbours", "a", "-k", "0"], "0 neighbours cannot be listed"), (["--out", "a.csv"], "--model"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(words, said, tiny_llama):
    answer = CliRunner().invoke(app, ["embed", *(str(tiny_llama.hf) if word == "X" else word for word in words)])
    assert isinstance(answer.exception, LayerscopeError) and said in str(answer.exception)


def test_a_trace_file_alone_can_be_projected(tmp_path):
    path = write_trace(tmp_path, n_tokens=6)
    with open_trace(path) as trace:
        found = project(TraceRows([trace], "resid_post"), ProjectionSpec(Choice("toy", "resid_post", (trace.id,))))
    assert found.facts["n"] == 18 and found.coords.shape == (18, 3)

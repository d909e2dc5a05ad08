"""Claims about files and folders that are no model, no decoder, or a decoder with something odd about it: what cannot be run is refused
by name in one sentence, and what is merely unusual runs, in both engines."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from backend.engines import Engine, OpenOptions, Request, Sampling, open_engine
from backend.engines.gguf import GgufEngine
from backend.engines.hf import HfEngine
from backend.errors import LayerscopeError
from backend.experiments.capture import CaptureSpec, capture
from backend.files.gguf_format import read_file
from backend.files.model_kinds import GGUF_KINDS, HF_KINDS, refuse_config
from backend.jobs.warm_engine import WarmEngine
from backend.model_files import Shelf, describe
from backend.trace import open_trace
from backend.weights import open_weights
from config import load_settings
from tests.gguf_cases import ARR, STR, Tensor, model_file, model_tensors
from tests.test_engines_agree import NMSE, nmse
from tests.test_hf_engine import capture as values_of
from tests.test_library import save_header_only
from tests.test_split_gguf import part_file
from tests.tiny_models import TinyModel, save_tiny

OPTIONS = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32", n_threads=2)


def refused(path: Path, sentence: str) -> None:
    with pytest.raises(LayerscopeError, match=sentence) as refusal:
        describe(path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


# What is no decoder


def folder_of(path: Path, **files: object) -> Path:
    """A folder of JSON files; __ in a name stands for the dot."""
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_lora_folder_is_named_with_its_base_and_is_listed_with_the_reason(tmp_path: Path) -> None:
    models = tmp_path / "models"
    adapter = folder_of(models / "tuned", adapter_config={"peft_type": "LORA", "base_model_name_or_path": "org/base-7b"})
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    refused(adapter, r"^tuned holds a LoRA adapter of org/base-7b, and no model; merge it into its model first")
    (entry,) = Shelf([models], tmp_path / "v", None, ()).entries()
    assert entry.name == "tuned" and "LoRA adapter of org/base-7b" in (entry.error or "")
    refused(folder_of(tmp_path / "bare", adapter_config="{"), r"^bare holds a LoRA adapter, and no model")


def test_an_adapter_beside_a_whole_model_is_refused_too_because_transformers_would_load_both(tmp_path: Path) -> None:
    folder = save_header_only(tmp_path / "both")
    describe(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refused(folder, "both holds a LoRA adapter of org/base")


def test_a_gguf_adapter_is_named_with_its_base(tmp_path: Path) -> None:
    path = tmp_path / "lora.gguf"
    path.write_bytes(model_file(general__type=(STR, "adapter"), general__base_model__0__repo_url=(STR, "https://huggingface.co/org/base")))
    refused(path, r"^lora.gguf holds a LoRA adapter of https://huggingface.co/org/base, and no model")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"model_index": {"_class_name": "StableDiffusionPipeline"}}, "holds an image or video generator"),
        ({"config": {"model_type": "qwen3"}, "config_sentence_transformers": {"__version__": {"sentence_transformers": "3"}}}, "holds an embedding model"),
        ({"config": {"model_type": "bert"}, "modules": [{"idx": 0, "type": "sentence_transformers.models.Transformer"}]}, "holds an embedding model"),
        ({"config": {"model_type": "bert", "architectures": ["BertForMaskedLM"]}}, "'bert', a text encoder"),
        ({"config": {"model_type": "nomic_bert", "auto_map": {"AutoModel": "x.Y"}}}, "'nomic_bert', a text encoder"),
        ({"config": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}}, "'t5', an encoder-decoder"),
        ({"config": {"model_type": "whisper"}}, "'whisper', an audio model"),
        ({"config": {"model_type": "siglip"}}, "'siglip', a vision model"),
        ({"config": {"model_type": "llada", "architectures": ["LLaDAModelLM"]}}, "'llada', a diffusion language model"),
        ({"config": {"model_type": "Dream", "architectures": ["DreamForCausalLM"]}}, "'Dream', a diffusion language model"),
    ],
)
def test_a_folder_that_is_no_decoder_is_refused_as_what_it_is(tmp_path: Path, files: dict[str, object], sentence: str) -> None:
    refused(folder_of(tmp_path / "it", **files), f"^it holds.*{sentence.removeprefix('holds ')}.*; Layerscope runs decoders, which predict the next token")


@pytest.mark.parametrize("architecture", sorted(GGUF_KINDS))
def test_a_gguf_file_that_is_no_decoder_is_refused_as_what_it_is(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "it.gguf"
    path.write_bytes(model_file(general__architecture=(STR, architecture)))
    refused(path, f"^it.gguf holds '{architecture}', an? .+; Layerscope runs decoders")


def test_no_architecture_that_can_be_run_is_called_something_else() -> None:
    from backend.engines import gguf_sites
    from backend.files import hf_keys

    assert not set(GGUF_KINDS) & set(gguf_sites.ARCHITECTURES) and not set(HF_KINDS) & set(hf_keys.ARCHITECTURES)
    encoders = {name for name in gguf.MODEL_ARCH_NAMES.values() if "bert" in name or name.endswith(("-embedding", "-embed", "-dec", "encoder"))}
    assert encoders and encoders <= set(GGUF_KINDS)


def test_a_bert_that_was_made_a_decoder_is_not_called_an_encoder() -> None:
    refuse_config("it", {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True})
    with pytest.raises(LayerscopeError, match="a text encoder"):
        refuse_config("it", {"model_type": "bert", "architectures": ["BertModel"]})


# Vocabularies and embeddings of different sizes


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_a_padded_vocabulary_runs_in_both_engines_and_its_unused_ids_have_readable_texts(kind: str, tmp_path: Path) -> None:
    """Embeddings are often padded to a round number of rows: qwen2 has 151,936 for 151,665 tokens."""
    tiny = save_tiny(kind, tmp_path / kind, vocab_size=352)
    ids = [0, 290, 351, 330, 31, 7]
    engines = HfEngine(tiny.hf, OPTIONS), GgufEngine(tiny.gguf, OPTIONS)
    hf, llama = (values_of(engine, ids) for engine in engines)
    assert hf["logits", None].shape == (6, 352)
    assert {key: error for key in hf if (error := nmse(llama[key], hf[key])) > NMSE} == {}
    assert engines[0].token_texts(ids[2:4]) == ["[351]", "[330]"] and engines[1].token_texts(ids[2:4]) == ["[unused351]", "[unused330]"]
    for engine in engines:
        assert engine.info.d_vocab == 352
        with open_trace(capture(engine, CaptureSpec(token_ids=tuple(ids), max_new_tokens=2), tmp_path / "traces")) as trace:
            assert "330" in trace.token_texts[3] and all(trace.token_text(token).strip("‹›") for token in trace.top_ids.ravel())
            assert all(check["ok"] for check in trace.integrity.values())
        with pytest.raises(LayerscopeError, match="Token id 352 is outside the vocabulary of 352"):
            engine.run([0, 352], Request(("logits",)), lambda piece: None)
        engine.close()


def test_a_tokenizer_larger_than_the_embedding_is_refused_and_added_words_alone_are_not(tmp_path: Path) -> None:
    """Words added without rows for them are common (gemma3 1B has one): text that reaches one is refused, other text runs."""
    small = save_tiny("llama", tmp_path / "small", vocab_size=280)
    n_words = len(json.loads((small.hf / "tokenizer.json").read_text())["model"]["vocab"])
    with pytest.raises(LayerscopeError, match=rf"The tokenizer of small has {n_words} tokens, and the embedding has 280 rows"):
        HfEngine(small.hf, OPTIONS)
    added = save_tiny("llama", tmp_path / "added", vocab_size=n_words)
    tokenizer = json.loads((added.hf / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": n_words, "content": "<image>", "special": False})
    (added.hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    engine = HfEngine(added.hf, OPTIONS)
    assert engine.tokenize("a <image>")[-1] == n_words and engine.token_texts([n_words]) == ["<image>"]
    with pytest.raises(LayerscopeError, match=f"Token id {n_words} is outside the vocabulary of {n_words}"):
        capture(engine, CaptureSpec(prompt="a <image>"), tmp_path / "traces")
    assert capture(engine, CaptureSpec(prompt="a b"), tmp_path / "traces").exists()
    engine.close()


@pytest.mark.parametrize("n_words", [319, 321])
def test_a_gguf_tokenizer_of_another_size_than_the_embedding_is_refused(tiny_llama: TinyModel, tmp_path: Path, n_words: int) -> None:
    words = [f"t{i}" for i in range(n_words)]
    path = tmp_path / "words.gguf"
    tensors = [Tensor("token_embd.weight", (8, 320)), *model_tensors()[1:]]
    path.write_bytes(model_file(tensors, tokenizer__ggml__tokens=(ARR, (STR, words)), tokenizer__ggml__token_type=None))
    refused(path, f"tokens has {n_words} entries, and the embedding has 320 rows")


@pytest.mark.parametrize(("tensor", "rows"), [("model.embed_tokens.weight", 352), ("lm_head.weight", 300)])
def test_a_matrix_of_another_number_of_rows_than_vocab_size_is_refused_by_name(tiny_llama: TinyModel, tmp_path: Path, tensor: str, rows: int) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_llama.hf, tmp_path / "odd"))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, tensor: np.zeros((rows, 64), np.float32)}, folder / "model.safetensors")
    refused(folder, rf"odd: {tensor} has shape \[{rows}, 64\], but config.json says \[320, 64\]")


# Output matrices that are tied, stored twice, or missing


def without_output(folder: Path, out: Path, keep: bool = False, same: bool = False, **config: object) -> Path:
    """A copy of a folder whose output matrix is left out (or, with `same`, is the embedding again); a config value None leaves the key out."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    if same:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    elif not keep:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    data = {**json.loads((out / "config.json").read_text()), **config}
    (out / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return out


def check_unembedding(engine: Engine, source: Path, tied: bool, folder: Path) -> None:
    """Engine, files, unembed and the integrity report agree on which matrix is W_U."""
    weights = open_weights(source)
    assert np.array_equal(engine.weight("unembed.W_U"), weights["unembed.W_U"])
    assert np.array_equal(weights["unembed.W_U"], weights["embed.W_E"]) is tied
    with open_trace(capture(engine, CaptureSpec(token_ids=(0, 290, 284, 280), sites=("resid_post", "logits")), folder)) as trace:
        assert trace.integrity["unembed"]["checked"] and trace.integrity["unembed"]["ok"], trace.integrity["unembed"]
    engine.close()


@pytest.mark.parametrize(
    ("kind", "changes", "tied"),
    [
        ("llama", {"tie_word_embeddings": True}, True),
        ("llama", {"tie_word_embeddings": True, "same": True}, True),
        ("llama", {"tie_word_embeddings": False, "same": True}, True),  # two matrices that happen to be equal
        ("llama", {"tie_word_embeddings": True, "keep": True}, False),  # the config says tied, the file holds another matrix: transformers takes it
        ("llama", {"tie_word_embeddings": None, "keep": True}, False),
        ("gemma2", {"tie_word_embeddings": True}, True),
        ("gemma2", {"tie_word_embeddings": None}, True),
        ("gemma2", {"tie_word_embeddings": None, "same": True}, True),
        ("starcoder2", {"tie_word_embeddings": None}, True),
    ],
)
def test_the_output_matrix_is_the_one_that_transformers_takes(
    tiny_model: Callable[[str], TinyModel], tmp_path: Path, kind: str, changes: dict[str, Any], tied: bool
) -> None:
    folder = without_output(tiny_model(kind).hf, tmp_path / "odd", **changes)
    check_unembedding(HfEngine(folder, OPTIONS), folder, tied, tmp_path / "traces")


@pytest.mark.parametrize(("kind", "tie"), [("llama", False), ("llama", None), ("gemma2", False), ("qwen3_moe", False)])
def test_an_output_matrix_that_is_neither_stored_nor_tied_is_refused_by_name(
    tiny_model: Callable[[str], TinyModel], tmp_path: Path, kind: str, tie: bool | None
) -> None:
    folder = without_output(tiny_model(kind).hf, tmp_path / "odd", tie_word_embeddings=tie)
    with pytest.raises(LayerscopeError, match=r"odd does not fit its config.json: 1 missing tensor, the first lm_head.weight"):
        HfEngine(folder, OPTIONS)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "gemma2", "phi3", "gpt2", "starcoder2", "granite"])
def test_a_gguf_file_without_an_output_matrix_takes_the_embedding_as_llama_cpp_does_or_says_that_it_is_missing(
    tiny_model: Callable[[str], TinyModel], tmp_path: Path, kind: str
) -> None:
    source = tiny_model(kind).gguf
    names = [name for name in read_file(source).tensors if name != "output.weight"]
    path = tmp_path / "tied.gguf"
    path.write_bytes(part_file(source, names, 0, 1, len(names)))
    try:
        engine = GgufEngine(path, OPTIONS)
    except LayerscopeError as refusal:
        assert "output.weight" in str(refusal)
        return
    check_unembedding(engine, path, True, tmp_path / "traces")


# What a failed download or a careless disk leaves

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 4123456789\n"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"it is empty"),
        (POINTER, r"it is a Git LFS pointer, .*\(git lfs pull\)"),
        (b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title>", r"it is a web page"),
        (b"\xef\xbb\xbf\n<html>", r"it is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", r"it is a web page"),
        (b'{"error":"Repository not found"}', r"it is JSON text, such as a server's error"),
    ],
)
def test_what_a_failed_download_left_is_named(tiny_llama: TinyModel, tmp_path: Path, content: bytes, sentence: str) -> None:
    path, folder = tmp_path / "x.gguf", Path(shutil.copytree(tiny_llama.hf, tmp_path / "folder"))
    path.write_bytes(content)
    (folder / "model.safetensors").write_bytes(content)
    refused(path, rf"^x.gguf is not a valid GGUF file: .*{sentence}")
    refused(folder, rf"^model.safetensors of folder is no safetensors file: {sentence}")


def test_a_web_page_for_a_config_is_named_and_json_is_read_as_json(tiny_llama: TinyModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama.hf, tmp_path / "folder"))
    for content, sentence in ((b"<html>", "it is a web page"), (POINTER, "it is a Git LFS pointer"), (b"", "it is empty"), (b'{"a" 1}', "Expecting ':'")):
        (folder / "config.json").write_bytes(content)
        refused(folder, f"config.json of folder is no valid JSON: {sentence}")


def test_links_that_lead_nowhere_or_in_a_circle_are_refused_and_hide_no_model(tiny_llama: TinyModel, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(tiny_llama.gguf, models / "good.gguf")
    (models / "loop.gguf").symlink_to("loop.gguf")
    (models / "gone.gguf").symlink_to("nothing")
    (models / "round").symlink_to(models)
    (models / "deep").mkdir()
    (models / "deep" / "back").symlink_to(models)
    (models / "circle").symlink_to("circle")
    entries = {entry.name: entry for entry in Shelf([models], tmp_path / "v", None, ()).entries()}
    assert set(entries) == {"good.gguf", "loop.gguf", "gone.gguf"} and entries["good.gguf"].info is not None
    for name in ("loop.gguf", "gone.gguf"):
        refused(models / name, f"^{name} is a symbolic link that leads nowhere")


def test_a_folder_called_x_gguf_is_a_folder(tiny_llama: TinyModel, tmp_path: Path) -> None:
    empty = tmp_path / "empty.gguf"
    empty.mkdir()
    refused(empty, "The folder 'empty.gguf' is no model: it has no config.json")
    folder = Path(shutil.copytree(tiny_llama.hf, tmp_path / "models" / "real.gguf"))
    (entry,) = Shelf([tmp_path / "models"], tmp_path / "v", None, ()).entries()
    assert (entry.kind, entry.error) == ("hf", None)
    engine = open_engine(folder, OPTIONS)
    assert isinstance(engine, HfEngine)
    engine.close()


@contextlib.contextmanager
def without_privileges() -> Iterator[Path]:
    """A folder that a plain user can enter, and that user's rights while the block runs."""
    folder = Path(tempfile.mkdtemp(prefix="layerscope-tests-"))
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in folder.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)


def test_what_may_not_be_read_is_named_and_hides_no_model(tiny_llama: TinyModel) -> None:
    with without_privileges() as folder:
        for name in ("good.gguf", "secret.gguf"):
            shutil.copy(tiny_llama.gguf, folder / name)
        for name in ("weights", "closed"):
            shutil.copytree(tiny_llama.hf, folder / name)
        (folder / "secret.gguf").chmod(0)
        (folder / "weights" / "model.safetensors").chmod(0)
        (folder / "closed").chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        refused(folder / "secret.gguf", "secret.gguf cannot be read: Permission denied")
        refused(folder / "weights", "weights/model.safetensors cannot be read: Permission denied")
        refused(folder / "closed", "closed.* cannot be read: Permission denied")
        shelf = Shelf([folder], folder / "v", None, ())
        entries = {entry.name: entry for entry in shelf.entries()}
        assert set(entries) == {"good.gguf", "secret.gguf", "weights"} and entries["good.gguf"].info is not None
        assert "Permission denied" in (entries["secret.gguf"].error or "") and "Permission denied" in (entries["weights"].error or "")
        if os.getuid() == 0:
            os.seteuid(0)
        (folder / "secret.gguf").chmod(0o644)
        assert {entry.name: entry for entry in shelf.entries()}["secret.gguf"].info is not None, "noticed though neither size nor time changed"


def test_a_file_replaced_while_it_is_open_is_never_mixed_with_the_old_one(tiny_llama: TinyModel, tiny_mistral: TinyModel, tmp_path: Path) -> None:
    """The worker opens the new one; an engine that someone holds says that it must be opened again."""
    models = tmp_path / "models"
    models.mkdir()
    path = Path(shutil.copy(tiny_llama.gguf, models / "x.gguf"))
    status = path.stat()
    settings = load_settings(data_dir=tmp_path / "data", models_dirs=[models], kv_cache="f32", use_hf_cache=False, n_threads=1)
    warm = WarmEngine(settings, Shelf([models], tmp_path / "v", None, ()))
    held = GgufEngine(path, OPTIONS)
    first, ids = warm("x.gguf", {}), [0, 290, 284]
    assert warm("x.gguf", {}) is first and np.array_equal(values_of(held, ids)["logits", None], values_of(first, ids)["logits", None])
    shutil.copy(tiny_mistral.gguf, tmp_path / "new.gguf")
    os.utime(tmp_path / "new.gguf", ns=(status.st_atime_ns, status.st_mtime_ns))  # as a copy that keeps times leaves it
    os.replace(tmp_path / "new.gguf", path)
    for call in (lambda: values_of(held, ids), lambda: held.generate(ids, 1, Sampling())):
        with pytest.raises(LayerscopeError, match=r"The file of x has changed since it was opened; open it again"):
            call()
    second = warm("x.gguf", {})
    assert second is not first and second.info.d_mlp == 112
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(LayerscopeError, match="has changed since it was opened"):
        values_of(second, ids)
    with pytest.raises(LayerscopeError, match="x.gguf is truncated"):
        warm("x.gguf", {})
    held.close()
    warm.close()

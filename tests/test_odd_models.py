"""Claims about files and folders that are no model, no decoder, or a decoder with something odd about it: what cannot be run is refused
by name in one sentence, and what is merely unusual runs, in both engines."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from backend.errors import LayerscopeError
from backend.model_files import Shelf, describe
from backend.model_kinds import GGUF_KINDS, HF_KINDS, refuse_config
from tests.gguf_cases import STR, model_file
from tests.test_library import save_header_only


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
    from backend import hf_config
    from backend.engines import gguf_sites

    assert not set(GGUF_KINDS) & set(gguf_sites.ARCHITECTURES) and not set(HF_KINDS) & set(hf_config.ARCHITECTURES)
    encoders = {name for name in gguf.MODEL_ARCH_NAMES.values() if "bert" in name or name.endswith(("-embedding", "-embed", "-dec", "encoder"))}
    assert encoders and encoders <= set(GGUF_KINDS)


def test_a_bert_that_was_made_a_decoder_is_not_called_an_encoder() -> None:
    refuse_config("it", {"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True})
    with pytest.raises(LayerscopeError, match="a text encoder"):
        refuse_config("it", {"model_type": "bert", "architectures": ["BertModel"]})

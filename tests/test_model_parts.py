"""Claims about the parts of a model and its metadata, read from headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backend.files.demo import ensure_demo_variants
from backend.model_files import describe
from backend.reports.model_metadata import FIRST_ITEMS, TEXT_CHARACTERS, metadata_row, read_metadata
from backend.reports.model_parts import layer_ranges, take_apart, type_layers
from backend.weights import open_weights
from components.model_facts import Facts
from tests.generic_models import CONFIGS, ROWS, save_generic, write_f32
from tests.gguf_cases import ARR, STR, Tensor, model_file, model_tensors

ROOT = Path(__file__).parent.parent
KINDS = ["llama", "mixtral", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt2", "qwen2_moe", "gpt_oss", "deepseek_v3", "stablelm, parallel"]


def facts_of(path: Path) -> Facts:
    return Facts(describe(path), read_metadata(path)[0], take_apart(open_weights(path)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_the_whole_model_in_both_formats(kind: str, tiny_model):
    model = tiny_model(kind)
    keys = []
    for path in (model.gguf, model.hf):
        weights, info = open_weights(path), describe(path)
        anatomy = take_apart(weights)
        assert sum(part.n_params for _, part in anatomy.parts) == info.n_params and sum(part.n_bytes for _, part in anatomy.parts) == info.n_bytes
        assert sorted(tensor.name for _, part in anatomy.parts for tensor in part.tensors) == sorted(weights.native_names)
        assert sorted(layer for group in anatomy.groups for layer in group.layers) == list(range(info.n_layers))
        assert not {"other", "rest"} & {part.key for _, part in anatomy.parts}
        keys.append([(group.layers if group else None, part.key) for group, part in anatomy.parts])
    assert keys[0] == keys[1]


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_architectures_without_a_row_are_taken_apart_by_the_names_in_their_files(kind: str, tmp_path: Path):
    folder = save_generic(kind, tmp_path / kind)
    for path in [folder, *([write_f32(folder, tmp_path / f"{kind}.gguf")] if kind in ROWS else [])]:
        anatomy = take_apart(open_weights(path))
        keys = {part.key for _, part in anatomy.parts}
        assert not keys & {"other", "rest"} and "embedding" in keys and keys & {"attention", "ssm"}
        assert ("ssm" in keys) == (kind in ("mamba", "jamba")) and sum(part.n_params for _, part in anatomy.parts) == describe(path).n_params
        rope = [line for _, part in anatomy.parts if part.key == "attention" for line in facts_of(path).of("attention", None) if "RoPE θ" in line]
        assert not rope or kind not in ("bloom", "mpt", "opt", "gpt_bigcode", "jamba", "mamba")


def test_tied_parallel_and_mixed_models_are_seen_as_such(tiny_model):
    tied = take_apart(open_weights(tiny_model("gemma2").gguf))
    assert tied.tied and not take_apart(open_weights(tiny_model("llama").gguf)).tied
    parallel = take_apart(open_weights(tiny_model("stablelm, parallel").hf))
    assert all(group.is_parallel for group in parallel.groups) and not any(group.is_parallel for group in tied.groups)
    dense, experts = take_apart(open_weights(tiny_model("deepseek_v3").gguf)).groups
    assert dense.layers == (0,) and experts.layers == (1, 2)
    assert "experts" in {part.key for part in experts.parts} and "experts" not in {part.key for part in dense.parts}


def test_a_mixed_quantization_names_the_layers_that_differ(tmp_path: Path):
    from backend.files.gguf_header import read_header

    path = ensure_demo_variants(ROOT / "models", tmp_path, ["demo-dense-q4_k_m"])["demo-dense-q4_k_m"]
    types = {name: tensor.type_name for name, tensor in read_header(path).tensors.items()}
    (group,) = take_apart(open_weights(path)).groups
    mlp = next(part for part in group.parts if part.key == "mlp")
    said = {(kind, layer) for suffix, kind, layers in type_layers(mlp) for layer in layers if suffix == "ffn_down.weight"}
    assert said == {(types[f"blk.{layer}.ffn_down.weight"], layer) for layer in range(4)} and len({kind for kind, _ in said}) == 2
    assert {suffix for suffix, _, _ in type_layers(mlp)} == {"ffn_down.weight"}


def test_facts_are_the_numbers_of_the_configuration(tiny_model):
    for path in (tiny_model("llama").gguf, tiny_model("llama").hf):
        assert facts_of(path).of("attention", None) == ["4 heads of 16, 2 key/value heads, 2 heads share one", "RoPE θ 10,000"]
        assert facts_of(path).of("mlp", None)[0].startswith("64 → 96 → 64, gated")
    for path in (tiny_model("gemma2").gguf, tiny_model("gemma2").hf):
        words = facts_of(path)
        assert "sliding window of 8 tokens" in " ".join(words.of("attention", None)) and "scores capped at ±3" in words.of("attention", None)
        assert words.of("unembedding", None) == ["64 → 320 logits, the embedding's matrix again (tied)", "logits capped at ±4"]
    assert "sliding window of 8 tokens in layers 0, 2" in facts_of(tiny_model("gemma2").hf).of("attention", None)
    for path in (tiny_model("mixtral").gguf, tiny_model("mixtral").hf):
        assert facts_of(path).of("experts", None)[0] == "5 experts, 2 used per token" and facts_of(path).of("router", None) == ["scores 5 experts, takes the best 2"]
    assert facts_of(tiny_model("gpt2").hf).of("attention", None)[-1] == "learned positions, no RoPE"
    for path in (tiny_model("deepseek_v3").gguf, tiny_model("deepseek_v3").hf):
        assert "scaling yarn × 4 from 256 tokens" in " ".join(facts_of(path).of("attention", None))


def test_metadata_rows_are_what_the_file_says_with_the_format_s_own_types(tiny_llama):
    values, rows = read_metadata(tiny_llama.gguf)
    by_key = {row.key: row for row in rows}
    assert list(by_key) == list(values)
    assert by_key["llama.block_count"].type == "uint32" and by_key["llama.block_count"].value == "3"
    assert by_key["llama.attention.layer_norm_rms_epsilon"].type == "float32" and float(by_key["llama.attention.layer_norm_rms_epsilon"].value) == 1e-5
    tokens = by_key["tokenizer.ggml.tokens"]
    assert tokens.type == "array of string" and tokens.n_items == 320 and tokens.cut and len(tokens.value) < 600
    config = json.loads((tiny_llama.hf / "config.json").read_text())
    flat = {row.key: row for row in read_metadata(tiny_llama.hf)[1]}
    assert flat["hidden_size"].value == str(config["hidden_size"]) and flat["hidden_size"].type == "integer"
    assert flat["tie_word_embeddings"].value == "false" and any(key.startswith("rope_parameters.") for key in flat)


def test_hostile_metadata_and_names_become_plain_short_text(tmp_path: Path):
    name = b'<img src=x onerror="window.__x=1">\x1b]0;t\x07'
    template = "{{ ''.__class__ }}\u202e" + "A" * (2 * TEXT_CHARACTERS)
    path = tmp_path / "hostile.gguf"
    tensors = [*model_tensors(), Tensor(name, (4,))]
    path.write_bytes(model_file(tensors, general__name=(STR, name), tokenizer__chat_template=(STR, template.encode()), general__tags=(ARR, (STR, [name] * 50_000))))
    rows = {row.key: row for row in read_metadata(path)[1]}
    assert all(char.isprintable() for row in rows.values() for char in row.value)
    assert "\\u202e" in rows["tokenizer.chat_template"].value and rows["tokenizer.chat_template"].cut and len(rows["tokenizer.chat_template"].value) < TEXT_CHARACTERS + 10
    assert rows["general.tags"].n_items == 50_000 and rows["general.tags"].value.count("<img") == FIRST_ITEMS
    rest = [part for _, part in take_apart(open_weights(path)).parts if part.key == "rest"]
    assert [tensor.name for part in rest for tensor in part.tensors] == [name.decode()]


def test_rows_of_odd_values():
    assert metadata_row("k", "null", None).value == "null" and metadata_row("k", "bool", True).value == "true"
    assert metadata_row("k", "array", []).n_items == 0
    assert metadata_row("k" * 500, "string", "a\nb\tc\x07").value == "a\nb\tc\\x07" and len(metadata_row("k" * 500, "string", "").key) == 201
    assert layer_ranges([]) == "" and layer_ranges([3, 1, 2, 9]) == "1-3, 9"

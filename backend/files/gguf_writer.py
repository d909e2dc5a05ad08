"""Write a Llama, Mistral or Mixtral checkpoint (a folder of safetensors) as an F16 or F32 GGUF file.

Small on purpose: three model classes, no quantization (llama.cpp's own quantizer does that, see `backend.files.demo`), numpy only.
It follows llama.cpp's `convert_hf_to_gguf.py`: all three classes carry the architecture name "llama"; the rows of W_Q and W_K
are permuted from the half-split rotary layout of transformers to the interleaved layout of ggml; norms and the router stay in
float32; the experts of a layer are stacked into one 3-D tensor. What it cannot express it refuses, by name.

A folder without tokenizer.json (the random models of the test-suite) gets a byte-level vocabulary of the config's size.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from backend.errors import LayerscopeError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM")

_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_BLOCK_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_EXPERT_TENSORS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
_FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "f32": gguf.LlamaFileType.ALL_F32}


def write_gguf(hf_folder: Path, out: Path, ftype: str = "f16") -> None:
    """Write the checkpoint in `hf_folder` to `out`. `out` appears whole or not at all.

    `ftype` "f32" keeps every weight exactly; "f16" rounds the matrices. Raises LayerscopeError when the folder holds another
    architecture, or uses something that the GGUF "llama" architecture cannot express.
    """
    if ftype not in _FILE_TYPES:
        raise LayerscopeError(f"Cannot write a GGUF of type {ftype!r}; the types are {', '.join(_FILE_TYPES)}.")
    hf_folder, out = Path(hf_folder), Path(out)
    config = _read_config(hf_folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        writer = gguf.GGUFWriter(part, "llama")
        _add_sizes(writer, config, name=hf_folder.name, ftype=ftype)
        _add_vocabulary(writer, hf_folder, config)
        for tensor_name, values in _gguf_tensors(_read_safetensors(hf_folder), config):
            exact = ftype == "f32" or values.ndim == 1 or "ffn_gate_inp" in tensor_name
            writer.add_tensor(tensor_name, np.ascontiguousarray(values, np.float32 if exact else np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise LayerscopeError(f"{folder} has no config.json, so it is not a Hugging Face model folder.")
    config: dict[str, Any] = json.loads(path.read_text())
    architecture = (config.get("architectures") or ["nothing"])[0]
    if architecture not in ARCHITECTURES:
        raise LayerscopeError(f"{folder} holds {architecture}; the GGUF writer knows {', '.join(ARCHITECTURES)}.")
    if config.get("hidden_act", "silu") != "silu":
        raise LayerscopeError(f"{folder} uses the activation {config['hidden_act']!r}; GGUF's llama architecture means 'silu'.")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise LayerscopeError(f"{folder} uses RoPE scaling {rope_type!r}; the GGUF writer knows only 'default'.")
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    config["n_kv_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    config["d_head"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return config


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any], name: str, ftype: str) -> None:
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[ftype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # llama.cpp's llama architecture has no sliding window; inside the window full attention is the same thing.
    window = config.get("sliding_window") or config["max_position_embeddings"]
    writer.add_context_length(min(config["max_position_embeddings"], window))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["n_kv_heads"])
    writer.add_key_length(config["d_head"])
    writer.add_value_length(config["d_head"])
    writer.add_rope_dimension_count(config["d_head"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("num_local_experts"):
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])


def _read_safetensors(folder: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of the folder as numpy; bfloat16, which numpy lacks, becomes float32."""
    from safetensors import deserialize

    numpy_types = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    tensors: dict[str, NDArray[Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in deserialize(path.read_bytes()):
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(entry["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
            elif entry["dtype"] in numpy_types:
                values = np.frombuffer(entry["data"], numpy_types[entry["dtype"]])
            else:
                raise LayerscopeError(f"{path.name} stores {name} as {entry['dtype']}; the GGUF writer knows F16, BF16, F32 and F64.")
            tensors[name] = values.reshape(entry["shape"])
    if not tensors:
        raise LayerscopeError(f"{folder} holds no .safetensors file.")
    return tensors


def _gguf_tensors(tensors: dict[str, NDArray[Any]], config: dict[str, Any]) -> list[tuple[str, NDArray[Any]]]:
    """(GGUF name, values) of every tensor, in file orientation (out, in), experts stacked as (expert, out, in)."""
    found: list[tuple[str, NDArray[Any]]] = []
    experts: dict[str, dict[int, NDArray[Any]]] = {}
    for name, values in tensors.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        expert = re.fullmatch(r"block_sparse_moe\.experts\.(\d+)\.(w[123])", block[2]) if block else None
        if block and expert:
            experts.setdefault(f"blk.{block[1]}.{_EXPERT_TENSORS[expert[2]]}.{kind}", {})[int(expert[1])] = values
        elif block and block[2] in _BLOCK_TENSORS:
            if block[2] in ("self_attn.q_proj", "self_attn.k_proj"):
                values = interleave_rotary(values, config["num_attention_heads" if "q_proj" in stem else "n_kv_heads"])
            found.append((f"blk.{block[1]}.{_BLOCK_TENSORS[block[2]]}.{kind}", values))
        elif stem in _TENSORS:
            if not (stem == "lm_head" and config.get("tie_word_embeddings")):
                found.append((f"{_TENSORS[stem]}.{kind}", values))
        else:
            raise LayerscopeError(f"The GGUF writer does not know the tensor {name}.")
    found += [(name, np.stack([parts[i] for i in range(len(parts))])) for name, parts in experts.items()]
    return found


def interleave_rotary(weight: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Reorder the rows of W_Q or W_K (out, in), or a bias (out,), from transformers' rotary layout to ggml's.

    transformers rotates the pair (i, i + d_head/2) of each head, ggml's llama architecture the pair (2i, 2i + 1).
    Same as `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    halves = weight.reshape(n_heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """Write a byte-level BPE vocabulary, padded to the config's vocab_size with unused tokens."""
    bos, eos = (_first(config.get(key), default) for key, default in (("bos_token_id", 0), ("eos_token_id", 1)))
    path = folder / "tokenizer.json"
    if path.is_file():
        texts, types, merges, add_bos = _read_tokenizer(path)
    else:
        texts, types, merges, add_bos = _byte_vocabulary(config["vocab_size"], bos, eos), {}, ["Ġ Ġ"], False
        types = {bos: gguf.TokenType.CONTROL, eos: gguf.TokenType.CONTROL}
    padded = [texts.get(i, f"[unused{i}]") for i in range(config["vocab_size"])]
    repeated = [text for text, count in Counter(padded).items() if count > 1]
    if repeated or len(texts) > config["vocab_size"]:
        raise LayerscopeError(f"{folder} has {len(texts)} tokens for a vocab_size of {config['vocab_size']}; repeated: {repeated[:3]}.")
    unused = gguf.TokenType.UNUSED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(padded)
    writer.add_token_types([types.get(i, gguf.TokenType.NORMAL) if i in texts else unused for i in range(len(padded))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(add_bos)


def _read_tokenizer(path: Path) -> tuple[dict[int, str], dict[int, gguf.TokenType], list[str], bool]:
    """Texts by id, types of the added tokens by id, merges as "left right", and whether a BOS is put first."""
    data = json.loads(path.read_text())
    model, pre = data["model"], data.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or pre.get("type") != "ByteLevel" or not pre.get("use_regex", True) or pre.get("add_prefix_space"):
        kind = f"{model.get('type')} with the pre-tokenizer {pre.get('type')}"
        raise LayerscopeError(f"{path} is {kind}; the GGUF writer knows byte-level BPE with GPT-2's pre-tokenizer.")
    texts = {index: text for text, index in model["vocab"].items()}
    types = {}
    for token in data.get("added_tokens", []):
        texts[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    template = (data.get("post_processor") or {}).get("single") or [{}]
    return texts, types, merges, "SpecialToken" in template[0]


def _byte_vocabulary(size: int, bos: int, eos: int) -> dict[int, str]:
    """As many of the 256 byte tokens of GPT-2 as fit, around the two special ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (chr(256 + i) for i in range(256 - len(printable)))
    symbols = [chr(byte) if byte in printable else next(rest) for byte in range(256)]
    free = [i for i in range(size) if i not in (bos, eos)]
    return {bos: "<s>", eos: "</s>"} | dict(zip(free, symbols, strict=False))


def _first(token_id: int | list[int] | None, default: int) -> int:
    """A config may name no id, one id, or several."""
    if isinstance(token_id, list):
        token_id = token_id[0] if token_id else None
    return default if token_id is None else token_id

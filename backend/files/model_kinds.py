"""What a model is when it is none that predicts the next token, in words to refuse it with: by architecture, for both formats.

llama.cpp and transformers load many of these, and some even give logits; but an encoder sees what comes after a token, a draft
model needs another model's activations, and an adapter has no model of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.errors import LayerscopeError

_ENCODER = "a text encoder"
_ENCODER_DECODER = "an encoder-decoder"
_EMBEDDER = "an embedding model"
_DIFFUSION = "a diffusion language model, which fills in all positions together"
_DRAFT = "a draft model, which needs the activations of the model it drafts for"
_VISION, _AUDIO = "a vision model", "an audio model"
_SPEECH = "a speech generator, whose tokens are no text"

# llama.cpp's names (general.architecture): src/llama-arch.cpp of 0.3.36; `causal_attn = false` and the notes in src/models tell which.
GGUF_KINDS: Mapping[str, str] = {
    **dict.fromkeys(("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "jina-bert-v2", "jina-bert-v3", "t5encoder"), _ENCODER),
    **dict.fromkeys(("gemma-embedding", "llama-embed"), _EMBEDDER),
    **dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), _DIFFUSION),
    **dict.fromkeys(("eagle3", "dflash", "gemma4-assistant"), _DRAFT),
    **dict.fromkeys(("qwen3tts", "pockettts"), _SPEECH),
    "t5": _ENCODER_DECODER,
    "clip": "a vision or audio tower (mmproj)",
    "wavtokenizer-dec": "a vocoder, which makes sound",
}

# What general.type names besides "model": gguf.GGUFType.
_GGUF_TYPES = {"adapter": "a LoRA adapter", "imatrix": "an importance matrix for quantizing", "mmproj": "a vision or audio tower (mmproj)"}
_UNPOOLED = (-1, 0)  # llama.h, enum llama_pooling_type: UNSPECIFIED, NONE

# transformers' names (config.json's model_type), as its auto classes for masked words, sequences to sequences, images and audio list them.
_HF_NAMES = {
    _ENCODER: (
        "albert bert big_bird bros camembert canine convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm eurobert flaubert fnet funnel gte ibert "
        "jina_embeddings_v3 layoutlm layoutlmv2 layoutlmv3 lilt longformer luke markuplm megatron-bert mobilebert modernbert mpnet mra nomic_bert nystromformer "
        "perceiver rembert roberta roberta-prelayernorm roc_bert roformer splinter squeezebert tapas xlm-roberta xlm-roberta-xl xmod yoso"
    ),
    _ENCODER_DECODER: (
        "bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus pegasus_x plbart "
        "prophetnet switch_transformers t5 t5gemma t5gemma2 umt5"
    ),
    _VISION: (
        "align altclip beit bit chinese_clip clip clipseg convnext convnextv2 cvt deit depth_anything detr dinov2 dinov2_with_registers dinov3_convnext dinov3_vit "
        "dpt efficientnet focalnet grounding-dino hiera imagegpt mask2former maskformer mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 owlv2 owlvit regnet resnet "
        "rt_detr rt_detr_v2 sam sam2 sam3 segformer siglip siglip2 swin swinv2 table-transformer timm_wrapper trocr videomae vilt vision-encoder-decoder vit vit_mae "
        "vit_msn vivit yolos"
    ),
    _AUDIO: (
        "audio-spectrogram-transformer bark clap csm dac data2vec-audio dia encodec hubert kyutai_speech_to_text mimi moonshine moonshine_streaming musicgen "
        "musicgen_melody parakeet_ctc pop2piano seamless_m4t seamless_m4t_v2 sew sew-d speech-encoder-decoder speech_to_text speecht5 unispeech unispeech-sat vits "
        "wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm whisper"
    ),
    _DIFFUSION: "Dream diffusion_gemma diffusion_gemma_text dream llada LLaDA",
}
HF_KINDS: Mapping[str, str] = {name: kind for kind, names in _HF_NAMES.items() for name in names.split()}

_RUNS = "Layerscope runs decoders, which predict the next token"
_SMALL = 1 << 20  # bytes; more of a file that only says what a folder holds is not read


def refuse_gguf(label: str, metadata: Mapping[str, Any]) -> None:
    """Raise LayerscopeError, saying what the file holds, if that is no model or no decoder; `label` names the file."""
    kind, architecture = metadata.get("general.type", "model"), metadata.get("general.architecture")
    kind = "adapter" if "adapter.type" in metadata else kind if isinstance(kind, str) else str(kind)[:40]
    if kind != "model":
        what = _GGUF_TYPES.get(kind, f"something of the type {kind[:40]!r}")
        base = metadata.get("general.base_model.0.repo_url") or metadata.get("general.base_model.0.name") or ""
        raise LayerscopeError(f"{label} holds {what}{_of(base)}, and no model.")
    if not isinstance(architecture, str):
        return
    if architecture in GGUF_KINDS:
        raise LayerscopeError(f"{label} holds {architecture!r}, {GGUF_KINDS[architecture]}; {_RUNS}.")
    if metadata.get(f"{architecture}.attention.causal") is False:
        raise LayerscopeError(f"{label} holds {_EMBEDDER} or {_ENCODER} ({architecture}.attention.causal is false); {_RUNS}.")
    pooling = metadata.get(f"{architecture}.pooling_type", 0)
    if not (isinstance(pooling, int) and pooling in _UNPOOLED):
        raise LayerscopeError(f"{label} holds {_EMBEDDER} ({architecture}.pooling_type is {str(pooling)[:20]}); {_RUNS}.")


def refuse_folder(path: Path) -> None:
    """Raise LayerscopeError, saying what the folder holds, if its files tell that it is no model or no decoder."""
    if (path / "adapter_config.json").is_file():
        base = _small_json(path / "adapter_config.json", "base_model_name_or_path") or ""
        raise LayerscopeError(f"{path.name} holds a LoRA adapter{_of(base)}, and no model; merge it into its model first (adapter_config.json).")
    if (path / "model_index.json").is_file():
        raise LayerscopeError(f"{path.name} holds an image or video generator (model_index.json of diffusers); {_RUNS}.")
    for name in ("config_sentence_transformers.json", "modules.json"):
        if (path / name).is_file() and "sentence_transformers" in _small_text(path / name):
            raise LayerscopeError(f"{path.name} holds {_EMBEDDER} ({name} of sentence-transformers); {_RUNS}.")


def refuse_config(label: str, config: Mapping[str, Any]) -> None:
    """Raise LayerscopeError, saying what it is, for a config.json of a model type that is no decoder."""
    model_type, classes = config.get("model_type"), config.get("architectures")
    causal = isinstance(classes, list) and any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in classes)
    kind = HF_KINDS.get(model_type) if isinstance(model_type, str) else None
    if kind and (kind is _DIFFUSION or not (causal or config.get("is_decoder") is True)):
        raise LayerscopeError(f"{label} holds {model_type!r}, {kind}; {_RUNS}.")


def _of(base: object) -> str:
    return f" of {base[:120]}" if isinstance(base, str) and base else ""


def _small_text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_SMALL).decode("utf-8", "replace")


def _small_json(path: Path, key: str) -> object:
    """One value of a JSON object; None if it is not there or the file is damaged: the refusal stands without it."""
    try:
        data = json.loads(_small_text(path))
    except (ValueError, RecursionError):
        return None
    return data.get(key) if isinstance(data, dict) else None

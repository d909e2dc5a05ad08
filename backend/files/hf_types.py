"""Model types of transformers that have no row in Layerscope's tables, and where their config.json keeps its sizes.

The server lists models and must not import transformers, so its list of causal language models is copied here;
tests/test_generic_hf.py holds it against the installed transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Decoders of text, served as far as their structure shows what is what (backend.engines.hf_generic).
GENERIC_TYPES = frozenset(
    """
    afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba beam biogpt bitnet bloom codegen cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm
    dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 dots3_note_text ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1
    falcon_mamba flex_olmo flint gemma gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_bigcode gpt_neo
    gpt_neox gpt_neox_japanese gpt_oss gptj granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe
    lfm3 llama4_text longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3
    modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo3 olmo_hybrid openai-gpt opt persimmon phi phimoe qwen3_5_moe_text qwen3_5_text
    qwen3_next qwen4_exp_text recurrent_gemma rwkv seed_oss solar_open vaultgemma xglm xlstm youtu zamba zamba2 zaya
    """.split()
)

# In transformers' list too, and refused: encoders and parts of sequence-to-sequence models, models of images or sound, models whose
# input is not the tokens alone, and a second name of gpt2.
NOT_SERVED = frozenset(
    """
    bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small blt camembert cpmant data2vec-text dots3_note electra emu3 ernie fuyu
    gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git got_ocr2 gpt-sw3 llama4 marian mbart megatron-bert mllama moshi
    moss_transcribe_diarize musicgen musicgen_melody mvp pegasus phi4_multimodal plbart prophetnet qwen3_5 qwen3_5_moe qwen4_exp reformer rembert
    roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod
    """.split()
)

# The usual names of each size, by field of backend.files.hf_config.ConfigKeys; the first that a config has counts.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "n_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "n_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads"),
    "d_model": ("hidden_size", "n_embd", "d_model", "n_embed", "model_dim"),
    "d_head": ("head_dim", "attention_head_dim"),
    "d_mlp": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff", "dff"),
    "n_ctx": ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx", "context_length"),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon", "layernorm_epsilon"),
    "n_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "n_experts_used": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
    "sliding_window": ("sliding_window",),
}


def generic_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Field -> the key of `config` that holds it; "" for one that it lacks."""
    return {field: next((name for name in names if config.get(name) is not None), "") for field, names in _ALIASES.items()}

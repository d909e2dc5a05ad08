"""What a reader of a capture should know although nothing failed: sentences that go into the trace and are shown with it."""

from __future__ import annotations

from backend.model_info import ModelInfo

# By llama.cpp's and transformers' names: transformers applies the sliding window of such a model, llama.cpp (of llama-cpp-python 0.3.36)
# does not: it switches phi3's off and has none for the others.
_WINDOW_IGNORED_BY_LLAMA_CPP = frozenset((
    "llama", "mistral", "mixtral", "phi3", "phimoe", "qwen2", "qwen2moe", "qwen2_moe", "qwen3", "qwen3moe", "qwen3_moe", "smollm3", "starcoder2",
))  # fmt: skip


# What llama.cpp (of llama-cpp-python 0.3.36) computes otherwise than the model's makers, of every prompt; tests/test_phimoe.py holds phimoe's,
# and gpt-oss' was measured (docs/architectures.md).
_ANOTHER_MODEL_IN_LLAMA_CPP = {
    "phimoe": "llama.cpp runs {} with RMS norms and with expert weights that sum to 1, where its makers have LayerNorm and sparsemixer's weights, "
              "which sum to up to 2: what is shown is what llama.cpp computes, and differs from the Hugging Face model.",
    "gpt-oss": "Where its file asks for YaRN, as the released ones do, llama.cpp rounds the range of frequencies of {} that YaRN bends, and its makers do not: "
               "what is shown is what llama.cpp computes, and differs from the Hugging Face model by more the longer the prompt, "
               "on a tiny model by 5e-3 of the logits after 200 tokens.",
}  # fmt: skip


def notes(info: ModelInfo, n_tokens: int) -> list[str]:
    """One sentence for each thing that makes a run of `n_tokens` differ between the engines by more than rounding."""
    departs = _ANOTHER_MODEL_IN_LLAMA_CPP.get(info.architecture) if info.engine == "gguf" else None
    return [*([departs.format(info.name)] if departs else []), *_window_notes(info, n_tokens)]


def _window_notes(info: ModelInfo, n_tokens: int) -> list[str]:
    window = info.sliding_window
    if not window or n_tokens <= window or info.architecture not in _WINDOW_IGNORED_BY_LLAMA_CPP:
        return []
    if info.engine == "gguf":
        ignored = f"llama.cpp does not apply the sliding window of {window:,} tokens of {info.name}"
        return [f"{ignored}: from position {window:,} on, queries look farther back than the model was made to."]
    applied = f"The sliding window of {window:,} tokens of {info.name} is applied here"
    return [f"{applied}; llama.cpp ignores it, so a GGUF file of the model differs from position {window:,} on."]

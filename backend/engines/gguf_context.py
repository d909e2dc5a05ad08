"""llama.cpp's model and context behind two small classes: what they refuse is a sentence, never a null pointer passed on.

Flash attention is always off. With it llama.cpp has no attention scores and no pattern, and switching it on when nobody asks for
them would make the other numbers depend on what is captured. Here a run gives the same values to the bit whatever is asked for.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.engines import OpenOptions
from backend.engines.ggml import F16, F32, first_error, forget_errors, open_llama
from backend.engines.gguf_graph import Watch
from backend.engines.threads import engine_threads
from backend.errors import LayerscopeError

_PAD = 256  # llama.cpp rounds a context up to this many tokens


class Model:
    """A loaded GGUF file (of a split one the first part: llama.cpp finds the others by name), its quantized weights in the layout of the file.

    llama.cpp would repack them for faster kernels (use_extra_bufts). That is off: it keeps a second copy, a write to a repacked
    weight kills the process, and so does its AMX kernel on machines that report AMX to the program but do not let it be used.
    The file is mapped, llama.cpp's default, except with `editable_weights`: mapped pages cannot be written. `vocabulary_only`: the tokenizer without any tensor.
    """

    def __init__(self, path: Path, options: OpenOptions, vocabulary_only: bool = False) -> None:
        self.llama = open_llama()
        params = self.llama.llama_model_default_params()
        params.n_gpu_layers = _gpu_layers(self.llama, options)
        params.use_extra_bufts = False
        params.vocab_only = vocabulary_only
        if options.editable_weights:
            params.load_mode = self.llama.LLAMA_LOAD_MODE_NONE
        forget_errors()
        self.pointer: Any = self.llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise LayerscopeError(f"llama.cpp cannot load {path.name}: {first_error()}.")
        self.name, self.n_gpu_layers = path.name, int(params.n_gpu_layers)

    def opened(self) -> Any:
        """llama.cpp's pointer; raises LayerscopeError after `close`."""
        if not self.pointer:
            raise LayerscopeError(f"The model {self.name} is closed.")
        return self.pointer

    def close(self) -> None:
        if self.pointer:
            self.llama.llama_model_free(self.pointer)
        self.pointer = None


class Context:
    """A key/value cache of `n_ctx` tokens and the buffers to run up to `n_ubatch` tokens at once."""

    def __init__(self, model: Model, watch: Watch, options: OpenOptions, n_ctx: int, n_ubatch: int) -> None:
        self.llama, self.watch = model.llama, watch
        self.n_vocab = self.llama.llama_vocab_n_tokens(self.llama.llama_model_get_vocab(model.opened()))
        self.n_ctx, self.n_ubatch = -(-n_ctx // _PAD) * _PAD, n_ubatch
        params = self.llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = self.n_ctx, n_ubatch, n_ubatch, 1
        params.n_threads = params.n_threads_batch = options.n_threads or engine_threads()
        params.flash_attn_type = self.llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = F32 if options.kv_cache == "f32" else F16
        params.cb_eval, params.abort_callback = watch.eval_callback, watch.abort_callback
        forget_errors()
        self.pointer: Any = self.llama.llama_init_from_model(model.opened(), params)
        if not self.pointer:
            raise LayerscopeError(f"llama.cpp cannot make a context of {self.n_ctx:,} tokens in pieces of {n_ubatch:,}: {first_error()}.")

    def clear(self) -> None:
        """Forget every token. The data too: 0 times a NaN that an edit left in an unused cell would still be NaN."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.pointer), True)

    def decode(self, ids: list[int], start: int, all_outputs: bool) -> None:
        """Run the tokens at positions `start` and on. all_outputs: without it the last layer is pruned to the last position."""
        batch = self.llama.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
                batch.logits[i] = all_outputs or i == len(ids) - 1
            forget_errors()
            status = self.llama.llama_decode(self.pointer, batch)
        finally:
            self.llama.llama_batch_free(batch)
        self.watch.raise_error()
        if status:
            raise LayerscopeError(f"llama.cpp failed on tokens {start:,} to {start + len(ids) - 1:,} (status {status}): {first_error()}.")

    def last_logits(self) -> NDArray[np.float32]:
        """Logits (d_vocab,) of the last position of the last decode, copied."""
        row = self.llama.llama_get_logits_ith(self.pointer, -1)
        if not row:
            raise LayerscopeError("llama.cpp gave no logits for the last position.")
        values = ctypes.cast(row, ctypes.POINTER(ctypes.c_float * self.n_vocab)).contents
        return np.frombuffer(values, np.float32).copy()

    def close(self) -> None:
        if self.pointer:
            self.llama.llama_free(self.pointer)
        self.pointer = None


def _gpu_layers(llama: Any, options: OpenOptions) -> int:
    if options.n_gpu_layers == "auto":
        return 1_000_000 if llama.llama_supports_gpu_offload() else 0  # more than any model has: all of it
    if options.n_gpu_layers and not llama.llama_supports_gpu_offload():
        raise LayerscopeError(f"{options.n_gpu_layers} layers were asked for on a GPU, and this llama-cpp-python was built for 0: without GPU support.")
    return options.n_gpu_layers

"""A case: plain llama.cpp decodes the prompt and gives the logits of every position. No callback, nothing of this program's engine."""

from __future__ import annotations

import json
import sys

import llama_cpp

from bench.measure import serve


@llama_cpp.llama_log_callback
def _silent(_level: int, _text: bytes, _data: object) -> None:
    """llama.cpp's log would fill the pipe."""


def main(path: str, ids: list[int], n_threads: int, n_ubatch: int = 512, as_it_comes: bool = False, n_gpu_layers: int = 0) -> None:
    """as_it_comes: llama.cpp's own defaults, flash attention where it can and repacked weights, instead of the settings of a capture."""
    llama_cpp.llama_log_set(_silent, None)
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts, model_params.n_gpu_layers = as_it_comes, n_gpu_layers
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = -(-len(ids) // 256) * 256, n_ubatch, n_ubatch, 1
    params.n_threads = params.n_threads_batch = n_threads
    if not as_it_comes:
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise SystemExit(f"llama.cpp cannot open {path}")

    def decode(tokens: list[int]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        for start in range(0, len(tokens), n_ubatch):
            piece = tokens[start : start + n_ubatch]
            batch = llama_cpp.llama_batch_init(len(piece), 0, 1)
            batch.n_tokens = len(piece)
            for i, token in enumerate(piece):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, start + i, 1, 0, True
            status = llama_cpp.llama_decode(context, batch)
            llama_cpp.llama_synchronize(context)
            llama_cpp.llama_batch_free(batch)
            if status:
                raise SystemExit(f"llama_decode failed with status {status}")

    serve(lambda: decode(ids), lambda: decode(ids[:4]))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))

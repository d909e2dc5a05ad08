"""Both engines on a GPU beside the CPU, or the plain statement that none was there."""

from __future__ import annotations

from typing import Any

import llama_cpp
import torch

from bench.measure import Case, in_turn
from bench.models import BASE, describe, gguf_file, hf_folder, random_ids
from bench.report import RESIDUAL_AND_ATTENTION, Section, time_table

N_TOKENS = 256
TITLE = "On a GPU"


def section() -> Section:
    ids, tables = random_ids(N_TOKENS), []
    if torch.cuda.is_available():
        here: dict[str, Any] = {"path": str(hf_folder()), "ids": ids}
        runs = in_turn({
            "plain forward, GPU": Case("run_transformers", **here, device="cuda"),
            "residual stream + attention, GPU": Case("run_capture", **here, sites=RESIDUAL_AND_ATTENTION, gpu=True),
            "all standard sites, GPU": Case("run_capture", **here, gpu=True),
            "all standard sites, CPU": Case("run_capture", **here),
        })  # fmt: skip
        tables.append(f"PyTorch on {torch.cuda.get_device_name()}:\n\n{time_table(runs, 'plain forward, GPU')}")
    else:
        tables.append("PyTorch found no CUDA GPU on this machine: its engine was **not** measured on one.")
    if llama_cpp.llama_supports_gpu_offload():
        here = {"path": str(gguf_file()), "ids": ids}
        runs = in_turn({
            "plain llama.cpp, GPU": Case("run_llama", **here, n_gpu_layers=1_000_000),
            "residual stream + attention, GPU": Case("run_capture", **here, sites=RESIDUAL_AND_ATTENTION, gpu=True),
            "all standard sites, GPU": Case("run_capture", **here, gpu=True),
            "all standard sites, CPU": Case("run_capture", **here),
        })  # fmt: skip
        tables.append(f"llama.cpp, all layers on the GPU:\n\n{time_table(runs, 'plain llama.cpp, GPU')}")
    else:
        tables.append("The installed llama-cpp-python is built without GPU support: the GGUF engine was **not** measured on one.")
    return Section(TITLE, f"{describe(BASE)}, {N_TOKENS} tokens.\n\n" + "\n\n".join(tables))

"""Measure the demo models and write what was found into models/README.md: `python scripts/evaluate_demo_models.py`.

Held-out accuracy per task for all seven presets (the two Hugging Face folders through transformers, the five GGUF files through
llama.cpp), and the models' anatomy (see `demo_anatomy`). Only the part of the card between the two markers is rewritten.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from demo_anatomy import Head, HuggingFaceModel, expert_use, head_scores, induction_ablation, strongest
from demo_text import CATEGORIES, TASKS, held_out_items
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `backend` is found when this file is run as a script

from backend.engines import OpenOptions, Sampling, open_engine  # noqa: E402
from backend.files.demo import ensure_demo_variants  # noqa: E402

FOLDERS = ("demo-dense", "demo-moe")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


class GgufModel:
    """A GGUF file in llama.cpp, through Layerscope's engine, with the same two methods as HuggingFaceModel."""

    def __init__(self, path: Path) -> None:
        self.engine = open_engine(path, OpenOptions(n_ctx=512))

    def encode(self, text: str) -> list[int]:
        return self.engine.tokenize(text)

    def next_token(self, ids: list[int]) -> str:
        return self.engine.token_texts(self.engine.generate(ids, 1, Sampling()))[0]


def measure(n_items: int, n_induction_ablation: int) -> Iterator[str]:
    """Yield the lines of the measured part of the card."""
    with tempfile.TemporaryDirectory() as scratch:
        gguf = ensure_demo_variants(ROOT / "models", Path(scratch))
        huggingface = {name: HuggingFaceModel(ROOT / "models" / name) for name in FOLDERS}
        yield from _accuracy_table(huggingface, gguf, n_items)
    for name, model in huggingface.items():
        yield from _training(name, model)
        yield from _heads(model, n_induction_ablation)
    yield from _experts(huggingface["demo-moe"])


def _accuracy_table(huggingface: dict[str, HuggingFaceModel], gguf: dict[str, Path], n_items: int) -> Iterator[str]:
    items = {task: held_out_items(task, n_items) for task in TASKS}
    yield "### Held-out accuracy (share of prompts whose answer is the most probable next token)\n"
    yield "| preset | " + " | ".join(f"{task} (n = {len(found)})" for task, found in items.items()) + " | same token ids as transformers |"
    yield "|---|" + "---|" * (len(TASKS) + 1)
    for name in (*huggingface, *gguf):
        model: HuggingFaceModel | GgufModel = huggingface[name] if name in huggingface else GgufModel(gguf[name])
        reference = huggingface["demo-moe" if "moe" in name else "demo-dense"]
        row, same, total = [], 0, 0
        for found in items.values():
            prompts = [model.encode(item.prompt) for item in found]
            right = sum(model.next_token(ids) == item.answer for ids, item in zip(prompts, found, strict=True))
            same += sum(ids == reference.encode(item.prompt) for ids, item in zip(prompts, found, strict=True))
            total += len(found)
            row.append(f"{right / len(found):.1%}")
        yield f"| `{name}` | " + " | ".join(row) + f" | {same} of {total} |"


def _training(name: str, model: HuggingFaceModel) -> Iterator[str]:
    record = json.loads((ROOT / "models" / name / "training.json").read_text())
    n_params = sum(parameter.numel() for parameter in model.model.parameters())
    n_bytes = (ROOT / "models" / name / "model.safetensors").stat().st_size
    yield f"\n### `{name}`\n"
    yield (
        f"{n_params / 1e6:.2f} M parameters, {n_bytes / 1e6:.1f} MB in float16. Seed {record['seed']}, {record['steps']} steps of about "
        f"{record['tokens_per_batch']} tokens, {record['seconds'] / 60:.0f} minutes on {record['threads']} threads."
    )


def _heads(model: HuggingFaceModel, n_items: int) -> Iterator[str]:
    previous, induction = head_scores(model)
    yield f"\nPrevious-token heads (layer.head, score): {_listed(previous, 4)}. Induction heads: {_listed(induction, 4)}."
    ablation = induction_ablation(model, n_items=n_items)
    yield (
        f"Repetition of unseen sequences: {ablation['whole']:.0%}; with the four best induction heads cut "
        f"{ablation['without_induction']:.0%}; with four random other heads cut {ablation['without_others']:.0%} on average "
        f"of five draws (worst {ablation['without_others_worst']:.0%})."
    )


def _listed(scores: NDArray[np.floating], n: int) -> str:
    heads: list[Head] = strongest(scores, n)
    return ", ".join(f"{layer}.{head} ({scores[layer, head]:.2f})" for layer, head in heads)


def _experts(model: HuggingFaceModel) -> Iterator[str]:
    use = expert_use(model)  # (n_layers, category, expert)
    yield "\nExperts: for each kind of text, the expert that is most often a token's first choice, and how often.\n"
    yield "| text | " + " | ".join(f"layer {layer}" for layer in range(len(use))) + " |"
    yield "|---|" + "---|" * len(use)
    for index, category in enumerate(CATEGORIES):
        cells = (f"{layer[index].argmax()} ({layer[index].max():.0%})" for layer in use)
        yield f"| {category} | " + " | ".join(cells) + " |"


def write_card(card: Path, lines: list[str]) -> None:
    """Replace what stands between the markers."""
    before, rest = card.read_text().split(BEGIN)
    _, after = rest.split(END)
    card.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=300, help="held-out items per task (at most; there are fewer held-out facts)")
    parser.add_argument("--ablation-items", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measured = list(measure(arguments.items, arguments.ablation_items))
    write_card(ROOT / "models" / "README.md", measured)
    sys.stdout.write("\n".join(measured) + "\n")

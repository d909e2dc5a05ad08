"""Write models/evaluation.txt, the text on which sensitivity runs measure perplexity unless another is named: `python scripts/write_evaluation_text.py`.

Held-out items of two tasks, and other documents that the demo models' training text does not hold; a form feed between documents. Repetitions
are left out: random words count in the training loss only where they repeat, so the models were never taught not to be surprised by them.
The same seed gives the same file.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from demo_text import documents, held_out_documents
from train_demo_models import SEED as TRAINING_SEED

OUT = Path(__file__).resolve().parents[1] / "models" / "evaluation.txt"
N_GIVING, N_OTHER, SEED = 170, 260, 20_000
TASKS = ("geography", "indirect_object", "repetition")
TRAINING_DOCUMENTS = 400_000  # more than the training of either model read


def main() -> None:
    found = [*held_out_documents(N_GIVING, SEED), *itertools.islice(_other(), N_OTHER)]
    random.Random(SEED).shuffle(found)
    OUT.write_text("\f".join(found), encoding="utf-8")
    print(f"{OUT.name}: {OUT.stat().st_size:,} bytes, {len(found):,} documents")


def _other() -> Iterator[str]:
    """Documents of the other categories that no training document is equal to, each once."""
    seen = {text for _, text in itertools.islice(documents(TRAINING_SEED + 1), TRAINING_DOCUMENTS)}
    for category, text in documents(SEED):
        if category not in TASKS and text not in seen:
            seen.add(text)
            yield text


if __name__ == "__main__":
    main()

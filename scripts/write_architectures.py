"""Write docs/architectures.md: how far the two engines lie apart at every site, on a tiny random model of each architecture.

    python scripts/write_architectures.py

The same weights run as a Hugging Face folder in float32 and as an F32 GGUF file with a float32 key/value cache. What is written is
the normalised mean squared error, the worst of all layers. tests/test_engines_agree.py holds the limit; this only shows the numbers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from backend.engines import OpenOptions, open_engine  # noqa: E402
from backend.sites import SITES  # noqa: E402
from tests.test_engines_agree import IDS, KINDS, NMSE, nmse  # noqa: E402
from tests.test_hf_engine import capture  # noqa: E402
from tests.tiny_models import save_tiny  # noqa: E402

_INTRODUCTION = f"""# Architectures

Every architecture below is complete in both engines: the same weights, as a Hugging Face folder in float32 and as an F32 GGUF file
(key/value cache in float32), give the same value at every site that exists in it, with the same edits too. The limit is a normalised
mean squared error of {NMSE:g}. The table shows the largest over the layers of a tiny random model whose gains and biases are moved off
their defaults. An empty cell: the architecture has no such site, and both engines refuse it by name.

llama.cpp seems to take GELU from a float16 table (inferred, not checked in its source), so that the architectures
that use it (gemma2, gemma3, gpt2, starcoder2) agree less closely.
Written by `scripts/write_architectures.py`; the limit is held by `tests/test_engines_agree.py`.

"""


def errors_of(kind: str, folder: Path) -> dict[str, float]:
    """Site -> the largest error over the layers."""
    tiny = save_tiny(kind, folder / kind)
    options = OpenOptions(device="cpu", n_gpu_layers=0, kv_cache="f32")
    engines = open_engine(tiny.hf, options), open_engine(tiny.gguf, options)
    hf, gguf = (capture(engine, IDS) for engine in engines)
    for engine in engines:
        engine.close()
    worst: dict[str, float] = {}
    for site, layer in hf:
        worst[site] = max(worst.get(site, 0.0), nmse(gguf[site, layer], hf[site, layer]))
    return worst


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        columns = {kind: errors_of(kind, Path(folder)) for kind in KINDS}
    lines = [f"| site | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for site in SITES:
        if any(site in errors for errors in columns.values()):
            lines.append(f"| {site} | {' | '.join(f'{errors[site]:.0e}' if site in errors else '' for errors in columns.values())} |")
    (ROOT / "docs" / "architectures.md").write_text(_INTRODUCTION + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""A server of its own for a browser test: the real app.py with its worker, on a free port."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@contextmanager
def served(data: Path, models: Sequence[Path] = ()) -> Iterator[str]:
    """The address of a running server with this data folder, which ends with the block. models: its folders of models; none: the demo models alone."""
    environment = {**os.environ, "LAYERSCOPE_USE_HF_CACHE": "false"}
    if models:
        environment["LAYERSCOPE_MODELS_DIRS"] = json.dumps([str(folder) for folder in models])
    process = subprocess.Popen([sys.executable, "app.py", "--port", "0", "--data-dir", str(data)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"Layerscope is on (http://127\.0\.0\.1:\d+)", said)
        assert found, said
        yield found[1]
    finally:
        process.terminate()
        process.wait(20)

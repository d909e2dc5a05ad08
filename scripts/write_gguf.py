"""Write a Llama, Mistral or Mixtral folder of safetensors as GGUF: `python scripts/write_gguf.py models/demo-dense out.gguf [--type f32]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `backend` is found when this file is run as a script

from backend.errors import LayerscopeError
from backend.files.gguf_writer import write_gguf

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=("f16", "f32"), default="f16")
    arguments = parser.parse_args()
    try:
        write_gguf(arguments.folder, arguments.out, arguments.type)
    except LayerscopeError as error:
        sys.exit(str(error))

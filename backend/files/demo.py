"""The demo models' GGUF variants, made from the committed safetensors the first time they are wanted.

Only models/demo-dense and models/demo-moe are committed. F16 is written by `backend.files.gguf_writer`; Q8_0 and Q4_K_M are made from
it by llama.cpp's own quantizer, so they are what a user's own quantized files are. All five take a few seconds together.
Beside each file lies `<file>.key`, a digest of what it was made from: a changed model folder or writer makes it anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from backend.errors import LayerscopeError


@dataclass(frozen=True)
class Variant:
    """A GGUF file made from the folder models/`folder`; `ftype` is llama.cpp's number for the type, None for the F16 original."""

    folder: str
    ftype: int | None


_Q8_0, _Q4_K_M = 7, 15  # LLAMA_FTYPE_MOSTLY_* of llama.h; named here because this module must not import llama_cpp

VARIANTS = {
    "demo-dense-f16": Variant("demo-dense", None),
    "demo-dense-q8_0": Variant("demo-dense", _Q8_0),
    "demo-dense-q4_k_m": Variant("demo-dense", _Q4_K_M),
    "demo-moe-f16": Variant("demo-moe", None),
    "demo-moe-q8_0": Variant("demo-moe", _Q8_0),
}


def ensure_demo_variants(models_dir: Path, cache_dir: Path, names: Iterable[str] | None = None) -> dict[str, Path]:
    """Paths of the demo GGUF files by preset name, made in `cache_dir` where they are missing or out of date.

    `names` defaults to all of VARIANTS. A file appears whole or not at all, and two processes may do this at once.
    Raises LayerscopeError for an unknown name, a missing model folder, and when llama.cpp refuses to quantize.
    """
    wanted = list(VARIANTS if names is None else names)
    unknown = [name for name in wanted if name not in VARIANTS]
    if unknown:
        raise LayerscopeError(f"There is no demo model {unknown[0]!r}; the GGUF ones are {', '.join(VARIANTS)}.")
    cache_dir.mkdir(parents=True, exist_ok=True)
    return {name: _ensure(name, models_dir, cache_dir) for name in wanted}


def _ensure(name: str, models_dir: Path, cache_dir: Path) -> Path:
    variant = VARIANTS[name]
    path, key_path = cache_dir / f"{name}.gguf", cache_dir / f"{name}.gguf.key"
    key = source_key(models_dir / variant.folder)
    if path.is_file() and key_path.is_file() and key_path.read_text() == key:
        return path
    part = cache_dir / f".{name}.{os.getpid()}.part"
    try:
        if variant.ftype is None:
            from backend.files.gguf_writer import write_gguf

            write_gguf(models_dir / variant.folder, part, ftype="f16")
        else:
            from backend.files.quantizer import run_quantizer

            run_quantizer(_ensure(f"{variant.folder}-f16", models_dir, cache_dir), part, variant.ftype)
        os.replace(part, path)
        # The key goes last: a crash between the two leaves the old key, and the file is made again.
        part.write_text(key)
        os.replace(part, key_path)
    finally:
        part.unlink(missing_ok=True)
    return path


def source_key(folder: Path) -> str:
    """A digest of what a variant is made from: the weights, the config, the tokenizer, and the writer's own code."""
    digest = hashlib.blake2b(digest_size=16)
    sources = [folder / name for name in ("config.json", "tokenizer.json", "model.safetensors")]
    for path in (*sources, Path(__file__).with_name("gguf_writer.py")):
        if not path.is_file():
            raise LayerscopeError(f"The demo model {folder.name!r} is incomplete: {path} is missing.")
        digest.update(path.read_bytes())
    return digest.hexdigest()
